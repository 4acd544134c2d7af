"""Chooses and renames the weights of a loaded checkpoint, and makes the object that is written."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_memload.convert.streaming import StreamedTensors
from lightning_memload.errors import CheckpointFormatError
from lightning_memload.restore import find_state_dict
from lightning_memload.restore.state_dict import choose_keys

__all__ = ["Selection", "WeightsChoice", "select"]

_VERSION_KEY = "pytorch-lightning_version"
_MAX_DEPTH = 6
# What Lightning saves with save_weights_only=False only (dump_checkpoint, Lightning 2.5 to 2.6).
_NOT_WEIGHTS = ("callbacks", "optimizer_states", "lr_schedulers")


@dataclass
class Selection:
    """The chosen weights of a loaded checkpoint.

    Attributes:
        loaded: The loaded checkpoint.
        path: Its path.
        found: The state dict in it.
        weights: The chosen weights under their new names. Empty: nothing is chosen, and all is written as it is.
        dropped: The keys of ``loaded`` that are not written.
    """

    loaded: Any
    path: str
    found: Mapping[str, Any]
    weights: OrderedDict[str, Any]
    dropped: tuple[str, ...] = field(default=())

    def object_of(self, format: str, *, only_weights: bool, as_lightning: bool) -> Any:
        """The object that is written. Its state dict is :attr:`weights`."""
        if only_weights:
            is_whole = self.found is self.loaded or not isinstance(self.loaded, Mapping)
            keys = [] if is_whole else [str(key) for key, value in self.loaded.items() if value is not self.found]
            if format == "safetensors" or not as_lightning or _VERSION_KEY not in self.loaded:
                self.dropped = tuple(keys)
                return self.weights
            self.dropped = tuple(key for key in keys if key in _NOT_WEIGHTS or _is_precision(key))
            kept = {key: value for key, value in self.loaded.items() if str(key) not in self.dropped}
            return {**kept, "state_dict": self.weights}
        if not self.weights:
            return self.loaded
        if not isinstance(self.found, dict) or not _holds(self.loaded, self.found):
            raise CheckpointFormatError(
                f"The weights of {self.path} are those of a pickled module. Convert the weights only.", path=self.path
            )
        # In its place in the object, at any depth.
        self.found.clear()
        self.found.update(self.weights)
        if hasattr(self.weights, "_metadata") and hasattr(self.found, "_metadata"):
            self.found._metadata = self.weights._metadata
        self.weights = self.found  # type: ignore[assignment]
        return self.loaded

    def convert(self, streaming: StreamedTensors, dtype: torch.dtype | None) -> None:
        """Gives the floating-point weights another dtype. Their values are read when they are written."""
        for name, value in self.weights.items():
            if isinstance(value, torch.Tensor):
                self.weights[name] = streaming.replaced(value, dtype)


@dataclass(frozen=True, slots=True)
class WeightsChoice:
    """Which weights are written, and under which names, see :func:`convert_checkpoint`."""

    key: str | None
    strip_prefix: str
    rename: Mapping[str, str]
    include: str | Sequence[str]
    exclude: str | Sequence[str]

    @property
    def is_everything(self) -> bool:
        """Whether all weights keep their names."""
        return not (self.key or self.strip_prefix or self.rename or self.include or self.exclude)


def select(loaded: Any, path: str, choice: WeightsChoice) -> Selection:
    """Finds the state dict in a loaded checkpoint, renames its keys and chooses among them.

    Raises:
        CheckpointFormatError: No state dict is found, or several, or no weight is chosen.
        ValueError: Two weights get the same name, or a regular expression is invalid.
    """
    found = find_state_dict(loaded, path, choice.key)
    weights = choose_keys(found, choice.strip_prefix, choice.rename, choice.include, choice.exclude)
    if not weights:
        raise CheckpointFormatError(
            f"{path} has no weight that include={choice.include!r} and exclude={choice.exclude!r} select after "
            "renaming.",
            path=path,
        )
    return Selection(loaded, path, found, weights)


def _is_precision(key: str) -> bool:
    """Whether a key is the name of a precision plugin, under which Lightning saves the state of a gradient scaler."""
    return key.endswith("Precision") or key == "native_amp_scaling_state"


def _holds(value: Any, found: object, depth: int = 0) -> bool:
    """Whether an object is in nested containers. The state dict of a pickled module is not."""
    if value is found:
        return True
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return depth < _MAX_DEPTH and any(_holds(item, found, depth + 1) for item in items)
