"""What the attacks cost, beside the plain way, each in a process of its own.

    python training_scripts/studies/benchmark_attacks.py --output_dir docs

1. `extraction`: 100 prompts x 50 images of 224 px. Once all images are fresh, so that one tile tells them apart; once
   all images are near-copies of the training images, which is the most that there can be to compare. Beside them the
   same attack pair by pair, in a loop over the images and their tiles, timed on some pairs and scaled to all pairs.
2. Nearest neighbours of 10,000 generated among 100,000 training images by 1,024 features, beside the matrix product
   alone, in blocks of the same size.

Writes `attack_cost.json` and `attack_cost.md`. The peak memory is what the work adds to the memory of its inputs.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from common.memory import peak_memory
from common.pages import publish_results, table
from memcontrol_hf import metrics

COMMAND = "python training_scripts/studies/benchmark_attacks.py --output_dir docs"
CLIQUE, THRESHOLD = 3, 20.0

# ---- the inputs ----


def random_images(args: argparse.Namespace, copies: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random images: generated `[P, K, 3, H, W]`, fresh or near-copies of the training images, and training."""
    generator, side = torch.Generator().manual_seed(0), args.side
    train = F.interpolate(torch.rand(args.prompts, 3, 14, 14, generator=generator), (side, side), mode="bilinear")
    generated = torch.empty(args.prompts, args.images, 3, side, side)
    for p, original in enumerate(train):
        coarse = torch.rand(args.images, 3, 14, 14, generator=generator)
        fresh = F.interpolate(coarse, (side, side), mode="bilinear")
        generated[p] = 0.95 * original + 0.05 * fresh if copies else fresh
    return generated, train


