"""Embeddings that are searched: they bring back what a model memorized, and the audit says what search alone does."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import RESOLUTION, images_of, tiny_pipeline

from memcontrol_hf import audit_memorization, metrics
from memcontrol_hf.audit import AuditSettings, embedding
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.families import family_of
from memcontrol_hf.randomness import seeded_generator

SETTINGS = AuditSettings(
    resolution=RESOLUTION, num_prompts=2, images_per_prompt=3, num_quality_images=2, inference_steps=2,
    guidance_scale=2.0, num_timesteps=1, embedding_attack=2, near_duplicates=0,
)  # fmt: skip


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(family, latents, embeds, seed, steps, draws, lr):
    """Adam on the mean loss of one image, under draws from one generator."""
    scale, generator = embeds.square().mean().sqrt(), seeded_generator(*seed)
    searched = (embeds / scale).requires_grad_()
    optimizer = torch.optim.Adam([searched], lr=lr)
    for _ in range(steps):
        losses = []
        for _ in range(draws):
            timestep, noise = family.noise.sample_timestep(generator), torch.randn(4, 8, 8, generator=generator)
            losses.append(family.losses(family.denoiser, latents, searched * scale, timestep[None], noise[None]))
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    return (searched * scale).detach()


def test_a_search_is_adam_on_the_loss_of_one_image_whatever_the_batch():
    family = family_of(tiny_pipeline())
    latents, embeds, seeds = draw(3, 4, 8, 8, seed=1), 5 * draw(3, 8, 8, seed=2), [(0, i) for i in range(3)]
    expected = torch.cat(
        [by_hand(family, latents[i : i + 1], embeds[i : i + 1], seeds[i], 3, 2, 0.05) for i in range(3)]
    )
    for batch_size in (1, 4, 64):
        search = metrics.search_embeddings(family, family.denoiser, latents, embeds, seeds, 3, 2, 0.05, batch_size)
        torch.testing.assert_close(search["prompt_embeds"], expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(expected, embeds, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seeds": [1]}, "as many images as seeds"), ({"latents": draw(0, 4, 8, 8, seed=1)}, "at least one")],
)
def test_a_search_refuses_what_does_not_fit(change, message):
    family = family_of(tiny_pipeline())
    given = {"latents": draw(2, 4, 8, 8, seed=1), "condition": draw(2, 8, 8, seed=2), "seeds": [1, 2], **change}
    with pytest.raises(ValueError, match=message):
        metrics.search_embeddings(family, family.denoiser, **given)


def test_a_search_finds_embeddings_under_which_images_are_denoised_better_and_members_best():
    """The model was trained on 4 images under other embeddings than those at which the search starts."""
    family = family_of(tiny_pipeline())
    latents, embeds = draw(8, 4, 8, 8, seed=1), draw(8, 8, 8, seed=2)
    unet, generator = family.denoiser, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    for _ in range(100):
        timesteps = torch.randint(0, 1000, (8,), generator=generator)
        noise = torch.randn(8, 4, 8, 8, generator=generator)
        losses = family.losses(unet, latents[:4].repeat(2, 1, 1, 1), embeds[:4].repeat(2, 1, 1), timesteps, noise)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    hidden, seeds = draw(8, 8, 8, seed=3), list(range(8))
    found = metrics.search_embeddings(family, unet, latents, hidden, seeds, steps=15)["prompt_embeds"]

    def losses_under(embeddings):
        return metrics.denoising_losses(family, unet, latents, embeddings, [300, 600, 900], seeds).mean(1)

    searched = losses_under(found)
    assert searched.mean() < losses_under(hidden).mean()
    assert metrics.membership(-searched[:4], -searched[4:]).auc == 1


def test_an_audit_compares_the_search_with_that_for_held_out_images(monkeypatch):
    monkeypatch.setattr(metrics, "search_embeddings", partial(metrics.search_embeddings, steps=2))
    pipeline = tiny_pipeline()
    report = audit_memorization(
        images_of(4, seed=1), images_of(8, seed=2), pipeline, base_pipeline=tiny_pipeline(),
        encoder=torch.nn.Flatten(), settings=SETTINGS,
    )  # fmt: skip
    for name in ("embedding_attack_auc", "embedding_attack_rate", "embedding_attack_rate_held_out"):
        for who in ("model", "frozen_base", "held_out_as_train"):
            assert 0 <= report.audit["measures"][name][who]["value"] <= 1
    model = report.audit["measures"]["embedding_attack_auc"]
    assert model["model"] == model["frozen_base"], "the model is its base, and the search is deterministic"
    assert report.judge({"embedding_attack_auc": {"min": 0.0}})


def test_no_image_of_a_person_who_is_searched_for_calibrates_the_distances(monkeypatch):
    """Other images of the held-out persons alone would make these persons' distances longer than those of members."""
    people = [images_of(12, seed).add_column("group", [f"{seed}-{row // 3}" for row in range(12)]) for seed in (1, 2)]
    members, others = (EncodedImages(images, RESOLUTION) for images in people)
    given = []

    def found(evaluator, images, rows, references, settings):
        given.append((rows, references))
        pixels = images.pixels(rows)
        return metrics.extraction(pixels[:, None].repeat(1, 3, 1, 1, 1), pixels, 20.0, 3, held_out=references)

    monkeypatch.setattr(embedding, "nearest_found", found)
    evaluator = SimpleNamespace(family=family_of(tiny_pipeline()))
    embedding.embedding_attack(evaluator, members, others, SETTINGS)
    (_, references), (rows, same) = given
    searched = set(others.units_of(rows))
    free = [row for row in others.distinct if others.units[row] not in searched]
    assert len(searched) == 2 and len(free) == 6 and torch.equal(references, same)
    assert sorted(map(pixels_of, references)) == sorted(map(pixels_of, others.pixels(free)))


def pixels_of(image: torch.Tensor) -> list[float]:
    return image.flatten().tolist()


def test_an_audit_leaves_the_search_out_unless_it_is_asked_for():
    with pytest.raises(ValueError, match="embedding_attack must be at least 0, but is -1"):
        AuditSettings(embedding_attack=-1)
    assert AuditSettings().embedding_attack == 0
