"""The names of splits, however a person spells them: `Test`, `held-out`, `holdout`, `test_images`, `trainset`."""

import re
from collections.abc import Iterable

SPLITS = ("train", "validation", "held_out")

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "validate", "validating", "val", "valid", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "tests", "testing", "heldout", "holdout"), "held_out"),
    **dict.fromkeys(("eval", "evaluation"), None),  # some mean the validation images, some the held-out ones
}
_FILLERS = {
    *("data", "dataset", "file", "files", "folder", "image", "images", "img", "imgs", "of", "part", "photo", "photos"),
    *("pic", "pics", "picture", "pictures", "scan", "scans", "set", "shard", "split", "subset"),
}
_JOINED = re.compile(r"^(train|training|val|valid|validation|dev|test|heldout|holdout|eval)(set|data|images|imgs)$")


def split_of_name(name: str, strict: bool = True) -> str | None:
    """The split that the name of a folder or a file means.

    Case, digits, punctuation and words such as `images` do not matter.

    Args:
        name (`str`): name of a folder, of a file without its suffix, or of a split of `datasets`.
        strict (`bool`): whether a name that has other words, too, is an error; else the other words are passed over.

    Returns:
        `str`: one of `SPLITS`; `None` for a name without a word for a split.

    Raises:
        ValueError: for a name that may mean a split or not, and for one that may mean several.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.sub(r"[^a-z]+", " ", spaced.lower()).strip()
    words = re.sub(r"\b(held|hold) outs?\b", "heldout", words)
    tokens = [_JOINED.sub(r"\1", word) for word in words.split()]
    meant = [word for word in tokens if word in _WORDS]
    if not meant:
        return None
    splits = {_WORDS[word] for word in meant}
    others = [word for word in tokens if word not in _WORDS and word not in _FILLERS]
    if len(splits) == 1 and splits != {None} and not (strict and others):
        return splits.pop()
    raise ValueError(
        f"{name!r} may be the name of a split or not: rename it to {', '.join(SPLITS[:-1])} or {SPLITS[-1]} if it is "
        f"one, and to a name without {meant[0]!r} if it is none"
    )


def split_of_path(parts: Iterable[str], strict: bool = True) -> str | None:
    """The split that the folders of a path mean: the first name of a split decides, and the others must agree.

    Args:
        parts (list of `str`): names of the folders, the outermost first.
        strict (`bool`): as in [`split_of_name`], for the names outside of the first split.

    Raises:
        ValueError: as [`split_of_name`], and for a path that names two splits.
    """
    found = None
    for part in parts:
        split = split_of_name(part, strict and found is None)
        if split and found and split != found:
            raise ValueError(f"the folder {part!r} of {split} lies in a folder of {found}: move it out, or rename it")
        found = found or split
    return found