def random_features(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features of unit length, `[M, D]` generated and `[N, D]` training."""
    generator = torch.Generator().manual_seed(0)
    generated, train = (
        F.normalize(torch.randn((count, args.features), generator=generator), dim=1)
        for count in (args.generated, args.train)
    )
    return generated, train


# ---- the work ----


def extraction(args: argparse.Namespace, copies: bool = False) -> dict[str, float]:
    """The extraction attack of fresh images, or of near-copies."""
    generated, train = random_images(args, copies)
    return measured(lambda: metrics.extraction(generated, train, THRESHOLD, CLIQUE))


def extraction_of_copies(args: argparse.Namespace) -> dict[str, float]:
    """The extraction attack where every image is a near-copy."""
    return extraction(args, copies=True)


def pair_by_pair(args: argparse.Namespace) -> dict[str, float]:
    """The tile distances of pairs of images in a loop, scaled to all pairs that the attack compares."""
    generated, train = random_images(args)
    side = args.side // 4
    corners = range(0, 4 * side, side)
    tiles = [(slice(y, y + side), slice(x, x + side)) for y in corners for x in corners]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return max(torch.linalg.vector_norm(a[:, y, x] - b[:, y, x]).item() for y, x in tiles)

    count = args.images
    pairs = [(p, i, j) for p in range(args.prompts) for i in range(count) for j in range(i + 1, count)]
    pairs += [(p, i, None) for p in range(args.prompts) for i in range(count)]  # None: the training image
    timed = pairs[:: max(1, len(pairs) // args.sampled_pairs)]
    row = measured(
        lambda: [distance(generated[p, i], train[p] if j is None else generated[p, j]) for p, i, j in timed]
    )
    seconds = row["seconds"] * len(pairs) / len(timed)
    return {**row, "seconds": seconds, "pairs": len(pairs), "pairs_timed": len(timed)}


def neighbours(args: argparse.Namespace) -> dict[str, float]:
    """The nearest training image of each generated image."""
    generated, train = random_features(args)
    return measured(lambda: metrics.nearest_distances(generated, train))


def matrix_product(args: argparse.Namespace, block: int = 2048) -> dict[str, float]:
    """The matrix product of the neighbour search alone, in blocks."""
    generated, train = random_features(args)

    def product() -> None:
        out = torch.empty(block * block)
        for b in train.split(block):
            for a in generated.split(block):
                torch.mm(a, b.T, out=out[: len(a) * len(b)].view(len(a), len(b)))

    return measured(product)


WORK = {
    "extraction": extraction,
    "extraction, all memorized": extraction_of_copies,
    "extraction, pair by pair": pair_by_pair,
    "nearest neighbours": neighbours,
    "matrix product": matrix_product,
}

# ---- the measurement ----


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds and peak memory of some work, in this process. Linux only."""
    start = time.perf_counter()
    before, peak = peak_memory(work)
    return {"seconds": time.perf_counter() - start, "input_mib": before, "peak_mib": peak - before}


def in_own_process(work: Callable[[argparse.Namespace], dict[str, float]], args: argparse.Namespace) -> dict:
    """Some work in a new process, whose memory holds nothing else."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (args.threads,)) as pool:
        return pool.apply(work, (args,))


def render(results: dict[str, Any]) -> str:
    """The page, in Markdown."""
    settings, measured_rows = results["settings"], results["measured"]
    loop = measured_rows["extraction, pair by pair"]
    lines = [
        "# What the attacks cost",
        "",
        f"`{results['command']}`, PyTorch {results['torch']} on {settings['threads']} thread(s) of the processor. "
        "Each line is measured in a process of its own. The peak memory is what the work adds to the memory of the "
        "process with its inputs.",
        "",
        *table(
            ["work", "seconds", "peak memory, MiB", "inputs, MiB"],
            [
                [name, f"{row['seconds']:.1f}", f"{row['peak_mib']:.0f}", f"{row['input_mib']:.0f}"]
                for name, row in measured_rows.items()
            ],
            numbers=True,
        ),
        f"- Extraction: {settings['prompts']} prompts x {settings['images']} images of {settings['side']} px, without "
        f"the time to generate them. The attack is {results['extraction_speedup']:.0f} times as fast as the loop pair "
        f"by pair, and {results['extraction_speedup_all_memorized']:.0f} times where every image is a near-copy. The "
        f"loop was timed on {loop['pairs_timed']:,} of {loop['pairs']:,} pairs and scaled to all pairs.",
        f"- Nearest neighbours: {settings['generated']:,} among {settings['train']:,} images by "
        f"{settings['features']:,} features take {results['neighbours_over_product']:.2f} times the bare matrix "
        "product.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("docs"), help="folder of attack_cost.json and attack_cost.md"
    )
    parser.add_argument("--prompts", type=int, default=100, help="prompts of the extraction attack (default: 100)")
    parser.add_argument("--images", type=int, default=50, help="images of each prompt (default: 50)")
    parser.add_argument("--side", type=int, default=224, help="side of the images in pixels (default: 224)")
    parser.add_argument(
        "--sampled_pairs", type=int, default=20_000, help="pairs that the loop is timed on (default: 20000)"
    )
    parser.add_argument(
        "--generated", type=int, default=10_000, help="generated images of the neighbour search (default: 10000)"
    )
    parser.add_argument(
        "--train", type=int, default=100_000, help="training images of the neighbour search (default: 100000)"
    )
    parser.add_argument("--features", type=int, default=1024, help="width of the features (default: 1024)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of the processor (default: all cores)"
    )
    args = parser.parse_args()
    rows = {name: in_own_process(work, args) for name, work in WORK.items()}
    seconds = {name: row["seconds"] for name, row in rows.items()}
    results = {
        "command": COMMAND,
        "settings": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "torch": torch.__version__,
        "measured": rows,
        "extraction_speedup": seconds["extraction, pair by pair"] / seconds["extraction"],
        "extraction_speedup_all_memorized": seconds["extraction, pair by pair"] / seconds["extraction, all memorized"],
        "neighbours_over_product": seconds["nearest neighbours"] / seconds["matrix product"],
    }
    publish_results(args.output_dir / "attack_cost.json", results, render)


if __name__ == "__main__":
    main()
