"""Finds the state dict in a loaded checkpoint, renames its keys, and filters them.

Only names are handled. The values stay where they are, so no byte of a tensor is read. Of modules, this file knows only
that their versions (``_metadata``) are keyed by their paths, and that a pickled module has a state dict.
"""

from __future__ import annotations

import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_memload.errors import CheckpointFormatError, listed
from lightning_memload.pickles import holds_refused

__all__ = [
    "add_compiled_versions",
    "choose_keys",
    "find_state_dict",
    "key_filter",
    "match_compiled",
    "rename_compiled",
    "rename_keys",
    "suggest_renaming",
]

# The usual keys of the weights in a checkpoint that holds more than weights.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")
# Names of other parts of a checkpoint that may hold tensors by name.
_OTHER_PARTS = re.compile("optim|sched|callback|loop|hyper_param|hparam|rng|scaler", re.IGNORECASE)
_MAX_DEPTH = 6
_MAX_ITEMS = 16
# torch.compile wraps a module in another one, which holds it under this name.
_COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod\.")
_FEW = 3
_SAMPLE = 64


def find_state_dict(loaded: Any, path: str | os.PathLike[str], key: str | None = None) -> Mapping[str, Any]:
    """Finds the state dict in a loaded checkpoint.

    A pickled module, as ``weights_only=False`` loads it, counts as its state dict.

    Args:
        loaded: The checkpoint.
        path: Name of the checkpoint in messages.
        key: Keys from the root to the state dict, joined by dots. ``None``: the state dict under one of the usual keys;
            else the checkpoint itself if it holds tensors by name; else the only state dict anywhere in it that does
            not belong to an optimizer or another such part.

    Raises:
        CheckpointFormatError: No state dict is found, or several.
    """
    if key is not None:
        return _state_dict_at(loaded, path, key)
    # The usual keys come first: a tensor beside them (the best accuracy) does not make the checkpoint a state dict.
    candidates = [loaded[name] for name in _STATE_DICT_KEYS if name in loaded] if isinstance(loaded, Mapping) else []
    for candidate in (*candidates, loaded):
        weights = _as_state_dict(candidate)
        if weights is not None:
            return weights
    found = _search(loaded)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        several = [f"key={name!r} ({len(weights)} entries)" for name, weights in found.items()]
        raise CheckpointFormatError(
            f"{os.fspath(path)} holds {len(found)} state dicts, so the choice is ambiguous. Choose one: "
            f"{listed(several)}.",
            path=os.fspath(path),
        )
    raise _not_found("No state dict is found", loaded, path)


def _state_dict_at(loaded: Any, path: str | os.PathLike[str], key: str) -> Mapping[str, Any]:
    found, rest = loaded, key
    while rest:
        if isinstance(found, (list, tuple)):
            first, _, after = rest.partition(".")
            if not first.isdecimal() or int(first) >= len(found):
                break
            found, rest = found[int(first)], after
            continue
        # The longest part first, since a key may contain dots.
        name = next((part for part in _prefixes(rest) if part in found), None) if isinstance(found, Mapping) else None
        if name is None:
            break
        found, rest = found[name], rest[len(name) + 1 :]
    weights = _as_state_dict(found) if not rest else None
    if weights is None:
        raise _not_found(f"No state dict is at {key!r}", loaded, path)
    return weights


def _as_state_dict(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, nn.Module):
        weights: Mapping[str, Any] = value.state_dict(keep_vars=True)
        return weights
    return value if _is_state_dict(value) else None


