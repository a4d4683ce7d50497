"""The flags of `training_scripts/train_memcontrol.py`: their help, their defaults, and what of them is published."""

import dataclasses
import hashlib
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import HfApi
from peft import PeftConfig

from .evaluation import METRICS
from .families import DTYPES, QUANTIZATIONS
from .mitigations import MITIGATIONS
from .tuners import MemControlConfig

# the projections of attention layers: of denoisers, of CLIP, of T5
ATTENTION = [*("to_q", "to_k", "to_v", "to_out.0"), *("q_proj", "k_proj", "v_proj", "out_proj"), *("q", "k", "v", "o")]

# method -> its config, and the learning rates that are searched
METHODS: dict[str, tuple[PeftConfig, tuple[float, float]]] = {
    "svdiff": (MemControlConfig(method="svdiff"), (1e-2, 1e-1)),
    "difffit": (MemControlConfig(method="difffit"), (3e-4, 3e-2)),
    "attention": (MemControlConfig(method="weights"), (1e-5, 1e-3)),
    "weights": (MemControlConfig(method="weights"), (1e-5, 1e-3)),
    "norm": (MemControlConfig(method="norm"), (3e-4, 3e-2)),
    "bias": (MemControlConfig(method="bias"), (3e-4, 3e-2)),
    "lora": (
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION),
        (1e-4, 1e-2),
    ),
}

# what a flag is when it is not given: for the demo's pipeline, which shall be done in minutes on two cores, and others
DEMO = {
    "resolution": 64,
    "train_batch_size": 32,
    "max_train_steps": 100,
    "search_max_steps": 50,
    "n_finalists": 0,
    "eval_num_images": 144,
    "eval_inference_steps": 10,
    "eval_guidance_scale": 3.0,
    "audit_num_prompts": 92,
    "audit_images_per_prompt": 4,
}

OTHER = {
    "resolution": 512,
    "train_batch_size": 4,
    "max_train_steps": 1000,
    "search_max_steps": 250,
    "n_finalists": 3,
    "eval_num_images": 256,
    "eval_inference_steps": 25,
    "eval_guidance_scale": 7.5,
    "audit_num_prompts": 100,
    "audit_images_per_prompt": 10,
}


def _by_pipeline(name: str, text: str) -> Any:
    """A flag whose default depends on the pipeline."""
    return field(default=None, metadata={"help": f"{text} {DEMO[name]} for the demo's pipeline, else {OTHER[name]}."})


