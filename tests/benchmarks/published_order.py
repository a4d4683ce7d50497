"""A trial beside the same trial in the order of work of the paper's published code.

There, each trial loads the base and decomposes its weights; each step encodes its images and captions; each validation
batch is encoded again for the reward, the noise norm at one random timestep; and the images of fid are sampled in each
trial, beside features of the real images that are computed anew. What is trained is the same on both sides.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import get_peft_model

from memcontrol_hf import SearchSpace, demo_dataset, demo_pipeline, metrics
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.families import Family, family_of
from memcontrol_hf.flags import DEMO
from memcontrol_hf.from_flags import METHODS
from memcontrol_hf.images import to_pixels
from memcontrol_hf.sampling import generate
from memcontrol_hf.tuners import svd

from .timing import alternate, clock, compared
from .training_step import demo_trainer
from .whole_search import composed

METHOD, RATE = "svdiff", 0.03
STEPS, BATCH, IMAGES = DEMO["search_max_steps"], DEMO["train_batch_size"], DEMO["eval_num_images"]


def every_second_block(space: SearchSpace) -> dict[str, bool]:
    """A mask with half of the blocks."""
    return {block: number % 2 == 0 for number, block in enumerate(space.mask(True))}


def published_trial(device: torch.device) -> Callable[[], None]:
    """A trial in the published order, from the data set on."""
    data, resolution = demo_dataset(), DEMO["resolution"]
    train, validation = data["train"], data["validation"]

    def encoded(family: Family, rows: dict[str, list]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            latents = family.encode_images(to_pixels(rows["image"], resolution))
            return latents.to(device), family.encode_prompts(rows["text"])

    @decomposed_anew()
    def trial() -> None:
        pipeline = demo_pipeline().to(device)
        family, space = family_of(pipeline), SearchSpace.from_model(pipeline.unet)
        model = get_peft_model(pipeline.unet, space.apply(METHODS[METHOD][0], every_second_block(space))).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        times = family.noise.scheduler.config.num_train_timesteps
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            chosen = torch.randint(len(train), (BATCH,), generator=generator).tolist()
            latents, condition = encoded(family, train[chosen])
            noise = torch.randn(latents.shape, generator=generator).to(device)
            steps = torch.randint(times, (BATCH,), generator=generator).to(device)
            noisy = family.noise.scheduler.add_noise(latents, noise, steps)
            (family.denoise(model, noisy, steps, condition) - noise).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        null, norms = family.null_condition(), []
        for start in range(0, len(validation), BATCH):
            latents, condition = encoded(family, validation[start : start + BATCH])
            at = torch.randint(times, (1,), generator=generator).tolist()
            keys = [(0, start + number) for number in range(len(latents))]
            norms.append(metrics.noise_norm(model, latents, condition, null, family, at, keys, BATCH).max())
        rows = range(min(IMAGES, len(validation)))
        captions = validation[: len(rows)]["text"]
        images = generate(
            pipeline,
            captions,
            [(0, row) for row in rows],
            resolution,
            DEMO["eval_inference_steps"],
            DEMO["eval_guidance_scale"],
            BATCH,
        )
        encoder = load_encoder("demo", device)
        metrics.fid(encoder(images), encoder(to_pixels(validation["image"], resolution)))

    return trial


@contextmanager
def decomposed_anew() -> Iterator[None]:
    """No decomposition is found in memory or on the disk."""
    kept = svd._kept
    svd._FACTORS_BY_CONTENT.clear()
    svd._kept = lambda weight, digest: svd._decomposed(weight)
    try:
        yield
    finally:
        svd._kept = kept
        svd._FACTORS_BY_CONTENT.clear()


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page: a trial with the default objectives, one with the paper's two rewards, a whole search.

    Args:
        pairs: At most so many turns of each side; each takes half a minute on a CPU, so three do there.
    """
    data = demo_dataset()
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer(METHOD, folder, data["train"], data["validation"])
        device, args = trainer.args.device, trainer.args
        args.search_max_steps = STEPS
        run = {"mask": every_second_block(trainer.search_space), "learning_rate": RATE}
        trainer.encode(trainer.eval_dataset)
        pairs = pairs if device.type == "cuda" else min(pairs, 3)

        def trial(objectives: list[str]) -> None:
            args.objectives = objectives
            trainer.apply_hyperparameters(run)
            trainer.train_and_evaluate()

        published = {"published order": published_trial(device)}
        for what, objectives in (
            ("default objectives", args.objectives),
            ("fid and noise norm", ["fid", "noise_norm"]),
        ):
            sides = {f"by {what}": partial(trial, objectives)} | published
            seconds = alternate(sides, pairs, clock(device))
            yield compared(f"a trial by {what}, the demo", 1 / 3, seconds)
            if what == "default objectives":
                yield composed(seconds)
