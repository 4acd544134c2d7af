"""Describes a module for comparison, and restores a state dict into one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_memload import meta_init
from lightning_memload.formats import load_mapped
from lightning_memload.restore import RestoreSession, WeightsRestore
from lightning_memload.restore.recipes import WaitingParameter
from lightning_memload.restore.tape import Recipe
from lightning_memload.transfer import LazyRing, choose_layout

__all__ = ["assert_same_build", "quietly", "raw", "restore", "same_on_meta"]

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.Size, torch.device)


def same_on_meta(
    build: Callable[[], nn.Module], folder: Path, *, real: tuple[str, ...] = (), computed: tuple[str, ...] = ()
) -> nn.Module:
    """Asserts that a module built under ``meta_init`` is the ordinary one but for memory, also after a restore.

    Args:
        build: Makes the module.
        folder: For the checkpoint.
        real: Parameters that keep their memory.
        computed: Buffers that are computed from parameters which are drawn, so that their values differ before the
            restore.

    Returns:
        The restored module.
    """
    torch.manual_seed(1)
    expected = build()
    torch.manual_seed(2)
    with meta_init():
        actual = build()
    in_memory = {name for name, p in actual.named_parameters(remove_duplicate=False) if p.numel() and not p.is_meta}
    assert in_memory == set(real)
    assert not any(buffer.is_meta for buffer in actual.buffers())
    assert_same_build(expected, actual, computed=computed)
    objects = dict(actual.named_parameters(remove_duplicate=False))
    restore(actual, expected.state_dict(), folder)
    for name, parameter in actual.named_parameters(remove_duplicate=False):
        assert parameter is objects[name], f"{name} is another object"
    assert_same_build(expected, actual, restored=True)
    return actual


def restore(module: nn.Module, state_dict: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint and restores it the way the callback does."""
    path = folder / "state.pt"
    torch.save(state_dict, path)
    loaded, mapped = load_mapped(path, weights_only=True)
    session = RestoreSession(mapped, device=torch.device("cpu"), ring=LazyRing(choose_layout(1 << 20, 1), pinned=False))
    weights = WeightsRestore(module, session)
    try:
        module.load_state_dict(loaded)
    finally:
        weights.remove()
        del loaded
        session.close()


def assert_same_build(
    expected: nn.Module, actual: nn.Module, *, restored: bool = False, computed: tuple[str, ...] = ()
) -> None:
    """Asserts equality of structure, of everything but the values of parameters on meta, and of those if restored."""
    modules = dict(expected.named_modules(remove_duplicate=False))
    others = dict(actual.named_modules(remove_duplicate=False))
    assert list(modules) == list(others)
    for path, module in modules.items():
        other = others[path]
        assert type(other) is type(module) or type(other).__name__ == type(module).__name__
        assert list(vars(other)) == list(vars(module)), path
        for name, value in vars(module).items():
            if isinstance(value, _SIMPLE):
                assert vars(other)[name] == value, f"{path}.{name}"
            elif isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and not restored:
                assert vars(other)[name].shape == value.shape, f"{path}.{name}"
        assert other._non_persistent_buffers_set == module._non_persistent_buffers_set
        assert len(other._forward_pre_hooks) == len(module._forward_pre_hooks)
        if restored:
            assert len(other._load_state_dict_pre_hooks) == len(module._load_state_dict_pre_hooks)
    for kind in ("named_parameters", "named_buffers"):
        tensors = dict(getattr(expected, kind)(remove_duplicate=False))
        found = dict(getattr(actual, kind)(remove_duplicate=False))
        assert list(found) == list(tensors)
        assert _ties(found) == _ties(tensors)
        for name, tensor in tensors.items():
            _assert_same_tensor(
                tensor, found[name], name, values=restored or (kind == "named_buffers" and name not in computed)
            )
    assert list(actual.state_dict()) == list(expected.state_dict())


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def _assert_same_tensor(expected: torch.Tensor, actual: torch.Tensor, name: str, *, values: bool) -> None:
    assert type(actual) is (WaitingParameter if not values and actual.is_meta else type(expected)), name
    assert isinstance(actual, nn.parameter.UninitializedTensorMixin) or actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    assert actual.requires_grad == expected.requires_grad, name
    assert actual.layout == expected.layout, name
    assert {key: value for key, value in vars(actual).items() if not isinstance(value, Recipe)} == vars(expected), name
    if isinstance(expected, nn.parameter.UninitializedTensorMixin):
        return
    assert actual.stride() == expected.stride() or expected.numel() <= 1, name
    if values:
        assert not actual.is_meta, name
        assert raw(actual) == raw(expected), name


def _ties(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def quietly(category: type[Warning], message: str, build: Callable[[], Any]) -> Callable[[], Any]:
    """The same function without one warning of torch's own."""

    def built() -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message, category)
            return build()

    return built
