"""The page of the table, rendered from the collected results, and what the cards show of the same results."""

from collections.abc import Sequence
from typing import Any

from common.intervals import t_interval
from common.pages import table
from memcontrol_hf.metrics import clopper_pearson

from .claims import (
    COMPARED,
    MARGIN,
    MEMORIZATION,
    NOT_RUN,
    UNSEEN,
    Comparison,
    Figures,
    Judged,
    Runs,
    compare,
    judge,
    outlook,
    runs_by_row,
    verdict,
)
from .data_sets import DATA
from .rows import MAIN, ROWS, TRANSFER
from .sweep import SWEPT
from .tasks import PICTURED_SEED

# column -> title, format
COST = {
    "trainable_percent": ("trainable %", "{:.3g}"),
    "adapter_bytes": ("adapter, bytes", "{:.0f}"),
    "fid": ("fid ↓", "{:.3f}"),
    "audit_kid": ("kid ↓", "{:.4f}"),
    "amd": ("amd ↑", "{:.4f}"),
    "amd_held_out": ("amd to held-out", "{:.4f}"),
    "audit_copy_similarity": ("copy similarity, p95 ↓", "{:.4f}"),
    "noise_norm": ("noise norm", "{:.2f}"),
}
ATTACKS = {
    **{
        f"audit_membership_{kind}_{name.lower()}": (f"{kind.upper()} {name} ↓", "{:.3f}")
        for kind in ("auc", "tpr")
        for name in ("loss", "CLiD", "PIA", "SecMI")
    },
    "canaries_best": ("canaries caught by the best attack, % ↓", "{:.0f}"),
}
EXTRACTED = {"audit_extraction_rate": "extracted ↓", "audit_extraction_rate_calibrated": "extracted, calibrated ↓"}
TRANSFERRED = {
    **{column: (title, "{:.4g}") for column, title in COMPARED.items()},
    "trainable_percent": COST["trainable_percent"],
}
COMPARISON_HEAD = ["difference", *COMPARED.values(), "seeds to decide it", ""]

INTRODUCTION = """\
# The paper's table, small, with error bars

```bash
python training_scripts/studies/reproduce_table.py
```

Each row is fine-tuned for {max_train_steps} steps of batch size 32. Each search has {n_trials} trials of \
{search_max_steps} steps, and each audit generates {images_per_prompt} images for each of {num_prompts} prompts. The \
model is the demo's base (3.3 M parameters, 64 pixels). {runs} runs, {searches} searches and {rates} choices of a \
learning rate are finished; they took {hours:.1f} CPU hours ({environment}). Every run is in \
[paper_table.parquet](paper_table.parquet) and [paper_table.json](paper_table.json).

[reproduce_table.py](../../training_scripts/studies/reproduce_table.py) says how a row is made, how its learning rate \
is chosen, and what a searched row is. All figures compare with held-out images that neither training nor search saw.

- A figure is the mean ± half width of the 95 % t interval over seeds.
- *Extracted* counts the prompts of all seeds together. The exact 95 % interval treats the prompts as independent, \
although the seeds share the same prompts. An image was compared with its prompt's own training image alone; on the \
solar cells, where eight captions name all images, an audit of today also counts others with the same caption, so \
these shares are too low there.
- *TPR* is the true positive rate at 1 % false alarms.
- *Canaries* are the repeated training images. The column shows the share that the best of eight attacks of the audit \
catches. The best attack was chosen after all attacks ran, so the line of the frozen base shows how much is chance.
- *Adapter, bytes* is the size of the adapter's safetensors files.

## The claims of the paper
"""

RULE = f"""\
[The claims](../results.md) are tested again, with more seeds, at the same held-out loss and corrected for the number \
of tests. Where the two differ, the later verdict holds.

Here, verdicts are computed from the differences below, which are paired by seed. Two membership AUCs decide. The \
searches lower the AUC of the loss attack on the same training images; no search sees the AUC of CLiD. Where a row \
shall beat another row, fid decides too: it may be worse by {100 * MARGIN:.0f} % of the other row's fid.

- *Confirmed*: all of these 95 % t intervals lie below 0, and the interval of fid lies below the margin.
- *Not confirmed*: one interval lies above its limit.
- *Undecided*: everything else.

A claim with several comparisons is confirmed when all comparisons are confirmed, and not confirmed when one \
comparison is not. The intervals are not corrected for the number of comparisons. The capacity claim is confirmed \
when Spearman's correlations over the rows without a mitigation lie above 0. Three seeds decide only large \
differences. For each undecided comparison the page says how many seeds would decide it, and how, if mean and spread \
stayed as they are; with three seeds this number is rough.
"""


