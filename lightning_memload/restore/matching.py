"""Checks whether a state dict fits a module, before anything changes where this is possible.

The result is the same as of torch's ``load_state_dict``, with all problems in one error. The result for modules with
hooks or their own loading code cannot be predicted: it is checked after the load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_memload.errors import IncompatibleWeightsError, listed
from lightning_memload.restore.recipes import fill_before_load
from lightning_memload.restore.state_dict import suggest_renaming
from lightning_memload.torch_private import FORESEEN_LOADING, IncompatibleKeys

__all__ = [
    "OTHERS_LOADED",
    "WeightsMatch",
    "incompatible",
    "is_of_restore",
    "match_weights",
    "module_keys",
    "short_errors",
    "walk_apart",
]

_NOTHING_CHANGED = "Nothing was changed."
OTHERS_LOADED = "Other weights were loaded."
_ADVICE = "Use rename= or strip_prefix= for other names, exclude= for new layers."


@dataclass(frozen=True, slots=True)
class WeightsMatch:
    """The differences between a module and the checkpoint that was loaded into it.

    Attributes:
        num_loaded: Number of tensors of the module that got values.
        num_expected: Number of tensors of the module that were to be loaded.
        new: Names that the module has and the checkpoint lacks.
        unused: Names that the checkpoint has and the module lacks.
    """

    num_loaded: int
    num_expected: int
    new: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def is_nothing(self) -> bool:
        """Whether no tensor of the module got values, although some were to be loaded."""
        return self.num_loaded == 0 < self.num_expected

    def __str__(self) -> str:
        words = [f"{self.num_loaded} of {self.num_expected} tensors loaded"]
        words += [f"new: {listed(self.new)}"] if self.new else []
        words += [f"unused in the file: {listed(self.unused)}"] if self.unused else []
        return "; ".join(words)


def match_weights(
    module: nn.Module, given: Collection[str], keys: IncompatibleKeys, wants: Callable[[str], bool] = lambda _: True
) -> WeightsMatch | None:
    """Describes the differences that a ``load_state_dict`` found.

    Args:
        module: The module.
        given: The names that were loaded.
        keys: The result of ``load_state_dict``.
        wants: Whether a key of the module was to be loaded.

    Returns:
        ``None`` if no name is missing or unexpected.
    """
    missing_keys = [name for name in keys.missing_keys if wants(name)]
    if not missing_keys and not keys.unexpected_keys:
        return None
    entries = {name: value for name, value, _ in _entries(module)}
    expected = {name for name, value in entries.items() if isinstance(value, torch.Tensor) and wants(name)}
    new = _without_ties(entries, given, missing_keys)
    if not new and not keys.unexpected_keys:
        return None
    num_loaded = len(expected) - len(expected & set(new))
    return WeightsMatch(num_loaded, len(expected), tuple(new), tuple(keys.unexpected_keys))


def _require_match(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    wants: Callable[[str], bool],
    *,
    strict: bool,
    path: str,
    advice: str,
) -> None:
    """Raises the error that ``load_state_dict`` would raise, while the module is still unchanged.

    The behaviour of modules with hooks or their own ``_load_from_state_dict`` cannot be predicted: their keys are not
    checked here.

    Args:
        module: The module.
        state_dict: The state dict that is going to be loaded.
        wants: Whether a key of the module is to be loaded.
        strict: Whether missing and unexpected keys are errors.
        path: Name of the checkpoint in messages.
        advice: What the user can do, for messages.

    Raises:
        IncompatibleWeightsError: Shapes differ, or with ``strict`` keys are missing or unexpected.
    """
    if _has_own_way(module):
        return
    own_ways: set[str] = set()
    for place, child, _ in walk_apart(module, _has_own_way):
        prefix = f"{place}." if place else ""
        # torch ignores names below a child that is None.
        parts = child._modules.items()
        own_ways.update(f"{prefix}{name}." for name, part in parts if part is None or _has_own_way(part))
    # Includes modules with their own loading code: a tied parameter may have its other name there.
    entries = {name: (value, apart) for name, value, apart in _entries(module)}
    expected = {name: value for name, (value, apart) in entries.items() if not apart}
    given = state_dict
    if own_ways:
        given = {n: v for n, v in state_dict.items() if not any(prefix in own_ways for prefix in _prefixes(n))}
    mismatched = {
        name: (tuple(value.shape), tuple(expected[name].shape))
        for name, value in given.items()
        if name in expected
        and isinstance(value, torch.Tensor)
        and isinstance(expected[name], torch.Tensor)
        and not nn.parameter.is_lazy(expected[name])
        and value.shape != expected[name].shape
        # torch accepts a tensor of shape (1,) for a scalar, since old files store scalars so.
        and not (expected[name].dim() == 0 and tuple(value.shape) == (1,))
    }
    # Batch norms in old files have no such counter, and torch still loads them.
    asked = [name for name in expected if wants(name) and not name.endswith("num_batches_tracked")]
    missing = _without_ties({n: value for n, (value, _) in entries.items()}, state_dict, asked) if strict else []
    unexpected = [name for name in given if name not in expected] if strict else []
    if missing or unexpected or mismatched:
        renaming = suggest_renaming(given, expected) if missing or unexpected else None
        done = _NOTHING_CHANGED + (f" The names differ by a prefix: use {renaming}." if renaming is not None else "")
        raise incompatible(module, path, missing, unexpected, mismatched, done=done, advice=advice)


@contextlib.contextmanager
def short_errors(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    wants: Callable[[str], bool] = lambda _: True,
    *,
    strict: bool,
    path: str,
    advice: str = _ADVICE,
    match: Callable[[], WeightsMatch | None] = lambda: None,
) -> Iterator[None]:
    """Replaces torch's long error of a ``load_state_dict`` within the block by a short one.

    What can be known in advance is checked at the start of the block, while the module is still unchanged.

    Args:
        module: See :func:`_require_match`, as for the next five.
        state_dict: The state dict that the block loads.
        wants: Whether a key of the module is to be loaded.
        strict: Whether missing and unexpected keys are errors.
        path: Name of the checkpoint in messages.
        advice: What the user can do, for messages.
        match: Gives the differences, for an error that torch raises within the block. See :func:`_refused_by_torch`.

    Raises:
        IncompatibleWeightsError: The weights do not fit the module. It is a ``RuntimeError``, as in torch.
    """
    _require_match(module, state_dict, wants, strict=strict, path=path, advice=advice)
    try:
        yield
    except RuntimeError as error:
        refused = _refused_by_torch(module, error, match(), path=path, advice=advice)
        if refused is None:
            raise
        raise refused from error


def _without_ties(entries: Mapping[str, Any], given: Collection[str], names: Iterable[str]) -> list[str]:
    """Names that are not given, except those of parameters that are given under another name.

    Some formats (safetensors) store a tied parameter once.
    """
    names = [name for name in names if name not in given]
    if not names:
        return names
    supplied = {id(value) for name, value in entries.items() if name in given and value is not None}
    return [name for name in names if id(entries.get(name)) not in supplied]


def module_keys(module: nn.Module) -> list[str]:
    """The keys of a module's ``state_dict``, without calling it."""
    return [name for name, _, _ in _entries(module)]


