"""Tiny random models and small real images; nothing is fetched and nothing is mocked."""

import os
import socket
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests themselves run beside each other
if "MEMCONTROL_TESTS_CACHE" not in os.environ:  # workers of pytest-xdist and subprocesses of the tests inherit it
    _caches = tempfile.TemporaryDirectory(prefix="memcontrol_tests_")
    os.environ["MEMCONTROL_TESTS_CACHE"] = _caches.name
os.environ.update(  # the libraries read them when they are imported; each worker has its own folders
    {
        f"{owner}_CACHE": os.path.join(
            os.environ["MEMCONTROL_TESTS_CACHE"], os.environ.get("PYTEST_XDIST_WORKER", "one"), owner.lower()
        )
        for owner in ("HF_DATASETS", "HF_EVALUATE", "HF_METRICS", "HF_MODULES", "MEMCONTROL_SVD")
    }
)

import pytest
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 16


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def tiny_unet(**kwargs) -> UNet2DConditionModel:
    """Five attention sites, 2 levels."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**defaults, **kwargs})


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


def tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=8)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=tiny_unet().eval(),
        scheduler=DDIMScheduler(prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


def images_of(count: int, seed: int = 0) -> Dataset:
    """Pictures of a few coloured tiles, with captions."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(t.numpy()).resize((RESOLUTION, RESOLUTION), Image.Resampling.NEAREST) for t in tiles]
    texts = ["".join(chr(97 + c) for c in torch.randint(0, 26, (3,), generator=generator)) for _ in range(count)]
    return Dataset.from_dict({"image": images, "text": texts})


@pytest.fixture
def train_images() -> Dataset:
    return images_of(10, seed=1)


@pytest.fixture
def validation_images() -> Dataset:
    return images_of(8, seed=2)


AVERAGES = torch.nn.Sequential(torch.nn.AvgPool2d(RESOLUTION), torch.nn.Flatten())


def tiny_trainer(
    output_dir,
    pipeline=None,
    config=None,
    train=None,
    validation=None,
    mask=None,
    space=None,
    encoder=AVERAGES,
    optimizer_cls_and_kwargs=None,
    **arguments,
):
    """A trainer whose steps take milliseconds."""
    from memcontrol_hf import MemControlConfig, MemControlTrainer, MemControlTrainingArguments

    defaults = {
        "resolution": RESOLUTION,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_num_images": 6,
        "eval_inference_steps": 2,
        "eval_guidance_scale": 2.0,
        "eval_num_timesteps": 2,
        "save_strategy": "no",
        "disable_tqdm": False,
    }
    return MemControlTrainer(
        pipeline=pipeline or tiny_pipeline(),
        peft_config=config or MemControlConfig(method="svdiff"),
        args=MemControlTrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments}),
        train_dataset=train or images_of(10, seed=1),
        eval_dataset=validation or images_of(8, seed=2),
        search_space=space,
        mask=mask,
        encoder=encoder,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def small_report(passed: bool | None = True, **changes):
    """A report with all its parts; `passed`: of the gate, `None` without an audit."""
    from memcontrol_hf import MemorizationReport
    from memcontrol_hf.report import ALL_ON, FROZEN_BASE, SELECTED

    figures = {
        "trainable_parameters": 64,
        "trainable_percent": 1.5,
        "loss": 0.2,
        "loss_train": 0.1,
        "membership_auc": 0.52,
        "membership_auc_low": 0.45,
        "membership_auc_high": 0.58,
        "noise_norm": 2.0,
        "noise_norm_held_out": 2.1,
        "fid": 4.25,
        "amd": 0.11,
        "amd_held_out": 0.12,
    }
    audit = {
        "subject": "adapter",
        "settings": {"num_prompts": 100, "images_per_prompt": 10, "seed": 0},
        "encoder": "demo",
        "images": {"train": 92, "held_out": 256},
        "measures": {
            "membership_auc_loss": _measure(0.517, 0.449, 0.585),
            "membership_tpr_loss": _measure(None, note="not estimable from 80 held-out images: it needs 100"),
            "extraction_rate": _measure(0.0 if passed else 0.25, 0.0, 0.04 if passed else 0.5),
            "amd": _measure(0.106),
        },
        "distances": {"edges": [0.0, 0.1, 0.2], "train": [3, 1], "held_out": [2, 2]},
        "canaries": {"planted": 12, "caught": {"membership_loss": {"caught": 3, "of": 12}}},
        "caption_markers": {},
    }
    mask = {"mid_block.attentions.0": False, "up_blocks.1.attentions.0": True, "up_blocks.1.attentions.1": False}
    fields = {
        "base_model": "owner/base",
        "method": "svdiff",
        "mask": mask,
        "figures": {name: dict(figures) for name in (FROZEN_BASE, ALL_ON, SELECTED)},
        "training": {"learning_rate": 0.05, "max_steps": 9, "batch_size": 4, "resolution": 16, "seed": 0},
        "images": {"train": 128, "train_different": 92, "held_out_different": 256},
        "encoder": "demo",
        "search": {"sampler": "tpe", "objectives": ["fid", "membership_auc"], "trials": [{}] * 8},
        "audit": audit,
        "command": "accelerate launch training_scripts/train_memcontrol.py",
        **changes,
    }
    report = MemorizationReport(**fields)
    if passed is None:
        report.audit = None
    elif report.audit:
        assert report.judge({"extraction_rate": {"max": 0.05}, "membership_auc_loss": {"max": 0.65}}) == passed
    return report


def _measure(value, low=None, high=None, note=None):
    figure = {"value": value, "low": low, "high": high, "note": note}
    return {"model": figure, "frozen_base": figure, "held_out_as_train": None if low is None else figure}


def adapter_folder(folder, config=None, mask=None, report=None):
    """What a fine-tune leaves, with random weights in the place of trained ones."""
    from peft import get_peft_model

    from memcontrol_hf import MemControlConfig, SearchSpace
    from memcontrol_hf.adapter_folder import adapter_digests
    from memcontrol_hf.report.card import write_card

    unet = tiny_unet()
    space = SearchSpace.from_model(unet)
    mask = space.check({"mid_block.attentions.0": True} if mask is None else mask)
    adapted = get_peft_model(unet, space.apply(config or MemControlConfig(method="svdiff"), mask))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.3
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "study.journal").write_text("not for others")
    (folder / "private").mkdir()
    (folder / "private" / "review.html").write_text("not for others")
    report = report or small_report(mask=mask)
    report.weights = adapter_digests(folder)
    report.to_json(folder / "memorization_report.json")
    write_card(folder)
    return folder
