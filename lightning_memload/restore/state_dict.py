"""The state dict within a loaded checkpoint: where it is, under which names, and which of them are wanted.

All of it is about names: the values stay where they are, so no byte of a tensor is read. Of modules it is known only
that their versions (``_metadata``) are keyed by their paths.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_memload.errors import CheckpointFormatError, listed

__all__ = ["find_state_dict", "key_filter", "rename_keys"]

# Where training scripts put the weights of a checkpoint that holds more than weights.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


def find_state_dict(loaded: Any, path: str | os.PathLike[str], key: str | None = None) -> Mapping[str, Any]:
    """The state dict in a loaded checkpoint.

    Args:
        loaded: The checkpoint.
        path: What to call it in messages.
        key: Keys from the root to the state dict, joined by dots. ``None``: what the checkpoint has under one of the
            usual keys, else itself if it holds tensors by name.

    Raises:
        CheckpointFormatError: There is none there.
    """
    if key is None:
        # Tensors beside it (the best accuracy) make no state dict of the checkpoint.
        candidates = (
            [loaded[name] for name in _STATE_DICT_KEYS if name in loaded] if isinstance(loaded, Mapping) else []
        )
        candidates.append(loaded)
        found = next((candidate for candidate in candidates if _is_state_dict(candidate)), None)
    else:
        found = loaded
        rest = key
        while rest and isinstance(found, Mapping):
            # The longest first, for keys that have dots of their own.
            name = next((part for part in _prefixes(rest) if part in found), None)
            if name is None:
                break
            found, rest = found[name], rest[len(name) + 1 :]
        found = found if not rest and _is_state_dict(found) else None
    if found is None:
        what = f"No state dict is at {key!r}" if key is not None else "No state dict is found"
        has = listed(map(repr, loaded)) if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise CheckpointFormatError(
            f"{what} in {os.fspath(path)}, whose top level has {has}. Say with key= where the names and tensors are.",
            path=os.fspath(path),
        )
    return found  # type: ignore[no-any-return]


def rename_keys(
    state_dict: Mapping[str, Any], strip_prefix: str = "", rename: Mapping[str, str] | None = None
) -> OrderedDict[str, Any]:
    """A state dict under other names, with the versions of its modules (``_metadata``) under theirs.

    Args:
        state_dict: The state dict.
        strip_prefix: Taken off the keys that start with it.
        rename: Regular expressions and what to put for them, applied in their order.

    Raises:
        ValueError: Two keys get the same name, or a regular expression is none.
    """
    try:
        pairs = [(re.compile(pattern), replacement) for pattern, replacement in (rename or {}).items()]
        for pattern, replacement in pairs:
            re.compile(f"{pattern.pattern}|").sub(replacement, "")  # a replacement may be wrong as well
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
        # Keyed by the paths of modules, which are keys without their last part.
        paths = {path: rename_one(f"{path}.").removesuffix(".") if path else "" for path in metadata}
        renamed._metadata = {new: metadata[path] for path, new in paths.items()}  # type: ignore[attr-defined]
    return renamed


def key_filter(include: str | Sequence[str], exclude: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a key is wanted, as regular expressions say.

    Args:
        include: Any key in which one of these is found. Empty: every key.
        exclude: But none in which one of these is found.

    Raises:
        ValueError: A regular expression is none.
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
