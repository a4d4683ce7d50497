"""Adapters in a pipeline: load them, put them on by a mask, merge them while nothing is trained, save them."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from huggingface_hub import file_exists, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn

from .adapter_checks import check_lora_whole, check_sizes, check_whole, weights_file
from .error_lines import first_line
from .families import Family, family_of
from .search_space import SearchSpace
from .tuners import MemControlConfig
from .tuners.hooks import has_hooks
from .whole_files import write_whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# The initialisations of PEFT's LoRA that leave the base's weights as they are, beside `True` and `False`.
_LORA_INITS = ("gaussian", "eva", "orthogonal", "mica")
# What PEFT, diffusers and the Hub raise for a file that is no adapter, or none for the pipeline.
_NOT_LOADED = (
    OSError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    SafetensorError,
    HfHubHTTPError,
    HFValidationError,
)
# Fields of an adapter's configuration that PEFT writes when it saves, or that change while it trains.
_NOT_PART_OF_A_RUN = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "rank_pattern",
    "search",
}


# ---- an adapter from a folder or the Hub ----


def load_adapter(pipeline: "DiffusionPipeline", adapter: str | Path) -> None:
    """Put a saved adapter into a pipeline.

    Args:
        adapter (`str`):
            A PEFT folder or Hub id (this package's method or any of PEFT's), in which text encoders' adapters have
            folders of their names. Or a LoRA file of diffusers or kohya: a `.safetensors` file, or a folder or Hub id
            that holds `pytorch_lora_weights.safetensors`. A pickle can run code, so no file of another format is read.

    Raises:
        ValueError: when the adapter is none of these or does not fit the pipeline, when one of its tensors is missing,
            belongs to no layer or is not finite, or when it changes the base's own weights, which a later measurement
            of the base would see. The pipeline is then as before.
    """
    path, family = Path(adapter), family_of(pipeline)

    def is_there(folder: str) -> bool:
        file = f"{folder}/{CONFIG_NAME}".lstrip("/")
        if path.exists():
            return (path / file).is_file()
        if is_offline_mode():
            return isinstance(try_to_load_from_cache(str(adapter), file), str)
        return file_exists(str(adapter), file)

    bare = family.parts
    try:
        if not path.is_file() and (folders := [folder for folder in bare if is_there(folder)]):
            for folder in folders:
                tuned = _load_part(bare[folder], str(adapter), folder)
                setattr(pipeline, folder or family.denoiser_name, tuned.eval())
        else:
            source: dict[str, Any] = {"use_safetensors": True}
            if path.is_file():
                if path.suffix != ".safetensors":
                    raise ValueError("weights in another format than safetensors are not read.")
                source["weight_name"] = path.name
            place = str(path.parent if path.is_file() else adapter)
            pipeline.load_lora_weights(place, **source)
            check_lora_whole(pipeline, bare, place, **source)
    except _NOT_LOADED as error:
        for folder, part in bare.items():
            _take_off(part)
            setattr(pipeline, folder or family.denoiser_name, part)
        reason = first_line(error)
        raise ValueError(
            f"cannot load the adapter {str(adapter)!r}: {reason} Give a PEFT folder or Hub id, or a LoRA file"
        ) from None


def _load_part(part: nn.Module, adapter: str, folder: str) -> PeftModel:
    """A part of a pipeline with its part of an adapter, which has been loaded whole."""
    file, subfolder = weights_file(adapter, folder), folder or None
    config = PeftConfig.from_pretrained(adapter, subfolder=subfolder)
    check_leaves_base(config)
    check_sizes(config, file)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error here
        tuned = PeftModel.from_pretrained(part, adapter, subfolder=subfolder)
    check_whole(tuned, file)
    return tuned


def _take_off(part: nn.Module) -> None:
    """Put the base's own layers back where PEFT or diffusers has replaced them."""
    for name, layer in _tuner_layers(part):
        part.set_submodule(name, layer.get_base_layer())
    vars(part).pop("peft_config", None)
    if hasattr(part, "_hf_peft_config_loaded"):
        part._hf_peft_config_loaded = False


def unload_adapter(pipeline: "DiffusionPipeline") -> None:
    """Take the adapter of [`load_adapter`] off a pipeline."""
    family = family_of(pipeline)
    adapted = {folder: part for folder, part in family.parts.items() if isinstance(part, PeftModel)}
    for folder, part in adapted.items():
        setattr(pipeline, folder or family.denoiser_name, part.unload())
    if not adapted:
        pipeline.unload_lora_weights()


