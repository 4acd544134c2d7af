"""Whether a state dict fits a module, told before anything changes as far as that can be foreseen.

The same verdicts as torch's ``load_state_dict``, all of them together. What modules with hooks or a way of loading of
their own will take cannot be foreseen: it is judged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lightning_memload.errors import IncompatibleWeightsError, listed
from lightning_memload.restore.recipes import fill_before_load
from lightning_memload.restore.state_dict import suggest_renaming

__all__ = [
    "ADVICE",
    "NOTHING_CHANGED",
    "OTHERS_LOADED",
    "WeightsMatch",
    "incompatible",
    "is_of_restore",
    "match_weights",
    "module_keys",
    "refused_by_torch",
    "require_match",
    "walk_apart",
]

NOTHING_CHANGED = "Nothing was changed."
OTHERS_LOADED = "Other weights were loaded."
ADVICE = "Use rename= or strip_prefix= for other names, exclude= for new layers."

# Ways of loading that can be foreseen: torch's own, and that of its batch norms, which add a counter if it is missing.
_FORESEEN = (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)


@dataclass(frozen=True, slots=True)
class WeightsMatch:
    """What of a module's weights a checkpoint gave, where that is not all, or not all of the checkpoint.

    Attributes:
        num_loaded: Tensors of the module that got values.
        num_expected: Tensors of the module that were asked for.
        new: Names that the module has and the checkpoint lacks.
        unused: Names that the checkpoint has and the module lacks.
    """

    num_loaded: int
    num_expected: int
    new: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def is_nothing(self) -> bool:
        """Whether the module got none of the tensors that it has."""
        return self.num_loaded == 0 < self.num_expected

    def __str__(self) -> str:
        words = [f"{self.num_loaded} of {self.num_expected} tensors loaded"]
        words += [f"new: {listed(self.new)}"] if self.new else []
        words += [f"unused in the file: {listed(self.unused)}"] if self.unused else []
        return "; ".join(words)


def match_weights(
    module: nn.Module, given: Collection[str], keys: _IncompatibleKeys, wants: Callable[[str], bool] = lambda _: True
) -> WeightsMatch | None:
    """What a ``load_state_dict`` gave the module.

    Args:
        module: The module.
        given: The names that were loaded.
        keys: What ``load_state_dict`` returned.
        wants: Which keys of the module are asked for.

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


