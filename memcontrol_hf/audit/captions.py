"""Traces of de-identification in captions, and identifiers that it missed."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

MARKERS = {
    "blank (___)": re.compile(r"_{2,}"),
    "placeholder ([** **])": re.compile(r"\[\*\*.*?\*\*\]"),
    "redaction (XXXX)": re.compile(r"\bX{3,}\b"),
    "date": re.compile(r"\b\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}\b"),
    "long number": re.compile(r"\b\d{6,}\b"),
    "titled name": re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\.? [A-Z]\w+"),
}
"""Patterns of tokens that de-identification leaves in captions, or misses. Models often memorize such tokens."""

CONFIDENCE = 0.4
"""Lowest score of Presidio that counts. A mere run of digits, which may be a number of a driver's license, has .01."""


def caption_markers(captions: Sequence[str]) -> dict[str, int]:
    """Number of captions that hold each of `MARKERS`; markers that no caption holds are left out."""
    counts = {name: sum(bool(pattern.search(text)) for text in captions) for name, pattern in MARKERS.items()}
    return {name: count for name, count in counts.items() if count}


def caption_identifiers(captions: Sequence[str]) -> dict[str, int] | None:
    """Number of captions in which an identifier was recognized, by its kind; kinds that were not found are left out.

    [Presidio](https://microsoft.github.io/presidio/supported_entities/) recognizes by patterns and check digits:
    `EMAIL_ADDRESS`, `PHONE_NUMBER`, `US_SSN`, `CREDIT_CARD`, ... Names and places need a language model, which is not
    used here, so they are not counted. Nothing is fetched from the network.

    Args:
        captions (list of `str`): captions in English.

    Returns:
        `dict[str, int]`: captions by kind; `None` when Presidio (the extra `identifiers`) is not installed.
    """
    if find_spec("presidio_analyzer") is None:
        return None
    from presidio_analyzer import RecognizerRegistry

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)  # it warns of each recognizer of other languages
    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"])
    registry.remove_recognizer("SpacyRecognizer")  # it reads what a language model says
    for recognizer in registry.recognizers:
        if recognizer.supported_entities == ["EMAIL_ADDRESS"]:
            recognizer.validate_result = lambda _: None  # it would fetch the list of domains; the pattern is enough
    counts: Counter[str] = Counter()
    for caption in captions:
        found = [
            result.entity_type
            for recognizer in registry.recognizers
            for result in recognizer.analyze(caption, recognizer.supported_entities, None) or []
            if result.score >= CONFIDENCE
        ]
        counts.update(set(found))
    return dict(sorted(counts.items()))
