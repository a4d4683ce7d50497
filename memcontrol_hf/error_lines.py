"""An error of a library, in one line of the error that a person reads."""


def first_line(error: BaseException | str) -> str:
    """The first line with text; the name of the error's class when it says nothing, as `TimeoutError()` does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """All lines in one, for errors of YAML, which name the place in the text last."""
    words = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
    return words or type(error).__name__