def walk_apart(module: nn.Module, is_apart: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Walks all submodules in the order of ``named_modules(remove_duplicate=False)``, once for each path.

    Args:
        module: The root. It comes first, with the path ``""``, and is never marked.
        is_apart: Whether to mark a submodule and all submodules in it.

    Yields:
        Path, module, and whether it is marked.
    """
    stack: list[tuple[str, nn.Module, bool]] = [("", module, False)]
    while stack:
        path, parent, apart = stack.pop()
        yield path, parent, apart
        prefix = f"{path}." if path else ""
        children = [(f"{prefix}{name}", child) for name, child in parent._modules.items() if child is not None]
        stack.extend((name, child, apart or is_apart(child)) for name, child in reversed(children))


def _entries(module: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """The names and values of a module's ``state_dict``, and whether their submodule has its own loading code."""
    for path, child, apart in walk_apart(module, _has_own_way):
        prefix = f"{path}." if path else ""
        skipped = child._non_persistent_buffers_set
        for name, value in (*child._parameters.items(), *child._buffers.items()):
            if value is not None and name not in skipped:
                yield prefix + name, value, apart
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}_extra_state", None, apart


def _has_own_way(module: nn.Module) -> bool:
    """Whether a module has its own loading code or hooks, so that the result of loading it cannot be predicted."""
    loads = type(module)._load_from_state_dict
    overrides = type(module).load_state_dict is not nn.Module.load_state_dict or loads not in FORESEEN_LOADING
    # Hooks of the restore change no names. A post-hook may remove missing keys from the result.
    hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    return overrides or any(not is_of_restore(hook) for hook in hooks)