def _search(loaded: Any) -> dict[str, Mapping[str, Any]]:
    """Every state dict in nested containers by its key, except those of optimizers and other parts."""
    found: dict[str, Mapping[str, Any]] = {}
    stack: list[tuple[tuple[str, ...], Any]] = [((), loaded)]
    while stack:
        path, value = stack.pop()
        weights = _as_state_dict(value)
        if weights is not None:
            found[".".join(path)] = weights
        elif len(path) == _MAX_DEPTH or (isinstance(value, tuple) and holds_refused(value)):
            continue
        elif isinstance(value, Mapping):
            named = [(name, item) for name, item in value.items() if isinstance(name, str)]
            stack += [((*path, name), item) for name, item in reversed(named) if not _OTHER_PARTS.search(name)]
        elif isinstance(value, (list, tuple)):
            stack += [((*path, str(number)), item) for number, item in reversed([*enumerate(value[:_MAX_ITEMS])])]
    return found


def _not_found(what: str, loaded: Any, path: str | os.PathLike[str]) -> CheckpointFormatError:
    has = listed(map(repr, loaded)) or "nothing" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
    found = _search(loaded)
    advice = "Pass key= with the place of the state dict."
    if found:
        advice = f"Choose one of {listed(f'key={name!r}' for name in found)}."
    return CheckpointFormatError(
        f"{what} in {os.fspath(path)}, whose top level has {has}. {advice}", path=os.fspath(path)
    )


def rename_keys(
    state_dict: Mapping[str, Any], strip_prefix: str = "", rename: Mapping[str, str] | None = None
) -> OrderedDict[str, Any]:
    """Returns a state dict with renamed keys. The versions of its modules (``_metadata``) are renamed too.

    Args:
        state_dict: The state dict.
        strip_prefix: Prefix that is removed from the keys that start with it.
        rename: Regular expressions and their replacements, applied in this order.

    Raises:
        ValueError: Two keys get the same name, or a regular expression is invalid.
    """
    try:
        pairs = [(re.compile(pattern), replacement) for pattern, replacement in (rename or {}).items()]
        for pattern, replacement in pairs:
            re.compile(f"{pattern.pattern}|").sub(replacement, "")  # raises if the replacement is invalid
    except re.error as error:
        raise ValueError(f"rename: {error.pattern!r} is no regular expression: {error}.") from error

    def rename_one(name: str) -> str:
        name = name.removeprefix(strip_prefix)
        for pattern, replacement in pairs:
            name = pattern.sub(replacement, name)
        return name

    renamed: OrderedDict[str, Any] = OrderedDict()
    origin: dict[str, str] = {}
    for old, value in state_dict.items():
        name = rename_one(old)
        if name in renamed:
            raise ValueError(f"Renaming gives {origin[name]!r} and {old!r} the same name {name!r}.")
        renamed[name], origin[name] = value, old
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        # The keys of _metadata are the paths of modules: keys of the state dict without their last part.
        paths = {path: rename_one(f"{path}.").removesuffix(".") if path else "" for path in metadata}
        renamed._metadata = {new: metadata[path] for path, new in paths.items()}  # type: ignore[attr-defined]
    return renamed