def require_match(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    wants: Callable[[str], bool] = lambda _: True,
    *,
    strict: bool,
    path: str,
    advice: str = ADVICE,
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
        advice: What to do, for messages.

    Raises:
        IncompatibleWeightsError: Shapes differ, or with ``strict`` keys are missing or unexpected.
    """
    if _has_own_way(module):
        return
    own_ways: set[str] = set()
    for place, child, _ in walk_apart(module, _has_own_way):
        prefix = f"{place}." if place else ""
        # torch passes over names below a child that is None.
        parts = child._modules.items()
        own_ways.update(f"{prefix}{name}." for name, part in parts if part is None or _has_own_way(part))
    # With what modules take in their own way: a tied parameter may have its other name there.
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
        # torch takes a tensor of one element for a scalar, as old files have it.
        and not (expected[name].dim() == 0 and tuple(value.shape) == (1,))
    }
    # Batch norms of old files have no such counter, and load all the same.
    asked = [name for name in expected if wants(name) and not name.endswith("num_batches_tracked")]
    missing = _without_ties({n: value for n, (value, _) in entries.items()}, state_dict, asked) if strict else []
    unexpected = [name for name in given if name not in expected] if strict else []
    if missing or unexpected or mismatched:
        renaming = suggest_renaming(given, expected) if missing or unexpected else None
        done = NOTHING_CHANGED + (f" The names differ by a prefix: use {renaming}." if renaming is not None else "")
        raise incompatible(module, path, missing, unexpected, mismatched, done=done, advice=advice)


def _without_ties(entries: Mapping[str, Any], given: Collection[str], names: Iterable[str]) -> list[str]:
    """Names that are not given, unless the very same parameter is given under another name.

    Some formats (safetensors) hold a tied parameter once.
    """
    names = [name for name in names if name not in given]
    if not names:
        return names
    supplied = {id(value) for name, value in entries.items() if name in given and value is not None}
    return [name for name in names if id(entries.get(name)) not in supplied]


def module_keys(module: nn.Module) -> list[str]:
    """The keys that a module's ``state_dict`` would have, without making it."""
    return [name for name, _, _ in _entries(module)]


def walk_apart(module: nn.Module, is_apart: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module in a module, in the order of ``named_modules(remove_duplicate=False)``, each once for each path.

    Args:
        module: The module itself comes first, with the path ``""``, and is never apart.
        is_apart: Whether a module, and with it all modules in it, is to be told apart.

    Yields:
        Path, module, and whether it is apart.
    """
    stack: list[tuple[str, nn.Module, bool]] = [("", module, False)]
    while stack:
        path, parent, apart = stack.pop()
        yield path, parent, apart
        prefix = f"{path}." if path else ""
        children = [(f"{prefix}{name}", child) for name, child in parent._modules.items() if child is not None]
        stack.extend((name, child, apart or is_apart(child)) for name, child in reversed(children))


def _entries(module: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """What a module's ``state_dict`` would have, without making it, and whether its module loads in its own way."""
    for path, child, apart in walk_apart(module, _has_own_way):
        prefix = f"{path}." if path else ""
        skipped = child._non_persistent_buffers_set
        for name, value in (*child._parameters.items(), *child._buffers.items()):
            if value is not None and name not in skipped:
                yield prefix + name, value, apart
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}_extra_state", None, apart


def _has_own_way(module: nn.Module) -> bool:
    """Whether a module does more than torch's own modules when it is loaded."""
    loads = type(module)._load_from_state_dict
    overrides = type(module).load_state_dict is not nn.Module.load_state_dict or loads not in _FORESEEN
    # Those of the restore change no names. A post-hook may strike missing keys out.
    hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    return overrides or any(not is_of_restore(hook) for hook in hooks)


def is_of_restore(hook: Any) -> bool:
    """Whether a hook of a module is one that this package has installed for the time of a restore."""
    hook = getattr(hook, "hook", hook)  # torch (2.13) wraps each pre-hook, and has no public name for them
    return hook is fill_before_load or getattr(getattr(hook, "__self__", None), "is_of_restore", False) is True


def _prefixes(name: str) -> Iterator[str]:
    end = name.find(".")
    while end >= 0:
        yield name[: end + 1]
        end = name.find(".", end + 1)


def refused_by_torch(
    module: nn.Module, error: RuntimeError, match: WeightsMatch | None, *, path: str, advice: str = ADVICE
) -> IncompatibleWeightsError | None:
    """A short error in place of the one of a ``load_state_dict``, which lists every name.

    Args:
        module: The module.
        error: What was raised.
        match: What the module got, ``None`` where that does not matter or is not known.
        path: What to call the checkpoint.
        advice: What to do.

    Returns:
        ``None`` if the error is another one.
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
    advice: str = ADVICE,
    others: Sequence[str] = (),
    strict: bool = True,
) -> IncompatibleWeightsError:
    """The error that names all that does not fit: the first ten names of each kind, and their number.

    Args:
        module: The module.
        path: What to call the checkpoint.
        missing: Names that the checkpoint lacks.
        unexpected: Names that the module lacks.
        mismatched: For each name whose shapes differ, the shape on disk and the one in the module.
        done: What has happened to the module.
        advice: What to do.
        others: What else is wrong, in words.
        strict: Whether names may be neither missing nor unexpected. If not, there is nothing more to pass over.
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
    # Shapes have to be the same whether strict or not.
    loosely = " strict=False passes over all of these names, and is the last resort."
    lines.append(f"{done} {advice}{loosely if strict and (missing or unexpected) and advice == ADVICE else ''}")
    return IncompatibleWeightsError(
        "\n".join(lines),
        path=path,
        missing_keys=tuple(missing),
        unexpected_keys=tuple(unexpected),
        mismatched_shapes=dict(mismatched),
    )