@contextmanager
def adapter_in_place(pipeline: "DiffusionPipeline", adapter: str | Path | None) -> Iterator[None]:
    """The pipeline with a saved adapter, if one is given, and as before afterwards."""
    if adapter is None:
        yield
        return
    load_adapter(pipeline, adapter)
    try:
        with merged(part for part in family_of(pipeline).parts.values() if isinstance(part, PeftModel)):
            yield
    finally:
        unload_adapter(pipeline)


@contextmanager
def merged(adapted: Iterable[PeftModel]) -> Iterator[None]:
    """Merge adapters of this package, which unmerge exactly, for the time being: merged layers sample faster.

    A model whose weights hooks move or cast (offloading, layerwise casting) is left as it is, and computes the same.
    """
    own = [model for model in adapted if isinstance(model.active_peft_config, MemControlConfig)]
    own = [m for m in own if not any(has_hooks(layer.get_base_layer()) for _, layer in _tuner_layers(m))]
    for model in own:
        model.merge_adapter()
    try:
        yield
    finally:
        for model in own:
            model.unmerge_adapter()


# ---- the adapter that a mask puts on ----


class DenoiserAndTextEncoders(nn.Module):
    """One model for the Trainer when text encoders are tuned: it is called, and otherwise looks, like the denoiser.

    The text encoders make the denoiser's conditions before it is called. They stay in evaluation mode: T5's dropout
    would draw from the global random state.
    """

    def __init__(self, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]):
        super().__init__()
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleDict(text_encoders)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser(*args, **kwargs)

    def train(self, mode: bool = True) -> "DenoiserAndTextEncoders":
        super().train(mode)
        self.text_encoders.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "denoiser":
                raise
            return getattr(self.denoiser, name)