def render(results: dict[str, Any]) -> str:
    """The page of the finished runs, in Markdown."""
    judged = judge(results)
    pieces = {kind: results[kind] for kind in ("runs", "searches", "rates")}
    hours = sum(piece["seconds"] for kind in pieces.values() for piece in kind) / 3600
    counts = {kind: len(of_kind) for kind, of_kind in pieces.items()}
    lines = [
        INTRODUCTION.format(**results["settings"], **counts, hours=hours, environment=results["environment"]),
        *table(
            ["", *(data.title for data in DATA.values())],
            [[text, *(of_data[data].verdict for data in DATA)] for text, of_data in judged.items()],
        ),
        RULE,
    ]
    for data in DATA:
        lines += data_section(data, results, {text: of_data[data] for text, of_data in judged.items()})
    lines += [
        *sweep_section(results["sweep"]),
        "",
        "The same rows in [the original setting](../../training_scripts/README.md) would settle the claims at full "
        "size.",
    ]
    return "\n".join(lines) + "\n"


def data_section(data: str, results: dict[str, Any], judged: dict[str, Judged]) -> list[str]:
    """The tables of one data set."""
    runs = runs_by_row(results, data)
    lines = [f"## {DATA[data].title}", ""]
    for columns, pooled in ((COST, {}), (ATTACKS, EXTRACTED)):
        heads = [head for head, _ in columns.values()]
        cells = {
            name: [cell(runs[name], column, form) for column, (_, form) in columns.items()]
            + [pooled_rate(runs[name], column) for column in pooled]
            for name in MAIN
            if name in runs
        }
        titles = {name: ROWS[name].title for name in MAIN}
        lines += table(
            ["", "seeds", *heads, *pooled.values()], row_lines(titles, runs, cells, len(columns) + len(pooled))
        )
    if runs:
        lines += [f"![](paper_table_{data}.png)", "", *pictures_section(data, results["pictures"])]
    lines += transfer_section(runs)
    lines += ["### What the claims rest on", ""]
    for text, claim in judged.items():
        lines += [f"{text}: **{claim.verdict}**", "", *comparison_table(claim.comparisons)]
    return lines


def row_lines(titles: dict[str, str], runs: Runs, cells: dict[str, list[str]], width: int) -> list[list[str]]:
    """A line for each row with its title, the number of seeds and its `width` cells; rows without a run say so."""
    return [
        [title, str(len(runs.get(name, {}))), *cells.get(name, [NOT_RUN, *[""] * (width - 1)])]
        for name, title in titles.items()
    ]