def is_of_restore(hook: Any) -> bool:
    """Whether this package installed the hook of a module for the duration of a restore."""
    hook = getattr(hook, "hook", hook)  # torch (2.13) wraps each pre-hook in a private class
    return hook is fill_before_load or getattr(getattr(hook, "__self__", None), "is_of_restore", False) is True


def _prefixes(name: str) -> Iterator[str]:
    end = name.find(".")
    while end >= 0:
        yield name[: end + 1]
        end = name.find(".", end + 1)


def _refused_by_torch(
    module: nn.Module, error: RuntimeError, match: WeightsMatch | None, *, path: str, advice: str = _ADVICE
) -> IncompatibleWeightsError | None:
    """Makes a short error from the error of a ``load_state_dict``, which lists every name.

    Args:
        module: The module.
        error: The error that was raised.
        match: The differences between module and checkpoint; ``None`` if they are unknown or do not matter.
        path: Name of the checkpoint in the message.
        advice: What the user can do.

    Returns:
        The short error; ``None`` if ``error`` is not one of ``load_state_dict``.
    """
    first, *problems = str(error).splitlines()
    if not first.startswith("Error(s) in loading state_dict"):
        return None
    new, unused = (match.new, match.unused) if match is not None else ((), ())
    known = ("Missing key(s)", "Unexpected key(s)") if match is not None else ()
    others = [problem.strip() for problem in problems if problem.strip() and not problem.strip().startswith(known)]
    return incompatible(module, path, new, unused, {}, done=OTHERS_LOADED, advice=advice, others=others)


def incompatible(
    module: nn.Module,
    path: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    done: str,
    advice: str = _ADVICE,
    others: Sequence[str] = (),
    strict: bool = True,
) -> IncompatibleWeightsError:
    """Makes the error that lists all differences: the first ten names of each kind, and their number.

    Args:
        module: The module.
        path: Name of the checkpoint in the message.
        missing: Names that the checkpoint lacks.
        unexpected: Names that the module lacks.
        mismatched: For each name whose shapes differ, the shape on disk and the one in the module.
        done: A sentence that says whether the module was changed.
        advice: What the user can do.
        others: Other problems, as sentences.
        strict: Whether missing and unexpected names are errors. If so, the message mentions ``strict=False``.
    """
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
    if others:
        lines.append(f"  {listed(others, separator=' ')}")
    # strict=False does not accept different shapes.
    loosely = " strict=False ignores all of these names; use it only as a last resort."
    lines.append(f"{done} {advice}{loosely if strict and (missing or unexpected) and advice == _ADVICE else ''}")
    return IncompatibleWeightsError(
        "\n".join(lines),
        path=path,
        missing_keys=tuple(missing),
        unexpected_keys=tuple(unexpected),
        mismatched_shapes=dict(mismatched),
    )
