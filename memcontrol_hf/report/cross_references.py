"""Where a dossier answers what frameworks ask for, element by element. No claim is made that an answer suffices."""

from collections.abc import Iterator, Mapping
from typing import Any

from .verdict import GENERATED

Table = tuple[str, str, list[list[str]]]
"""Title, what it is about, and a table whose first row is the head."""


def cross_references(audit: Mapping[str, Any]) -> Iterator[Table]:
    """The tables, which name what this audit measured alone.

    Args:
        audit (`dict`): `audit` of a report.
    """
    yield (
        "EDPB Opinion 28/2024",
        "Elements that the opinion of the European Data Protection Board of 17 December 2024 lists in section 3.2.2, "
        "and the section here that has something on them. The list of the opinion is neither binding nor complete.",
        [
            ["element of the opinion", "here", "not here"],
            [
                "Extraction of personal data from the model",
                _measured(audit, "membership_", "extraction_"),
                "4: attacks trained for the purpose",
            ],
            [
                "Personal data obtained by queries",
                _measured(
                    audit, "extraction_", "copy_share", "partial_copy_share", "nearest_share", "embedding_attack_"
                ),
                "4: optimized captions",
            ],
            ["Selection of sources", "2, as people stated it", "whether the sources were lawful and necessary"],
            ["Preparation and minimisation of data", "2", "2: identifiers in pixels"],
            ["Methodological choices in training", "3, mitigations; summary, formal guarantee", "nothing named"],
            ["Measures on outputs", "1, safeguards, as people stated them", "whether the safeguards work"],
            ["Audits of the measures", "3; 5, the command that repeats the measurement", "an audit by somebody else"],
            [
                "Resistance to membership and attribute inference",
                _measured(audit, "membership_", "attribute_advantage"),
                "4: attribute inference, unless an attribute was named",
            ],
            ["Resistance to exfiltration and regurgitation", _measured(audit, "extraction_"), "nothing named"],
            ["Resistance to model inversion and reconstruction", "nothing", "4: reconstruction from the weights"],
            ["Documentation", "5, and the report itself", "impact assessment, advice of the officer"],
            ["Context of release", "1, as people stated it", "nothing named"],
        ],
    )
    of_weights = audit["subject"] != GENERATED
    yield (
        "The motivated intruder (ICO)",
        "The test that the United Kingdom's Information Commissioner recommends: a competent person with ordinary "
        "sources and without special knowledge tries to identify somebody.",
        [
            ["the intruder of the guidance", "the attacker of section 3"],
            [
                "has no special equipment or skill",
                "has the weights and the skill to use them: assumes more"
                if of_weights
                else "has the generated images alone, and an encoder that compares them",
            ],
            [
                "starts without prior knowledge",
                "has a candidate image and its caption: assumes more"
                if of_weights
                else "has a candidate image: assumes more",
            ],
            ["searches the internet, archives and public documents", "searches nowhere: assumes less, not tested"],
            ["asks people who know the person", "asks nobody: assumes less, not tested"],
            ["is repeated as techniques and data change", "5, next review, as people stated it"],
        ],
    )


def _measured(audit: Mapping[str, Any], *starts: str) -> str:
    """Section 3 with those measures that the audit has a figure of, each by the start of its name."""
    figures = {name: of["model"] for name, of in audit["measures"].items() if of["model"]}
    found = [s for s in starts if any(name.startswith(s) and of["value"] is not None for name, of in figures.items())]
    return f"3, {', '.join(f'{s}*' if s.endswith('_') else s for s in found)}" if found else "nothing: not tested"
