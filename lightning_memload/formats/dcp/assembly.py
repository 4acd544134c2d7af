"""Assembles the saved object of a distributed checkpoint from its leaves and their key paths.

This module knows dicts and lists only. A leaf is any other object except ``None``. Flattening at the save dropped empty
containers, which cannot be restored, and turned an optimizer's parameter numbers into strings, which is undone here.
Optimizer states of a Trainer stay under the names of their parameters, as the strategies save them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_memload.checkpoint.index import KeyPath
from lightning_memload.errors import CheckpointFormatError

__all__ = ["assemble", "map_leaves", "rename_for_trainer", "walk_leaves"]

# A list has holes where flattening dropped empty containers. No real list has more holes than this.
_MAX_HOLES = 100_000


def assemble(
    leaves: Mapping[str, Any],
    paths: Mapping[str, KeyPath],
    read_numbers: Callable[[Any], Iterable[int]],
    metadata_path: str,
) -> dict[Any, Any]:
    """The saved object with its leaves, and with ``None`` in the holes of lists.

    Args:
        leaves: The leaves by their flat names.
        paths: The keys and positions from the root to each leaf.
        read_numbers: Reads the numbers from the leaf that lists an optimizer's parameters.
        metadata_path: The file that holds the paths, for messages.

    Raises:
        CheckpointFormatError: The paths contradict one another.
    """
    assembly = _Assembly(read_numbers, metadata_path)
    for name, leaf in leaves.items():
        assembly.place(name, paths[name], leaf)
    settled: dict[Any, Any] = assembly.settle(assembly.root)
    return settled


class _Positions(dict[int, Any]):
    """A list under construction: its items by position, added in any order."""


class _Assembly:
    def __init__(self, read_numbers: Callable[[Any], Iterable[int]], metadata_path: str) -> None:
        self.root: dict[Any, Any] = {}
        self._read_numbers = read_numbers
        self._metadata_path = metadata_path
        self._holes = 0

    def place(self, name: str, path: KeyPath, leaf: Any) -> None:
        node: Any = self.root
        for depth, key in enumerate(path):
            last = depth + 1 == len(path)
            child: Any = leaf if last else _Positions() if isinstance(path[depth + 1], int) else {}
            found = node.setdefault(key, child)
            if type(found) is not type(child) or (last and found is not leaf):
                raise self._damaged(f"the keys {path} of {name} lead to another object as well")
            node = found

    def settle(self, node: Any) -> Any:
        """Turns positions into lists, and restores the numbers of an optimizer's parameters."""
        if isinstance(node, _Positions):
            length = max(node) + 1
            self._holes += length - len(node)
            if self._holes > _MAX_HOLES:
                raise self._damaged(f"it describes lists with more than {_MAX_HOLES} empty positions")
            return [self.settle(node.get(position)) for position in range(length)]
        if not isinstance(node, dict):
            return node
        settled = {key: self.settle(value) for key, value in node.items()}
        groups = settled.get("param_groups")
        if isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups):
            # Flattening turns an optimizer's parameter numbers into strings, and drops an empty state.
            numbers = {str(number): number for group in groups for number in self._read_numbers(group["params"])}
            settled["state"] = {numbers.get(key, key): value for key, value in settled.get("state", {}).items()}
        return settled

    def _damaged(self, what: str) -> CheckpointFormatError:
        return CheckpointFormatError(
            f"{self._metadata_path} is damaged: {what}. Resume from another checkpoint.", path=self._metadata_path
        )


def rename_for_trainer(root: dict[Any, Any], extra: Mapping[Any, Any]) -> None:
    """Renames the entries of Lightning's strategies to their names in an ordinary checkpoint.

    Args:
        root: The saved object. It is modified.
        extra: The content of ``meta.pt``.
    """
    if "state_dict" not in root:
        # FSDPStrategy renames "state_dict" to "model". ModelParallelStrategy does not.
        weights = root.pop("model", {})
        rest = dict(root)
        root.clear()
        root.update(state_dict=weights, **rest)
    optimizers: list[Any] = []
    while f"optimizer_{len(optimizers)}" in root:
        optimizers.append(root.pop(f"optimizer_{len(optimizers)}"))
    # An empty list of optimizers is not saved. A checkpoint of weights only has no "lr_schedulers" either.
    if optimizers or "lr_schedulers" in extra:
        root["optimizer_states"] = optimizers


def map_leaves(node: Any, function: Callable[[KeyPath, Any], Any], path: KeyPath = ()) -> Any:
    """A copy of the object in which each leaf is replaced by ``function(path, leaf)``."""
    if isinstance(node, dict):
        return {key: map_leaves(value, function, (*path, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [map_leaves(value, function, (*path, position)) for position, value in enumerate(node)]
    return None if node is None else function(path, node)


def walk_leaves(node: Any) -> list[tuple[KeyPath, Any]]:
    """All leaves in order, each after its key path."""
    found: list[tuple[KeyPath, Any]] = []
    map_leaves(node, lambda path, leaf: found.append((path, leaf)))
    return found
