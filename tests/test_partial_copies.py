"""Parts of training images in generated images: found where they were pasted, and nowhere else."""

import math

import evaluate
import pytest
import torch
from torch.nn import functional as F

from memcontrol_hf import metrics
from memcontrol_hf.images import tile_distances


def pictures(count: int, seed: int, side: int = 64) -> torch.Tensor:
    """Smooth images with a black border of an eighth of the side, which all of them have in common."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    edge = side // 8
    framed = torch.zeros_like(images)
    framed[..., edge:-edge, edge:-edge] = images[..., edge:-edge, edge:-edge]
    return framed


def with_a_quarter_of(train: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The images, each with a quarter of a training image at its place."""
    pasted, half = images.clone(), images.shape[-1] // 2
    for row, image in enumerate(pasted):
        y, x = half * (row % 2), half * (row // 2 % 2)
        image[:, y : y + half, x : x + half] = train[row % len(train), :, y : y + half, x : x + half]
    return pasted


def test_a_pasted_quarter_is_found_where_whole_images_hide_it():
    train, held_out, fresh = pictures(40, seed=1), pictures(150, seed=2), pictures(60, seed=3)
    pasted = with_a_quarter_of(train, fresh)
    noisy = (pasted + 0.02 * torch.randn(pasted.shape, generator=torch.Generator().manual_seed(4))).clamp(0, 1)
    found, innocent = (metrics.partial_copies(images, train, held_out) for images in (noisy, fresh))
    assert found.share == 1 and found.nearest.tolist() == [row % 40 for row in range(60)]
    assert innocent.share <= 0.05 and found.threshold == innocent.threshold

    flat = [images.flatten(1) for images in (noisy, train, held_out)]
    assert metrics.copy_similarity(*flat).share < 0.2
    to_own = tile_distances(noisy, train)[range(60), found.nearest]
    to_others = tile_distances(noisy, held_out).amin(1)
    assert (to_own > to_others).double().mean() > 0.8, "by the most different tile, other images are nearer"


def test_held_out_images_as_training_images_give_the_nominal_false_alarms():
    alarms = []
    for seed in range(5):
        half, other, fresh = pictures(100, 3 * seed), pictures(100, 3 * seed + 1), pictures(200, 3 * seed + 2)
        alarms.append(metrics.partial_copies(fresh, half, other, false_alarms=0.05).share)
    assert sum(alarms) / 5 < 0.08


def test_the_relative_distance_follows_its_formula():
    train, held_out = pictures(5, seed=1, side=32), pictures(6, seed=2, side=32)
    result = metrics.partial_copies(held_out[:1], train, held_out[1:])
    expected = math.inf
    for y in range(0, 17, 4):
        for x in range(0, 17, 4):
            window, *others = (of[..., y : y + 16, x : x + 16].flatten(1).double() for of in (held_out, train))
            if window[0].view(3, -1).var(1).mean().sqrt() < 0.02:
                continue
            to_train = (others[0] - window[0]).norm(dim=1).min()
            to_held_out = (window[1:] - window[0]).norm(dim=1).min()
            expected = min(expected, (to_train / (to_held_out + 0.02 * math.sqrt(768))).item())
    assert result.distances.item() == pytest.approx(expected, rel=1e-4)


def test_what_all_images_have_in_common_is_no_copy():
    train, held_out = pictures(20, seed=1), pictures(60, seed=2)
    blank = torch.zeros_like(train[:4])
    result = metrics.partial_copies(blank, train, held_out)
    assert result.share == 0 and result.distances.isinf().all()


def test_prompts_and_persons_are_the_draws():
    train, held_out = pictures(20, seed=1), pictures(60, seed=2)
    images = torch.cat([with_a_quarter_of(train, pictures(4, seed=3)), pictures(8, seed=4)])
    by_prompt = metrics.partial_copies(images, train, held_out, per_prompt=4)
    by_person = metrics.partial_copies(images, train, held_out, per_prompt=4, persons=[0, 1, 1])
    assert by_prompt.share == pytest.approx(1 / 3) and by_person.share == pytest.approx(1 / 2)
    assert by_prompt.interval == metrics.clopper_pearson(1, 3) and by_person.interval == metrics.clopper_pearson(1, 2)


def test_several_images_of_a_held_out_person_do_not_call_other_images_copies():
    """A held-out image is compared with those of other persons: beside its own person's, all others look far away."""
    train, people, fresh = pictures(20, seed=1), pictures(40, seed=2), pictures(60, seed=3)
    several = people.repeat_interleave(3, dim=0)
    several = (several + 0.01 * torch.randn(several.shape, generator=torch.Generator().manual_seed(4))).clamp(0, 1)
    owners = [row // 3 for row in range(len(several))]
    careless = metrics.partial_copies(fresh, train, several)
    result = metrics.partial_copies(fresh, train, several, held_out_persons=owners)
    assert careless.share > 0.9 and result.share <= 0.05
    assert result.threshold == pytest.approx(metrics.partial_copies(fresh, train, people).threshold, rel=0.1)
    assert metrics.partial_copies(with_a_quarter_of(train, fresh), train, several, held_out_persons=owners).share == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"false_alarms": 1.0}, "false_alarms must lie between 0 and 1, but got 1.0"),
        ({"held_out": pictures(1, seed=2)}, r"held_out: images must be \[N, 3, H, W\], N > 1, but are \[1, 3"),
        ({"generated": pictures(2, seed=2)[:, :1]}, r"generated: images must be \[N, 3, H, W\]"),
        ({"train": torch.full((2, 3, 8, 8), math.nan)}, "train: images must lie in"),
        ({"held_out": pictures(9, seed=1)}, "9 of 9 held-out images hold a copy of a part of a training image"),
        ({"held_out": torch.zeros(9, 3, 8, 8)}, "9 have no contrast"),
        ({"held_out_persons": [0] * 9}, "9 held-out images, but has 9 entries of 1 persons"),
        ({"held_out_persons": [0, 1]}, "9 held-out images, but has 2 entries of 2 persons"),
    ],
)
def test_what_cannot_be_judged_is_refused(change, message):
    arguments = {"generated": pictures(2, seed=0), "train": pictures(9, seed=1), "held_out": pictures(9, seed=2)}
    with pytest.raises(ValueError, match=message):
        metrics.partial_copies(**{**arguments, **change})


def test_the_module_gives_what_the_function_gives():
    sets = pictures(4, seed=0), pictures(5, seed=1), pictures(6, seed=2)
    result = metrics.partial_copies(*sets)
    module = evaluate.load(metrics.path("partial_copies"))
    values = module.compute(predictions=sets[0].tolist(), train=sets[1], held_out=sets[2].tolist())
    assert values["partial_copy_share"] == result.share
    assert values["partial_copy_threshold"] == pytest.approx(result.threshold, rel=1e-4)
