"""The model card of an adapter, and the push of what may be published."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from jinja2 import Environment, StrictUndefined

from .report import SELECTED, MemorizationReport, selected_blocks

PUBLIC_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "memorization_report.json",
    "pareto_front.png",
    "README.md",
)
"""What a push uploads; nothing else of the folder."""

_TEMPLATE = Path(__file__).with_name("model_card_template.md")


def render_card(
    report: MemorizationReport,
    adapter_location: str,
    command: str,
    denoiser: str = "unet",
    example_prompt: str = "",
    license: str | None = None,
) -> str:
    """The text of the card.

    Args:
        report ([`MemorizationReport`]): what is said.
        adapter_location (`str`): folder or Hub id in the loading snippet.
        command (`str`): that repeats the run.
        denoiser (`str`): the pipeline's attribute.
        example_prompt (`str`): of the loading snippet; never a training caption unless the user chose it.
        license (`str`, *optional*): of the adapter; left out when not given.
    """
    on_hub = report.base_model != "demo" and "/" in report.base_model
    data = ModelCardData(
        base_model=report.base_model if on_hub else None,
        library_name="peft",
        license=license,
        pipeline_tag="text-to-image",
        tags=["memcontrol", report.method, "diffusers", "memorization"],
    )
    if on_hub:
        data.base_model_relation = "adapter"
    demo = report.base_model == "demo"
    figures = report.figures[SELECTED]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=data.to_yaml().strip(),
        title=f"{Path(adapter_location).name}: {report.method} adapter for {report.base_model}",
        base_model="the demo pipeline of memcontrol_hf" if demo else report.base_model,
        pipeline_import=None if demo else "from diffusers import DiffusionPipeline",
        pipeline_expression="memcontrol_hf.demo_pipeline()"
        if demo
        else f"DiffusionPipeline.from_pretrained({_quoted(report.base_model)})",
        denoiser=denoiser,
        adapter_location=_quoted(adapter_location),
        example_prompt=example_prompt.replace("\\", "").replace('"', "'").replace("\n", " "),
        table=report.table(),
        images=report.images,
        training=report.training,
        privacy=report.privacy(),
        encoder=report.encoder,
        method=report.method,
        parameters=f"{figures['trainable_parameters']:,}",
        percent=f"{figures['trainable_percent']:.3g}",
        blocks=selected_blocks(report.mask),
        block_count=len(report.mask),
        search=report.search,
        command=command,
        versions=report.versions,
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def push(folder: str | Path, repo_id: str, private: bool = True, revision: str | None = None) -> str:
    """Upload the public files of a folder in one commit; the token is the Hub login's own.

    Returns:
        `str`: the address of the commit.
    """
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        allow_patterns=list(PUBLIC_FILES),
        revision=revision,
        commit_message="Upload adapter, memorization report and card",
    )
    return commit.commit_url
