"""Whether a state dict fits a module, told before anything changes as far as that can be foreseen.

The same verdicts as torch's ``load_state_dict``, all of them together. What modules with hooks or a way of loading of
their own will take cannot be foreseen: it is judged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lightning_memload.errors import IncompatibleWeightsError, listed
from lightning_memload.restore.recipes import fill_before_load
from lightning_memload.restore.state_dict import suggest_renaming

__all__ = ["module_keys", "require_all_taken", "require_match"]

# Ways of loading that can be foreseen: torch's own, and that of its batch norms, which add a counter if it is missing.
_FORESEEN = (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)


def require_match(
    module: nn.Module, state_dict: Mapping[str, Any], wants: Callable[[str], bool], *, strict: bool, path: str
) -> None:
    """Raises if ``load_state_dict`` is going to, while the module is still as it was.

    What modules with hooks or a ``_load_from_state_dict`` of their own do cannot be foreseen: their keys are left to
    torch.

    Args:
        module: The module.
        state_dict: What is going to be loaded.
        wants: Which keys of the module are asked for.
        strict: Whether keys may be neither missing nor unexpected.
        path: What to call the checkpoint in messages.

    Raises:
        IncompatibleWeightsError: Shapes differ, or with ``strict`` keys are missing or unexpected.
    """
    own_ways = tuple(_own_ways(module))
    expected = {name: value for name, value in _entries(module) if not name.startswith(own_ways)}
    given = {name: value for name, value in state_dict.items() if not name.startswith(own_ways)}
    mismatched = {
        name: (tuple(value.shape), tuple(expected[name].shape))
        for name, value in given.items()
        if name in expected
        and isinstance(value, torch.Tensor)
        and isinstance(expected[name], torch.Tensor)
        and not nn.parameter.is_lazy(expected[name])
        and value.shape != expected[name].shape
        # torch takes a tensor of one element for a scalar, as old files have it.
        and not (expected[name].dim() == 0 and tuple(value.shape) == (1,))
    }
    # Batch norms of old files have no such counter, and load all the same.
    asked = [name for name in expected if wants(name) and not name.endswith("num_batches_tracked")]
    # With what modules take in their own way: a tied parameter may have its other name there.
    missing = _without_ties(dict(_entries(module)), state_dict, asked) if strict else []
    unexpected = [name for name in given if name not in expected] if strict else []
    if missing or unexpected or mismatched:
        renaming = suggest_renaming(given, expected) if missing or unexpected else None
        raise _incompatible(module, path, missing, unexpected, mismatched, changed=False, renaming=renaming)


def require_all_taken(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    wants: Callable[[str], bool],
    keys: _IncompatibleKeys,
    *,
    path: str,
) -> None:
    """Raises if modules that load in their own way left something out, which is known afterwards only.

    Args:
        module: The module.
        state_dict: What was loaded.
        wants: Which keys of the module are asked for.
        keys: What the module's ``load_state_dict`` returned.
        path: What to call the checkpoint in messages.

    Raises:
        IncompatibleWeightsError: Keys are missing or unexpected. Other weights were loaded.
    """
    missing = _without_ties(dict(_entries(module)), state_dict, filter(wants, keys.missing_keys))
    if missing or keys.unexpected_keys:
        raise _incompatible(module, path, missing, keys.unexpected_keys, {}, changed=True)


def _without_ties(entries: Mapping[str, Any], given: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Names that are not given, unless the very same parameter is given under another name.

    Some formats (safetensors) hold a tied parameter once.
    """
    supplied = {id(value) for name, value in entries.items() if name in given and value is not None}
    return [name for name in names if name not in given and id(entries.get(name)) not in supplied]


def module_keys(module: nn.Module) -> list[str]:
    """The keys that a module's ``state_dict`` would have, without making it."""
    return [name for name, _ in _entries(module)]


def _entries(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module's ``state_dict`` would have, without making it."""
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        skipped = child._non_persistent_buffers_set
        for name, value in (*child._parameters.items(), *child._buffers.items()):
            if value is not None and name not in skipped:
                yield prefix + name, value
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}_extra_state", None


def _own_ways(module: nn.Module) -> Iterator[str]:
    """Prefixes of the modules that do more than torch's own modules when they are loaded."""
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        loads = type(child)._load_from_state_dict
        overrides = type(child).load_state_dict is not nn.Module.load_state_dict or loads not in _FORESEEN
        hooks = (getattr(hook, "hook", hook) for hook in child._load_state_dict_pre_hooks.values())
        if overrides or not all(hook is fill_before_load for hook in hooks):
            yield prefix


def _incompatible(
    module: nn.Module,
    path: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    changed: bool,
    renaming: str | None = None,
) -> IncompatibleWeightsError:
    lines = [f"{path} does not fit {type(module).__name__}:"]
    if mismatched:
        shapes = [
            f"{name} has shape {ours} in the module and {theirs} on disk" for name, (theirs, ours) in mismatched.items()
        ]
        lines.append(f"  {listed(shapes)}")
    if missing:
        lines.append(f"  {len(missing)} missing: {listed(missing)}")
    if unexpected:
        lines.append(f"  {len(unexpected)} unexpected: {listed(unexpected)}")
    done = "Other weights were loaded." if changed else "Nothing was changed."
    # Shapes have to be the same whether strict or not.
    if renaming is not None:
        done += f" The names differ by a prefix: use {renaming}."
    advice = "Use rename= or strip_prefix= for other names, exclude= for new layers"
    lines.append(f"{done} {advice}, or strict=False." if missing or unexpected else f"{done} {advice}.")
    return IncompatibleWeightsError(
        "\n".join(lines),
        path=path,
        missing_keys=tuple(missing),
        unexpected_keys=tuple(unexpected),
        mismatched_shapes=dict(mismatched),
    )
