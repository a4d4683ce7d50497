"""What de-identification leaves in captions, or misses."""

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
"""What de-identification leaves in captions or misses; such tokens are among the most memorized ones."""


def caption_markers(captions: Sequence[str]) -> dict[str, int]:
    """How many captions hold each of `MARKERS`, where any does."""
    counts = {name: sum(bool(pattern.search(text)) for text in captions) for name, pattern in MARKERS.items()}
    return {name: count for name, count in counts.items() if count}
