"""Measures of quality and memorization beside independent implementations of their formulas."""

import importlib
import inspect
import math
import os
import pkgutil
from itertools import combinations

import evaluate
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from scipy.linalg import sqrtm
from scipy.stats import norm

import memcontrol_hf
from memcontrol_hf import metrics
from memcontrol_hf.families import family_of
from memcontrol_hf.metrics.denoiser_calls import both_predictions, draw_noise
from memcontrol_hf.randomness import seeded_generator


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_functions_stay_functions_when_every_module_is_imported():
    functions = {name: value for name in metrics.__all__ if inspect.isfunction(value := getattr(metrics, name))}
    assert {"amd", "fid", "membership", "noise_norm", "extraction"} <= functions.keys()
    for module in pkgutil.walk_packages(memcontrol_hf.__path__, "memcontrol_hf."):
        importlib.import_module(module.name)
    for name in metrics.MODULES:
        importlib.import_module(f"memcontrol_hf.metrics.evaluate_modules.{name}.{name}")
    assert {name: getattr(metrics, name) for name in functions} == functions


def test_amd_is_the_mean_cosine_distance_to_the_nearest():
    generated, train = features(7, 0).numpy(), features(9, 1).numpy()
    distances = [
        min(1 - g @ t / (np.linalg.norm(g) * np.linalg.norm(t)) for t in train) for g in generated.astype(float)
    ]
    assert metrics.amd(torch.tensor(generated), torch.tensor(train)) == pytest.approx(np.mean(distances), abs=1e-6)


def test_the_nearest_of_many_references_does_not_depend_on_the_chunks():
    generated, train = features(7, 0), features(50, 1)
    whole, chunked = (metrics.nearest_distances(generated, train, chunk=size) for size in (50, 3))
    torch.testing.assert_close(chunked, whole)


def test_a_copy_is_at_distance_zero_and_a_stranger_is_not():
    train = features(9, 1)
    assert metrics.amd(3 * train[:4], train) == pytest.approx(0, abs=1e-6)
    assert metrics.amd(-train[:1], train[:1]) == pytest.approx(2, abs=1e-6)


def test_fid_follows_its_formula():
    generated, real = features(40, 0), features(60, 1, shift=0.5)
    a, b = generated.double().numpy(), real.double().numpy()
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert metrics.fid(generated, real) == pytest.approx(expected, rel=1e-6)
    assert metrics.fid(real, real) == pytest.approx(0, abs=1e-8)


def test_fid_of_fewer_images_than_features_warns():
    with pytest.warns(UserWarning, match="6 generated images in 6 features is unstable"):
        metrics.fid(features(6, 0), features(7, 1))


def test_the_auc_counts_the_pairs_in_order_and_ties_half():
    members, others = torch.tensor([3.0, 2.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, -1.0])
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert metrics.membership(members, others).auc == pytest.approx(np.mean([float(p) for p in pairs]))


def test_member_like_scores_are_the_higher_ones():
    high, low = torch.arange(10.0) + 100, torch.arange(10.0)
    assert metrics.membership(high, low).auc == 1
    assert metrics.membership(low, high).auc == 0
    assert metrics.membership(low, low).auc == 0.5


def test_a_perfect_attack_on_few_images_keeps_an_interval():
    low, high = metrics.membership(torch.ones(5), torch.zeros(5)).interval
    assert 0.4 < low < 0.9 and high == 1


def test_the_interval_covers_the_true_auc():
    generator, true = torch.Generator().manual_seed(0), norm.cdf(1 / math.sqrt(2))
    hits = 0
    for _ in range(300):
        members = torch.randn(40, generator=generator) + 1
        low, high = metrics.membership(members, torch.randn(60, generator=generator)).interval
        hits += low <= true <= high
    assert 0.92 <= hits / 300 <= 0.99


