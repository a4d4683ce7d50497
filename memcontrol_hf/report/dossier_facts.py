"""What people say in a dossier, and no report can know: purpose, recipients, who signs, when to look again."""

import datetime
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..error_lines import in_one_line

FACTS = "dossier.yaml"
"""The file in the folder of a report that people fill in."""

NOT_STATED = "not stated"

LONGEST = 2000
"""Largest number of characters of a fact, which fits a page."""


@dataclass(frozen=True)
class Facts:
    """What people filled in; an empty text is shown as "not stated".

    Args:
        purpose (`str`): what the model is for.
        recipients (`str`): who gets the model, and on which terms.
        knowledge (`str`): what recipients know or have besides the model.
        source (`str`): where the images come from, and who they show.
        preparation (`str`): what was removed from images and captions before the training.
        harm (`str`): what happens to a person whose image is recognized or given back.
        safeguards (`str`): what is put around the model: access control, contracts, filters.
        residual_risk (`str`): the risk that remains, as those who sign judge it.
        decision (`str`): what was decided.
        signed_by (`str`): names and roles of those who sign.
        signed_on (`str`): date of the signature, `YYYY-MM-DD`.
        review_date (`str`): date of the next review, `YYYY-MM-DD`.
        review_when (`str`): events after which the model is tested again before that date.
        incidents (`str`): who is told of an incident, and what is done.
    """

    purpose: str = ""
    recipients: str = ""
    knowledge: str = ""
    source: str = ""
    preparation: str = ""
    harm: str = ""
    safeguards: str = ""
    residual_risk: str = ""
    decision: str = ""
    signed_by: str = ""
    signed_on: str = ""
    review_date: str = ""
    review_when: str = ""
    incidents: str = ""

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Facts":
        """Read a file that people filled in.

        Raises:
            ValueError: when the file cannot be read, names something else than these facts, or holds a date that is
                none or a text of more than `LONGEST` characters.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"cannot read {str(path)!r}: {in_one_line(error)}") from None
        if content is None:
            content = {}
        known = [fact.name for fact in fields(cls)]
        if not isinstance(content, dict) or (unknown := [name for name in content if name not in known]):
            what = f"unknown {unknown[0]!r}" if isinstance(content, dict) else f"a {type(content).__name__}"
            raise ValueError(f"{str(path)!r} holds {what}: give some of {', '.join(known)}, each with a text")
        return cls(**{name: _text(name, value, path) for name, value in content.items()})

    def overdue(self, today: datetime.date) -> bool:
        """Whether the date of the next review has passed."""
        return bool(self.review_date) and datetime.date.fromisoformat(self.review_date) < today


def _text(name: str, value: Any, path: str | Path) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime.date):
        value = value.isoformat()
    if not isinstance(value, str):
        raise ValueError(f"{name} in {str(path)!r} must be a text, but is {value!r}: write it in quotes")
    if len(value) > LONGEST:
        raise ValueError(
            f"{name} in {str(path)!r} has {len(value)} characters, more than {LONGEST}: say it in short, and name the "
            "document that holds the rest"
        )
    if name.endswith(("_date", "_on")) and value.strip():
        try:
            datetime.date.fromisoformat(value.strip())
        except ValueError:
            raise ValueError(f"{name} in {str(path)!r} must be a date like 2027-01-31, but is {value!r}") from None
    return value.strip()


def empty_facts() -> str:
    """The text of a file to fill in, with a comment for each fact."""
    comments = (Facts.__doc__ or "").partition("Args:")[2].strip().splitlines()
    lines = ["# What people say in the dossier. What is left empty is shown as not stated."]
    for comment in comments:
        name, _, text = comment.strip().partition(" (`str`): ")
        lines += ["", f"# {text[0].upper()}{text[1:]}", f"{name}:"]
    return "\n".join(lines) + "\n"