class MaskedAdapters:
    """The adapters that a mask puts on a pipeline: one on the denoiser, one on each text encoder in the search space.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        search_space ([`~memcontrol_hf.search_space.SearchSpace`]): the blocks that a mask switches.
        peft_config (`PeftConfig`): the PEFT method, which a mask restricts.

    Attributes:
        adapted (dict of `PeftModel`): the adapted parts by name; the denoiser's name is empty.

    Raises:
        ValueError: for a PEFT config that changes the base's own weights.
    """

    def __init__(self, family: Family, search_space: SearchSpace, peft_config: PeftConfig):
        check_leaves_base(peft_config)
        self._family, self._space, self._config = family, search_space, peft_config
        self._parts = {name: family.parts[name] for name in ("", *search_space.text_encoders)}
        for name in search_space.text_encoders:
            self._parts[name].name_or_path = None  # PEFT would write down the folder that it was loaded from
        self.adapted: dict[str, PeftModel] = {}
        self.base_size = sum(_count(p) for part in self._parts.values() for p in part.parameters())

    def put_on(self, mask: Mapping[str, bool]) -> nn.Module:
        """Take off what an earlier mask has put on, and put new adapters into the blocks that `mask` selects.

        Returns:
            `nn.Module`: the model to train: the denoiser with its adapter, the bare one for the all-off mask, or
            [`DenoiserAndTextEncoders`] where the mask selects blocks of text encoders.
        """
        for adapted in self.adapted.values():
            adapted.unload()
        self.adapted = {}
        for part, module in self._parts.items():
            config = self._space.apply(self._config, mask, part)
            if config.target_modules:
                # PEFT warns of a name that the module itself does not have.
                name, config.base_model_name_or_path = config.base_model_name_or_path, None
                self.adapted[part] = get_peft_model(module, config)
                config.base_model_name_or_path = name
        text_encoders = {part: adapted for part, adapted in self.adapted.items() if part}
        denoiser = self.adapted.get("", self._family.denoiser)
        return DenoiserAndTextEncoders(denoiser, text_encoders) if text_encoders else denoiser

    @property
    def tunes_text(self) -> bool:
        """Whether a text encoder has an adapter now, so that captions have to be encoded anew."""
        return any(part for part in self.adapted)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Other adapters, or none, for a while; afterwards the very same ones, with their weights, are back."""
        adapted, bases = self.adapted, [model.get_base_model() for model in self.adapted.values()]
        layers = [(base, name, layer) for base in bases for name, layer in _tuner_layers(base)]
        configs = [(base, vars(base).pop("peft_config")) for base in bases if "peft_config" in vars(base)]
        for base, name, layer in layers:
            base.set_submodule(name, layer.get_base_layer())
        self.adapted = {}
        try:
            yield
        finally:
            for other in self.adapted.values():
                other.unload()
            self.adapted = adapted
            for base, name, layer in layers:
                base.set_submodule(name, layer)
            for base, config in configs:
                base.peft_config = config

    @contextmanager
    def text_encoders_disabled(self) -> Iterator[None]:
        """The base's own text encoders, whatever adapters they have."""
        with ExitStack() as stack:
            for part, adapted in self.adapted.items():
                if part:
                    stack.enter_context(adapted.disable_adapter())
            yield

    def save(self, folder: Path, state_dict: dict | None = None) -> None:
        """Write the adapters alone, a text encoder's into a folder of its name, and nothing of the base."""
        for part in self._family.parts.keys() - self.adapted.keys():  # files that an earlier mask has left
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                (folder / part / name).unlink(missing_ok=True)
        for part, adapted in self.adapted.items():
            card = folder / part / "README.md"
            before = card.read_text(encoding="utf-8") if card.is_file() else None
            # The vocabulary is not tuned; PEFT would ask the Hub about it by the base model's name.
            adapted.save_pretrained(folder / part, state_dict=state_dict, save_embedding_layers=False)
            if before is not None:
                write_whole(card, before)  # PEFT has written into it
            elif part:
                card.unlink()  # there is one card for the whole

    def load(self, folder: Path) -> None:
        """Read the weights of the adapters that are on from a folder that [`save`] has written."""
        for part, adapted in self.adapted.items():
            adapted.load_adapter(str(folder / part), adapted.active_adapter, is_trainable=True)

    def differences(self, folder: Path) -> list[str]:
        """How the adapters saved in a folder differ from those that are on: in their blocks, method and settings."""
        stored = {part: _read_config(folder / part) for part in self._family.parts}
        current = {part: _plain(adapted.peft_config["default"].to_dict()) for part, adapted in self.adapted.items()}
        if not any(stored.values()):
            return []  # no checkpoint: transformers says so
        differing = []
        for part, config in stored.items():
            if bool(config) != (part in current):
                differing.append(f"blocks of the {part or 'denoiser'} were {'on' if config else 'off'}")
            for name in (config.keys() & current.get(part, {}).keys()) - _NOT_PART_OF_A_RUN:
                were, are = config[name], current[part][name]
                if were != are and name == "mask" and were and are:
                    were, are = ([block for block, on in mask.items() if on] for mask in (were, are))
                if were != are:
                    differing.append(f"{name} was {shorten(str(were), 300)} and is {shorten(str(are), 300)}")
        return differing


def _tuner_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The layers with which PEFT has replaced modules of a model, without those inside of other ones."""
    found: dict[str, BaseTunerLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.startswith(tuple(f"{outer}." for outer in found)):
            found[name] = module
    return list(found.items())


def check_leaves_base(config: PeftConfig) -> None:
    """Raise `ValueError` for a PEFT config that changes the base's own weights, from which the next run starts."""
    reason = None
    if (bias := getattr(config, "bias", "none")) != "none":
        reason = f"bias={bias!r} trains the base's own biases: use bias='none'"
    if modules := getattr(config, "modules_to_save", None):
        reason = f"modules_to_save={modules!r} trains modules outside the mask: use modules_to_save=None"
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower() not in _LORA_INITS:
        names = ", ".join(map(repr, _LORA_INITS))
        reason = f"init_lora_weights={init!r} changes the base's weights: use True, False, {names}"
    if reason:
        raise ValueError(f"the base has to stay as it is, since every run starts from it, but {reason}")


def _count(parameter: nn.Parameter) -> int:
    """How many parameters a tensor holds, counted as PEFT does: 4-bit tensors of bitsandbytes hold two in a byte."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.numel() * parameter.element_size()
    return parameter.numel()


def _read_config(folder: Path) -> dict[str, Any]:
    """An adapter's stored configuration; empty where there is none."""
    file = folder / CONFIG_NAME
    return _plain(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back, with lists of names in one order."""
    lists = (list, tuple, set)
    return json.loads(json.dumps({k: sorted(v, key=str) if isinstance(v, lists) else v for k, v in config.items()}))