def test_a_rate_at_few_false_alarms_needs_enough_images():
    members, others = torch.arange(100.0, 200.0), torch.cat([torch.arange(99.0), torch.tensor([150.0])])
    result = metrics.membership(members, others)
    assert result.tpr_at_fpr(0.01) == 1.0
    assert metrics.membership(members, others - 1000 * (others > 99)).tpr_at_fpr(0.01) == 1.0
    assert metrics.membership(members[:50], others + 60).tpr_at_fpr(0.05) == pytest.approx(0.0)
    assert math.isnan(result.tpr_at_fpr(0.001))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.amd(torch.empty(0, 3), torch.ones(2, 3)), "queries: features must be"),
        (lambda: metrics.amd(torch.ones(2, 3), torch.full((2, 3), math.nan)), "references: 2 of 2 rows"),
        (lambda: metrics.fid(torch.ones(5, 3), torch.ones(5, 4)), r"different widths: \[3, 4\]"),
        (lambda: metrics.fid(torch.ones(1, 3), torch.ones(2, 3)), "at least 2 images"),
        (lambda: metrics.membership(torch.ones(2), torch.empty(0)), "nonmember_scores: must be"),
        (lambda: metrics.membership(torch.tensor([math.inf]), torch.ones(2)), "member_scores: 1 of 1 are not finite"),
        (lambda: metrics.membership(torch.ones(2), torch.ones(2)).tpr_at_fpr(0), "between 0 and 1"),
        (lambda: metrics.path("psnr"), "unknown metric 'psnr': use one of amd"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def noised():
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(9, 4, 8, 8, generator=generator),
        "embeds": torch.randn(9, 8, 8, generator=generator),
        "null": torch.randn(1, 8, 8, generator=generator),
    }


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_noise_norm_and_losses_do_not_depend_on_the_batch_size(noised, batch_size):
    family = family_of(tiny_pipeline())
    unet, scheduler, timesteps = family.pipeline.unet, family.noise.scheduler, family.noise.timesteps(3)
    seeds = list(range(9))
    whole, part = (
        metrics.noise_norm(
            unet, noised["latents"], noised["embeds"], noised["null"], scheduler, timesteps, seeds, size
        )
        for size in (9, batch_size)
    )
    assert whole.shape == (9, 3)
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    losses = [
        metrics.denoising_losses(family, unet, noised["latents"], noised["embeds"], timesteps, seeds, size)
        for size in (9, batch_size)
    ]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)


def test_noise_norm_of_an_image_depends_on_its_own_seed_alone(noised):
    unet, family = tiny_unet().eval(), family_of(tiny_pipeline())
    arguments = (noised["null"], family.noise.scheduler, [500])
    full = metrics.noise_norm(unet, noised["latents"], noised["embeds"], *arguments, list(range(9)))
    torch.rand(3)  # the global state plays no part
    one = metrics.noise_norm(unet, noised["latents"][4:5], noised["embeds"][4:5], *arguments, [4])
    torch.testing.assert_close(one, full[4:5], atol=1e-5, rtol=1e-5)