def transfer_section(runs: Runs) -> list[str]:
    """Masks that were found on one data set, on the other."""
    cells = {
        name: [cell(runs[name], column, form) for column, (_, form) in TRANSFERRED.items()]
        for name in TRANSFER
        if name in runs
    }
    titles = {name: ROWS[name].title for name in TRANSFER} | {"svdiff": "all blocks"}
    heads = [head for head, _ in TRANSFERRED.values()]
    others = [name for name in TRANSFER if name != "transfer-mask"]
    return [
        "### Masks from the other set",
        "",
        *table(
            ["SV-DIFF, the learning rate of all blocks", "seeds", *heads],
            row_lines(titles, runs, cells, len(TRANSFERRED)),
        ),
        *comparison_table([compare(runs, "transfer-mask", other, True) for other in others]),
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    """A line for each comparison: its differences, how many seeds would decide it, and its verdict."""
    lines = [
        [
            comparison.title,
            *("–" if interval is None else str(interval) for interval in comparison.intervals),
            outlook(comparison.limits),
            verdict(comparison.limits),
        ]
        for comparison in comparisons
    ]
    return table(COMPARISON_HEAD, lines)


def cell(by_seed: dict[int, Figures], column: str, form: str) -> str:
    """A column of a row: mean ± half width over seeds, or one number where all seeds have the same size."""
    values = [figures[column] for figures in by_seed.values() if figures.get(column) is not None]
    if not values:
        return "–"
    interval = t_interval(values)
    if interval is None or (len(set(values)) == 1 and column in ("trainable_percent", "adapter_bytes")):
        return form.format(values[0])
    return f"{form.format(interval.mean)} ± {form.format(interval.half)}"


def pooled_rate(by_seed: dict[int, Figures], column: str) -> str:
    """A rate over the prompts of all seeds together, with the exact interval."""
    runs = [figures for figures in by_seed.values() if figures.get(column) is not None]
    if not runs:
        return "–"
    prompts = sum(figures["prompts"] for figures in runs)
    found = round(sum(figures[column] * figures["prompts"] for figures in runs))
    low, high = clopper_pearson(found, prompts)
    return f"{found} of {prompts} ({100 * low:.0f} to {100 * high:.0f} %)"


def pictures_section(data: str, pictures: Sequence[str]) -> list[str]:
    """The samples of the rows, in the order of the table, below the real images."""
    lines = ["### Samples", ""]
    if not DATA[data].public:
        return [
            *lines,
            f"The licence of the images does not allow showing samples here. The command writes them to "
            f"`samples/{data}`.",
            "",
        ]
    titles = {"real": "real images", **{name: row.title for name, row in ROWS.items()}}
    return [
        *lines,
        f"Samples of the runs with seed {PICTURED_SEED}; all rows have the same captions and noise. The first four "
        "captions are of images that are repeated in training, the last four of held-out images. The first line shows "
        "the images themselves.",
        "",
        *table(
            ["", ""],
            [[title, f"![](paper_table_samples/{name}.png)"] for name, title in titles.items() if name in pictures],
        ),
    ]


def sweep_section(sweep: dict[str, Any] | None) -> list[str]:
    """The rank correlations with size over the masks of the table of real trials."""
    lines = ["## Size alone: the same method over many masks", ""]
    if sweep is None:
        return [*lines, f"{NOT_RUN}: it is read from the table of `training_scripts/studies/trial_table.py`."]
    cells = [
        "–" if ranked is None else f"{ranked['rho']:.2f} ({ranked['low']:.2f} to {ranked['high']:.2f})"
        for ranked in sweep["correlations"].values()
    ]
    return [
        *lines,
        f"{sweep['runs']} runs of [the table of real trials](../trial_table.parquet) tune the whole attention weights "
        "in some of six groups of blocks on the demo. The table shows Spearman's correlation of the trainable "
        "parameters with the measures of the audit, by ranks within each learning rate (95 % bootstrap interval over "
        "runs).",
        "",
        *table(list(SWEPT.values()), [cells]),
        "![](paper_table_sweep.png)",
    ]


CARD_ROWS = ("base", "full", "svdiff", "random-svdiff", "memcontrol-svdiff")
CARD_COLUMNS = ("trainable_percent", "fid", "amd", "amd_held_out", MEMORIZATION, UNSEEN)


def over_seeds(results: dict[str, Any], data: str) -> dict[str, Any] | None:
    """The table over seeds on the card of a data set's SV-DIFF adapter; `None` before all its rows have two seeds."""
    runs = runs_by_row(results, data)
    seeds = set.intersection(*(set(runs.get(name, {})) for name in CARD_ROWS))
    if len(seeds) < 2:
        return None
    columns = {column: (COST | ATTACKS)[column] for column in CARD_COLUMNS}
    lines = [["", *(head for head, _ in columns.values())]]
    for name in CARD_ROWS:
        by_seed = {seed: runs[name][seed] for seed in sorted(seeds)}
        lines.append([ROWS[name].title, *(cell(by_seed, column, form) for column, (_, form) in columns.items())])
    return {"seeds": len(seeds), "steps": results["settings"]["max_train_steps"], "table": lines}