def match_compiled(given: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """Finds the names that differ from a module's names only by the ``_orig_mod.`` of ``torch.compile``.

    Args:
        given: Names of a state dict.
        expected: Names of the module.

    Returns:
        The module's name for each such name. Not included: names that the module has, and ambiguous names.
    """
    if not any("_orig_mod." in name for name in given) and not any("_orig_mod." in name for name in expected):
        return {}
    plain: dict[str, str | None] = {}
    for name in expected:
        short = _COMPILED.sub("", name)
        plain[short] = None if short in plain else name
    taken: Counter[str] = Counter()
    renamed: dict[str, str] = {}
    known = set(expected)
    for name in given:
        target = plain.get(_COMPILED.sub("", name)) if name not in known else None
        if target is not None and target not in given:
            renamed[name] = target
            taken[target] += 1
    return {name: target for name, target in renamed.items() if taken[target] == 1}


def rename_compiled(state_dict: dict[str, Any], expected: Collection[str]) -> None:
    """Renames the keys of a state dict in place to the names of a module, as :func:`match_compiled` finds them."""
    renamed = match_compiled(state_dict, expected)
    if renamed:
        items = [(renamed.get(name, name), value) for name, value in state_dict.items()]
        state_dict.clear()
        state_dict.update(items)


def add_compiled_versions(state_dict: Any, module_paths: Collection[str]) -> None:
    """Copies the versions of modules in a state dict (``_metadata``) to the compiled names of the same modules."""
    metadata = getattr(state_dict, "_metadata", None)
    if not isinstance(metadata, dict):
        return
    plain = {_COMPILED.sub("", f"{path}."): version for path, version in metadata.items()}
    for path in module_paths:
        if path not in metadata and _COMPILED.sub("", f"{path}.") in plain:
            metadata[path] = plain[_COMPILED.sub("", f"{path}.")]


def suggest_renaming(given: Collection[str], expected: Collection[str]) -> str | None:
    """Suggests arguments for names that differ from a module's names by one prefix; ``None`` if none helps."""
    expected, given = set(expected), set(given)
    before = len(given & expected)
    best: tuple[int, str] = (before, "")
    more = Counter(prefix for name in _sample(given) for prefix, tail in _splits(name) if tail in expected)
    less = Counter(prefix for name in _sample(expected) for prefix, tail in _splits(name) if tail in given)
    for prefix, _ in more.most_common(3):
        count = len({name.removeprefix(prefix) for name in given if name.startswith(prefix)} & expected)
        words = f"strip_prefix={prefix!r}"
        # Entries beside the module, such as the counter of an AveragedModel.
        others = sorted(name for name in given if not name.startswith(prefix) and name not in expected)
        if 0 < len(others) <= _FEW:
            words += f", exclude={[f'^{re.escape(name)}$' for name in others]}"
        best = max(best, (count, words), key=lambda item: item[0])
    for prefix, _ in less.most_common(3):
        count = len({f"{prefix}{name}" for name in given} & expected)
        best = max(best, (count, f"rename={{'^': {prefix!r}}}"), key=lambda item: item[0])
    return best[1] or None


def _sample(names: Collection[str]) -> list[str]:
    return sorted(names)[:: max(1, len(names) // _SAMPLE)]


def _splits(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    return ((".".join(parts[:count]) + ".", ".".join(parts[count:])) for count in range(1, len(parts)))


def choose_keys(
    state_dict: Mapping[str, Any],
    strip_prefix: str,
    rename: Mapping[str, str] | None,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
) -> OrderedDict[str, Any]:
    """Renames the keys of a state dict, and leaves out those that are then not wanted.

    Args:
        state_dict: The state dict.
        strip_prefix: See :func:`rename_keys`.
        rename: See :func:`rename_keys`.
        include: See :func:`key_filter`.
        exclude: See :func:`key_filter`.

    Raises:
        ValueError: Two keys get the same name, or a regular expression is invalid.
    """
    wants = key_filter(include, exclude)
    chosen = rename_keys(state_dict, strip_prefix, rename)
    for name in [name for name in chosen if not wants(name)]:
        del chosen[name]
    return chosen


def key_filter(include: str | Sequence[str], exclude: str | Sequence[str]) -> Callable[[str], bool]:
    """Makes a function that tells whether a key is wanted.

    Args:
        include: Regular expressions. A key is wanted if one of them is found in it. Empty: every key is wanted.
        exclude: Regular expressions. A key is not wanted if one of them is found in it.

    Raises:
        ValueError: A regular expression is invalid.
    """
    included, excluded = _compiled("include", include), _compiled("exclude", exclude)

    def wants(name: str) -> bool:
        found = not included or any(pattern.search(name) for pattern in included)
        return found and not any(pattern.search(name) for pattern in excluded)

    return wants


def _compiled(argument: str, patterns: str | Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    except re.error as error:
        raise ValueError(f"{argument}: {error.pattern!r} is no regular expression: {error}.") from error


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(item, torch.Tensor) for item in value.values())
    )


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))
