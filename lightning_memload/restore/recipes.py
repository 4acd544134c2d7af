"""The recipes of parameters on meta: how to make their initial values if no checkpoint fills them.

``meta_init`` turns such a parameter into a :class:`WaitingParameter`: the same object, on meta, with the recipe of its
values. It makes the values when they are needed. A restore fills it with other values, and it becomes an ordinary
parameter again.
"""

from __future__ import annotations

from collections.abc import Collection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import nn

from lightning_memload.errors import MetaTensorError
from lightning_memload.restore.allocation import carry_over, is_free, tensors_of
from lightning_memload.restore.questions import is_copyable
from lightning_memload.restore.tape import Recipe, holds_data
from lightning_memload.restore.waiting import (
    OWN_ATTRIBUTES,
    FilledAlias,
    FilledParameter,
    WaitingAlias,
    WaitingParameter,
    give_memory,
    settle,
)

__all__ = [
    "WaitingParameter",
    "fill_before_load",
    "follow_recipes",
    "let_wait",
    "names_of_data",
    "remove_load_hooks",
]

_NOT_ORDINARY = frozenset((WaitingParameter, WaitingAlias, FilledParameter, FilledAlias))


def let_wait(parameter: nn.Parameter, modules: Collection[nn.Module], recipe: Recipe) -> None:
    """Moves a parameter to meta and turns it into a :class:`WaitingParameter`. It stays the same object.

    Args:
        parameter: The parameter.
        modules: The modules that have it.
        recipe: The recipe of its values.

    Raises:
        MetaTensorError: A reference to the parameter would forbid to give it memory later. It is unchanged.
    """
    if not is_free(parameter):
        raise MetaTensorError("Other code refers to the parameter.", names=())
    waiting = WaitingParameter.of(recipe, parameter.requires_grad)
    torch.utils.swap_tensors(parameter, carry_over(parameter, waiting))
    for module in modules:
        if not any(_is_ours(hook) for hook in module._load_state_dict_pre_hooks.values()):
            module.register_load_state_dict_pre_hook(fill_before_load)


def fill_before_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """The load_state_dict pre-hook of a module with waiting parameters. torch cannot copy into tensors on meta.

    A parameter gets memory if the state dict has a value for it, and the values of its constructor if not.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None:
            settle(parameter)
        if type(parameter) is WaitingParameter:
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, (WaitingParameter, WaitingAlias)):
                value.follow()  # The value may come from state_dict() of the same module.
            if not isinstance(parameter, WaitingParameter):
                continue
            with torch.no_grad():
                fits = is_copyable(parameter, value) and getattr(value, "shape", None) == parameter.shape
            if not fits:
                parameter.follow(f"{prefix}{name}")
            elif not local_metadata.get("assign_to_params_buffers", False):
                give_memory(parameter)


def remove_load_hooks(root: nn.Module) -> None:
    """Removes the hooks from modules without waiting parameters. A copied module has no handles for that."""
    for module in root.modules():
        hooks = module._load_state_dict_pre_hooks  # torch (2.13) has no public name for this dict.
        ours = [key for key, hook in hooks.items() if _is_ours(hook)]
        if ours and not any(type(parameter) is WaitingParameter for parameter in module._parameters.values()):
            for key in ours:
                del hooks[key]


def follow_recipes(
    root: nn.Module,
    names: Collection[str] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Gives waiting parameters the values that their constructors made, one parameter after the other.

    Args:
        root: The module.
        names: Names of the parameters. ``None``: all parameters.
        device: Device of the values. ``None``: the device on which the constructor made each parameter.
        dtype: Type of floating-point parameters. ``None``: their present type.

    Raises:
        MetaTensorError: A parameter cannot get memory, since a reference to it forbids that.

    Peak memory: the values, and one parameter twice if device, type or strides differ from those of its recipe.
    """
    if any(type(tensor) in _NOT_ORDINARY for tensor in tensors_of(root)):
        for name, parameter in root.named_parameters(remove_duplicate=False):
            if type(parameter) is WaitingParameter and (names is None or name in names):
                parameter.follow(name, device, dtype)
            settle(parameter)
        for _, buffer in root.named_buffers():
            if isinstance(buffer, WaitingAlias):
                buffer.follow()
    remove_load_hooks(root)


def names_of_data(root: nn.Module) -> list[str]:
    """Names of the waiting parameters whose recipe contains data that a constructor loaded, not only initialisers."""
    return [
        name
        for name, parameter in root.named_parameters(remove_duplicate=False)
        if type(parameter) is WaitingParameter and holds_data(parameter.waits_for.contents)
    ]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", hook) is fill_before_load  # torch wraps each pre-hook.


def _recipe_of(parameter: WaitingParameter) -> tuple[Any, ...]:
    attributes = {key: value for key, value in vars(parameter).items() if key not in OWN_ATTRIBUTES}
    return _with_recipe, (parameter.waits_for, parameter.requires_grad, attributes)


def _with_recipe(recipe: Recipe, requires_grad: bool, attributes: dict[str, Any]) -> WaitingParameter:
    parameter = WaitingParameter.of(recipe, requires_grad)
    vars(parameter).update(attributes)
    return parameter


# Another process gets the recipe. A file gets the values: it must be readable without this package.
ForkingPickler.register(WaitingParameter, _recipe_of)
