"""What the attacks cost, beside the plain way, each in a process of its own.

```bash
python training_scripts/benchmark_attacks.py --output_dir docs
```

1. `extraction`: 100 prompts x 50 images of 224 px, once with fresh images, which one tile parts, and once with nothing
   but near-copies of the training images, the most that there can be to compare; beside the same attack pair by pair,
   in a loop over the images and their tiles, timed on some of the pairs and scaled to all of them.
2. Nearest neighbours of 10,000 generated among 100,000 training images by 1,024 features, beside nothing but the
   matrix product, in blocks of the same size.

Writes `attack_cost.json` and `attack_cost.md`. The peak memory is what the work adds to that of its inputs.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from memcontrol_hf import metrics

CLIQUE, THRESHOLD = 3, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="where attack_cost.{json,md} go")
    parser.add_argument("--prompts", type=int, default=100, help="prompts of the extraction attack")
    parser.add_argument("--images", type=int, default=50, help="images of each prompt")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--sampled_pairs", type=int, default=20_000, help="pairs that the loop is timed on")
    parser.add_argument("--generated", type=int, default=10_000, help="generated images of the neighbour search")
    parser.add_argument("--train", type=int, default=100_000, help="training images of the neighbour search")
    parser.add_argument("--features", type=int, default=1024, help="width of the features")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the processor")
    arguments = parser.parse_args()

    rows = {name: in_own_process(work, arguments) for name, work in WORK.items()}
    result = {
        "command": "python training_scripts/benchmark_attacks.py --output_dir docs",
        "settings": {k: v for k, v in vars(arguments).items() if k != "output_dir"},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "measured": rows,
        "extraction_speedup": rows["extraction, pair by pair"]["seconds"] / rows["extraction"]["seconds"],
        "extraction_speedup_all_memorized": rows["extraction, pair by pair"]["seconds"]
        / rows["extraction, all memorized"]["seconds"],
        "neighbours_over_product": rows["nearest neighbours"]["seconds"] / rows["matrix product"]["seconds"],
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "attack_cost.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.output_dir / "attack_cost.md").write_text(as_table(result))
    print(as_table(result))


def extraction(arguments: argparse.Namespace, copies: bool = False) -> dict:
    generated, train = images_of(arguments, copies)
    return measured(lambda: metrics.extraction(generated, train, THRESHOLD, CLIQUE))


def extraction_of_copies(arguments: argparse.Namespace) -> dict:
    return extraction(arguments, copies=True)


def pair_by_pair(arguments: argparse.Namespace) -> dict:
    """The tile distances of pairs of images in a loop, scaled to all pairs that the attack compares."""
    generated, train = images_of(arguments)
    side = arguments.side // 4
    tiles = [
        (slice(y, y + side), slice(x, x + side)) for y in range(0, 4 * side, side) for x in range(0, 4 * side, side)
    ]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return max(torch.linalg.vector_norm(a[:, y, x] - b[:, y, x]).item() for y, x in tiles)

    count = arguments.images
    pairs = [(p, i, j) for p in range(arguments.prompts) for i in range(count) for j in range(i + 1, count)]
    pairs += [(p, i, None) for p in range(arguments.prompts) for i in range(count)]  # None: the training image
    some = pairs[:: max(1, len(pairs) // arguments.sampled_pairs)]
    row = measured(lambda: [distance(generated[p, i], train[p] if j is None else generated[p, j]) for p, i, j in some])
    return {**row, "seconds": row["seconds"] * len(pairs) / len(some), "pairs": len(pairs), "pairs_timed": len(some)}


def neighbours(arguments: argparse.Namespace) -> dict:
    generated, train = features_of(arguments)
    return measured(lambda: metrics.nearest_distances(generated, train))


def matrix_product(arguments: argparse.Namespace, block: int = 2048) -> dict:
    generated, train = features_of(arguments)

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


def images_of(arguments: argparse.Namespace, copies: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images, fresh ones or near-copies of the training images."""
    generator, side = torch.Generator().manual_seed(0), arguments.side
    train = F.interpolate(torch.rand(arguments.prompts, 3, 14, 14, generator=generator), (side, side), mode="bilinear")
    generated = torch.empty(arguments.prompts, arguments.images, 3, side, side)
    for p, original in enumerate(train):
        coarse = torch.rand(arguments.images, 3, 14, 14, generator=generator)
        fresh = F.interpolate(coarse, (side, side), mode="bilinear")
        generated[p] = 0.95 * original + 0.05 * fresh if copies else fresh
    return generated, train


def features_of(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (arguments.generated, arguments.features), (arguments.train, arguments.features)
    return tuple(F.normalize(torch.randn(size, generator=generator), dim=1) for size in sizes)


def measured(work: Callable) -> dict:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before, start = memory_mib("VmRSS"), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "input_mib": before, "peak_mib": memory_mib("VmHWM") - before}


def memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def in_own_process(work: Callable, arguments: argparse.Namespace) -> dict:
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (arguments.threads,)) as pool:
        return pool.apply(work, (arguments,))


def as_table(result: dict) -> str:
    settings, rows = result["settings"], result["measured"]
    loop = rows["extraction, pair by pair"]
    lines = [
        "# What the attacks cost",
        "",
        f"`{result['command']}`, PyTorch {result['torch']} on {settings['threads']} thread(s) of the processor, each "
        "line in a process of its own. Memory is the peak beyond that of the process with its inputs.",
        "",
        "| work | seconds | peak memory, MiB | inputs, MiB |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {row['seconds']:.1f} | {row['peak_mib']:.0f} | {row['input_mib']:.0f} |"
            for name, row in rows.items()
        ),
        "",
        f"- Extraction: {settings['prompts']} prompts x {settings['images']} images of {settings['side']} px, the "
        f"images given. {result['extraction_speedup']:.0f} times as fast as pair by pair, and "
        f"{result['extraction_speedup_all_memorized']:.0f} times where every image is a near-copy. The loop was timed "
        f"on {loop['pairs_timed']:,} of {loop['pairs']:,} pairs and scaled to all.",
        f"- Nearest neighbours: {settings['generated']:,} among {settings['train']:,} images by "
        f"{settings['features']:,} features. {result['neighbours_over_product']:.2f} times the bare matrix product.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
