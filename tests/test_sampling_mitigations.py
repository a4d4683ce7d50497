"""The mitigations that work while images are sampled."""

import pytest
import torch
from conftest import RESOLUTION, images_of, tiny_pipeline, tiny_trainer
from torch.nn import functional as F

from memcontrol_hf import MemControlTrainingArguments
from memcontrol_hf.families import family_of
from memcontrol_hf.metrics import steering_norms
from memcontrol_hf.mitigations import MITIGATIONS, AntiMemorizationGuidance, PromptEmbedding, parse_mitigations
from memcontrol_hf.randomness import seeded_generator
from memcontrol_hf.sampling import generate

PROMPTS = ["abc", "xyz", "q"]
KEYS = [(1, i) for i in range(3)]


def images(pipeline, batch_size=3, prompt_embedding=None) -> torch.Tensor:
    adjust = [prompt_embedding.inputs] if prompt_embedding else []
    return generate(pipeline, PROMPTS, KEYS, RESOLUTION, 4, 3.0, batch_size, adjust)


def test_they_alone_are_marked_as_no_protection_of_published_weights():
    unprotected = [name for name, mitigation in MITIGATIONS.items() if not mitigation.guards_weights]
    assert unprotected == ["prompt_embedding", "anti_memorization_guidance"]


# ---- prompt embedding ----


def norms_at_first_step(pipeline, inputs) -> torch.Tensor:
    pipeline.scheduler.set_timesteps(4)
    with torch.no_grad():
        conditional, unconditional = (
            pipeline.unet(inputs["latents"], pipeline.scheduler.timesteps[0], inputs[name]).sample
            for name in ("prompt_embeds", "negative_prompt_embeds")
        )
    return steering_norms(conditional, unconditional)


def adjusted(pipeline, **arguments) -> dict[str, torch.Tensor]:
    generators = [seeded_generator(*key) for key in KEYS]
    return PromptEmbedding(**arguments).inputs(family_of(pipeline), PROMPTS, generators, RESOLUTION, 4)


def test_a_prompt_is_made_to_steer_less_until_the_target(pipeline):
    before = norms_at_first_step(pipeline, adjusted(pipeline, target=1e9))
    target = before.sort().values[1].item() * 0.98  # one prompt is below it as it is
    inputs = adjusted(pipeline, target=target, iterations=50)
    after = norms_at_first_step(pipeline, inputs)
    plain = family_of(pipeline).encode_prompts(PROMPTS)["prompt_embeds"]
    for i in range(3):
        same = torch.equal(inputs["prompt_embeds"][i], plain[i])
        assert same == (before[i] <= target), "a prompt that steers little is left as it is"
        assert after[i] <= target * 1.001
    assert torch.equal(inputs["prompt_embeds"][:, 0], plain[:, 0]), "the start token is kept"
    assert (norms_at_first_step(pipeline, adjusted(pipeline)) < before).all(), "without a target: ten steps"


@pytest.mark.parametrize(("factor", "changes"), [(1.1, False), (0.9, True)])
def test_the_target_is_of_the_noise_that_a_prediction_implies(pipeline, factor, changes):
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    family = family_of(pipeline)
    norms = norms_at_first_step(pipeline, adjusted(pipeline, target=1e9))
    norms = family.noise.epsilon_scale(int(pipeline.scheduler.timesteps[0])) * norms
    inputs = adjusted(pipeline, target=factor * norms.max().item(), iterations=1)
    plain = family.encode_prompts(PROMPTS)["prompt_embeds"]
    assert torch.equal(inputs["prompt_embeds"], plain) is not changes


def test_prompts_below_the_target_give_the_images_of_no_mitigation(pipeline):
    plain = images(pipeline)
    assert torch.equal(plain, images(pipeline, prompt_embedding=PromptEmbedding(target=1e9)))
    changed = images(pipeline, prompt_embedding=PromptEmbedding(lr=0.5))
    assert not torch.allclose(plain, changed, atol=1e-3)
    torch.testing.assert_close(
        changed, images(pipeline, 1, PromptEmbedding(lr=0.5)), atol=1e-4, rtol=0, msg="whatever the batch size"
    )


