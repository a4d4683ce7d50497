"""The page of the benchmarks, rendered from what they measured."""

from typing import Any

from common.pages import table

Row = dict[str, Any]

REASONS: dict[str, str] = {
    "bare step with all blocks": (
        "*SV-DIFF beside LoRA.* SV-DIFF makes each of the 192 weights anew in every step, in half a dozen small "
        "operations, where LoRA adds two products. For few tokens beside the size of the weights, as in batches of 1, "
        "making a weight costs more than its use. `U(d * (V x))` beside the layer's output would be cheaper there, "
        "but it is rounded differently, so that a training would give other figures than before."
    ),
    "bare forward passes in batches": (
        "*Batches of the evaluation.* On a CPU, the bare forward passes of the demo's small denoiser are faster in "
        "larger batches. A trial's figures gain less, because most of their passes are those of sampling with "
        "guidance, whose batches are twice as large already. So 32 stays the default; `--eval_batch_size` changes it, "
        "and the figures do not depend on it, but for rounding."
    ),
    "images and captions encoded": (
        "*Encoding.* Beside the encoders, an image is decoded from its file, its pixels are hashed to find copies, "
        "and latents and conditions are written to the cache. The demo's autoencoder is so small that this is seen."
    ),
    "an adapter loaded and called once": (
        "*Loading.* A profile shows PEFT's search for the layers to replace, which both sides have, and for SV-DIFF "
        "the reading of each weight to find its decomposition: a digest of its values, then the file. Decompositions "
        "of weights with fewer than 128 rows or columns are computed."
    ),
    "a trial by": (
        "*A trial.* The demo's autoencoder and text encoder are so small that encoding each batch anew costs little. "
        "Most of a trial by the default objectives are its training steps, which both sides make. Beside Stable "
        "Diffusion's encoders, and 256 images of 25 guided steps for fid, there is more to save."
    ),
    "training step": (
        "*The training step.* Beside forward, backward and AdamW, the trainer reads the rows of the batch, draws "
        "noise and timesteps with a generator for each row, clips the gradients, steps the schedule, and calls "
        "callbacks."
    ),
}
"""Why a goal is missed, and what a profile says, by the beginning of the row's name."""


def verdict(row: Row) -> str:
    """Whether the goal is kept: `kept` and `missed` when the whole interval says so."""
    if row["high"] <= row["goal"]:
        return "kept"
    return "missed" if row["low"] > row["goal"] else "within" if row["ratio"] <= row["goal"] else "open"


def seconds(value: float) -> str:
    """A duration in its unit."""
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def amount(value: float, row: Row) -> str:
    """What was measured, in its unit: seconds unless the row names another."""
    return f"{value:.0f} {row['unit']}" if "unit" in row else seconds(value)


def render(content: dict[str, Any]) -> str:
    """The page: a table for each machine."""
    lines = [
        "# How fast it is",
        "",
        f"`{content['command']}` on the machine at hand; the same command measures on a GPU, if there is one.",
        "",
        "Both sides run in one process and take turns, so that what else runs on the machine slows both. Medians, and "
        "their ratio with its 95 % interval, for which pairs are resampled. On a CPU, seconds are those that the "
        "process computed, with one thread; on a GPU, those on the wall once the GPU has finished. Memory is the peak "
        "beyond what a process held when it had loaded its libraries, each side in processes of its own.",
        "",
        "The demo has batches of 32. Stable Diffusion 1.5's layout is its denoiser with random weights: on a GPU at "
        "its own size with batches of 8, on a CPU with a fifth of its channels, latents of 32 x 32 and batches of 1.",
        "",
        "A goal is *kept* or *missed* when the whole interval says so. If the interval reaches to both sides of the "
        "goal, *within* says that the ratio keeps it, and *open* that the ratio does not.",
        "",
    ]
    for machine, measured in content["machines"].items():
        loads = sorted(row["load"] for row in measured)
        lines += [f"## {machine}", "", f"Load average {loads[0]:.1f} to {loads[-1]:.1f}.", ""]
        cells = []
        for row in measured:
            (us, ours), (them, theirs) = row["medians"].items()
            ratio = f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
            sides = [f"{us}: {amount(ours, row)}", f"{them}: {amount(theirs, row)}"]
            cells.append([row["name"], *sides, str(row["pairs"]), ratio, f"at most {row['goal']:g}", verdict(row)])
        lines += table(["what", "this package", "beside", "pairs", "ratio (95 %)", "goal", ""], cells)
        missed = [row["name"] for row in measured if verdict(row) in ("missed", "open")]
        reasons = [text for start, text in REASONS.items() if any(name.startswith(start) for name in missed)]
        lines += [line for text in reasons for line in (text, "")]
    lines += ["How time and memory grow with images, blocks and trials: [growth.md](results/growth.md)."]
    return "\n".join(lines).rstrip() + "\n"
