"""Attacks and measures beside independent implementations, and cases whose figure must come out bad, or good."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DDIMScheduler
from PIL import Image
from scipy.stats import beta
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from memcontrol_hf import metrics
from memcontrol_hf.families import family_of
from memcontrol_hf.randomness import seeded_generator

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clopper_pearson(found: int, total: int) -> tuple[float, float]:
    low = beta.ppf(0.025, found, total - found + 1) if found else 0.0
    high = beta.ppf(0.975, found + 1, total - found) if found < total else 1.0
    return low, high


# --- extraction


def tile_distance_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    side = a.shape[-1] // 4
    corners = [(i * side, j * side) for i in range(4) for j in range(4)]
    return max(np.linalg.norm(a[:, y : y + side, x : x + side] - b[:, y : y + side, x : x + side]) for y, x in corners)


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((*shape, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("neighbors", [1, 4, 50])
def test_the_calibrated_distance_follows_its_formula(neighbors):
    train, held_out = pictures(6, seed=1), pictures(9, seed=2)
    blend = torch.linspace(0, 1, 6).view(6, 1, 1, 1, 1)
    generated = blend * train[:, None] + (1 - blend) * pictures(6, 4, seed=3)
    result = metrics.extraction(generated, train, held_out=held_out, neighbors=neighbors)
    for p in range(6):
        ratios = []
        for image in generated[p].numpy():
            others = sorted(tile_distance_by_hand(image, other) for other in held_out.numpy())[:neighbors]
            ratios.append(tile_distance_by_hand(image, train[p].numpy()) / (0.5 * np.mean(others)))
        assert result.calibrated_distance[p].item() == pytest.approx(min(ratios), abs=1e-5)
        assert result.calibrated[p].item() == (min(ratios) <= 1)
        nearest = min(tile_distance_by_hand(image, train[p].numpy()) for image in generated[p].numpy())
        assert result.nearest[p].item() == pytest.approx(nearest, abs=1e-5)
    found = int(result.calibrated.sum())
    assert 0 < found < 6 and result.calibrated_rate == found / 6
    assert result.calibrated_interval == pytest.approx(clopper_pearson(found, 6))


def test_copies_are_extracted_and_fresh_images_are_not():
    train, held_out = pictures(5, seed=1), pictures(20, seed=2)
    copies = (train[:, None] + 0.02 * draw(5, 4, 3, 8, 8)).clamp(0, 1)
    bad = metrics.extraction(copies, train, threshold=1.0, held_out=held_out)
    good = metrics.extraction(pictures(5, 4, seed=3), train, threshold=1.0, held_out=held_out)
    assert bad.extracted.all() and bad.calibrated.all() and bad.rate == bad.calibrated_rate == 1
    assert not good.extracted.any() and not good.calibrated.any() and good.calibrated_rate == 0
    assert good.calibrated_interval[1] == pytest.approx(1 - 0.025 ** (1 / 5))


def test_the_calibrated_verdict_does_not_change_with_the_contrast():
    """An absolute threshold takes every pair of pale images for copies."""
    train, held_out, generated = pictures(5, seed=1), pictures(20, seed=2), pictures(5, 4, seed=3)
    pale = metrics.extraction(0.1 * generated, 0.1 * train, threshold=1.0, held_out=0.1 * held_out)
    full = metrics.extraction(generated, train, threshold=1.0, held_out=held_out)
    assert pale.extracted.all() and not pale.calibrated.any()
    torch.testing.assert_close(pale.calibrated_distance, full.calibrated_distance)


def test_one_copy_among_fresh_images_is_found_without_a_clique():
    train, generated = pictures(3, seed=1), pictures(3, 4, seed=3)
    generated[1, 2] = train[1]
    result = metrics.extraction(generated, train, threshold=1.0, held_out=pictures(20, seed=2))
    assert result.calibrated.tolist() == [False, True, False]
    assert result.calibrated_distance[1] == 0 and not result.extracted.any()


def test_identical_images_everywhere_are_never_called_safe():
    same = torch.full((2, 4, 3, 8, 8), 0.5)
    result = metrics.extraction(same, same[:, 0], held_out=same[0])
    assert result.extracted.all() and result.calibrated.all() and (result.calibrated_distance == 0).all()


def test_near_copies_far_from_black_keep_their_distance():
    """In float32, products of bright images alone would lose a small difference."""
    train = pictures(1, seed=1).mul(0.01).add(0.99)
    generated = (train[:, None] - 1e-4 * pictures(1, 3, seed=3)).clamp(0, 1)
    expected = [tile_distance_by_hand(g.double().numpy(), train[0].double().numpy()) for g in generated[0]]
    assert metrics.extraction(generated, train).nearest.item() == pytest.approx(min(expected), rel=1e-3)
    assert metrics.extraction(generated, train, threshold=1e-5).memorized.tolist() == [False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": torch.rand(4, 1, 8, 8)}, r"held_out must be \[L, 3, 8, 8\], L > 0, but got \[4, 1, 8, 8\]"),
        ({"held_out": torch.rand(0, 3, 8, 8)}, r"held_out must be .* but got \[0, 3, 8, 8\]"),
        ({"held_out": torch.full((2, 3, 8, 8), math.nan)}, r"held_out: images must lie in \[0, 1\], but reach nan"),
        ({"generated": torch.full((2, 4, 3, 8, 8), math.nan)}, "generated: images must lie"),
        ({"train": torch.rand(2, 1, 8, 8)}, r"generated must be \[P, K, C, H, W\]"),
        ({"generated": torch.rand(0, 4, 3, 8, 8), "train": torch.rand(0, 3, 8, 8)}, "at least one"),
        ({"threshold": math.nan}, "threshold nan and scale 0.5 must be positive"),
        ({"threshold": 0.0}, "threshold 0.0 and scale"),
        ({"neighbors": 0}, "neighbors 0 at least 1"),
    ],
)
def test_extraction_refuses_what_it_cannot_judge(change, message):
    arguments = {"generated": torch.rand(2, 4, 3, 8, 8), "train": torch.rand(2, 3, 8, 8), **change}
    with pytest.raises(ValueError, match=message) as error:
        metrics.extraction(**arguments)
    assert "\n" not in str(error.value)


# --- membership scores


@pytest.fixture(params=PREDICTION_TYPES)
def family(request):
    return family_of(tiny_pipeline(request.param))


@pytest.fixture
def inputs():
    return draw(5, 4, 8, 8, seed=1), draw(5, 8, 8, seed=2), draw(1, 8, 8, seed=3)


def epsilon_by_hand(family, x, c, t):
    """The noise by the definition `x_t = a x_0 + s ε`, solved for what the model does not predict itself."""
    with torch.no_grad():
        output = family.pipeline.unet(x, torch.tensor(t), c).sample.double()
    signal = np.cumprod(1 - family.noise.scheduler.betas.double().numpy())[t]
    a, s = math.sqrt(signal), math.sqrt(1 - signal)
    if family.noise.scheduler.config.prediction_type == "epsilon":
        return output, a, s
    original = output if family.noise.scheduler.config.prediction_type == "sample" else a * x - s * output
    return (x - a * original) / s, a, s


def test_secmi_follows_its_formula(family, inputs):
    """f, phi and psi of the paper."""
    latents, embeds, _ = inputs

    def f_and_noise(x, t):
        noise, a, s = epsilon_by_hand(family, x.float(), embeds, t)
        return (x - s * noise) / a, noise

    def move(x, t, to):
        f, noise = f_and_noise(x, t)
        signal = np.cumprod(1 - family.noise.scheduler.betas.double().numpy())[to]
        return math.sqrt(signal) * f + math.sqrt(1 - signal) * noise

    x = latents.double()
    for t in range(0, 60, 20):
        x = move(x, t, t + 20)
    error = (move(move(x, 60, 80), 80, 60) - x).square().sum((1, 2, 3))
    actual = metrics.secmi(family, family.pipeline.unet, latents, embeds, timestep=60, stride=20)
    torch.testing.assert_close(actual.double(), -error, rtol=1e-2, atol=1e-5)


def test_secmi_at_several_timesteps_is_secmi_at_each(family, inputs):
    latents, embeds, _ = inputs
    several = metrics.secmi_errors(family, family.pipeline.unet, latents, embeds, [60, 20], stride=20)
    for column, timestep in enumerate((60, 20)):
        alone = metrics.secmi(family, family.pipeline.unet, latents, embeds, timestep=timestep, stride=20)
        assert torch.equal(several[:, column], -alone)


def test_sima_follows_its_formula(family, inputs):
    latents, embeds, _ = inputs
    noise, _, _ = epsilon_by_hand(family, latents, embeds, 100)
    expected = -((noise.abs() ** 4).sum((1, 2, 3)) ** 0.25)
    actual = metrics.sima(family, family.pipeline.unet, latents, embeds)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_semantic_noise_follows_its_formula(family, inputs, guidance):
    """Equations 4 to 6 and 10 of the paper, with the model itself for the inversion."""
    latents, embeds, null = inputs
    null = null.expand(5, -1, -1)
    signals = np.cumprod(1 - family.noise.scheduler.betas.double().numpy())

    def move(x, guided, t, to):
        noise, a, s = epsilon_by_hand(family, x.float(), embeds, t)
        if guided:
            unconditional = epsilon_by_hand(family, x.float(), null, t)[0]
            noise = unconditional + guidance * (noise - unconditional)
        signal = signals[max(to, 0)]
        return math.sqrt(signal) * (x - s * noise) / a + math.sqrt(1 - signal) * noise

    x, last = latents.double(), [750, 500, 250, 0]
    for t, to in ((0, 250), (250, 500), (500, 750)):
        x = move(x, False, t, to)
    for t in last[:3]:
        x = move(x, True, t, t - 250)
    noise, a, s = epsilon_by_hand(family, x.float(), embeds, 0)
    unconditional = epsilon_by_hand(family, x.float(), null, 0)[0]
    x = (x - s * (unconditional + guidance * (noise - unconditional))) / a  # DDIM's last step ends without noise
    family.noise.scheduler.register_to_config(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    actual = metrics.semantic_noise(family, family.pipeline.unet, latents, embeds, inputs[2], 4, guidance)
    torch.testing.assert_close(actual.double(), -(x - latents).flatten(1).norm(dim=1), rtol=1e-2, atol=1e-4)


def test_a_set_is_told_by_many_weak_scores_and_its_false_alarms_are_nominal():
    def p_value(shift: float, seed: int) -> float:
        members, others = draw(40, 5, seed=seed) + shift, draw(60, 5, seed=seed + 1000)
        return metrics.dataset_inference(members, others, splits=5)

    assert sum(p_value(0.6, seed) < 0.05 for seed in range(10)) >= 8
    assert sum(p_value(0.0, seed) < 0.05 for seed in range(40)) <= 6  # 99 of 100 such studies have 6 at most
    constant = torch.ones(9, 2)
    assert metrics.dataset_inference(constant, constant) == 1


@pytest.mark.parametrize(
    ("members", "others", "message"),
    [
        (draw(7, 2), draw(9, 2), "N >= 8"),
        (draw(9), draw(9), "must be .N, F."),
        (draw(9, 2), draw(9, 3), "2 and 3 attacks"),
        (draw(9, 2), torch.full((9, 2), torch.nan), "finite"),
    ],
)
def test_sets_that_no_test_can_judge_are_refused(members, others, message):
    with pytest.raises(ValueError, match=message):
        metrics.dataset_inference(members, others)


def test_pia_follows_its_formula(family, inputs):
    latents, embeds, _ = inputs
    noise, _, _ = epsilon_by_hand(family, latents, embeds, 0)
    signal = np.cumprod(1 - family.noise.scheduler.betas.double().numpy())[200]
    noised = math.sqrt(signal) * latents + math.sqrt(1 - signal) * noise
    again, _, _ = epsilon_by_hand(family, noised.float(), embeds, 200)
    expected = -(((noise - again).abs() ** 4).sum((1, 2, 3)) ** 0.25)
    actual = metrics.pia(family, family.pipeline.unet, latents, embeds)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-5)


def test_clid_follows_its_formula(family, inputs):
    latents, embeds, null = inputs
    timesteps, seeds = [100, 700], [(9, i) for i in range(5)]
    expected = []
    for i in range(5):
        noise = torch.randn((2, 4, 8, 8), generator=seeded_generator(*seeds[i]))
        differences = []
        for k, t in enumerate(timesteps):
            signal = np.cumprod(1 - family.noise.scheduler.betas.double().numpy())[t]
            noisy = (math.sqrt(signal) * latents[i] + math.sqrt(1 - signal) * noise[k])[None].float()
            errors = [
                (epsilon_by_hand(family, noisy, c, t)[0] - noise[k]).square().mean() for c in (null, embeds[i : i + 1])
            ]
            differences.append((errors[0] - errors[1]).item())
        expected.append(np.mean(differences))
    actual = metrics.clid(family, family.pipeline.unet, latents, embeds, null, timesteps, seeds)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_no_score_depends_on_the_batch_size_or_on_the_other_images(batch_size):
    family = family_of(tiny_pipeline())
    latents, embeds, null = draw(9, 4, 8, 8, seed=1), draw(9, 8, 8, seed=2), draw(8, 8, seed=3)
    seeds, order = list(range(9)), torch.tensor([8, 2, 5])

    def scores(rows, batch_size):
        x, c, unet = latents[rows], embeds[rows], family.pipeline.unet
        own = [seeds[i] for i in rows]
        torch.rand(3)  # the global state plays no part
        return torch.stack(
            [
                metrics.secmi(family, unet, x, c, 20, 10, batch_size),
                metrics.secmi_errors(family, unet, x, c, [20, 40], 20, batch_size)[:, 1],
                metrics.sima(family, unet, x, c, batch_size=batch_size),
                metrics.semantic_noise(family, unet, x, c, null, 3, batch_size=batch_size),
                metrics.pia(family, unet, x, c, batch_size=batch_size),
                metrics.clid(family, unet, x, c, null, [50, 500], own, batch_size),
                metrics.trajectory_noise_norms(family, unet, c, null, (4, 8, 8), own, 3, batch_size=batch_size),
            ]
        )

    whole = scores(torch.arange(9), 9)
    assert whole.shape == (7, 9) and whole.device.type == "cpu"
    torch.testing.assert_close(scores(torch.arange(9), batch_size), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores(order, batch_size), whole[:, order], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def overfitted():
    """A tiny model that was trained for long on 8 captioned latents, and 24 more that it never saw."""
    family, steps = family_of(tiny_pipeline()), 200
    unet, generator = family.pipeline.unet, torch.Generator().manual_seed(0)
    latents, embeds, null = draw(32, 4, 8, 8, seed=1), draw(32, 8, 8, seed=2), draw(1, 8, 8, seed=3)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        timesteps = torch.randint(0, 1000, (8,), generator=generator)
        noise = torch.randn(8, 4, 8, 8, generator=generator)
        family.losses(unet, latents[:8], embeds[:8], timesteps, noise).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return family, latents, embeds, null


@pytest.mark.parametrize("attack", ["secmi", "secmi_several", "sima", "pia", "clid", "loss"])
def test_members_of_an_overfitted_model_are_found(overfitted, attack):
    family, latents, embeds, null = overfitted
    timesteps, seeds = family.noise.timesteps(4), list(range(32))

    denoiser = family.pipeline.unet
    match attack:
        case "secmi":
            scores = metrics.secmi(family, denoiser, latents, embeds)
        case "secmi_several":
            scores = -metrics.secmi_errors(family, denoiser, latents, embeds).log().mean(1)
        case "sima":
            scores = metrics.sima(family, denoiser, latents, embeds)
        case "pia":
            scores = metrics.pia(family, denoiser, latents, embeds)
        case "clid":
            scores = metrics.clid(family, denoiser, latents, embeds, null, timesteps, seeds)
        case _:
            scores = -metrics.denoising_losses(family, denoiser, latents, embeds, timesteps, seeds).mean(1)
    assert metrics.membership(scores[:8], scores[8:]).auc > (0.75 if attack in ("secmi", "clid") else 0.9)
    low, high = metrics.membership(scores[8:16], scores[16:]).interval  # none of these is a member
    assert low < 0.5 < high


@pytest.mark.parametrize(
    ("attack", "arguments", "message"),
    [
        ("secmi", {"timestep": 25}, "positive multiple of stride 10, but got 25"),
        ("secmi", {"timestep": 0}, "positive multiple of stride 10, but got 0"),
        ("secmi", {"timestep": 990}, "timestep 1000 lies outside the schedule: use 0 to 999"),
        ("secmi", {"latents": torch.empty(0, 4, 8, 8), "condition": torch.empty(0, 8, 8)}, "at least one"),
        ("secmi_errors", {"timesteps": [20, 25]}, "positive multiple of stride 10, but got 25"),
        ("sima", {"timestep": 1000}, "timestep 1000 lies outside"),
        ("pia", {"timestep": -1}, "timestep -1 lies outside"),
        ("pia", {"condition": torch.ones(2, 8, 8)}, r"as many images as conditions, at least one, not \[5, 2\]"),
        ("clid", {"timesteps": [1000]}, "timestep 1000 lies outside"),
        ("clid", {"seeds": [1]}, "5 images but 1 seeds"),
    ],
)
def test_the_scores_refuse_what_they_cannot_judge(inputs, attack, arguments, message):
    family = family_of(tiny_pipeline())
    given = {"latents": inputs[0], "condition": inputs[1]}
    if attack == "clid":
        given |= {"null": inputs[2], "timesteps": [5], "seeds": range(5)}
    with pytest.raises(ValueError, match=message):
        getattr(metrics, attack)(family, family.pipeline.unet, **{**given, **arguments})


def test_the_rate_at_few_false_alarms_has_an_exact_interval():
    members, others = torch.arange(40.0), torch.arange(100.0) - 70
    result = metrics.membership(members, others)
    for fpr in (0.01, 0.1):
        limit = others.sort(descending=True).values[int(100 * fpr)]  # as many non-members lie above it
        found = int((members > limit).sum())
        assert result.tpr_at_fpr(fpr) == pytest.approx(found / 40)
        assert result.tpr_interval(fpr) == pytest.approx(clopper_pearson(found, 40))
    assert all(math.isnan(bound) for bound in result.tpr_interval(0.001))
    assert all(math.isnan(bound) for bound in metrics.membership(members, others[:99]).tpr_interval(0.01))


# --- noise norms along trajectories


def test_trajectory_norms_follow_their_formula(family, inputs):
    _, embeds, null = inputs
    scheduler = DDIMScheduler.from_config(family.noise.scheduler.config)
    scheduler.set_timesteps(4)
    norms = []
    for i in range(5):
        x = torch.randn((1, 4, 8, 8), generator=seeded_generator(i))
        own = []
        for t in scheduler.timesteps:
            given, nothing = (epsilon_by_hand(family, x, c, int(t))[0] for c in (embeds[i : i + 1], null))
            own.append((given - nothing).norm().item())
            with torch.no_grad():
                outputs = [family.pipeline.unet(x, t, c).sample for c in (embeds[i : i + 1], null)]
            x = scheduler.step(outputs[1] + 3 * (outputs[0] - outputs[1]), t, x).prev_sample
        norms.append(own)
    arguments = (family, family.pipeline.unet, embeds, null, (4, 8, 8), range(5), 4, 3.0)
    actual = metrics.trajectory_noise_norms(*arguments)
    np.testing.assert_allclose(actual.numpy(), np.mean(norms, axis=1), rtol=1e-3)
    first = metrics.trajectory_noise_norms(*arguments, first=1)
    np.testing.assert_allclose(first.numpy(), np.array(norms)[:, 0], rtol=1e-3)


def test_a_prompt_that_is_the_empty_one_does_not_steer(inputs):
    family, null = family_of(tiny_pipeline()), inputs[2]
    norms = metrics.trajectory_noise_norms(
        family, family.pipeline.unet, null.expand(2, 8, 8), null, (4, 8, 8), [0, 1], 2
    )
    torch.testing.assert_close(norms, torch.zeros(2), atol=1e-4, rtol=0)


def test_no_step_of_a_trajectory_is_refused(inputs):
    family = family_of(tiny_pipeline())
    with pytest.raises(ValueError, match="first must lie between 1 and num_inference_steps 3, but got 4"):
        metrics.trajectory_noise_norms(
            family, family.pipeline.unet, inputs[1], inputs[2], (4, 8, 8), range(5), 3, first=4
        )


def test_near_duplicates_are_the_same_picture_and_no_other():
    images, others = (F.interpolate(pictures(n, seed=n), (64, 64), mode="bilinear") for n in (40, 30))
    again = F.interpolate(F.interpolate(images[:5], (48, 48), mode="bilinear"), (64, 64), mode="bilinear")
    brighter = (images[5:8] * 1.02).clamp(0, 1)
    found = metrics.near_duplicates(images, torch.cat([others, again, brighter]))
    assert found == [(i, 30 + i) for i in range(8)]
    assert metrics.near_duplicates(torch.cat([images, images[:2]])) == [(0, 40), (1, 41)]
    assert metrics.near_duplicates(images) == []
    many = images.repeat(20, 1, 1, 1)[:600]  # more than are compared at once
    assert len(metrics.near_duplicates(many)) == 40 * (15 * 14 // 2)


def test_altered_near_duplicates_are_mirrored_darker_or_of_another_contrast():
    images, others = (F.interpolate(pictures(n, seed=n), (64, 64), mode="bilinear") for n in (40, 30))
    altered = torch.cat(
        [images[:4].flip(3), images[4:8].flip(2), 0.7 * images[8:12], 0.5 + 0.6 * (images[12:16] - 0.5)]
    )
    assert metrics.near_duplicates(images, torch.cat([others, altered])) == []
    found = metrics.near_duplicates(images, torch.cat([others, altered]), altered=True)
    assert found == [(i, 30 + i) for i in range(16)]
    assert metrics.near_duplicates(images, torch.cat([others, altered]), threshold=0, altered=True) == []
    flat = 0.5 + 0.01 * (torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5)
    assert metrics.near_duplicates(flat[:10] - 0.2, flat[10:] + 0.2) == [], "nothing but noise, of other brightness"


def test_the_threshold_0_finds_equal_images_alone_however_many_they_are():
    images = pictures(2, seed=1)[[0] * 30 + [1] * 10]
    images[20:30, 0, 0, 0] += 0.01
    found = metrics.near_duplicates(images, threshold=0)
    assert found == [(i, j) for i in range(40) for j in range(i + 1, 40) if (i < 20, i < 30) == (j < 20, j < 30)]


# --- features


def cosine_distances_by_hand(queries: torch.Tensor, references: torch.Tensor) -> np.ndarray:
    a, b = (x.double().numpy() for x in (queries, references))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return np.array([min(1 - x @ y for y in b) for x in a])


def test_the_nearest_share_counts_images_and_its_interval_is_the_bootstraps():
    generated, train, held_out = draw(60, 6, seed=1), draw(20, 6, seed=2), draw(20, 6, seed=3)
    result = metrics.nearest_share(generated, train, held_out)
    to_train, to_held_out = (cosine_distances_by_hand(generated, r) for r in (train, held_out))
    nearer = to_train < to_held_out
    assert result.share == pytest.approx(nearer.mean()) and result.references == 20
    np.testing.assert_allclose(result.to_train.numpy(), to_train, atol=1e-6)
    np.testing.assert_allclose(result.to_held_out.numpy(), to_held_out, atol=1e-6)
    rng = np.random.default_rng(1)
    means = [rng.choice(nearer, 60).mean() for _ in range(4000)]
    assert result.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    torch.manual_seed(5)
    assert metrics.nearest_share(generated, train, held_out).interval == result.interval  # whatever the global state
    together = metrics.nearest_share(generated.repeat_interleave(10, 0), train, held_out, per_prompt=10)
    assert together.share == pytest.approx(result.share)
    assert together.interval == pytest.approx(result.interval), "more images of a prompt are no more prompts"


def test_copies_are_nearer_to_the_training_images_and_fresh_images_are_not():
    train, held_out = draw(50, 6, seed=2), draw(50, 6, seed=3)
    bad = metrics.nearest_share(train[:30] + 1e-3 * draw(30, 6), train, held_out)
    good = metrics.nearest_share(draw(200, 6, seed=4), draw(400, 6, seed=2), draw(400, 6, seed=3))
    assert bad.share == 1 and bad.interval == pytest.approx(clopper_pearson(30, 30))
    assert bad.to_train.max() < bad.to_held_out.min()
    assert good.interval[0] < 0.5 < good.interval[1] and good.interval[1] - good.interval[0] < 0.2


def test_the_larger_set_is_not_nearer_for_its_size():
    generated, train, held_out = draw(300, 6, seed=1), draw(1000, 6, seed=2), draw(30, 6, seed=3)
    assert (cosine_distances_by_hand(generated, train) < cosine_distances_by_hand(generated, held_out)).mean() > 0.9
    result = metrics.nearest_share(generated, train, held_out)
    assert result.references == 30 and 0.35 < result.share < 0.65


@pytest.mark.parametrize("prompts", [20, 200])  # fewer than held-out images, and more
def test_copies_of_the_prompts_own_images_are_seen_in_a_larger_set(prompts):
    train, held_out, fresh = draw(1000, 6, seed=2), draw(100, 6, seed=3), draw(600, 6, seed=4)
    own = list(range(500, 500 + prompts))
    copies = (train[own] + 1e-4 * draw(prompts, 6)).repeat_interleave(3, 0)
    result = metrics.nearest_share(copies, train, held_out, per_prompt=3, own=own)
    assert result.share == 1 and result.to_train.max() < 1e-4 and result.references == 100
    assert metrics.nearest_share(copies, train, held_out, per_prompt=3).share < 0.75
    assert 0.4 < metrics.nearest_share(fresh, train, held_out, per_prompt=3, own=own).share < 0.6


def test_no_own_images_are_needed_in_a_set_that_is_not_subsampled():
    generated, train, held_out = draw(30, 6, seed=1), draw(20, 6, seed=2), draw(25, 6, seed=3)
    for own in ([], [7, 3, 5]):
        to_train, to_held_out = metrics.distances_to_both(generated, train, held_out, own=own)
        order = torch.randperm(20, generator=seeded_generator(0, 0))
        assert torch.equal(to_train, metrics.nearest_distances(generated, train[order]))
        kept = torch.randperm(25, generator=seeded_generator(0, 1))[:20]
        assert torch.equal(to_held_out, metrics.nearest_distances(generated, held_out[kept]))


def test_equal_sets_are_ties_and_tell_nothing():
    train = draw(9, 6, seed=2)
    result = metrics.nearest_share(draw(8, 6), train, train.clone())
    assert result.share == 0.5 and result.interval[0] < 0.2 and result.interval[1] > 0.8


def test_copy_similarity_follows_its_formula():
    generated, train, held_out = draw(40, 6, seed=1), draw(50, 6, seed=2), draw(120, 6, seed=3)
    result = metrics.copy_similarity(generated, train, held_out)
    similarities = 1 - cosine_distances_by_hand(generated, train)
    threshold = np.quantile(1 - cosine_distances_by_hand(held_out, train), 0.99)
    copies = int((similarities > threshold).sum())
    np.testing.assert_allclose(result.similarities.numpy(), similarities, atol=1e-6)
    assert result.percentile_95 == pytest.approx(np.quantile(similarities, 0.95), abs=1e-6)
    assert result.threshold == pytest.approx(threshold, abs=1e-6)
    assert result.share == copies / 40 and result.interval == pytest.approx(clopper_pearson(copies, 40))
    together = metrics.copy_similarity(generated.repeat_interleave(10, 0), train, held_out, per_prompt=10)
    assert together.interval == pytest.approx(result.interval), "more images of a prompt are no more prompts"


def test_copies_are_told_by_similarity_and_fresh_images_are_not():
    train, held_out = draw(100, 16, seed=2), draw(200, 16, seed=3)
    bad = metrics.copy_similarity(torch.cat([train[:20], draw(20, 16, seed=4)]), train, held_out)
    good = metrics.copy_similarity(draw(500, 16, seed=5), train, held_out)
    assert bad.share >= 0.5 and bad.interval[0] > 0.3 and bad.percentile_95 == pytest.approx(1, abs=1e-6)
    assert good.interval[0] < 0.02 and good.share < 0.05


def test_kid_follows_its_formula():
    generated, real = draw(12, 5, seed=1), draw(17, 5, seed=2) + 0.5
    x, y = generated.double().numpy(), real.double().numpy()

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(12) for j in range(12) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(17) for j in range(17) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    expected = within_x + within_y - 2 * between
    for chunk in (1, 7, 64):
        assert metrics.kid(generated, real, chunk) == pytest.approx(expected, rel=1e-9)


def test_kid_is_about_zero_for_one_distribution_and_large_for_two():
    same = [metrics.kid(draw(100, 5, seed=2 * i), draw(100, 5, seed=2 * i + 1)) for i in range(30)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(30) and min(same) < 0
    assert metrics.kid(draw(100, 5, seed=1), draw(100, 5, seed=2) + 2) > 10 * max(same)


def test_precision_and_recall_follow_their_definition():
    generated, real = draw(25, 3, seed=1), 1.5 * draw(30, 3, seed=2) + 0.5

    def covered(queries, references, k=3):
        radii = [sorted(np.linalg.norm(references - r, axis=1))[k] for r in references]
        return np.mean([any(np.linalg.norm(q - r) <= s for r, s in zip(references, radii)) for q in queries])

    x, y = generated.double().numpy(), real.double().numpy()
    for chunk in (1, 7, 64):
        result = metrics.precision_recall(generated, real, chunk=chunk)
        assert result.precision == pytest.approx(covered(x, y)) and result.recall == pytest.approx(covered(y, x))
    assert 0 < result.recall < 1


def test_precision_is_lost_by_strange_images_and_recall_by_alike_ones():
    real = draw(60, 3, seed=2)
    assert metrics.precision_recall(real + 50, real) == (0, 0)
    assert metrics.precision_recall(real, real) == (1, 1)
    alike = metrics.precision_recall(real[:1] + 1e-3 * draw(30, 3), real)
    assert alike.precision == 1 and alike.recall < 0.1


@pytest.mark.parametrize("queries", [1, 7, 64])
def test_distances_do_not_depend_on_how_many_images_are_given_at_once(queries):
    generated, train = draw(70, 6, seed=1), draw(50, 6, seed=2)
    parts = torch.cat([metrics.nearest_distances(part, train, chunk=queries) for part in generated.split(queries)])
    torch.testing.assert_close(parts, metrics.nearest_distances(generated, train), atol=1e-6, rtol=0)


ONES, NAN = torch.ones(3, 4), torch.full((3, 4), math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.nearest_share(draw(3, 4), draw(3, 4), torch.empty(0, 4)), "held_out: features must be"),
        (lambda: metrics.nearest_share(NAN, draw(3, 4), draw(3, 4)), "generated: 3 of 3 rows of features are not"),
        (lambda: metrics.nearest_share(0 * ONES, draw(3, 4), draw(3, 4)), "queries: 3 of 3 rows of features are zero"),
        (lambda: metrics.copy_similarity(draw(3, 4), NAN, draw(3, 4)), "train: 3 of 3 rows"),
        (lambda: metrics.copy_similarity(draw(3, 4), draw(3, 5), draw(3, 4)), r"different widths: \[4, 5\]"),
        (lambda: metrics.copy_similarity(ONES, ONES, ONES), "cannot tell images apart, so that no copy can be told"),
        (lambda: metrics.copy_similarity(draw(3, 4), draw(3, 4), draw(3, 4)), "3 of 3 held-out images are as near"),
        (lambda: metrics.copy_similarity(ONES, ONES, ONES, 0), "false_alarms must lie between 0 and 1, but got 0"),
        (lambda: metrics.kid(ONES[:1], ONES), "generated: a kernel distance needs at least 2 images, but got 1"),
        (lambda: metrics.kid(ONES, NAN), "real: 3 of 3 rows"),
        (lambda: metrics.precision_recall(ONES, draw(9, 4)), "generated: 3 neighbors of 3 images"),
        (lambda: metrics.precision_recall(draw(9, 4), draw(9, 4), 0), "generated: 0 neighbors of 9 images"),
    ],
)
def test_measures_refuse_what_they_cannot_judge(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# --- evaluate modules


def test_the_evaluate_modules_give_what_the_functions_give():
    generated, train, held_out = draw(12, 6, seed=1), draw(12, 6, seed=2), draw(12, 6, seed=3)

    def computed(name, *arguments, **keywords):
        return evaluate.load(metrics.path(name)).compute(*arguments, **keywords)

    actual = computed("copy_similarity", predictions=generated, train=train.tolist(), held_out=held_out.tolist())
    expected = metrics.copy_similarity(generated, train, held_out)
    assert actual["copy_share"] == expected.share and actual["copy_share_high"] == expected.interval[1]
    assert actual["copy_similarity"] == pytest.approx(expected.percentile_95, abs=1e-6)
    assert computed("kid", predictions=generated, real=train.tolist())["kid"] == pytest.approx(
        metrics.kid(generated, train)
    )
    actual = computed("precision_recall", predictions=generated, real=train.tolist(), neighbors=2)
    assert actual == metrics.precision_recall(generated, train, 2)._asdict()

    actual = computed("amd", predictions=generated, train=train.tolist(), held_out=held_out.tolist())
    expected = metrics.nearest_share(generated, train, held_out)
    assert actual["amd"] == pytest.approx(metrics.amd(generated, train), abs=1e-6)
    assert (actual["nearest_share"], actual["nearest_share_high"]) == (expected.share, expected.interval[1])
    assert actual["c_t"] == pytest.approx(metrics.c_t(generated, train, held_out), abs=1e-6)
    assert actual["quantiles"][4] == pytest.approx(expected.to_train.median().item(), abs=0.05)
    scores = draw(1300, seed=4)
    actual = computed("membership", predictions=scores.tolist(), references=[1] * 200 + [0] * 1100)
    assert actual["tpr_at_1_percent_fpr"] < 0.1 and actual["tpr_at_0.1_percent_fpr"] < 0.05
    assert computed("membership", predictions=[0.1, 0.2], references=[1, 0])["tpr_at_0.1_percent_fpr"] is None

    several = draw(30, 3, seed=5)
    labels = [1] * 14 + [0] * 16
    actual = computed("dataset_inference", predictions=several.tolist(), references=labels, splits=5)
    assert actual["dataset_inference_p"] == metrics.dataset_inference(several[:14], several[14:], splits=5)

    images, originals = pictures(3, 4, seed=3), pictures(3, seed=1)
    images[0] = originals[0]
    others = pictures(9, seed=2)
    arguments = {"predictions": images.tolist(), "references": originals.tolist(), "threshold": 1.0}
    actual = computed("extraction", **arguments, held_out=others.tolist())
    expected = metrics.extraction(images, originals, 1.0, held_out=others)
    assert actual["extraction_rate"] == actual["calibrated_rate"] == expected.rate == 1 / 3
    assert actual["extracted"] == actual["calibrated"] == [True, False, False]
    assert actual["extraction_rate_high"] == expected.interval[1]
    assert "calibrated" not in computed("extraction", **arguments)


def to_pil_image(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_the_clip_score_is_the_cosine_of_the_embeddings(tmp_path):
    tokenizer = tiny_pipeline().tokenizer
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()
    size = {"height": 16, "width": 16}
    processor = CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    images, captions = F.interpolate(pictures(5), (16, 16)), ["a b", "c", "d e f", "g", "h i"]
    images = (images * 255).round() / 255
    shown = [to_pil_image(image) for image in images]
    inputs = processor(text=captions, images=shown, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs)
    cosines = F.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0)
    expected = 100 * cosines.mean().item()
    assert metrics.clip_score(images, captions, str(tmp_path)) == pytest.approx(expected, rel=1e-4)
    assert metrics.clip_score(images, captions, str(tmp_path), batch_size=2) == pytest.approx(expected, rel=1e-4)
    module = evaluate.load(metrics.path("clip_score"))
    arguments = {"predictions": shown, "references": captions, "model": str(tmp_path)}
    assert module.compute(**arguments)["clip_score"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="cannot load the CLIP model"):
        metrics.clip_score(images, captions, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="5 images but 1 captions"):
        metrics.clip_score(images, captions[:1], str(tmp_path))


@pytest.mark.parametrize("name", metrics.MODULES)
def test_each_module_has_a_card(name):
    card = (Path(metrics.path(name)) / "README.md").read_text()
    for part in ("Definition", "Source", "Range", "Cost", "Limits"):
        assert f"**{part}.**" in card
    assert "https://huggingface.co/papers/" in card