def test_the_adjustment_costs_a_pass_an_iteration_and_one(pipeline):
    passes = []
    pipeline.unet.register_forward_hook(lambda *_: passes.append(1))
    adjusted(pipeline, iterations=3)
    assert len(passes) == 4


# ---- anti-memorization guidance ----


def training_images(pipeline, count=6) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and text embeddings."""
    generator = torch.Generator().manual_seed(5)
    family = family_of(pipeline)
    return torch.randn(count, 4, 8, 8, generator=generator), family.encode_prompts(list("abcdef"[:count]))[
        "prompt_embeds"
    ]


def test_below_the_threshold_sampling_is_as_without(pipeline):
    plain, family = images(pipeline), family_of(pipeline)
    far = AntiMemorizationGuidance(threshold=1, c3=1e6)
    latents, embeds = training_images(pipeline)
    pipeline.scheduler.set_timesteps(4)
    limits = [1 - (int(t) / 1000) ** 2 for t in pipeline.scheduler.timesteps]
    assert min(limits) > 0.3, "so that chance similarities stay below"
    with far.on(family, pipeline.unet, latents, embeds, 3.0):
        assert torch.equal(images(pipeline), plain)
    near = AntiMemorizationGuidance(threshold=0)
    with near.on(family, pipeline.unet, latents, embeds, 3.0):
        guided = images(pipeline)
        assert not torch.allclose(guided, plain, atol=1e-3)
        torch.testing.assert_close(images(pipeline, batch_size=1), guided, atol=1e-3, rtol=0)
    assert torch.equal(images(pipeline), plain), "and no longer afterwards"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("terms", [{"c1": 0, "c2": 0}, {"c2": 0, "c3": 0}, {"c1": 0.5, "c3": 0}, {}])
def test_its_three_terms_follow_the_papers_equations(prediction_type, terms):
    """Against equations 10 to 17, written down once more in terms of the noise prediction."""
    pipeline = tiny_pipeline(prediction_type)
    family, unet, scale, t = family_of(pipeline), pipeline.unet, 3.0, torch.tensor(400)
    guidance = AntiMemorizationGuidance(threshold=0.1, **terms)
    train, captions = training_images(pipeline)
    alpha = family.noise.scheduler.alphas_cumprod[400]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    x[0] = alpha.sqrt() * train[3] + 0.1 * x[0]  # one that is near a training image
    null, text = family.encode_prompts(["", "abc"])["prompt_embeds"][:, None].expand(-1, 2, -1, -1)

    def noise_of(x, condition):
        prediction = unet(x, t, condition).sample
        return {
            "epsilon": prediction,
            "v_prediction": alpha.sqrt() * prediction + (1 - alpha).sqrt() * x,
            "sample": (x - alpha.sqrt() * prediction) / (1 - alpha).sqrt(),
        }[prediction_type]

    x.requires_grad_()
    unconditional, conditional = noise_of(x, null), noise_of(x, text)
    guided = unconditional + scale * (conditional - unconditional)
    clean = (x - (1 - alpha).sqrt() * guided) / alpha.sqrt()
    center = train.mean(0)
    similarity, nearest = F.cosine_similarity(
        (clean - center).flatten(1)[:, None], (train - center).flatten(1)[None], dim=2
    ).max(1)
    (gradient,) = torch.autograd.grad(similarity.sum(), x, retain_graph=True)
    found = similarity > guidance.threshold * (1 - 0.4**2)
    assert found.any()
    sigma = similarity[:, None, None, None]
    s1 = torch.clamp(guidance.c1 * sigma, 0, scale - 1)
    s2 = torch.minimum(guidance.c2 * sigma, scale - s1 - 1).clamp(min=0)
    change = -s1 * (conditional - unconditional) - s2 * (noise_of(x, captions[nearest]) - unconditional)
    change = change + guidance.c3 * (1 - alpha).sqrt() * gradient
    expected = (guided + change * found[:, None, None, None]).detach()

    x = x.detach()
    with torch.no_grad(), guidance.on(family, unet, train, captions, scale):
        both = unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=torch.cat([null, text]), return_dict=False)[0]
    prediction = both.chunk(2)[0] + scale * (both.chunk(2)[1] - both.chunk(2)[0])  # as a pipeline joins them
    result = {
        "epsilon": prediction,
        "v_prediction": alpha.sqrt() * prediction + (1 - alpha).sqrt() * x,
        "sample": (x - alpha.sqrt() * prediction) / (1 - alpha).sqrt(),
    }[prediction_type]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected[found], guided[found], atol=1e-3)


@pytest.mark.parametrize("terms", [{"c2": 0, "c3": 0}, {"c1": 0, "c3": 0}, {"c1": 0, "c2": 0, "c3": 1000}, {}])
def test_sampled_images_keep_away_from_the_training_images(pipeline, terms):
    """A model that guidance by any prompt leads to a training image; each term alone turns away from it."""
    family = family_of(pipeline)
    latents, embeds = training_images(pipeline)
    null, other = (
        family.null_condition()["prompt_embeds"],
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(6)),
    )

    class Memorized(torch.nn.Module):
        config, dtype, device = pipeline.unet.config, torch.float32, torch.device("cpu")

        def forward(self, x, timestep, encoder_hidden_states, **kwargs):
            alpha = family.noise.scheduler.alphas_cumprod[int(timestep)]
            prompted = (encoder_hidden_states != null).flatten(1).any(1).view(-1, 1, 1, 1)
            clean = 0.3 * x + 0.7 * (other + 0.3 * prompted * (latents[2] - other))
            return ((x - alpha.sqrt() * clean) / (1 - alpha).sqrt(),)

    pipeline.unet = Memorized()

    def nearest() -> torch.Tensor:
        drawn = pipeline("a", num_inference_steps=8, guidance_scale=3.0, output_type="latent", height=RESOLUTION,
                         width=RESOLUTION, generator=seeded_generator(0)).images  # fmt: skip
        center = latents.mean(0)
        return F.cosine_similarity((drawn - center).flatten(1), (latents - center).flatten(1)).max()

    plain = nearest()
    assert plain > 0.5
    with AntiMemorizationGuidance(**terms).on(family, pipeline.unet, latents, embeds, 3.0):
        assert nearest() < plain - 0.02


# ---- in the trainer ----


def test_the_trainer_samples_with_them_and_attacks_the_weights_without(tmp_path):
    figures = {}
    for mitigation in ("", "prompt_embedding:lr=0.5", "anti_memorization_guidance:threshold=0"):
        trainer = tiny_trainer(tmp_path, train=images_of(8, seed=1), mitigations=[mitigation] if mitigation else [])
        figures[mitigation] = trainer.evaluate(metrics=["fid", "membership_auc"])
    plain, *others = figures.values()
    for other in others:
        assert other["eval_fid"] != pytest.approx(plain["eval_fid"], rel=1e-3)
        assert other["eval_membership_auc"] == plain["eval_membership_auc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mitigations": ["prompt_embedding:0"]}, "target is 0.0; use prompt_embedding"),
        ({"mitigations": ["prompt_embedding:iterations=0"]}, "iterations is 0; use prompt_embedding"),
        ({"mitigations": ["prompt_embedding:lr=-1"]}, "lr is -1.0; use prompt_embedding"),
        ({"mitigations": ["anti_memorization_guidance:2"]}, "threshold is 2.0; use anti_memorization_guidance"),
        ({"mitigations": ["anti_memorization_guidance:c3=-1"]}, "c3 is -1.0; use anti_memorization_guidance"),
        (
            {"mitigations": ["anti_memorization_guidance"], "eval_guidance_scale": 1.0},
            "anti_memorization_guidance needs a guidance scale above 1, not 1",
        ),
    ],
)
def test_wrong_use_is_one_line(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        MemControlTrainingArguments(output_dir=str(tmp_path), **arguments)
    assert "\n" not in str(raised.value)


def test_arguments_may_be_written_in_both_ways():
    parsed = parse_mitigations(["prompt_embedding:3,iterations=5", "anti_memorization_guidance:0.4"])
    assert vars(parsed["prompt_embedding"]) == {"target": 3.0, "iterations": 5, "lr": 0.05}
    assert parsed["anti_memorization_guidance"].threshold == 0.4
