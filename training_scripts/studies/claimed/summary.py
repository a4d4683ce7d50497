"""The page of the claims that a reader sees first: one screen."""

from collections.abc import Iterable, Iterator
from statistics import fmean

from common.pages import table

from .judged import ABOVE, ATTACKS, CAPACITY, CLAIMS, CONFIRMED
from .page import COMMAND, SAME_RUNS, Content, Row, against, deciding, groups, is_copy, listed, preliminary
from .rows import ALL, FOUND, FULL, METHODS, RANDOMS, SEEDS, TRANSFERRED

SHORT = {"demo": "emoji", "elpv": "solar cells"}
"""Names of the data sets inside of a sentence."""
NEAR = ABOVE[1]
"""How far above the lowest common loss the page looks."""


def render_summary(content: Content) -> str:
    """The page `docs/results.md`."""
    shown = groups(content)
    if not shown:
        return (
            "# What is memorized, and what to do about it\n\n"
            f"`{COMMAND}`\n\n"
            "The claims of the paper are being tested again, by [a design](results/design.md) that is older than the "
            "first run. No three seeds are finished yet, so no verdict is shown. [What is finished]"
            "(results/claims.md) are learning rates and single runs. Until then there are [what screenings predict]"
            "(screening.md), "
            "[the mask of a screening with ten seeds](results/screening_paired.md), and [the earlier table]"
            "(results/paper_table.md) of all methods with three seeds.\n"
        )
    lines = [
        "# What is memorized, and what to do about it",
        "",
        f"`{COMMAND}`, by [a design](results/design.md) that is older than the first run. Small models: the demo's "
        "base (3.3 M parameters, 64 pixels), fine-tuned on 128 rows.",
        "",
        "![Membership AUC and CLiD against held-out loss along the training, for each row](results/claims.png)",
        "",
        "Each line is a row's way through its training: further left it has learned more, and further up an attack "
        "tells more of what was trained on. Better is left and low. Points are means over seeds with 95 % intervals. "
        "The *found mask* is what one [screening](screening.md) suggests. *RWA* adds random words to each caption, "
        "*threshold* leaves out rows that their caption steers too strongly ([mitigations](mitigations.md)). *CLiD* "
        "is an attack by what the caption changes ([Zhai et al.](https://huggingface.co/papers/2405.14800)).",
        "",
    ]
    by_claim: dict[str, dict[str, Row]] = {}
    for name in shown:
        for row in content["verdicts"][name]:
            by_claim.setdefault(row["claim"], {})[name] = row
    order = [CAPACITY, *(asked.claim for asked in CLAIMS)]
    head = ["claim", *(f"{title} ({preliminary(content, name)})" for name, title in shown.items())]
    rows = [
        [claim, *(_verdict_cell(content, name, rows.get(name)) for name in shown)]
        for claim in order
        if (rows := by_claim.get(claim))
    ]
    lines += table(head, rows)
    lines += [
        "Two rows are compared at the same held-out loss, the lowest that both reach with a seed. A claim is "
        "*confirmed* when both attacks, by the loss and by CLiD, find less in the row that the claim favours, and "
        "*refuted* when one of them finds more. No search and no screening sees CLiD. The cell shows the "
        "weaker of the two tests, of a refuted claim the stronger: the mean difference with half the width of its "
        "95 % interval over seeds, or a mean correlation with the interval, and the p-value after Holm's correction, "
        "which decides. *No common quality*: one row never learns as much as the other has at its first measurement, "
        "and the lowest losses are compared.",
        "",
        *_meaning(content, shown),
        "[All figures](results/claims.md), with intervals over images, at equal steps, the learning rates, and the "
        "authors' reward beside ours. [The earlier table](results/paper_table.md) of all methods with three seeds, "
        "fid, copies and extracted images was made before the search had screenings.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _verdict_cell(content: Content, name: str, row: Row | None) -> str:
    """A verdict with the figure that decides it, unless its runs are those of another line."""
    if row is None:
        return ""
    if is_copy(content, name, row):
        return SAME_RUNS
    return f"**{row['verdict']}**: {deciding(row)}"


def _meaning(content: Content, shown: Iterable[str]) -> list[str]:
    """What the verdicts mean, what weakens them and what they do not mean, with figures from the results."""

    def less(one: str, others: list[str]) -> int:
        return sum(row["verdict"] == CONFIRMED for row in _compared(content, shown, one, others).values())

    def more(one: str, others: list[str]) -> int:
        rows = _compared(content, shown, one, others).values()
        return sum(len(against(row)) == len(ATTACKS) for row in rows)

    def where(count: int) -> str:
        return f"in {count or 'none'} of {columns}"

    columns = len([*shown])
    rows = [row for name in shown for row in content["verdicts"][name]]
    capacity = sum(row["claim"] == CAPACITY and row["verdict"] == CONFIRMED for row in rows)
    refuted = sum(bool(against(row)) for row in _compared(content, shown, FOUND, [ALL]).values())
    return [
        f"- What it means. After the same steps, fewer parameters memorize less: {where(capacity)} columns. The rest "
        "is at the same held-out loss, where learning less is no advantage. A full fine-tune leaks less than all "
        f"blocks of the method {where(more(ALL, [FULL]))}. The mask of a screening leaks less than all blocks, "
        f"stopped early or not, {where(less(FOUND, [ALL]))}, and more by one attack or both {where(refuted)}; less "
        f"than random masks of its size {where(less(FOUND, [*RANDOMS]))}. All blocks with RWA (random words in the "
        f"captions) leak less than the mask {where(more(FOUND, ['all+rwa']))}, and RWA on top of the mask helps "
        f"{where(less('found+rwa', [FOUND]))}. Where nothing else is said, both attacks show it; *undecided* says "
        "that the seeds do not tell, not that there is no difference.",
        f"- What weakens it. {' '.join(_weaker(content, shown))}",
        "- What it does not mean. Nothing here is a guarantee, the attacks are those that are known, and one small "
        "base and two sets of images do not speak for Stable Diffusion or for radiographs.",
        "",
    ]


def _compared(content: Content, shown: Iterable[str], one: str, others: list[str]) -> dict[str, Row]:
    """The judged comparison of two rows in each data set and method where it was made."""
    return {
        name: row
        for name in shown
        for row in content["verdicts"][name]
        if (row.get("one"), row.get("others")) == (one, others)
    }


def _weaker(content: Content, shown: Iterable[str]) -> Iterator[str]:
    """What makes single lines of the table say less than they seem to, in sentences."""
    few = [_short(name) for name in shown if content["seeds"][name] < SEEDS]
    if few:
        yield f"What is counted of {listed(few)} is preliminary, since not all seeds are finished."
    left_out = [
        f"{row['left_out']} of {row['pairs']} ({_short(name)})"
        for name, row in _compared(content, shown, FOUND, [*RANDOMS]).items()
        if row["left_out"]
    ]
    if left_out:
        yield f"Of the pairs of the mask with random ones, {listed(left_out)} have no common loss and are left out."
    sizes = [f"{times:.1f} times ({_short(name)})" for name in shown if (times := _times(content, name))]
    if sizes:
        yield (
            f"The mask found on the other set has {listed(sizes)} the parameters of the random masks beside it, which "
            "have the size of the own mask: what carries over can be how many blocks are trained, and not which."
        )
    changed = [
        f'*{row["claim"]}* ({_short(name)}) would be "{other}"'
        for name in shown
        if content["seeds"][name] == SEEDS
        for row in content["verdicts"][name]
        if row["kind"] == "matched" and not is_copy(content, name, row)
        if (other := _verdict_above(content, name, row["claim"])) != row["verdict"]
    ]
    yield (
        "Where two curves are compared decides, too: near its lowest loss a run goes on to memorize while its loss "
        f"hardly changes. At losses {NEAR} higher, most differences are smaller, and where all seeds are finished, "
        f"{listed(changed) if changed else 'no verdict would be another'} ([all of them](results/claims.md))."
    )
    yield "All seeds have the same images; intervals over images, too, are on the page with all figures."


def _verdict_above(content: Content, name: str, claim: str) -> str:
    """The verdict on a claim that the same rule gives a little above the lowest common loss."""
    return next(row["verdict"] for row in content["above"][name][str(NEAR)] if row["claim"] == claim)


def _short(name: str) -> str:
    data, method = name.split("-")
    return f"{METHODS[method]} on the {SHORT[data]}"


def _times(content: Content, name: str) -> float | None:
    """How many times the parameters of the random masks the other set's mask has; `None` where one is missing."""
    curves = content["curves"][name]
    sizes = [curves[row]["parameters"] for row in RANDOMS if row in curves]
    return curves[TRANSFERRED]["parameters"] / fmean(sizes) if TRANSFERRED in curves and sizes else None
