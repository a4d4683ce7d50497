"""The memorization report: figures of the tuned model beside those of the frozen base and of the all-on mask.

It holds aggregates only: no image, caption, file name or id of the data.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml

from .search import complete_trials, is_frozen_base, pareto_front
from .search_space import block_map

SCHEMA_VERSION = 2
REPORT_SCHEMA = Path(__file__).with_name("report_schema.json")
"""The JSON Schema of a report."""
FROZEN_BASE, ALL_ON, SELECTED = "frozen base", "all blocks", "selected mask"
NOT_APPLICABLE = "not applicable"
"""How the note of a measure begins that has no meaning for a model; a gate passes over it."""
_PACKAGES = ("memcontrol_hf", "torch", "diffusers", "transformers", "peft", "optuna")


@dataclass
class MemorizationReport:
    """What was tuned, how it was found, what was measured, and what the attacks found.

    A fine-tune fills all of it; an audit of somebody else's model fills `audit` alone.

    Args:
        base_model (`str`): name of the pipeline that was tuned.
        method (`str`): the PEFT method.
        mask (`dict[str, bool]`): of the selected blocks.
        figures (`dict[str, dict[str, float]]`):
            For `"frozen base"`, `"all blocks"` and `"selected mask"`, each trained equally long: `trainable_percent`,
            `trainable_parameters`, and what [`MemControlTrainer.evaluate`] returns, against held-out images.
        training (`dict`): learning rate, steps, batch size, resolution, seed, ...; `mitigations`, and where there are
            any `sampling_mitigations`, `stopped_at_step` (of each run that was stopped early) and `dp_sgd` (what
            [`MemControlTrainer.privacy`] says of the selected mask's run).
        images (`dict[str, int]`): rows and different images of each split.
        encoder (`str`): whose features `fid` and `amd` use.
        search (`dict`, *optional*): the study; `None` when the mask was given.
        audit (`dict`, *optional*): what [`audit_memorization`] found.
        gate (`dict`, *optional*): what [`MemorizationReport.judge`] decided.
        command (`str`, *optional*): that made it, without what names a place or a person's data.
        card (`dict`):
            What the card says beside that, each where it is known: `base_revision` of the base model, `hub_model_id`
            and `revision` of a push, else the `location` of the folder in the loading snippet, `denoiser` (the
            pipeline's attribute), `example_inputs` of the pipeline (`prompt`, `class_labels` or `batch_size`),
            `license`, `datasets` (public ones), `run_url` (of the tracker), and `export` (what
            [`~memcontrol_hf.export.export`] made of the adapter).
        versions (`dict[str, str]`): of the packages.
    """

    base_model: str = ""
    method: str = ""
    mask: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    encoder: str = ""
    search: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    command: str | None = None
    weights: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in _PACKAGES})
    schema_version: int = SCHEMA_VERSION

    def to_json(self, path: str | Path) -> None:
        """Write the report."""
        content = json.dumps(asdict(self), indent=2, allow_nan=False)
        Path(path).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "MemorizationReport":
        """Read a report.

        Raises:
            ValueError: when the file holds a report of another version, or none.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no memorization report: {error}") from None
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise ValueError(f"{path} has report version {found!r}, but this package reads {SCHEMA_VERSION}")
        return cls(**content)

    def judge(self, limits: Mapping[str, Mapping[str, float]]) -> bool:
        """Apply a release gate to the audit, and keep the verdict in `gate`.

        Args:
            limits (`dict`): as [`load_gate`] reads them.

        Returns:
            `bool`: whether every limit is kept. What could not be measured is not kept.
        """
        if self.audit is None:
            raise ValueError("there is no audit to judge: run audit_memorization first")
        measured = self.audit["measures"]
        self.gate = {"limits": {k: dict(v) for k, v in limits.items()}, "failures": []}
        for name, limit in limits.items():
            figures = measured.get(name) or {}
            for kind, bound in limit.items():
                reason = _violation(name, kind, bound, figures)
                if reason and reason not in self.gate["failures"]:
                    self.gate["failures"].append(reason)
        self.gate["passed"] = not self.gate["failures"]
        return self.gate["passed"]

    def privacy(self) -> str | None:
        """What the differentially private training guarantees, in words; `None` without one."""
        spent = self.training.get("dp_sgd")
        if spent is None:
            return None
        terms = (
            f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g} for each row of the training data "
            f"({spent['accountant']}: noise multiplier {spent['noise_multiplier']:.3g}, gradients cut to the norm "
            f"{spent['max_grad_norm']:g}, sampling rate {spent['sample_rate']:.3g}, {spent['steps']} steps)"
        )
        if not spent["says_something"]:
            return (
                f"Too little noise: the training was differentially private with {terms}, but an epsilon above "
                f"{spent['epsilon_limit']:g} guarantees next to nothing."
            )
        looked = "by the search, which trained" if self.search else "if it was made by training"
        return (
            f"The training was differentially private: {terms}. An image in several rows, or a person with several "
            "images, is protected less. This covers the adapter's weights, while the key of the noise is kept secret. "
            f"It does not cover the figures of this report, nor the choice of mask and learning rate, {looked} on "
            "the same images."
        )

    def table(self) -> list[list[str]]:
        """The figures as rows of text, the head first."""
        head = ["", "trainable %", "fid ↓", "amd ↑ (held-out)", "membership AUC ↓ (95 %)", "noise norm (held-out)"]
        rows = [
            [
                name,
                f"{f['trainable_percent']:.3g}",
                f"{f['fid']:.2f}",
                f"{f['amd']:.4f} ({f['amd_held_out']:.4f})",
                f"{f['membership_auc']:.3f} ({f['membership_auc_low']:.3f} to {f['membership_auc_high']:.3f})",
                f"{f['noise_norm']:.3f} ({f['noise_norm_held_out']:.3f})" if "noise_norm" in f else NOT_APPLICABLE,
            ]
            for name, f in self.figures.items()
        ]
        return [head, *rows]

    def audit_table(self) -> list[list[str]]:
        """The audit's measures as rows of text, the head first."""
        head = ["", "model (95 %)", "frozen base", "held-out as train"]
        return [
            head,
            *(
                [name, *(_cell(of.get(who), who == "model") for who in ("model", "frozen_base", "held_out_as_train"))]
                for name, of in self.audit["measures"].items()
            ),
        ]

    def summary(self) -> str:
        """What was measured as aligned tables, with the canaries and the verdict."""
        parts = []
        if self.figures:
            parts.append(_aligned(self.table()))
        if privacy := self.privacy():
            parts.append(privacy)
        if self.audit is not None:
            parts.append(_aligned(self.audit_table()))
            canaries = self.audit["canaries"]
            found = ", ".join(f"{name} {n['caught']} of {n['of']}" for name, n in canaries["caught"].items())
            parts.append(
                f"canaries (training images that are repeated): {found or 'none attacked'}"
                if canaries["planted"]
                else "no canaries: no training image is repeated, so the attacks were not seen to fire"
            )
        if self.gate is not None:
            parts.append("\n".join([f"gate: {'passed' if self.gate['passed'] else 'FAILED'}", *self.gate["failures"]]))
        return "\n\n".join(parts)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(figure: Mapping[str, Any] | None, interval: bool) -> str:
    if figure is None:
        return "not measured"
    if figure["value"] is None:
        return NOT_APPLICABLE if (figure.get("note") or "").startswith(NOT_APPLICABLE) else "not estimable"
    text = f"{figure['value']:.3f}"
    return f"{text} ({figure['low']:.3f} to {figure['high']:.3f})" if interval and figure["low"] is not None else text


# ---- the release gate ----

DEFAULT_GATE = Path(__file__).with_name("gate.yaml")
LIMITS = ("max", "min", "max_above_frozen_base", "max_above_held_out_as_train")
"""Kinds of limits; each on the bad end of the model's interval."""
MEASURES = (
    *(f"membership_{kind}_{by}" for by in ("loss", "secmi", "pia", "clid") for kind in ("auc", "tpr", "tpr_strict")),
    "extraction_rate",
    "extraction_rate_calibrated",
    "nearest_share",
    "copy_share",
    "copy_similarity",
    "copy_threshold",
    "amd",
    "amd_held_out",
    "c_t",
    "auth_pct",
    "trajectory_norm_auc",
    "trajectory_norm_auc_canaries",
    "fid",
    "kid",
    "precision",
    "recall",
    "clip_score",
)
"""What an audit can measure, and a gate can limit."""


def load_gate(path: str | Path = DEFAULT_GATE) -> dict[str, dict[str, float]]:
    """Read a gate file: YAML, for each measure of the audit its limits.

    Raises:
        ValueError: for what is no gate, an unknown measure or kind of limit, or a limit that is no finite number.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the gate {str(path)!r}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not content or not all(isinstance(limit, dict) for limit in content.values()):
        raise ValueError(f"{str(path)!r} is no gate: it must name measures, each with limits such as {{max: 0.05}}")
    for name, limit in content.items():
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r} in {str(path)!r}: use some of {', '.join(MEASURES)}")
        for kind, bound in limit.items():
            if kind not in LIMITS:
                raise ValueError(f"unknown limit {kind!r} of {name} in {str(path)!r}: use {', '.join(LIMITS)}")
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
                raise ValueError(f"the limit {kind} of {name} in {str(path)!r} must be a number, but is {bound!r}")
    return content


def _violation(name: str, kind: str, bound: float, figures: Mapping[str, Any]) -> str | None:
    """What is wrong, in one line."""
    model = figures.get("model")
    if model and (model.get("note") or "").startswith(NOT_APPLICABLE):
        return None
    if not model or model["value"] is None:
        return f"{name}: {(model or {}).get('note') or 'was not measured'}; what is not measured does not pass"
    end = model["low" if kind == "min" else "high"]
    end = model["value"] if end is None else end
    if kind == "min":
        return None if end >= bound else f"{name}: may be as low as {end:.3f}, below the limit {bound:g}"
    if kind == "max":
        return None if end <= bound else f"{name}: may be as high as {end:.3f}, above the limit {bound:g}"
    control = kind.removeprefix("max_above_")
    reference = figures.get(control)
    if not reference or reference["value"] is None:
        return f"{name}: the control {control} was not measured, so {kind} cannot be judged"
    excess = end - reference["value"]
    return (
        None
        if excess <= bound
        else f"{name}: may be {excess:.3f} above {control} ({reference['value']:.3f}), over the limit {bound:g}"
    )


def search_summary(study: optuna.Study, sampler: str, objectives: list[str]) -> dict[str, Any]:
    """A study as the report holds it: its objectives, and mask size and values of every finished trial."""
    front = {trial.number for trial in pareto_front(study)}
    trials = [
        {
            "number": trial.number,
            "values": trial.values,
            "learning_rate": trial.user_attrs["hyperparameters"]["learning_rate"],
            "blocks": sum(trial.user_attrs["hyperparameters"]["mask"].values()),
            "trainable_percent": trial.user_attrs["trainable_percent"],
            "on_front": trial.number in front,
        }
        for trial in complete_trials(study)
    ]
    ended = Counter(trial.state.name for trial in study.trials)
    return {
        "study_name": study.study_name,
        "sampler": sampler,
        "objectives": objectives,
        "directions": [d.name.lower() for d in study.directions],
        "failed_trials": ended["FAIL"],
        "pruned_trials": ended["PRUNED"],
        "trials": trials,
        "block_effects": block_effects(study),
    }


def block_effects(study: optuna.Study) -> dict[str, list[float]]:
    """What a block does to each objective: the mean over the finished trials with it on, minus that of the others.

    Blocks that were always on, or always off, are left out. Optuna's importances would not say which way.

    Returns:
        `dict[str, list[float]]`: block name -> one difference for each objective, in its units.
    """
    trials = complete_trials(study)
    masks = [t.user_attrs["hyperparameters"]["mask"] for t in trials]
    values = np.array([t.values for t in trials])
    effects = {}
    for name in masks[0] if masks else ():
        on = np.array([mask[name] for mask in masks])
        if on.any() and not on.all():
            effects[name] = (values[on].mean(0) - values[~on].mean(0)).tolist()
    return effects


def plot_search(
    study: optuna.Study,
    objectives: list[str],
    path: str | Path,
    selected: int | None = None,
    distances: Mapping[str, list[float]] | None = None,
) -> None:
    """Draw a search as a PNG: its trials with the Pareto front, their history, and its blocks over the denoiser.

    Args:
        selected (`int`, *optional*): number of the trial that was chosen.
        distances (`dict`, *optional*): of the audit, for a fourth panel; see [`plot_distances`].
    """
    figure, (front, history, blocks, *further) = _figure(3 if distances is None else 4)
    _draw_front(figure, front, study, objectives, selected)
    _draw_history(history, study, objectives, selected)
    _draw_blocks(figure, blocks, study, objectives, selected)
    if distances is not None:
        _draw_distances(*further, distances)
    figure.savefig(path)


def _draw_front(figure: Any, axes: Any, study: optuna.Study, objectives: list[str], selected: int | None) -> None:
    trials = complete_trials(study)
    front = sorted(pareto_front(study), key=lambda t: t.values)
    y = [t.values[min(1, len(objectives) - 1)] for t in trials]
    x = [t.values[0] if len(objectives) > 1 else t.number for t in trials]
    place = {t.number: (a, b) for t, a, b in zip(trials, x, y)}
    if len(objectives) > 1:
        axes.plot(*zip(*(place[t.number] for t in front)), color="tab:blue", lw=1, zorder=1, label="Pareto front")
    sizes = [t.user_attrs["trainable_percent"] for t in trials]
    points = axes.scatter(x, y, c=sizes, cmap="viridis_r", s=55, zorder=2, edgecolor="black", linewidth=0.5)
    figure.colorbar(points, label="trainable parameters (%)")
    for trial in trials:
        mask = trial.user_attrs["hyperparameters"]["mask"]
        name = FROZEN_BASE if is_frozen_base(trial) else ALL_ON if all(mask.values()) else None
        if name:
            axes.annotate(name, place[trial.number], xytext=(7, 7), textcoords="offset points", fontsize=9)
    if selected is not None:
        axes.scatter(*place[selected], s=190, facecolor="none", edgecolor="tab:red", linewidth=2, zorder=3)
        axes.annotate(
            "selected", place[selected], xytext=(9, -14), textcoords="offset points", fontsize=9, color="tab:red"
        )
    directions = [d.name.lower() for d in study.directions]
    better = {"minimize": "lower is better", "maximize": "higher is better"}
    if len(objectives) > 1:
        axes.set_xlabel(f"{objectives[0]} ({better[directions[0]]})")
        axes.legend(loc="best", fontsize=9)
    else:
        axes.set_xlabel("trial")
    axes.set_ylabel(f"{objectives[-1]} ({better[directions[-1]]})")
    axes.set_title(f"{len(trials)} trials of {study.study_name}")
    axes.margins(0.18, 0.12)
    axes.grid(alpha=0.3)


def _draw_history(axes: Any, study: optuna.Study, objectives: list[str], selected: int | None) -> None:
    """The objectives of each trial, one after the other: the first on the left axis, a second on the right."""
    trials = complete_trials(study)
    for i, (name, color) in enumerate(zip(objectives[:2], ("tab:blue", "tab:orange"))):
        side = axes.twinx() if i else axes
        side.plot([t.number for t in trials], [t.values[i] for t in trials], "o-", ms=4, lw=0.8, color=color)
        side.set_ylabel(name, color=color)
        side.tick_params(axis="y", colors=color)
    if selected is not None:
        axes.axvline(selected, color="tab:red", lw=1, ls="--", label="selected")
        axes.legend(fontsize=9)
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("History")
    axes.grid(alpha=0.3)


def _draw_blocks(figure: Any, axes: Any, study: optuna.Study, objectives: list[str], selected: int | None) -> None:
    """The blocks in the way of the data: which are selected, and the effect of each on the objectives."""
    effects = block_effects(study)
    masks = {t.number: t.user_attrs["hyperparameters"]["mask"] for t in complete_trials(study)}
    names = list(masks[min(masks)])
    signs = [1 if d.name == "MINIMIZE" else -1 for d in study.directions]
    rows = [[effects[n][i] * signs[i] if n in effects else math.nan for n in names] for i in range(len(objectives))]
    largest = [max((abs(v) for v in row if math.isfinite(v)), default=0) or 1 for row in rows]
    shades = [[value / most for value in row] for row, most in zip(rows, largest)]
    image = axes.imshow([[math.nan] * len(names), *shades], cmap="RdYlGn_r", vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(image, ticks=[-1, 1]).ax.set_yticklabels(["better\nwith it", "worse\nwith it"], fontsize=9)
    labels = ["selected", *(f"{name}\n(up to {most:.2g})" for name, most in zip(objectives, largest))]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    on = [place for place, name in enumerate(names) if selected is not None and masks[selected][name]]
    axes.bar(on, 0.7, width=0.8, bottom=-0.35, color="black")
    parts = block_map(dict.fromkeys(names, True))
    ends = np.cumsum([len(blocks) for _, blocks in parts])
    starts = ends - [len(blocks) for _, blocks in parts]
    axes.set_xticks((starts + ends - 1) / 2, [part for part, _ in parts], rotation=30, ha="right", fontsize=9)
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color="black", lw=1)
    axes.set_title("What a block does: mean of the trials with it, minus without")


def plot_distances(distances: Mapping[str, list[float]], path: str | Path) -> None:
    """Draw how near generated images are to training images and to as many held-out ones, as a PNG.

    Args:
        distances (`dict`): `edges` of the bins, and the counts `train` and `held_out`: `audit["distances"]`.
    """
    figure, (axes,) = _figure(1)
    _draw_distances(axes, distances)
    figure.savefig(path)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(7 * columns, 4.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _draw_distances(axes: Any, distances: Mapping[str, list[float]]) -> None:
    for name, color in (("train", "tab:red"), ("held_out", "tab:gray")):
        label = {"train": "training images", "held_out": "held-out images, as many"}[name]
        axes.stairs(distances[name], distances["edges"], fill=True, alpha=0.45, color=color, label=label)
    axes.set_xlabel("cosine distance to the nearest image of the set")
    axes.set_ylabel("generated images")
    axes.set_title("Generated images: how near to what was trained on")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def selected_blocks(mask: Mapping[str, bool]) -> list[str]:
    """Names of the blocks that a mask has on."""
    return [name for name, on in mask.items() if on]
