"""What a person sees while a command runs: one quiet log, and bars with the time left on a terminal only."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_package = logging.getLogger("memcontrol_hf")
# Libraries that report at import what they cannot use here, although nobody asked for it.
_CHATTY = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_log() -> Iterator[None]:
    """Log the lines of this package, and of other libraries their errors alone; for commands, not for libraries.

    A warning is one line without source code. Lines do not break a bar. Of several processes only the first one
    logs what is no warning.
    """
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    verbosity = _quieten_libraries(bars=sys.stderr.isatty())
    logging.basicConfig(format="%(message)s")
    _package.setLevel(logging.INFO if _is_first_process() else logging.WARNING)
    format_before, warnings.formatwarning = warnings.formatwarning, _one_line
    logging.captureWarnings(True)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        logging.captureWarnings(False)
        warnings.formatwarning = format_before
        for library, level in verbosity.items():
            library.set_verbosity(level)


def _quieten_libraries(bars: bool) -> dict[ModuleType, int]:
    """Leave the Hugging Face libraries their errors and, if wanted, their bars; return the verbosity of before."""
    import datasets  # late, since these load PyTorch
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    before = {library: library.get_verbosity() for library in (diffusers_logging, transformers_logging)}
    for library in before:
        library.set_verbosity_error()
        if not bars:
            library.disable_progress_bar()
    if not bars:
        datasets.disable_progress_bars()
        disable_progress_bars()
    return before


def bar(items: Any = None, text: str = "", total: int | None = None, initial: int = 0) -> tqdm:
    """A bar with the time left, on a terminal, of a command; it vanishes at its end.

    Args:
        items (iterable, *optional*): what is iterated over.
        text (`str`): what is done, in front of the bar.
        total (`int`, *optional*): number of items, if there are no `items` that have a length.
        initial (`int`): number of items that were done before.
    """
    shown = _package.isEnabledFor(logging.INFO) and _is_first_process()
    # None: a bar is shown if the stream is a terminal.
    options = {"leave": False, "dynamic_ncols": True, "disable": None if shown else True}
    return tqdm(items, text, total, initial=initial, **options)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _one_line(message: Warning | str, category: type[Warning], *where: Any) -> str:
    return f"warning: {message}"
