"""Traces of de-identification in captions, and identifiers that it missed."""

import re
from collections.abc import Sequence

MARKERS = {
    "blank (___)": re.compile(r"_{2,}"),
    "placeholder ([** **])": re.compile(r"\[\*\*.*?\*\*\]"),
    "redaction (XXXX)": re.compile(r"\bX{3,}\b"),
    "date": re.compile(r"\b\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}\b"),
    "long number": re.compile(r"\b\d{6,}\b"),
    "titled name": re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\.? [A-Z]\w+"),
}
"""Patterns of tokens that de-identification leaves in captions, or misses. Models often memorize such tokens."""


def caption_markers(captions: Sequence[str]) -> dict[str, int]:
    """Number of captions that hold each of `MARKERS`; markers that no caption holds are left out."""
    counts = {name: sum(bool(pattern.search(text)) for text in captions) for name, pattern in MARKERS.items()}
    return {name: count for name, count in counts.items() if count}
