"""How often does a model that gives training images back pass the gate of generated images, with few held-out images?

    python training_scripts/studies/few_held_out.py    # five minutes on one core

Simulated features, drawn from one normal distribution: training images, held-out images and 200 generated images, of
which a share are near-exact copies of training images. The control has one half of the held-out images in the place of
the training images, as in an audit. The default gate judges `copy_share` and `nearest_share`, all that it judges of
generated images alone. Writes docs/results/few_held_out.json and .md.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.pages import publish_results, table
from memcontrol_hf import metrics
from memcontrol_hf.audit.settings import Figure
from memcontrol_hf.report import load_gate
from memcontrol_hf.report.verdict import violation

COMMAND = "python training_scripts/studies/few_held_out.py"
SIZES = ((53, 8), (72, 16), (72, 24), (72, 50), (92, 100), (92, 256))
"""Numbers of training and of held-out images."""
COPIES = (0.0, 0.1, 0.2, 0.3)
"""Shares of the generated images that are copies."""
GENERATED, DIMENSIONS = 200, 16
NEAR = 0.02
"""Standard deviation of a copy around its original, whose features have 1."""


def passes(train: int, held_out: int, copies: float, generator: torch.Generator) -> bool:
    """Whether the default gate passes for one draw of all images.

    Args:
        train, held_out: Number of images of each set.
        copies: Share of the generated images that are copies, in [0, 1].
        generator: Random draws.
    """

    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, DIMENSIONS, generator=generator)

    originals, others, generated = draw(train), draw(held_out), draw(GENERATED)
    count = round(copies * GENERATED)
    copied = torch.randint(train, (count,), generator=generator)
    generated[:count] = originals[copied] + NEAR * draw(count)
    figures: dict[str, dict[str, Any]] = {"copy_share": {}, "nearest_share": {}}
    sets = {"model": (originals, others), "held_out_as_train": others.split((held_out // 2, held_out - held_out // 2))}
    for who, pair in sets.items():
        for name, measure in (("copy_share", metrics.copy_similarity), ("nearest_share", metrics.nearest_share)):
            result = measure(generated, *pair)
            figures[name][who] = asdict(Figure(result.share, *result.interval))
    limits = load_gate()
    return not any(
        violation(name, kind, bound, of) for name, of in figures.items() for kind, bound in limits[name].items()
    )


def render(content: dict[str, Any]) -> str:
    """The page."""
    draws = content["draws"]

    def cell(passed: int) -> str:
        low, high = metrics.clopper_pearson(passed, draws)
        return f"{passed / draws:.0%} ({low:.0%} to {high:.0%})"

    lines = [
        "# Too few held-out images",
        "",
        f"`{content['command']}`",
        "",
        "How often the default gate passes generated images of which a share are copies of training images, in "
        f"{draws} simulated sets with 95 % intervals. The gate's limit is a share of copies of .1 above that of its "
        "control; with more it should fail, without any it should pass. A copy is what is more like a training image "
        "than all but 1 % of the held-out images. Of few images that threshold is a matter of chance, and that of the "
        "control, from half of them, even more: its false alarms are many, and a limit above them lets copies pass.",
        "",
        *table(
            ["training and held-out images", *(f"{share:.0%} copies" for share in COPIES)],
            [
                [f"{row['train']}, {row['held_out']}", *(cell(passed) for passed in row["passed"])]
                for row in content["rows"]
            ],
            numbers=True,
        ),
        "Features are normal draws, which real images are not; the numbers say how the rates go, not where exactly.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="simulated sets for each cell (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    rows = []
    for train, held_out in SIZES:
        generator = torch.Generator().manual_seed(args.seed)
        passed = [sum(passes(train, held_out, share, generator) for _ in range(args.draws)) for share in COPIES]
        rows.append({"train": train, "held_out": held_out, "passed": passed})
    content = {"command": COMMAND, "draws": args.draws, "seed": args.seed, "rows": rows}
    publish_results(args.docs_dir / "few_held_out.json", content, render)


if __name__ == "__main__":
    main()
