"""The object that a distributed checkpoint was saved from, put together from its leaves and the keys that lead to them.

Dicts and lists are all that is known here; a leaf is whatever the caller has in its place, but neither of these nor
``None``. Flattening lost what is empty and made strings of an optimizer's numbers: the latter is undone. States of a
Trainer's optimizers stay under the names of their parameters, as the strategies save them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_memload.checkpoint.index import KeyPath
from lightning_memload.errors import CheckpointFormatError

__all__ = ["assemble", "map_leaves", "rename_for_trainer", "walk_leaves"]

# Lists lose their empty containers when they are flattened. More holes than this are nobody's list.
_MAX_HOLES = 100_000


def assemble(
    leaves: Mapping[str, Any],
    paths: Mapping[str, KeyPath],
    read_numbers: Callable[[Any], Iterable[int]],
    metadata_path: str,
) -> dict[Any, Any]:
    """The saved object with leaves in their places, and ``None`` in the holes of lists.

    Args:
        leaves: By their flat names.
        paths: Keys and positions from the root to each of them.
        read_numbers: Reads the numbers in the leaf that lists an optimizer's parameters.
        metadata_path: The file that the paths are from, for messages.

    Raises:
        CheckpointFormatError: The paths contradict one another.
    """
    assembly = _Assembly(read_numbers, metadata_path)
    for name, leaf in leaves.items():
        assembly.place(name, paths[name], leaf)
    settled: dict[Any, Any] = assembly.settle(assembly.root)
    return settled


class _Positions(dict[int, Any]):
    """A list that is being put together in any order."""


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
                raise self._damaged(f"the keys {path} that lead to {name} lead to something else as well")
            node = found

    def settle(self, node: Any) -> Any:
        """Lists for positions, and an optimizer's states under the ids that it saved."""
        if isinstance(node, _Positions):
            length = max(node) + 1
            self._holes += length - len(node)
            if self._holes > _MAX_HOLES:
                raise self._damaged(f"it describes lists with more than {_MAX_HOLES} positions that hold nothing")
            return [self.settle(node.get(position)) for position in range(length)]
        if not isinstance(node, dict):
            return node
        settled = {key: self.settle(value) for key, value in node.items()}
        groups = settled.get("param_groups")
        if isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups):
            # Flattening makes strings of an optimizer's numbers, and loses a state that is empty.
            numbers = {str(number): number for group in groups for number in self._read_numbers(group["params"])}
            settled["state"] = {numbers.get(key, key): value for key, value in settled.get("state", {}).items()}
        return settled

    def _damaged(self, what: str) -> CheckpointFormatError:
        return CheckpointFormatError(
            f"{self._metadata_path} is damaged: {what}. Resume from another checkpoint.", path=self._metadata_path
        )


def rename_for_trainer(root: dict[Any, Any], extra: Mapping[Any, Any]) -> None:
    """Gives what Lightning's strategies renamed when they saved its name in an ordinary checkpoint again.

    Args:
        root: The saved object, which is changed.
        extra: What Lightning saved beside it.
    """
    if "state_dict" not in root:
        # FSDPStrategy; ModelParallelStrategy leaves the name.
        weights = root.pop("model", {})
        rest = dict(root)
        root.clear()
        root.update(state_dict=weights, **rest)
    optimizers: list[Any] = []
    while f"optimizer_{len(optimizers)}" in root:
        optimizers.append(root.pop(f"optimizer_{len(optimizers)}"))
    # A checkpoint without optimizers leaves no trace of the empty list; one of weights only has no schedulers either.
    if optimizers or "lr_schedulers" in extra:
        root["optimizer_states"] = optimizers


def map_leaves(node: Any, function: Callable[[KeyPath, Any], Any], path: KeyPath = ()) -> Any:
    """The same object with what a function makes of each leaf and the keys that lead there."""
    if isinstance(node, dict):
        return {key: map_leaves(value, function, (*path, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [map_leaves(value, function, (*path, position)) for position, value in enumerate(node)]
    return None if node is None else function(path, node)


def walk_leaves(node: Any) -> list[tuple[KeyPath, Any]]:
    """Every leaf after the keys that lead to it, in order."""
    found: list[tuple[KeyPath, Any]] = []
    map_leaves(node, lambda path, leaf: found.append((path, leaf)))
    return found