def test_noise_norm_follows_its_formula(noised):
    unet, family = tiny_unet().eval(), family_of(tiny_pipeline())
    seed = (1, 2)
    x, c = noised["latents"][:1], noised["embeds"][:1]
    noise = torch.randn((1, 4, 8, 8), generator=seeded_generator(*seed))
    steps = torch.tensor([300])
    alpha = family.noise.scheduler.alphas_cumprod[300]
    noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        expected = (unet(noisy, steps, c).sample - unet(noisy, steps, noised["null"]).sample).norm()
    actual = metrics.noise_norm(unet, x, c, noised["null"], family.noise.scheduler, [300], [seed])
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_noise_norm_is_of_implied_noise_whatever_is_predicted(noised, prediction):
    family, timesteps = family_of(tiny_pipeline(prediction)), [300, 900]
    x, c, null = noised["latents"][:3], noised["embeds"][:3], family.named(noised["null"])
    actual = metrics.noise_norm(family.denoiser, x, c, null, family, timesteps, [1, 2, 3])
    for column, timestep in zip(actual.T, timesteps):
        steps = torch.full((3,), timestep)
        noise = torch.stack([draw_noise(seed, (2, *x.shape[1:]))[timesteps.index(timestep)] for seed in (1, 2, 3)])
        noisy = family.noise.add_noise(x, noise, steps)
        with torch.no_grad():
            both = both_predictions(family, family.denoiser, noisy, steps, family.named(c), null)
        with_text, without = (family.noise.to_epsilon(one, noisy, timestep) for one in both)
        torch.testing.assert_close(column, (with_text - without).flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_the_evaluate_modules_give_what_the_functions_give():
    generated, train, held_out = features(8, 0), features(9, 1), features(9, 2)
    result = evaluate.load(metrics.path("amd")).compute(
        predictions=generated, train=train.tolist(), held_out=held_out.tolist()
    )
    assert result["amd"] == pytest.approx(metrics.amd(generated, train), abs=1e-6)
    assert result["amd_held_out"] == pytest.approx(metrics.amd(generated, held_out), abs=1e-6)

    module = evaluate.load(metrics.path("fid"))
    module.add_batch(predictions=generated[:5])
    module.add_batch(predictions=generated[5:])
    assert module.compute(real=train.tolist())["fid"] == pytest.approx(metrics.fid(generated, train), rel=1e-5)

    scores, members = torch.tensor([0.9, 0.2, 0.4, 0.1]), torch.tensor([1, 1, 0, 0])
    result = evaluate.load(metrics.path("membership")).compute(predictions=scores, references=members)
    assert result["membership_auc"] == pytest.approx(0.75)
    assert result["tpr_at_1_percent_fpr"] is None

    close = torch.tensor([1 + 3e-9, 1 + 2e-9, 1 + 1e-9, 1.0], dtype=torch.double)  # ties in single precision
    result = evaluate.load(metrics.path("membership")).compute(predictions=close.tolist(), references=members)
    assert result["membership_auc"] == 1

    result = evaluate.load(metrics.path("noise_norm")).compute(predictions=generated, references=generated + 1)
    assert result["noise_norm"] == pytest.approx(math.sqrt(6), rel=1e-6)
    assert all(os.listdir(os.environ[f"HF_{kind}_CACHE"]) for kind in ("METRICS", "MODULES")), "not the user's"


def test_auth_pct_counts_images_that_are_farther_than_training_images_among_themselves():
    generated, train = features(30, 0).double().numpy(), features(20, 1).double().numpy()
    authentic = 0
    for g in generated:
        to_train = np.linalg.norm(train - g, axis=1)
        nearest = to_train.argmin()
        others = np.delete(train, nearest, axis=0)
        authentic += to_train.min() > np.linalg.norm(others - train[nearest], axis=1).min()
    assert metrics.auth_pct(torch.tensor(generated), torch.tensor(train)) == pytest.approx(100 * authentic / 30)
    assert metrics.auth_pct(torch.tensor(train), torch.tensor(train)) == 0


def test_repeats_in_the_training_set_do_not_make_copies_authentic():
    train = features(20, 1)
    copies = train[:8] + 1e-4
    assert metrics.auth_pct(copies, torch.cat([train, train])) == 0


def test_c_t_follows_its_formula_and_is_negative_for_copies():
    train, held_out, generated = features(60, 1), features(50, 2), features(40, 3)
    d_held_out = [np.linalg.norm(train.numpy() - h, axis=1).min() for h in held_out.numpy()]
    d_generated = [np.linalg.norm(train.numpy() - g, axis=1).min() for g in generated.numpy()]
    u = sum((g > h) + 0.5 * (g == h) for g in d_generated for h in d_held_out)
    expected = (u - 40 * 50 / 2) / math.sqrt(40 * 50 * (40 + 50 + 1) / 12)
    assert metrics.c_t(generated, train, held_out) == pytest.approx(expected, abs=1e-6)
    assert metrics.c_t(train[:40] + 1e-3, train, held_out) < -5
    assert metrics.c_t(generated + 3, train, held_out) > 5
    assert abs(metrics.c_t(generated, train, held_out)) < 3


def extraction_by_hand(generated, train, threshold, size):
    """Every subset of the images, and every tile."""

    def distance(a, b):
        side = a.shape[-1] // 4
        return max(
            np.linalg.norm((a - b)[:, i * side : (i + 1) * side, j * side : (j + 1) * side])
            for i in range(4)
            for j in range(4)
        )

    memorized, extracted = [], []
    for images, original in zip(generated.numpy(), train.numpy()):
        cliques = [
            subset
            for subset in combinations(range(len(images)), size)
            if all(distance(images[a], images[b]) <= threshold for a, b in combinations(subset, 2))
        ]
        memorized.append(bool(cliques))
        extracted.append(any(distance(images[i], original) <= threshold for clique in cliques for i in clique))
    return memorized, extracted


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.1])
def test_extraction_is_what_every_subset_and_tile_says(size, threshold):
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(12, 3, 8, 8, generator=generator)
    noise = torch.rand(12, 1, 1, 1, 1, generator=generator) * torch.randn(12, 6, 3, 8, 8, generator=generator)
    generated = (train[:, None] + noise).clamp(0, 1)
    result = metrics.extraction(generated, train, threshold, size)
    memorized, extracted = extraction_by_hand(generated, train, threshold, size)
    assert result.memorized.tolist() == memorized and result.extracted.tolist() == extracted
    nearest = [metrics.tile_distances(g, t[None]).min().item() for g, t in zip(generated, train)]
    assert result.nearest.tolist() == pytest.approx(nearest, rel=1e-5)
    assert result.rate == pytest.approx(np.mean(extracted))
    assert result.interval[0] <= result.rate <= result.interval[1]


