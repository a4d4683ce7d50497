"""The PEFT method MEMCONTROL: SV-DIFF, DiffFit, whole weights, norms or biases of selected modules.

Importing this package registers the method, after which `get_peft_model`, `PeftModel.from_pretrained` and
`model.add_adapter` of diffusers take a [`MemControlConfig`].
"""

import peft
import peft.mapping
from peft.tuners.tuners_utils import BaseTuner

from .config import METHODS, MemControlConfig
from .layer import MemControlLayer
from .model import MemControlModel
from .tunable import quantized_type, tunable_modules

__all__ = [
    "METHODS",
    "MemControlConfig",
    "MemControlLayer",
    "MemControlModel",
    "quantized_type",
    "register",
    "tunable_modules",
]


def register() -> None:
    """Make the method known to PEFT. Doing it again changes nothing.

    PEFT's own `register_peft_method` only takes the names of a closed enum, so this fills the tables behind it.

    Raises:
        ImportError: If the installed PEFT lacks those tables or a method that the tuner builds on.
    """
    entries = {
        "PEFT_TYPE_TO_CONFIG_MAPPING": MemControlConfig,
        "PEFT_TYPE_TO_TUNER_MAPPING": MemControlModel,
        "PEFT_TYPE_TO_PREFIX_MAPPING": MemControlModel.prefix,
    }
    hooks = ("inject_adapter", "_prepare_model", "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")
    missing = [name for name in entries if not isinstance(getattr(peft.mapping, name, None), dict)]
    missing += [f"BaseTuner.{name}" for name in hooks if not hasattr(BaseTuner, name)]
    if missing:
        raise ImportError(
            f"memcontrol_hf cannot register its method with peft {peft.__version__}, which lacks "
            f"{', '.join(missing)}. Install the version that memcontrol_hf was tested with: peft==0.21.2."
        )
    for name, entry in entries.items():
        getattr(peft.mapping, name)["MEMCONTROL"] = entry


register()
