"""Divides the tensors of a checkpoint into sections: the weights, each optimizer, callbacks, and so on.

A section is found by the first key of a tensor's path. A file without a key of Lightning's is a state dict: all of its
tensors are weights, unless the first key names an optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_memload.checkpoint.index import TensorInfo

__all__ = ["TensorGroup", "divide"]

_WEIGHTS = "weights"
_STATE_DICT = "state_dict"
_OPTIMIZERS = "optimizer_states"
# The keys of a Lightning checkpoint that hold one section, and the name of the section.
_NAMES = {
    _STATE_DICT: _WEIGHTS,
    "lr_schedulers": "schedulers",
    "callbacks": "callbacks",
    "loops": "loops",
    "hyper_parameters": "hyperparameters",
    "datamodule_hyper_parameters": "hyperparameters",
}
_ORDER = (_WEIGHTS, "optimizer", "schedulers", "callbacks", "loops", "hyperparameters", "other")


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The tensors of one part of a checkpoint.

    Attributes:
        name: ``"weights"``, ``"optimizer 0"`` (its number), ``"schedulers"``, ``"callbacks"``, ``"loops"``,
            ``"hyperparameters"`` or ``"other"``.
        tensors: The tensors, in the order of the checkpoint.
        num_values: Number of elements. Tensors at the same place of the file count once.
        nbytes: Bytes of these elements.
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    num_values: int
    nbytes: int

    @property
    def dtypes(self) -> Mapping[str, int]:
        """The number of tensors of each dtype, the most frequent one first."""
        return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors).most_common())


def divide(tensors: Iterable[TensorInfo]) -> tuple[TensorGroup, ...]:
    """The sections of a checkpoint that hold tensors: weights first, then the optimizers, then the others."""
    tensors = tuple(tensors)
    is_lightning = any(tensor.path[:1] in ((_STATE_DICT,), (_OPTIMIZERS,)) for tensor in tensors)
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(_name(tensor, is_lightning), []).append(tensor)
    # A stable sort: optimizers keep their order.
    names = sorted(groups, key=lambda name: _ORDER.index(name.split()[0]))
    return tuple(_section(name, groups[name]) for name in names)


def _name(tensor: TensorInfo, is_lightning: bool) -> str:
    key = tensor.path[0] if tensor.path else ""
    if is_lightning and key == _OPTIMIZERS:
        return f"optimizer {tensor.path[1]}" if len(tensor.path) > 1 else "optimizer"
    if is_lightning:
        return _NAMES.get(str(key), "other")
    return "optimizer" if len(tensor.path) > 1 and str(key).startswith("optim") else _WEIGHTS


def _section(name: str, tensors: list[TensorInfo]) -> TensorGroup:
    distinct = {(t.storage.offset, t.storage_offset, t.dtype, t.shape, t.stride): t for t in tensors}.values()
    num_values, nbytes = sum(t.numel for t in distinct), sum(t.nbytes for t in distinct)
    return TensorGroup(name, tuple(tensors), num_values, nbytes)
