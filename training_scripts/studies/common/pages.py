"""The pages that the studies write: Markdown beside the figures that it is rendered from."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """The lines of a Markdown table, an empty line last.

    Cells are not padded: a wide cell would widen every line of the page. That is why no library renders the table.

    Args:
        head: A title for each column.
        rows: A cell for each column.
        numbers: Align all columns but the first to the right.
    """
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def read_results(file: Path) -> dict[str, Any]:
    """The results in a JSON file; an empty dictionary when there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def runs_of(pieces: Mapping[str, dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """The finished runs of one kind by their seed or size, ascending: those of the pieces `name/number`."""
    found = {int(piece.rpartition("/")[2]): run for piece, run in pieces.items() if piece.partition("/")[0] == name}
    return dict(sorted(found.items()))


def write_results(file: Path, results: dict[str, Any], page: str) -> None:
    """Write the results as JSON, and the page as Markdown beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(page, encoding="utf-8")


def publish_results(file: Path, results: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    """Write the results and the page that `render` makes of them, and print the page."""
    page = render(results)
    write_results(file, results, page)
    print(page)
