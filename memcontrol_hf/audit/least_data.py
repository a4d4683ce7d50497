"""The least number of images with which a release gate can pass at all, by the width of the measures' intervals."""

from collections.abc import Mapping
from dataclasses import asdict

from ..metrics.intervals import clopper_pearson
from ..metrics.membership_inference import auc_interval
from ..report.verdict import violation
from .settings import Figure


def cannot_pass(limits: Mapping[str, Mapping[str, float]], train: int, held_out: int, prompts: int) -> list[str]:
    """The measures by which even a model that learned nothing would not pass a gate, for want of images.

    Such a model has a membership AUC of .5, a rate of 0, and a share of .5 of images that are nearer to the training
    images, and its controls have the same.

    Args:
        limits (`dict`): limits of a gate, as [`~memcontrol_hf.report.load_gate`] reads them.
        train, held_out (`int`): number of different images of each set.
        prompts (`int`): number of training captions that the audit samples.
    """
    rows = min(train, prompts)
    harmless = {"extraction": (0.0, *clopper_pearson(0, rows)), "copy_share": (0.0, *clopper_pearson(0, rows))}
    harmless |= {"nearest_share": (0.5, *clopper_pearson(rows / 2, rows))}
    harmless |= {"membership_auc": (0.5, *auc_interval(0.5, train, held_out))}
    found = []
    for name, of_measure in limits.items():
        figure = next((asdict(Figure(*of)) for start, of in harmless.items() if name.startswith(start)), None)
        if figure is None:  # no interval is known beforehand
            continue
        figures = dict.fromkeys(("model", "frozen_base", "held_out_as_train"), figure)
        if any(violation(name, kind, bound, figures) for kind, bound in of_measure.items()):
            found.append(name)
    return found


def least_images(limits: Mapping[str, Mapping[str, float]], held_out_per_train: float = 1.0) -> tuple[int, int] | None:
    """The least number of training and held-out images with which a gate can pass; see [`cannot_pass`].

    Args:
        limits (`dict`): limits of a gate.
        held_out_per_train (`float`): number of held-out images for each training image.

    Returns:
        The number of training images, all of whose captions are sampled, and of held-out images; `None` when even a
        million images would not do.
    """

    def enough(train: int) -> bool:
        return not cannot_pass(limits, train, max(1, round(held_out_per_train * train)), train)

    high = 2
    while not enough(high):
        high *= 2
        if high > 10**6:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high, max(1, round(held_out_per_train * high))
