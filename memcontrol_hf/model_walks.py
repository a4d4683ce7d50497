"""A model whose `train` and `zero_grad`, which the Trainer's loop calls in every step, do not visit every module.

A denoiser with adapters has about 2,000 modules, of which few are trained: the visits take longer than the optimizer.
"""

from types import MethodType

from torch import nn


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a model, in the order of its modules; the list is kept after [`shorten_walks`]."""
    kept = vars(model).get("_trained_parameters")
    return [p for p in model.parameters() if p.requires_grad] if kept is None else kept


def shorten_walks(model: nn.Module) -> None:
    """Put a model into training mode, and have it do in `train` and `zero_grad` what changes anything.

    What is trained must not change until [`restore_walks`]. A copy of the model looks at its own parameters.
    """
    model.train()
    vars(model)["_trained_parameters"] = trained_parameters(model)
    vars(model)["train"] = MethodType(_train, model)
    vars(model)["zero_grad"] = MethodType(_zero_grad, model)


def restore_walks(model: nn.Module) -> None:
    """Undo [`shorten_walks`]; does nothing to a model as it was."""
    for name in ("_trained_parameters", "train", "zero_grad"):
        vars(model).pop(name, None)


def walks_are_short(model: nn.Module) -> bool:
    """Whether [`shorten_walks`] was called for this model."""
    return "_trained_parameters" in vars(model)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    return model if mode and model.training else type(model).train(model, mode)


def _zero_grad(model: nn.Module, set_to_none: bool = True) -> None:
    if not set_to_none:
        return type(model).zero_grad(model, set_to_none=False)
    for parameter in trained_parameters(model):
        parameter.grad = None