def test_a_chain_of_images_is_no_clique():
    """Joined one to the next, but not all with each other: a connected component would count it."""
    steps = torch.linspace(0, 1, 5)[None, :, None, None, None]
    generated, train = steps.expand(1, 5, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    assert metrics.extraction(generated, train, threshold=0.3, clique_size=2).extracted.tolist() == [True]
    assert metrics.extraction(generated, train, threshold=0.3, clique_size=3).memorized.tolist() == [False]


def test_a_clique_far_from_the_training_image_is_memorized_and_not_extracted():
    generated, train = torch.ones(2, 4, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    result = metrics.extraction(generated, train, threshold=1.0)
    assert result.memorized.all() and not result.extracted.any()
    assert result.rate == 0 and result.interval[0] == 0 and result.interval[1] == pytest.approx(1 - 0.025**0.5)


@pytest.mark.parametrize(
    ("shape", "train_shape", "message"),
    [
        ((2, 4, 3, 8, 8), (2, 3, 8, 4), r"generated must be \[P, K, C, H, W\]"),
        ((2, 4, 3, 8, 8), (3, 3, 8, 8), "2 prompts but 3 training images"),
        ((2, 2, 3, 8, 8), (2, 3, 8, 8), "cliques of 3 need 3 images or more of each prompt, but there are 2"),
        ((2, 4, 3, 6, 6), (2, 3, 6, 6), "cannot be cut into 4 x 4 tiles"),
    ],
)
def test_wrong_images_are_refused(shape, train_shape, message):
    with pytest.raises(ValueError, match=message):
        metrics.extraction(torch.rand(shape), torch.rand(train_shape))
    with pytest.raises(ValueError, match=r"train: images must lie in \[0, 1\], but reach 2"):
        metrics.extraction(torch.rand(2, 4, 3, 8, 8), torch.full((2, 3, 8, 8), 2.0))