@dataclass
class ScriptArguments:
    """What is tuned, on which images, how it is searched, and where the result goes."""

    pretrained_model_name_or_path: str = field(
        default="demo",
        metadata={
            "help": "Pipeline to tune: a Hub id, a folder or a .safetensors file. `demo`: the one in the package."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Of the pipeline on the Hub."})
    variant: str | None = field(default=None, metadata={"help": "Of the pipeline's weights, say fp16."})
    dtype: str | None = field(
        default=None, metadata={"help": f"Of the frozen weights: {', '.join(DTYPES)}. float32 if not given."}
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": f"Of the frozen denoiser, for --method lora: {', '.join(QUANTIZATIONS)}."},
    )
    single_file_config: str | None = field(
        default=None,
        metadata={"help": "For a .safetensors file: a Hub id or folder of a pipeline that is built alike."},
    )
    dataset_name: str = field(
        default="demo",
        metadata={"help": "Images: a Hub id or a folder that `load_dataset` reads. `demo`: those in the package."},
    )
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Images instead: a folder with a metadata.jsonl beside the files."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    caption_column: str = field(default="text", metadata={"help": "Column with the captions."})
    group_column: str | None = field(
        default=None, metadata={"help": "Column that must not be torn apart by the splits: a patient's id, say."}
    )
    canaries: int = field(
        default=0,
        metadata={"help": "Training images that are repeated, to see whether the audit's attacks find them."},
    )
    canary_repeats: int = field(default=4, metadata={"help": "How often each canary occurs."})
    near_duplicates: float = field(
        default=0.05,
        metadata={"help": "How unlike images of different splits must be, 0 to 1; see metrics.near_duplicates."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the result goes. outputs/quickstart for the demo."}
    )

    method: str = field(
        default="svdiff",
        metadata={
            "help": f"What is tuned in a selected block: {', '.join(METHODS)} (weights is attention's other name)."
        },
    )
    peft_config: str | None = field(
        default=None,
        metadata={"help": "Any other PEFT method: a JSON file as save_pretrained writes it (adapter_config.json)."},
    )
    granularity: list[str] = field(
        default_factory=lambda: ["block"],
        metadata={
            "help": "What a bit of the mask stands for: block, site (attn1, attn2, ff), or regular expressions over "
            "the denoiser's module names, one for each bit."
        },
    )
    text_encoder_blocks: bool = field(
        default=False,
        metadata={"help": "Layers of the text encoders are blocks, too; captions are then encoded in each step."},
    )
    mask_from: str | None = field(
        default=None,
        metadata={
            "help": "Take the mask of this adapter folder, JSON file or Hub repository instead of searching; with "
            "--n_trials it is the third trial of a search."
        },
    )

    n_trials: int | None = field(
        default=None, metadata={"help": "Trials of the search, all in all: 8, or none with --mask_from."}
    )
    objectives: list[str] = field(
        default_factory=lambda: ["fid", "membership_auc"],
        metadata={"help": f"Out of {', '.join(METRICS)}; quality first, memorization second."},
    )
    memorization_budget: float | None = field(
        default=None,
        metadata={
            "help": "Worst second objective that is allowed, a constraint of the search. Without it: the front's knee."
        },
    )
    max_trainable_percent: float | None = field(
        default=None, metadata={"help": "Masks that train more of the parameters are not tried."}
    )
    n_finalists: int | None = _by_pipeline(
        "n_finalists", "Runs of the front that are repeated with new seeds before one is chosen by the repeats."
    )
    finalist_repeats: int = field(default=1, metadata={"help": "How often each of them is repeated."})
    trial_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a trial's training is stopped; it has failed then."}
    )
    prune_at: float | None = field(
        default=None,
        metadata={"help": "Share of a trial's steps after which it is stopped if two others dominate it there."},
    )
    sampler: str = field(default="tpe", metadata={"help": "Of the search: tpe, nsga2, gp, random."})
    search_fraction: float = field(default=1.0, metadata={"help": "Share of the training rows in a trial."})
    search_max_steps: int | None = _by_pipeline("search_max_steps", "Steps of a trial of the search.")
    storage: str | None = field(
        default=None,
        metadata={
            "help": "Of the study, which any number of processes share: a journal file, a database's address, or "
            "grpc://host:port. See docs/search.md."
        },
    )
    study_name: str = field(default="memcontrol", metadata={"help": "Name of the study in its storage."})
    backend: str = field(
        default="optuna",
        metadata={"help": "optuna: the trials run in this process. ray: in workers that Ray places on its cluster."},
    )
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Workers of --backend ray, each with a CPU and a GPU if there are any: 2."},
    )

    resolution: int | None = _by_pipeline("resolution", "Side of the images in pixels.")
    train_batch_size: int | None = _by_pipeline("train_batch_size", "Images a step on each device.")
    eval_batch_size: int = field(default=32, metadata={"help": "Images at once in measuring and sampling."})
    max_train_steps: int | None = _by_pipeline("max_train_steps", "Steps of the final fine-tune.")
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches for one step."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory for more time."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "A fixed learning rate. Without it, it is searched with the mask."}
    )
    lr_scheduler: str = field(default="constant", metadata={"help": "As transformers calls it: cosine, ..."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps until the full learning rate."})
    snr_gamma: float | None = field(default=None, metadata={"help": "Min-SNR weighting of the loss; 5 is usual."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of captions replaced by the empty one."})
    mitigation: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": f"Further means against memorization, NAME[:arguments]: {', '.join(MITIGATIONS)}. Several "
            "combine: rwa:n=4 threshold:q=0.9. See docs/mitigations.md.",
        },
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    trainer_args: str = field(
        default="{}",
        metadata={"help": 'Any other argument of transformers\' Trainer as JSON: {"optim": "adamw_bnb_8bit"}.'},
    )

    encoder: str = field(
        default="demo",
        metadata={
            "help": "Image encoder of fid and amd: demo, a Hub id or folder of a model, or xrv:densenet121-res224-all."
        },
    )
    eval_num_images: int | None = _by_pipeline("eval_num_images", "Images generated for fid and for amd.")
    eval_inference_steps: int | None = _by_pipeline("eval_inference_steps", "Sampling steps of these images.")
    eval_guidance_scale: float | None = _by_pipeline("eval_guidance_scale", "Guidance scale of these images.")
    audit_num_prompts: int | None = _by_pipeline("audit_num_prompts", "Training captions that the audit samples.")
    audit_images_per_prompt: int | None = _by_pipeline("audit_images_per_prompt", "Images for each of them.")
    gate: str | None = field(
        default=None, metadata={"help": "Gate file of the audit: limits for its measures. The package's by default."}
    )
    validation_prompt: str | None = field(
        default=None, metadata={"help": "Prompt in the card's loading snippet. It is published."}
    )

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Read nothing but the model's configs; print blocks, trainable parameters, adapter size and "
            "memory, and stop."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of everything."})
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "Save the state of the final fine-tune each so many steps."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Go on with the final fine-tune: a checkpoint's folder, or latest."}
    )
    report_to: str = field(default="none", metadata={"help": "wandb, tensorboard, trackio, all or none."})
    log_images: int = field(
        default=0,
        metadata={"help": "Images of --validation_prompt to show in wandb, without those that may be copies."},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the public files, to a private repository."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "The repository; the folder's name if not given."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    hub_public: bool = field(
        default=False, metadata={"help": "Make a new repository public, or push to one that is public."}
    )
    allow_failed_gate: bool = field(
        default=False, metadata={"help": "Push although the release gate failed; the card says so first."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Of the adapter, as the Hub writes it: apache-2.0, ... It is on the card."}
    )

    def __post_init__(self) -> None:
        if self.n_trials is None:
            self.n_trials = 0 if self.mask_from else 8
        self.output_dir = self.output_dir or ("outputs/quickstart" if on_demo_data(self) else "outputs/memcontrol")
        for name, value in (DEMO if self.pretrained_model_name_or_path == "demo" else OTHER).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


_SEEN_LATER = ("images", "world_size")


def settings(args: ScriptArguments) -> dict[str, Any]:
    """What a study depends on: going on with another value is refused."""
    depends_on = (
        *("pretrained_model_name_or_path", "revision", "variant", "dtype", "quantization", "single_file_config"),
        *("dataset_name", "train_data_dir", "image_column"),
        *("caption_column", "group_column", "method", "peft_config", "granularity", "objectives", "sampler"),
        *("search_fraction", "search_max_steps", "resolution", "train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler", "lr_warmup_steps", "snr_gamma", "caption_dropout", "mixed_precision"),
        *("trainer_args", "encoder", "eval_num_images", "eval_inference_steps", "eval_guidance_scale", "seed"),
    )
    values = {name: without_place(getattr(args, name)) for name in depends_on}
    if args.text_encoder_blocks:
        values["text_encoder_blocks"] = True
    if args.prune_at is not None:
        values["prune_at"] = args.prune_at
    if args.canaries:
        values |= {"canaries": args.canaries, "canary_repeats": args.canary_repeats}
    return values | ({"mitigation": sorted(args.mitigation)} if args.mitigation else {})


def without_place(value: Any) -> Any:
    """A path of this machine as its last part and a digest of the whole; anything else as it is."""
    if not isinstance(value, str) or not os.path.exists(value):  # of a text that is too long for a path: False
        return value
    path = Path(value).resolve()
    return f"{path.name} ({hashlib.sha256(str(path).encode()).hexdigest()[:8]})"


def on_demo_data(args: ScriptArguments) -> bool:
    """Whether the images are those in the package."""
    return args.train_data_dir is None and args.dataset_name == "demo"


def public_datasets(args: ScriptArguments) -> list[str]:
    """The data set's name, if everybody can see it on the Hub."""
    if args.train_data_dir is not None or on_demo_data(args) or Path(args.dataset_name).exists():
        return []
    try:
        return [] if HfApi(token=False).dataset_info(args.dataset_name).private else [args.dataset_name]
    except Exception:  # offline, unknown or private: nothing is said
        return []


# Flags whose values are words of this script, and no folder that happens to have such a name.
CHOICES = ("method", "sampler", "backend", "dtype", "quantization", "mixed_precision", "lr_scheduler")


def public_flags(args: ScriptArguments) -> str:
    """The flags that differ from the defaults; a place, or a person's data, as `YOUR_...`, or left out."""
    private = {"train_data_dir", "dataset_name", "output_dir", "storage", "mask_from", "peft_config", "trainer_args",
               "resume_from_checkpoint", "gate", "pretrained_model_name_or_path", "single_file_config", "hub_model_id",
               "push_to_hub", "hub_revision", "hub_public", "allow_failed_gate", "report_to",
               "log_images"}  # fmt: skip
    needed = {"train_data_dir", "dataset_name", "pretrained_model_name_or_path", "single_file_config", "mask_from",
              "peft_config", "trainer_args"}  # fmt: skip
    if not os.path.exists(args.pretrained_model_name_or_path):
        private.remove("pretrained_model_name_or_path")
    if public_datasets(args):
        private.remove("dataset_name")
    default = ScriptArguments(pretrained_model_name_or_path=args.pretrained_model_name_or_path)
    default.pretrained_model_name_or_path = ScriptArguments().pretrained_model_name_or_path
    if on_demo_data(args) and args.pretrained_model_name_or_path == "demo":
        private -= {"output_dir"} if not Path(args.output_dir).is_absolute() else set()
    flags = []
    for name, value in dataclasses.asdict(args).items():
        place = name not in ("output_dir", *CHOICES) and without_place(value) != value
        if value == getattr(default, name):
            continue
        if name in private or place:
            flags += [f"--{name} YOUR_{name.upper()}"] if name in needed else []
            continue
        words = [] if value is True else value if isinstance(value, list) else [value]
        flags.append(shlex.join([f"--{name}", *map(str, words)]))
    return " ".join(flags)
