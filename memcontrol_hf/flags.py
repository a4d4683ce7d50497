"""The flags of `memcontrol train`: their help, their defaults, and which of them a study depends on.

Each flag says by itself whether a study depends on it and whether its value may be published. The help is printed
without loading PyTorch; `tests/test_train_command.py` compares the choices with the packages that they name.
"""

import hashlib
import os
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

Method = Literal["svdiff", "difffit", "attention", "weights", "norm", "bias", "lora"]
Objective = Literal["fid", "amd", "membership_auc", "noise_norm", "loss"]
MITIGATIONS = (
    *("multiple_captions", "rwa", "gaussian_noise", "caption_dropout", "timestep_range", "skip_low_loss"),
    *("threshold", "early_stop", "dp_sgd", "prompt_embedding", "anti_memorization_guidance"),
)

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
"""Defaults for the demo's pipeline, which runs in minutes on two cores."""
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
"""Defaults for any other pipeline."""


def _flag(
    default: Any,
    text: str,
    *,
    study: bool | str,
    publish: Literal["yes", "unless_path", "placeholder", "never"],
    **metadata: Any,
) -> Any:
    """A flag.

    Args:
        default: default value; a list is copied for each use.
        text (`str`): help text.
        study (`bool` or `str`):
            Whether a study depends on the flag, so that going on with another value is refused. The name of a flag
            says: only where that flag is set.
        publish (`str`):
            What the published command holds. `"yes"`: the value. `"unless_path"`: the value, but `YOUR_NAME` in the
            place of a path on this machine. `"placeholder"`: always `YOUR_NAME`, since the value names a place or a
            person's data. `"never"`: nothing, since others do not need the flag to repeat the run.
        **metadata: further metadata for `HfArgumentParser`.
    """
    given = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": text, "study": study, "publish": publish, **metadata})


def _by_pipeline(name: str, text: str, *, study: bool) -> Any:
    """A flag whose default depends on the pipeline."""
    text = f"{text} {DEMO[name]} for the demo's pipeline, else {OTHER[name]}."
    return _flag(None, text, study=study, publish="yes")


