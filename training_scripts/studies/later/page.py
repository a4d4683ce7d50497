"""The page of the controls of later attacks: from scores, distances and shares to tables."""

import statistics
from typing import Any

import torch
from scipy.stats import binom

from audit_controls import BASE, HALF, MEMORIZING
from audit_controls import COMMAND as CONTROLS
from common.pages import table
from memcontrol_hf.audit import FALSE_ALARMS
from memcontrol_hf.metrics import clopper_pearson, dataset_inference, membership

DRAWS = 20
"""Divisions of the held-out images in two halves, one of which stands in the place of the training images."""

SEARCHED = 16
"""Training images for which an embedding is searched, and held-out images; for the false alarms twice as many."""


def halves(count: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the two halves of `count` held-out images in one draw."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(number))
    return order[: count // 2], order[count // 2 :]


def with_calibrated(scores: dict[str, Any], base: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The scores as tensors, with those of the loss calibrated by the frozen base."""
    tensors = {attack: [torch.tensor(of_set).double() for of_set in of_sets] for attack, of_sets in scores.items()}
    calibrated = [mine - torch.tensor(of_base).double() for mine, of_base in zip(tensors["loss"], base["loss"])]
    return tensors | {"calibrated": calibrated}


def figures_of(members: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, Any]:
    """AUC and rate of each attack, and the p-value of all together."""
    found: dict[str, Any] = {}
    for attack, of_members in members.items():
        outcome = membership(of_members, others[attack])
        found[attack] = {"auc": outcome.auc, "interval": outcome.interval, "tpr": outcome.tpr_at_fpr(FALSE_ALARMS)}
    columns = [torch.stack(list(scores.values()), dim=1) for scores in (members, others)]
    found["p"] = dataset_inference(*columns)
    return found


def controls(content: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The membership figures of both models, and of each draw."""
    memorizing, base = (content[name]["scores"] for name in (MEMORIZING, BASE))
    scores = {
        MEMORIZING: with_calibrated(memorizing, base),
        BASE: {attack: [torch.tensor(of).double() for of in of_sets] for attack, of_sets in base.items()},
    }
    models = {
        name: figures_of(*({attack: of[side] for attack, of in of_model.items()} for side in (0, 1)))
        for name, of_model in scores.items()
    }
    held_out = {attack: of[1] for attack, of in scores[MEMORIZING].items()}
    draws = [
        figures_of(*({attack: of[part] for attack, of in held_out.items()} for part in halves(2 * HALF, number)))
        for number in range(DRAWS)
    ]
    return models, draws


def render(content: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# The controls of later attacks",
        "",
        f"`{content['settings']['command']}`",
        "",
        f"The models of [the audit's controls](../audit_controls.md) (`{CONTROLS}`), and the attacks that joined the "
        "audit after these were measured. The earlier attacks stand beside them. No limit of the gate names the later "
        "attacks.",
        "",
        *membership_section(content),
        *embedding_section(content),
        *copies_section(content),
    ]
    return "\n".join(lines).rstrip() + "\n"


def membership_section(content: dict[str, Any]) -> list[str]:
    """The attacks on single images, and the test of all together."""
    models, draws = controls(content)
    attacks = [name for name in models[MEMORIZING] if name != "p"]
    allowed, nominal = int(binom.ppf(0.99, DRAWS, 0.05)), (int(HALF * FALSE_ALARMS) + 1) / (HALF + 1)
    fires = [
        [attack, *(_auc(of[attack]) if attack in of else "no meaning" for of in models.values())] for attack in attacks
    ]
    fires.append(["all together, p-value", *(f"{of['p']:.2g}" for of in models.values())])
    alarms = []
    for attack in attacks:
        outside = sum(not of[attack]["interval"][0] <= 0.5 <= of[attack]["interval"][1] for of in draws)
        rate, tried = statistics.fmean(of[attack]["tpr"] for of in draws), HALF * DRAWS
        low, high = clopper_pearson(rate * tried, tried)
        alarms.append(
            [
                attack,
                f"{statistics.fmean(of[attack]['auc'] for of in draws):.3f}",
                f"{outside} of {DRAWS}",
                f"{rate:.4f} ({low:.4f} to {high:.4f})",
            ]
        )
    small = sum(of["p"] < 0.05 for of in draws)
    return [
        "## Membership: positive and negative control",
        "",
        "`secmi_several` is SecMI at three timesteps of one trajectory, fixed beforehand; `sima` is SimA, one call of "
        "the denoiser; `semantic_noise` inverts the image to noise and samples from it; `calibrated` is the loss of "
        "the frozen base minus the loss; the test of all scores together (`dataset_inference_p`) is after CDI.",
        "",
        *table(["membership AUC by", *(f"{name} (95 %)" for name in models)], fires),
        f"## Membership: false alarms, held-out images as training images, {DRAWS} draws",
        "",
        f"One half of the held-out images, {HALF}, against the other, by the scores of the memorizing model. All "
        "draws divide the same scores, so they are not independent; the nominal figures treat them as independent. At "
        f"a nominal level, at most {allowed} of {DRAWS} intervals leave .5 out in 99 of 100 such studies, and the "
        f"rate is {nominal:.4f}.",
        "",
        *table(["attack", "mean AUC", "draws whose 95 % interval leaves .5 out", "rate at 1 % false alarms"], alarms),
        f"The test of all scores together has a p-value below .05 in {small} of {DRAWS} draws; the smallest is "
        f"{min(of['p'] for of in draws):.2g}.",
        "",
    ]


def embedding_section(content: dict[str, Any]) -> list[str]:
    """The extraction by optimized embeddings."""
    found = {name: content[name]["search"] for name in (MEMORIZING, BASE)}
    rows = []
    for name, of in found.items():
        train, held_out = (-torch.tensor(of[key]).double() for key in ("train", "held_out"))
        outcome = membership(train, held_out)
        rows.append([name, _auc({"auc": outcome.auc, "interval": outcome.interval}), _share(train), _share(held_out)])
    distances, aucs, outside, extracted = -torch.tensor(found[MEMORIZING]["held_out"]).double(), [], 0, []
    for number in range(DRAWS):
        half, other = halves(len(distances), number)
        outcome = membership(distances[half], distances[other])
        aucs.append(outcome.auc)
        outside += not outcome.interval[0] <= 0.5 <= outcome.interval[1]
        extracted.append((distances[half] >= -1).double().mean().item())
    return [
        "## Extraction by optimized embeddings",
        "",
        f"For {SEARCHED} training images, the 12 canaries first, and {2 * SEARCHED} held-out images ({SEARCHED} by "
        "the base) an embedding was searched, 50 steps of 8 draws from the image's caption, and 4 images were sampled "
        "from it. The AUC says in how many of all pairs of a training and a held-out image the training image comes "
        "back nearer; the rates are the shares of images that come back within half the distance to held-out images.",
        "",
        *table(["model", "AUC (95 %)", "training images extracted", "held-out images extracted"], rows),
        f"False alarms: {SEARCHED} of the held-out images against the other {SEARCHED}, on the memorizing model, in "
        f"{DRAWS} draws: mean AUC {statistics.fmean(aucs):.3f}, {outside} of {DRAWS} intervals leave .5 out, and "
        f"{statistics.fmean(extracted):.4f} of the images are called extracted.",
        "",
    ]


def copies_section(content: dict[str, Any]) -> list[str]:
    """The partial copies."""
    subjects = {
        f"images of the {MEMORIZING}": content[MEMORIZING]["copies"]["generated"],
        f"images of the {BASE}": content[BASE]["copies"]["generated"],
        "the same with a pasted quarter of a training image": content[BASE]["copies"]["pasted"],
    }
    measures = ("partial_copy_share", "copy_share", "extraction_rate_calibrated")
    rows = [[name, *(_with_interval(*of[measure]) for measure in measures)] for name, of in subjects.items()]
    alarms = content[MEMORIZING]["copies"]["alarms"]
    low, high = clopper_pearson(sum(alarms) * HALF, HALF * DRAWS)
    return [
        "## Partial copies",
        "",
        "4 images from the caption of each of 92 training images. `partial_copy_share` looks for a quarter of a "
        "training image, `copy_share` and `extraction_rate_calibrated` for the whole.",
        "",
        *table(["", *(f"{measure} (95 %)" for measure in measures)], rows),
        f"False alarms: one half of the held-out images, {HALF}, as training images, and an image of the memorizing "
        f"model from each of their captions, in {DRAWS} draws: {statistics.fmean(alarms):.4f} ({low:.4f} to "
        f"{high:.4f}) of the images are called partial copies, of nominally {FALSE_ALARMS}.",
    ]


def _auc(of: dict[str, Any]) -> str:
    return _with_interval(of["auc"], *of["interval"])


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _share(scores: torch.Tensor) -> str:
    found = int((scores >= -1).sum())
    low, high = clopper_pearson(found, len(scores))
    return f"{found} of {len(scores)} ({low:.3f} to {high:.3f})"
