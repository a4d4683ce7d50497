"""The page of the benchmarks, rendered from what they measured."""

from collections.abc import Callable
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
        "*Encoding.* What comes on top of the encoders, by a profile with other work on the machine, in percent of "
        "their time: decoding the image files 4.7, making squares of the images 1.4, writing latents and conditions "
        "to the cache 1.4, a digest of the encoders' weights 1.2, digests of the pixels to find copies 1.2, a "
        "checksum of the file and the column of row numbers 0.5, the rest of `datasets.map` 1.9. The bare encoders "
        "have their pixels already. Only the decoding is large, and it cannot be left out. Beside Stable Diffusion's "
        "autoencoder, which is far larger than the demo's, all this is small."
    ),
    "an adapter loaded and called once": (
        "*Loading.* A profile shows PEFT's search for the layers to replace, which both sides have, and for SV-DIFF "
        "the reading of each weight to find its decomposition: a digest of its values, then the file. Decompositions "
        "of weights with fewer than 128 rows or columns are computed."
    ),
    "a trial by default objectives": (
        "*A trial.* The demo's autoencoder and text encoder are so small that encoding each batch anew costs little. "
        "Most of a trial by the default objectives are its training steps, which both sides make. Beside Stable "
        "Diffusion's encoders there is more to save."
    ),
    "a trial by fid and noise norm": (
        "*A trial by fid and noise norm.* By a profile, 44 % of this package's trial are the training steps and 30 % "
        "the sampling of the images of fid: the published order has both, too. The other 25 % are the noise norm, "
        "which the published order has for 4 %: it measures the 192 validation images at one random timestep, where "
        "this package measures the training images as well, 320 images in all, at 5 fixed timesteps, so that "
        "trials can be compared. The published order in turn spends 20 % on encoding images and captions in "
        "each step and each validation batch, which this package does once. The two nearly cancel out on the demo, "
        "whose encoders are small."
    ),
    "peak memory, screening, Stable": (
        "*Memory of a screening.* A screening holds two more copies of what is trained: the adapters that the trainer "
        "had before, which are put back in the end, and in a probed step the parameters before the step, which the "
        "probe multiplies with gradients. With attention weights a copy is large: 40 MiB at this layout, so that both "
        "make the difference between the two sides. With LoRA or SV-DIFF a copy is a small part of that."
    ),
    "training step": (
        "*The training step.* Beside forward, backward and AdamW, the trainer clips the gradients, draws noise and "
        "timesteps with a generator for each row, reads the rows of the batch, steps the schedule, and calls "
        "callbacks. By a profile all this is 3 % of a step of the demo with LoRA: clipping 1.0, draws 1.0, rows 0.3, "
        "the rest 0.8."
    ),
}
"""Why a goal is missed, and what a profile says, by the beginning of the row's name."""


def whole_search(row: Row, rows: dict[str, Row]) -> str:
    """Of what the row of a whole search is composed."""
    trials, searches = row["trials"], row["searches"]
    text = (
        f"*A whole search.* The row is composed, not measured as a whole. On the demo, plain random search has a "
        f"hypervolume of loss and membership AUC after {trials['published order']} trials. That is the yardstick, so "
        f"the published order needs {trials['published order']} trials by definition. A screened search comes as far "
        f"after {trials['screened']:g} trials, the screening counted as 1.5 (median of {searches['all']} real "
        "searches: [real_searches.md](results/real_searches.md)). Both numbers are multiplied with the seconds of a "
        "trial from the row *a trial by default objectives*. The interval resamples the searches and the pairs of "
        f"trials; {searches['never']} of the searches never came as far and counts as longer than all others. What "
        "it leaves out: that the yardstick itself comes from two random searches, and that the real searches train "
        "attention weights for 40 steps, where the row of a trial has SV-DIFF for 50."
    )
    if published := rows.get("a trial by fid and noise norm, the demo"):
        ratio = trials["screened"] / trials["published order"] * published["ratio"]
        text += (
            " With the published objectives on this package's side, fid and noise norm, the ratio would be larger: "
            f"{trials['screened']:g} / {trials['published order']} x {published['ratio']:.3g} = "
            f"{ratio:.3f}, which {'keeps' if ratio <= row['goal'] else 'misses'} the goal, and that only if as many "
            "trials were enough, which was not measured."
        )
    return text


def compiling(row: Row, rows: dict[str, Row]) -> str:
    """What `torch_compile` costs to start, and after how many steps it pays."""
    ours, theirs = row["medians"].values()
    text = (
        "*Compiling.* `--trainer_args '{\"torch_compile\": true}'` compiles the denoiser with its adapter in the "
        f"first step. With an empty cache of the compiler and one thread, this step took {row['start']:.0f} s on the "
        f"wall, at a load average of {row['load']:.1f}. "
    )
    if ours >= theirs:
        return text + "The steps after it are no faster, so it never pays."
    steps = row["start"] / (theirs - ours)
    return text + (
        f"Each step after it saves {seconds(theirs - ours)}, so it pays after about {float(f'{steps:.2g}'):.0f} "
        "steps. A trial of the demo has 50 steps, and each mask is another model, which is compiled anew. On a CPU, "
        "nobody should compile in a search, and in a single training only if it is longer than that."
    )


NOTES: dict[str, Callable[[Row, dict[str, Row]], str]] = {
    "a whole search, composed": whole_search,
    "training step with torch_compile": compiling,
}
"""What is said of a row in any case, from the row and all others, by the beginning of the row's name."""


def verdict(row: Row) -> str:
    """Whether the goal is kept: `kept` and `missed` when the whole interval says so; empty without a goal."""
    if row["goal"] is None:
        return ""
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
            goal = "none" if row["goal"] is None else f"at most {row['goal']:g}"
            cells.append([row["name"], *sides, str(row["pairs"]), ratio, goal, verdict(row)])
        lines += table(["what", "this package", "beside", "pairs", "ratio (95 %)", "goal", ""], cells)
        missed = [row["name"] for row in measured if verdict(row) in ("missed", "open")]
        reasons = [text for start, text in REASONS.items() if any(name.startswith(start) for name in missed)]
        by_name = {row["name"]: row for row in measured}
        notes = [
            note(row, by_name) for row in measured for start, note in NOTES.items() if row["name"].startswith(start)
        ]
        lines += [line for text in reasons + notes for line in (text, "")]
    lines += ["How time and memory grow with images, blocks and trials: [growth.md](results/growth.md)."]
    return "\n".join(lines).rstrip() + "\n"