@dataclass
class ScriptArguments:
    """What is tuned, on which images, how it is searched, and where the result goes."""

    # ---- model and images ----
    pretrained_model_name_or_path: str = _flag(
        "demo",
        "Pipeline to tune: a Hub id, a folder or a .safetensors file. `demo`: the pipeline in the package.",
        study=True,
        publish="unless_path",
    )
    revision: str | None = _flag(None, "Revision of the pipeline on the Hub.", study=True, publish="unless_path")
    variant: str | None = _flag(
        None, "Variant of the pipeline's weights, such as fp16.", study=True, publish="unless_path"
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = _flag(
        None, "Precision of the frozen weights; float32 if not given.", study=True, publish="yes"
    )
    quantization: Literal["bnb_4bit", "bnb_8bit", "torchao_int8"] | None = _flag(
        None, "Quantization of the frozen denoiser, for --method lora.", study=True, publish="yes"
    )
    single_file_config: str | None = _flag(
        None,
        "Hub id or folder of a pipeline with the same architecture as the .safetensors file.",
        study=True,
        publish="placeholder",
    )
    dataset_name: str = _flag(
        "demo",
        "Images: a Hub id or a folder that `load_dataset` reads. `demo`: the images in the package.",
        study=True,
        publish="placeholder",
    )
    train_data_dir: str | None = _flag(
        None,
        "Images, instead of --dataset_name: a folder with a metadata.jsonl beside the files.",
        study=True,
        publish="placeholder",
    )
    image_column: str = _flag("image", "Column with the images.", study=True, publish="placeholder")
    caption_column: str = _flag("text", "Column with the captions.", study=True, publish="placeholder")
    group_column: str | None = _flag(
        None,
        "Column whose values the splits keep together, such as a patient's id.",
        study=True,
        publish="placeholder",
    )
    attribute_column: str | None = _flag(
        None,
        "Column with an attribute that the captions name, such as a diagnosis: the audit measures whether the model "
        "tells it of training persons more often than of held-out persons.",
        study=False,
        publish="placeholder",
    )
    fit: Literal["crop", "pad"] = _flag(
        "crop",
        "How images that are not square become square. crop: the ends of the longer side are cut away. pad: the whole "
        "image is kept, between bars in the colour of --background, for images whose edges matter, such as scans.",
        study=True,
        publish="yes",
    )
    background: str = _flag(
        "white",
        "Colour of the bars of --fit pad, and under what is transparent: a name or #rrggbb.",
        study=True,
        publish="yes",
    )
    canaries: int = _flag(
        0,
        "Number of training images to repeat, which shows whether the audit's attacks find them.",
        study="canaries",
        publish="yes",
    )
    canary_repeats: int = _flag(4, "How often each canary occurs.", study="canaries", publish="yes")
    flip_canaries: bool = _flag(
        False,
        "Flip a coin for each canary: it is trained on, or kept out and known. From the coins the audit measures a "
        "lower bound of epsilon. --canary_repeats may be 1 then, and must be with dp_sgd.",
        study="canaries",
        publish="yes",
    )
    near_duplicates: float = _flag(
        0.05,
        "Least difference between images of different splits, 0 to 1; see metrics.near_duplicates.",
        study=False,
        publish="yes",
    )
    output_dir: str | None = _flag(
        None,
        "Folder for the result; outputs/quickstart for the demo, else outputs/memcontrol.",
        study=False,
        publish="never",
    )

    # ---- what is tuned ----
    method: Method = _flag(
        "svdiff",
        "PEFT method of a selected block; attention is another name of weights.",
        study=True,
        publish="yes",
    )
    peft_config: str | None = _flag(
        None,
        "Any other PEFT method: a JSON file as save_pretrained writes it (adapter_config.json).",
        study=True,
        publish="placeholder",
    )
    granularity: list[str] = _flag(
        ["block"],
        "What a bit of the mask stands for: block, site (attn1, attn2, ff), module (each linear layer and each "
        "convolution), or regular expressions over the denoiser's module names, one for each bit.",
        study=True,
        publish="yes",
    )
    text_encoder_blocks: bool = _flag(
        False,
        "Make the layers of the text encoders blocks, too; captions are then encoded in each step.",
        study=True,
        publish="yes",
    )
    singular_values: int | None = _flag(
        None,
        "memcontrol screen with --method svdiff: number of single singular values to choose, those that memorize "
        "least for what they learn. It writes them for --peft_config of memcontrol train.",
        study=False,
        publish="never",
    )
    mask_from: str | None = _flag(
        None,
        "Mask to use instead of a search: an adapter folder, a JSON file or a Hub repository; with --n_trials it is "
        "the third trial of the search.",
        study=False,
        publish="placeholder",
    )

    # ---- search ----
    n_trials: int | None = _flag(
        None,
        "Number of trials that the study holds in the end: 8, or none with --mask_from.",
        study=False,
        publish="yes",
    )
    objectives: list[str] = _flag(
        ["loss", "membership_auc"],
        "Objectives, the quality first and the memorization second: loss is that on the validation images; fid needs "
        "generated images in each trial.",
        study=True,
        publish="yes",
        choices=get_args(Objective),
    )
    memorization_budget: float | None = _flag(
        None,
        "Worst value of the second objective that is allowed, a constraint of the search. Without it, the knee of the "
        "front is chosen.",
        study=False,
        publish="yes",
    )
    max_trainable_percent: float | None = _flag(
        None, "Largest share of trained parameters; larger masks are not tried.", study=False, publish="yes"
    )
    n_finalists: int | None = _by_pipeline(
        "n_finalists", "Number of runs of the front that are repeated before one is chosen.", study=False
    )
    finalist_repeats: int = _flag(1, "How often each of these runs is repeated.", study=False, publish="yes")
    trial_timeout: float | None = _flag(
        None,
        "Seconds after which the training of a trial is stopped; the trial has failed then.",
        study=False,
        publish="yes",
    )
    screen: bool = _flag(
        True,
        "Make a screening first, which tells what each block learns and memorizes, and try its masks first. The "
        "screening is left out where it does not go with the other flags.",
        study=True,
        publish="yes",
    )
    screen_steps: int | None = _flag(
        None, "Steps of the screening; as many as a trial has by default.", study="screen", publish="yes"
    )
    screen_seeds: int = _flag(
        1,
        "Number of trainings of the screening, each with a random seed of its own; more make it steadier.",
        study="screen",
        publish="yes",
    )
    prune_at: float | None = _flag(
        None,
        "Share of a trial's steps after which the trial is stopped if two others dominate it there.",
        study=True,
        publish="yes",
    )
    sampler: Literal["tpe", "nsga2", "gp", "random"] = _flag(
        "tpe", "Sampler of the search.", study=True, publish="yes"
    )
    search_fraction: float = _flag(1.0, "Share of the training rows in a trial.", study=True, publish="yes")
    search_max_steps: int | None = _by_pipeline("search_max_steps", "Steps of a trial.", study=True)
    storage: str | None = _flag(
        None,
        "Storage of the study, which any number of processes share: a journal file, a database's address, or "
        "grpc://host:port. See docs/search.md.",
        study=False,
        publish="never",
    )
    study_name: str = _flag("memcontrol", "Name of the study in its storage.", study=False, publish="never")
    backend: Literal["optuna", "ray"] = _flag(
        "optuna",
        "Where trials run. optuna: in this process. ray: in workers that Ray places on its cluster.",
        study=False,
        publish="yes",
    )
    num_workers: int | None = _flag(
        None,
        "Number of workers of --backend ray, each with a CPU and a GPU if there are any: 2.",
        study=False,
        publish="yes",
    )

    # ---- training ----
    resolution: int | None = _by_pipeline("resolution", "Side of the images in pixels.", study=True)
    train_batch_size: int | None = _by_pipeline("train_batch_size", "Images a step on each device.", study=True)
    eval_batch_size: int = _flag(32, "Images at once in measuring and sampling.", study=False, publish="yes")
    max_train_steps: int | None = _by_pipeline("max_train_steps", "Steps of the final fine-tune.", study=False)
    gradient_accumulation_steps: int = _flag(1, "Number of batches for one step.", study=True, publish="yes")
    gradient_checkpointing: bool = _flag(False, "Use less memory and more time.", study=False, publish="yes")
    learning_rate: float | None = _flag(
        None,
        "Fixed learning rate. Without it, the learning rate is searched with the mask.",
        study=True,
        publish="yes",
    )
    lr_scheduler: str = _flag(
        "constant", "Schedule of the learning rate, as transformers names it: cosine, ...", study=True, publish="yes"
    )
    lr_warmup_steps: int = _flag(0, "Steps until the full learning rate.", study=True, publish="yes")
    snr_gamma: float | None = _flag(None, "Min-SNR weighting of the loss; 5 is usual.", study=True, publish="yes")
    caption_dropout: float = _flag(0.1, "Share of captions replaced by the empty one.", study=True, publish="yes")
    mitigation: list[str] = _flag(
        [],
        f"Mitigations of memorization, NAME[:arguments]: {', '.join(MITIGATIONS)}. Several combine: rwa:n=4 "
        "threshold:q=0.9. See docs/mitigations.md.",
        study=True,
        publish="yes",
        action="extend",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = _flag(
        "no", "Mixed precision of the training.", study=True, publish="yes"
    )
    trainer_args: str = _flag(
        "{}",
        'Other arguments of transformers\' Trainer as JSON: {"optim": "adamw_bnb_8bit"}.',
        study=True,
        publish="placeholder",
    )

    # ---- measures and audit ----
    encoder: str | None = _flag(
        None,
        "Image encoder of fid, amd and copies, needed for images of your own: a Hub id or folder of a vision "
        "model, or xrv:NAME. Photographs: facebook/dinov2-small. Radiographs: microsoft/rad-dino or "
        "xrv:densenet121-res224-all. Histology: owkin/phikon. demo: the demo's, trained on emoji alone.",
        study=True,
        publish="unless_path",
    )
    eval_num_images: int | None = _by_pipeline("eval_num_images", "Images generated for fid and for amd.", study=True)
    eval_inference_steps: int | None = _by_pipeline("eval_inference_steps", "Sampling steps of images.", study=True)
    eval_guidance_scale: float | None = _by_pipeline("eval_guidance_scale", "Guidance scale of images.", study=True)
    audit_num_prompts: int | None = _by_pipeline(
        "audit_num_prompts", "Number of training captions that the audit samples.", study=False
    )
    audit_images_per_prompt: int | None = _by_pipeline(
        "audit_images_per_prompt", "Number of images that the audit generates for each caption.", study=False
    )
    embedding_attack: int = _flag(
        0,
        "Number of images of each set whose text embedding the audit searches to bring them back. Each costs as much "
        "as 400 images of a training, three times.",
        study=False,
        publish="yes",
    )
    gate: str | None = _flag(
        None,
        "Gate file of the audit: limits for its measures. The package's own by default.",
        study=False,
        publish="never",
    )
    validation_prompt: str | None = _flag(
        None, "Prompt in the card's loading snippet. It is published.", study=False, publish="unless_path"
    )

    # ---- the run ----
    dry_run: bool = _flag(
        False,
        "Read nothing but the model's configs; print blocks, trainable parameters, adapter size, memory and the "
        "passes of each stage, and stop.",
        study=False,
        publish="never",
    )
    seed: int = _flag(0, "Random seed of data split, search and training.", study=True, publish="yes")
    checkpointing_steps: int | None = _flag(
        None, "Steps between two checkpoints of the final fine-tune.", study=False, publish="yes"
    )
    resume_from_checkpoint: str | None = _flag(
        None,
        "Checkpoint of the final fine-tune to go on with: a folder, or latest.",
        study=False,
        publish="never",
    )
    report_to: str = _flag("none", "Trackers: wandb, tensorboard, trackio, all or none.", study=False, publish="never")
    log_images: int = _flag(
        0,
        "Number of images of --validation_prompt to show in wandb, without those that may be copies.",
        study=False,
        publish="never",
    )

    # ---- publishing ----
    push_to_hub: bool = _flag(False, "Upload the public files, to a private repository.", study=False, publish="never")
    hub_model_id: str | None = _flag(
        None, "Repository to push to; the folder's name if not given.", study=False, publish="never"
    )
    hub_revision: str | None = _flag(None, "Branch to push to.", study=False, publish="never")
    hub_public: bool = _flag(
        False, "Make a new repository public, or push to one that is public.", study=False, publish="never"
    )
    allow_failed_gate: bool = _flag(
        False, "Push although the release gate failed; the card says so first.", study=False, publish="never"
    )
    license: str | None = _flag(
        None,
        "License of the adapter on the card, as the Hub writes it: apache-2.0, ...",
        study=False,
        publish="unless_path",
    )

    def __post_init__(self) -> None:
        if self.mixed_precision == "no":  # what `accelerate launch` was given or configured with is the run's
            self.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.encoder is None and on_demo_data(self):
            self.encoder = "demo"
        if self.n_trials is None:
            self.n_trials = 0 if self.mask_from else 8
        self.output_dir = self.output_dir or ("outputs/quickstart" if on_demo_data(self) else "outputs/memcontrol")
        for name, value in (DEMO if self.pretrained_model_name_or_path == "demo" else OTHER).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


SEEN_LATER = ("images", "world_size", "singular_values")
"""Settings of a study that are not flags, and not known before the images are read or the trainer is made."""


YOUNGER = {"fit": "crop", "background": "white", "screen_seeds": 1}
"""Flags that are younger than some studies, each with the value that those studies were made with. A study does not
name this value, so that a study of before can be gone on with."""


def settings(args: ScriptArguments) -> dict[str, Any]:
    """The flags that a study depends on: going on with another value is refused."""

    def counts(flag: Field) -> bool:
        study = flag.metadata["study"]
        return study is True or (isinstance(study, str) and bool(getattr(args, study)))

    values = {flag.name: without_place(getattr(args, flag.name)) for flag in fields(args) if counts(flag)}
    values = {name: value for name, value in values.items() if YOUNGER.get(name, object) != value}
    values["mitigation"] = sorted(args.mitigation)  # they apply in one order, however they are given
    return {name: value for name, value in values.items() if value is not None and value is not False and value != []}


def without_place(value: Any) -> Any:
    """A path on this machine as its last part and a digest of the whole; anything else as it is."""
    if not isinstance(value, str) or not os.path.exists(value):  # False for a text that is too long for a path
        return value
    path = Path(value).resolve()
    return f"{path.name} ({hashlib.sha256(str(path).encode()).hexdigest()[:8]})"


def on_demo_data(args: ScriptArguments) -> bool:
    """Whether the images are those in the package."""
    return args.train_data_dir is None and args.dataset_name == "demo"


def on_demo(args: ScriptArguments) -> bool:
    """Whether both the images and the pipeline are those in the package."""
    return on_demo_data(args) and args.pretrained_model_name_or_path == "demo"
