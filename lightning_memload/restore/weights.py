"""Streaming into modules, behind torch's own ``load_state_dict``.

A pre-hook brings every value to where it belongs and then puts the module's *own tensor* into the state dict, so that
torch copies a tensor onto itself, which does nothing, and keeps its checks, messages and results. The hook sits on
every submodule: a module that renames keys in a hook of its own, or is loaded by itself, is met when its turn comes.
What the hook does not recognise stays in the state dict as it is and is copied by torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.restore.meta import empty_on, materialize, replace_data
from lightning_memload.restore.session import Move, RestoreSession

__all__ = ["WeightsRestore"]

# The types that hold every float16, bfloat16 and float32 value exactly.
_HOLDS_HALF = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class _Target:
    """A parameter or persistent buffer that ``load_state_dict`` is about to fill."""

    key: str
    tensor: torch.Tensor
    value: torch.Tensor


class WeightsRestore:
    """Makes a module's ``load_state_dict`` stream from the mapped checkpoint while it is installed.

    Values go to the session's device: in place where a parameter is there already, else into new memory that replaces
    the parameter's old one when all values have arrived. A failure before that leaves such parameters as they were.
    Every ``Parameter`` object stays the same object.

    Args:
        module: The module.
        session: The restore.
        dtype: Floating-point type that the module is going to be converted to, applied to new memory already, so that
            no copy in the old type is made. ``None``: each parameter's own.
        assign: Make CPU parameters the file's own pages instead of copying.
        strict: Whether torch will refuse missing keys. If not, meta parameters that the checkpoint lacks are
            initialised by their modules' ``reset_parameters``.
        later_bytes: What the restore will need later, per device, for the check before the first byte.

    Peak memory: the destinations and the session's staging ring. No copy of the checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        session: RestoreSession,
        *,
        dtype: torch.dtype | None = None,
        assign: bool = False,
        strict: bool = True,
        later_bytes: Callable[[], dict[torch.device, int]] = dict,
    ) -> None:
        self._session: RestoreSession | None = session
        self._dtype = dtype
        self._assign = assign
        self._strict = strict
        self._later_bytes = later_bytes
        self.assigned_bytes = 0
        self._assigned_storages: set[int] = set()
        self._handles = [m.register_load_state_dict_pre_hook(self._before_load) for m in module.modules()]
        self._handles.append(module.register_load_state_dict_post_hook(self._after_load))

    def remove(self) -> None:
        """Removes the hooks. Removing twice is fine."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        # A copy of the module may keep this object: nothing of the restore, or of the Trainer, may hang on it.
        self._session = None
        self._later_bytes = dict

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightsRestore:
        # A module that is copied during the restore takes its hooks along; they end with this one's.
        return self

    def _before_load(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
    ) -> None:
        session = self._session
        if session is None:
            return
        by_tensor: dict[int, list[_Target]] = {}
        for target in _find_targets(module, state_dict, prefix):
            by_tensor.setdefault(id(target.tensor), []).append(target)
        # Parameters that share memory without being one object go on sharing it only if they are filled in place.
        shared = Counter(target.tensor.untyped_storage().data_ptr() for target, *_ in by_tensor.values())
        stream: list[_Target] = []
        fresh: list[_Target] = []
        assign: list[_Target] = []
        for targets in by_tensor.values():
            # One tensor under several keys: torch copies one value after the other, so the last one stays.
            target = targets[-1]
            if target.value is target.tensor:
                continue  # A parent's hook did it.
            if not session.checkpoint.holds(target.value):
                # A value that somebody made: torch copies it, into memory that has to exist.
                if target.tensor.is_meta:
                    fresh.append(target)
            elif self._can_assign(target, session.device, shared):
                assign.append(target)
            else:
                stream.append(target)
                if target.tensor.device != session.device:
                    fresh.append(target)
        if not (stream or fresh or assign):
            return
        needed = self._later_bytes()
        device = session.device
        needed[device] = needed.get(device, 0) + sum(self._fresh_bytes(target) for target in fresh)
        session.require(needed)

        replacements = {target.key: self._allocate(target, device) for target in fresh}
        session.move(
            [Move(target.key, target.value, replacements.get(target.key, target.tensor.detach())) for target in stream]
        )
        # Only now, when everything has arrived, does the module change.
        replacements |= {target.key: target.value.detach() for target in assign}
        old = [replace_data(target.tensor, replacements[target.key], name=target.key) for target in (*fresh, *assign)]
        session.free_in_background(old)
        self.assigned_bytes += sum(target.value.nbytes for target in assign)
        for target in (*stream, *assign):
            for alias in by_tensor[id(target.tensor)]:
                state_dict[alias.key] = target.tensor

    def _can_assign(self, target: _Target, device: torch.device, shared: Counter[int]) -> bool:
        if not self._assign or device.type != "cpu" or target.value.dtype != self._final_dtype(target):
            return False
        if isinstance(target.value, ChunkedTensor):
            return False
        if not target.tensor.is_meta:
            own = target.tensor.untyped_storage().data_ptr()
            if target.tensor.device.type != "cpu" or shared[own] > 1:
                return False
        # Two parameters that were saved as views of one storage are not one parameter: only the first may have it.
        storage = target.value.untyped_storage().data_ptr()
        if storage in self._assigned_storages:
            return False
        self._assigned_storages.add(storage)
        return True

    def _final_dtype(self, target: _Target) -> torch.dtype:
        """The dtype of new memory for a target, such that the values are those of the ordinary way.

        That way rounds to the parameter's own type first and converts afterwards. Going to the final type at once is
        the same only if the first step loses nothing; else the parameter's own type is allocated and converted later.
        """
        own = target.tensor.dtype
        if self._dtype is None or not target.tensor.is_floating_point():
            return own
        saved = target.value.dtype
        lossless = saved == own or (own in _HOLDS_HALF and saved in (torch.float16, torch.bfloat16, torch.float32))
        return self._dtype if target.tensor.is_meta or lossless else own

    def _allocate(self, target: _Target, device: torch.device) -> torch.Tensor:
        return empty_on(target.tensor, device, self._final_dtype(target))

    def _fresh_bytes(self, target: _Target) -> int:
        return target.tensor.numel() * self._final_dtype(target).itemsize

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        if not self._strict and self._session is not None:
            materialize(module, incompatible_keys.missing_keys, self._session.device, self._dtype)


def _find_targets(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> Iterator[_Target]:
    """The pairs of tensors that torch would copy, in torch's order: parents first, parameters before buffers."""
    for path, child in module.named_modules(remove_duplicate=False):
        child_prefix = f"{prefix}{path}." if path else prefix
        # torch 2.13 has no public name for non-persistent buffers; load_state_dict itself reads this set. Filling such
        # a buffer from a key that happens to exist would hide torch's "unexpected key".
        skipped = child._non_persistent_buffers_set
        buffers = ((name, buffer) for name, buffer in child._buffers.items() if name not in skipped)
        for name, tensor in (*child._parameters.items(), *buffers):
            value = state_dict.get(child_prefix + name)
            if not isinstance(value, ChunkedTensor) and not _is_plain(value):
                continue
            if _is_plain(tensor) and tensor.shape == value.shape:
                yield _Target(child_prefix + name, tensor, value)


def _is_plain(tensor: Any) -> TypeGuard[torch.Tensor]:
    """Whether a tensor's memory is simply its values. Subclasses and special layouts stay with torch."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
