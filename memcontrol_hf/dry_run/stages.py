"""How many images the stages of a run train, measure and generate, counted in passes of an image through the denoiser.

The seconds of a pass differ by a factor of a thousand between machines, and are not estimated: time one, and multiply.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..audit import AuditSettings
from ..evaluation import SEMANTIC_NOISE_STEPS
from ..families import Family
from ..metrics.embedding_search import DRAWS, STEPS
from ..report.report import aligned

SECMI_PASSES, PIA_PASSES, SIMA_PASSES = 24, 2, 1
"""Forward passes of an image: SecMI's way with a step on and back at three timesteps; two noise predictions of PIA."""

NUM_TIMESTEPS = 5
"""Fixed timesteps of `loss`, `membership_auc` and `noise_norm`, as `eval_num_timesteps` has them by default."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Args:
        name (`str`): what it is.
        times (`int`): how often it is done; the other numbers are of one time.
        trained (`int`): images that pass forward and backward.
        generated (`int`): images that are generated.
        passes (`int`): forward passes that generate them and follow their trajectories.
        for_each (tuple of `str` and `int`): further forward passes for each image of a split, whose size is not known.
    """

    name: str
    times: int = 1
    trained: int = 0
    generated: int = 0
    passes: int = 0
    for_each: tuple[tuple[str, int], ...] = ()

    def total(self, **sizes: int) -> int:
        """Forward passes without gradient of all times, for splits of these sizes."""
        return self.times * (self.passes + sum(count * sizes[split] for split, count in self.for_each))


def figures_stage(
    family: Family,
    name: str,
    metrics: Collection[str],
    splits: Sequence[str],
    sampling: tuple[int, int, float],
    times: int = 1,
    trained: int = 0,
) -> Stage:
    """A training, if there is one, that is measured by the trainer's metrics.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        name (`str`): what the stage is.
        metrics (list of `str`): names in [`~memcontrol_hf.evaluation.METRICS`].
        splits (list of `str`): the two splits that are compared.
        sampling (tuple): number of images for `fid` and again for `amd`, sampling steps, and guidance scale.
        times (`int`), trained (`int`): as in [`Stage`].
    """
    num_images, inference_steps, guidance_scale = sampling
    generated = num_images * len({"fid", "amd"} & set(metrics))
    each = NUM_TIMESTEPS * bool({"loss", "membership_auc"} & set(metrics))
    each += 2 * NUM_TIMESTEPS * ("noise_norm" in set(metrics) - family.not_applicable.keys())
    passes = generated * inference_steps * _of_a_step(family, guidance_scale)
    return Stage(name, times, trained, generated, passes, tuple((split, each) for split in splits) if each else ())


def audit_stage(family: Family, settings: AuditSettings, base: bool = True) -> Stage:
    """The audit: the attacks on the model and on its frozen base, and on held-out images as if they were trained on.

    There are as many prompts and images of quality as the settings allow, which a small split may not have.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        settings ([`~memcontrol_hf.audit.AuditSettings`]): settings of the audit.
        base (`bool`): whether the frozen base is attacked, too.
    """
    subjects, of_a_step = 2 if base else 1, settings.inference_steps * _of_a_step(family, settings.guidance_scale)
    samples = settings.num_prompts * settings.images_per_prompt
    generated = (subjects + 1) * samples + subjects * settings.num_quality_images
    trajectories = 0 if "noise_norm" in family.not_applicable else 2 * settings.num_prompts * 2
    each = settings.num_timesteps * (1 if "clid" in family.not_applicable else 2)
    each += SECMI_PASSES + PIA_PASSES + SIMA_PASSES
    to_noise = (family.noise.trajectory(SEMANTIC_NOISE_STEPS, tokens=1).timesteps > 0).sum().item()
    each += to_noise + SEMANTIC_NOISE_STEPS * _of_a_step(family, settings.guidance_scale)
    searched = 0 if "embedding_attack" in family.not_applicable else 2 * settings.embedding_attack * (subjects + 1)
    generated += searched * settings.images_per_prompt
    calibration = settings.num_timesteps if base else 0  # losses of the base, with the noise of the control's halves
    passes = generated * of_a_step + (subjects + 1) * trajectories * settings.inference_steps
    for_each = (("training", subjects * each), ("held-out", (subjects + 1) * each + calibration))
    trained = searched * STEPS * DRAWS
    return Stage("audit", trained=trained, generated=generated, passes=passes, for_each=for_each)


def _of_a_step(family: Family, guidance_scale: float) -> int:
    """Forward passes of a sampling step for one image."""
    return family.guided_passes if guidance_scale > 1 else 1


def stages_table(stages: Sequence[Stage]) -> str:
    """The stages to print."""
    head = ["stage", "times", "trained", "generated", "passes", "and for each image of a split"]
    rows = [
        [
            stage.name,
            *(f"{count:,}" for count in (stage.times, stage.trained, stage.generated, stage.passes)),
            ", ".join(f"{split} {count}" for split, count in stage.for_each),
        ]
        for stage in stages
    ]
    text = (
        "images of each stage, one time: trained (forward and backward), generated, and forward passes of an image\n"
        "through the denoiser, which take as many times the seconds of one pass on your machine"
    )
    return f"{text}\n\n{aligned([head, *rows])}"
