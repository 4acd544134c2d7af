"""Streaming into modules, behind torch's own ``load_state_dict``.

A pre-hook fills the module's tensors and then puts these *same tensors* into the state dict. torch then copies each
tensor onto itself, which does nothing, and still makes its checks, messages and results. Every submodule has the hook:
a module that renames keys in its own hook, or that is loaded by itself, is filled when torch loads it. torch copies
every value that the hook does not recognise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.errors import ChecksumError
from lightning_memload.restore.allocation import (
    empty_on,
    materialize,
    replace_data,
    tensors_of,
    without_weak_references,
)
from lightning_memload.restore.matching import WeightsMatch, match_weights, module_keys
from lightning_memload.restore.overlaps import (
    PLAIN_TYPES,
    Sharing,
    is_alias,
    overlapping_ids,
    overlaps_itself,
)
from lightning_memload.restore.recipes import (
    fill_before_load,
    follow_recipes,
    remove_load_hooks,
)
from lightning_memload.restore.recording import unrecorded
from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.restore.state_dict import rename_compiled
from lightning_memload.restore.targets import Target, find_targets, overrides_load

__all__ = ["WeightsRestore"]

# The types that hold every float16, bfloat16 and float32 value exactly.
_HOLDS_HALF = (torch.float32, torch.float64)
# A query of the free memory takes some 0.5 ms. It is not repeated for each of thousands of small modules.
_CHECK_BYTES = 4 << 20


@dataclass(slots=True)
class _FillPlan:
    """The ways in which the tensors of one module get their values. Each step of a load fills its part.

    Attributes:
        targets: All targets by the ``id`` of their tensor, in torch's order. Of a tensor with several keys, torch
            copies one value after the other: the last one stays.
        streamed: Targets whose values are read from the file.
        fresh: Targets that get new memory. Some have values that a hook made, and torch copies these.
        assigned: Targets that become pages of the file.
        memory: The new memory, or the pages, by key.
    """

    targets: dict[int, list[Target]]
    streamed: list[Target] = field(default_factory=list)
    fresh: list[Target] = field(default_factory=list)
    assigned: list[Target] = field(default_factory=list)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not (self.streamed or self.fresh or self.assigned)


class WeightsRestore:
    """Makes a module's ``load_state_dict`` stream from the mapped checkpoint while it is installed.

    Values go to the session's device. A parameter on this device is filled in place. Any other parameter gets new
    memory when all values have arrived; if the load fails earlier, it keeps its old memory. Every ``Parameter`` object
    stays the same object.

    Args:
        module: The module.
        session: The restore.
        dtype: Floating-point type that the module is going to be converted to, applied to new memory already, so that
            no copy in the old type is made. ``None``: each parameter's own.
        assign: Make CPU parameters the file's own pages instead of copying. A parameter whose memory other parameters
            or buffers share is copied all the same, and so is one with other strides than in the file.
        keep_memory: Assign only to parameters on meta. Parameters that have memory are filled in place, so that other
            references to this memory see the values.
        strict: Whether torch refuses missing keys. If not, meta parameters that the checkpoint lacks get the values of
            their constructor (``meta_init``), or else those of ``reset_parameters`` of their modules.
        later_bytes: Bytes that the restore needs later on each device, for the check before the first byte.

    Attributes:
        match: The differences that the ``load_state_dict`` found. ``None`` if no name is missing or unexpected.

    Peak memory: the destinations and the session's staging ring. No copy of the checkpoint, unless it is small, has
    many tensors, and fits into the size of the ring.
    """

    is_of_restore = True  # tells is_of_restore() whose the hooks are, also in copies

    def __init__(
        self,
        module: nn.Module,
        session: RestoreSession,
        *,
        dtype: torch.dtype | None = None,
        assign: bool = False,
        keep_memory: bool = False,
        strict: bool = True,
        later_bytes: Callable[[], dict[torch.device, int]] = dict,
    ) -> None:
        self._session: RestoreSession | None = session
        self._root: nn.Module | None = module
        self._dtype = dtype
        self._assign = assign
        self._keep_memory = keep_memory
        self._strict = strict
        self._later_bytes = later_bytes
        # Both are computed once. To look at the whole module for each submodule takes quadratic time.
        self._needed_later: dict[torch.device, int] | None = None
        self._unchecked_bytes = 0
        self._sharing: Sharing | None = None
        self.match: WeightsMatch | None = None
        self._given: list[str] = []
        # The value that each key had in the file, and the versions of the filled tensors: they tell of later changes.
        self._values: dict[str, torch.Tensor] = {}
        self._versions: dict[int, int] = {}
        self._disturbed: set[int] = set()
        # The values that torch copies, by their id, and whether one of them is damaged.
        self._left: dict[int, tuple[torch.Tensor, ChecksumError | None]] = {}
        self._is_damaged = False
        # Whether torch copies all values, out of a checkpoint that is in memory as a whole.
        self._is_torchs = False
        # ScriptModules refuse hooks. A parent's hook fills their parameters. torch loads a ScriptModule without parent.
        hookable = [child for child in module.modules() if not isinstance(child, torch.jit.ScriptModule)]
        self._handles = [_first_hook(child, self._before_load) for child in hookable]
        if hookable and hookable[0] is module:
            self._handles.append(module.register_load_state_dict_post_hook(self._after_load))

    def remove(self) -> None:
        """Removes the hooks. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._root is not None:
            remove_load_hooks(self._root)
        # A copy of the module may keep this object. It must not keep the restore or the Trainer alive.
        self._session = self._root = None
        self._later_bytes = dict
        self._sharing = None
        self._values.clear()
        self._left.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightsRestore:
        # A copy of the module that is made during the restore has the hooks too. They end with this object.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_session": None, "_root": None}  # A pickled module has a hook that does nothing.

    def _before_load(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
    ) -> None:
        session, root = self._session, self._root
        if session is None or root is None:
            return
        if module is root and not prefix:
            # Here, since a user's on_load_checkpoint may have renamed them before.
            rename_compiled(state_dict, module_keys(module))
        if module is root:
            self._given = list(state_dict)
            self._is_torchs = self._may_leave_all(session, root) and session.read_whole()
        if self._is_torchs or (module is not root and self._are_left(state_dict)):
            return  # torch copies all of them.
        tensors: list[tuple[str, torch.Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
        own = [(f"{prefix}{name}", tensor) for name, tensor in tensors if tensor is not None]
        overrides = overrides_load(module)
        with unrecorded():
            for key, tensor in own:
                value = state_dict.get(key)
                if key in self._values and value is tensor and self._is_disturbed(tensor):
                    state_dict[key] = self._values[key]
                elif not overrides and is_alias(value, tensor):
                    # The tensor has these values already. torch would copy each byte onto itself.
                    state_dict[key] = tensor
            if module._modules or any(state_dict.get(key) is not tensor for key, tensor in own):
                self._stream(session, root, module, state_dict, prefix)
            if module is root:
                self._leave(session, root, state_dict)
        for key, tensor in own:
            if key in self._values and state_dict.get(key) is tensor:
                # torch copies it onto itself now.
                self._versions[id(tensor)] = self._versions.get(id(tensor), 0) + 1

    def _may_leave_all(self, session: RestoreSession, root: nn.Module) -> bool:
        """Whether all tensors of the module are in CPU memory, where torch can copy values to them, and stay there."""
        if session.device.type != "cpu" or (self._assign and not self._keep_memory):
            return False
        return all(tensor.is_cpu for tensor in tensors_of(root))

    def _leave(self, session: RestoreSession, root: nn.Module, state_dict: dict[str, Any]) -> None:
        """Leaves small tensors of modules that load in their own way to torch, which copies them into their memory."""
        values = [v for v in state_dict.values() if type(v) in PLAIN_TYPES and id(v) not in self._versions]
        on_meta = any(tensor.is_meta for tensor in tensors_of(root)) if values else False
        self._left = {} if self._assign or on_meta else session.leave_small(values)
        self._is_damaged = any(error is not None for _, error in self._left.values())

    def _are_left(self, state_dict: dict[str, Any]) -> bool:
        return not self._is_damaged and all(id(value) in self._left for value in state_dict.values())

    def _is_left(self, value: torch.Tensor) -> bool:
        _, error = self._left.get(id(value), (None, None))
        if error is not None:
            raise error
        return id(value) in self._left

    def _is_disturbed(self, tensor: torch.Tensor) -> bool:
        """Whether other code changed a tensor after it was filled. If so, it is filled again, as by torch.

        ``set_extra_state``, a post-hook, or ``_load_from_state_dict`` of one module may change later modules.
        """
        if _version_of(tensor) != self._versions[id(tensor)]:
            self._disturbed.add(id(tensor))
        return id(tensor) in self._disturbed

    def _stream(
        self, session: RestoreSession, root: nn.Module, module: nn.Module, state_dict: dict[str, Any], prefix: str
    ) -> None:
        """Fills a module and puts its own tensors into the state dict. Nothing changes before all values are there."""
        plan = self._classify(session, root, module, state_dict, prefix)
        if plan.is_empty:
            return
        self._allocate(session, plan)
        session.move([Move(t.key, t.value, plan.memory.get(t.key, t.tensor.detach())) for t in plan.streamed])
        self._commit(session, plan, module)
        # A method of the module's own gets the values, and torch copies them once more.
        if not overrides_load(module):
            self._hand_back(plan, state_dict)

    def _classify(
        self, session: RestoreSession, root: nn.Module, module: nn.Module, state_dict: dict[str, Any], prefix: str
    ) -> _FillPlan:
        """Decides for each target how it gets its value. torch copies the targets that are in no list of the plan."""
        by_tensor: dict[int, list[Target]] = {}
        for target in find_targets(module, state_dict, prefix):
            by_tensor.setdefault(id(target.tensor), []).append(target)
        # Where the value is the tensor itself, the hook of a parent has filled it.
        plan = _FillPlan({key: found for key, found in by_tensor.items() if found[-1].value is not found[-1].tensor})
        last = [found[-1] for found in plan.targets.values()]
        held = {target.key for target in last if session.checkpoint.holds(target.value)}
        if not held and not any(target.tensor.is_meta for target in last):
            return plan
        if self._sharing is not None:
            self._sharing.note(module)  # The module's own code may have tied tensors since.
        overrides = overrides_load(module)
        overlapping = overlapping_ids(target.tensor for target in last)
        for target in last:
            if id(target.tensor) in overlapping or self._is_left(target.value):
                continue  # The order in which torch fills the memory matters, or the tensor is small.
            if target.key not in held:
                # A value that a hook made. torch copies it, and needs memory for it.
                if target.tensor.is_meta:
                    plan.fresh.append(target)
            elif not overrides and self._may_assign(target, session.device, root):
                plan.assigned.append(target)
            elif not (overlaps_itself(target.tensor) and target.tensor.device == session.device):
                plan.streamed.append(target)  # torch refuses the others, expanded buffers, and names them.
        return plan

    def _allocate(self, session: RestoreSession, plan: _FillPlan) -> None:
        """Finds pages and allocates memory. A target without pages of its own is streamed."""
        targets, plan.assigned = plan.assigned, []
        pages_of_all = session.pages_of([target.value for target in targets]) if targets else []
        for target, pages in zip(targets, pages_of_all, strict=True):
            if pages is None:
                plan.streamed.append(target)
            else:
                plan.assigned.append(target)
                plan.memory[target.key] = pages
        plan.fresh.extend(t for t in plan.streamed if t.tensor.is_meta or t.tensor.device != session.device)
        self._require(session, sum(self._fresh_bytes(target) for target in plan.fresh))
        for target in plan.fresh:
            plan.memory[target.key] = empty_on(target.tensor, session.device, self._final_dtype(target))

    @staticmethod
    def _commit(session: RestoreSession, plan: _FillPlan, module: nn.Module) -> None:
        """Gives the module its new memory, in torch's order. All values have arrived."""
        filled = [found[-1] for found in plan.targets.values() if found[-1].key in plan.memory]
        with without_weak_references(module):
            old = [replace_data(target.tensor, plan.memory[target.key], name=target.key) for target in filled]
        session.free_at_end(old)
        session.bytes_assigned += sum(plan.memory[target.key].nbytes for target in plan.assigned)

    def _hand_back(self, plan: _FillPlan, state_dict: dict[str, Any]) -> None:
        """Puts the module's own tensors into the state dict under all of their keys, for torch to find."""
        for target in (*plan.streamed, *plan.assigned):
            for alias in plan.targets[id(target.tensor)]:
                self._values[alias.key] = alias.value
                state_dict[alias.key] = alias.tensor
            self._versions[id(target.tensor)] = _version_of(target.tensor)

    def _require(self, session: RestoreSession, fresh_bytes: int) -> None:
        """Raises if the free memory is too small. For many small modules it is checked once for every few MiB."""
        self._unchecked_bytes += fresh_bytes
        if self._needed_later is None:
            self._needed_later = self._later_bytes()
        elif self._unchecked_bytes < _CHECK_BYTES:
            return
        device = session.device
        session.require({**self._needed_later, device: self._needed_later.get(device, 0) + self._unchecked_bytes})
        self._unchecked_bytes = 0

    def _may_assign(self, target: Target, device: torch.device, root: nn.Module) -> bool:
        tensor, value = target.tensor, target.value
        if not self._assign or device.type != "cpu" or value.dtype != self._final_dtype(target):
            return False
        if isinstance(value, ChunkedTensor) or tensor.stride() != value.stride():
            return False
        if tensor.is_meta or self._keep_memory or not tensor.is_cpu:
            return tensor.is_meta
        if self._sharing is None:
            self._sharing = Sharing(root)
        return not self._sharing.shares(tensor)

    def _final_dtype(self, target: Target) -> torch.dtype:
        """The dtype of new memory for a target, such that the values are those of the ordinary way.

        The ordinary way rounds to the parameter's own type first and converts afterwards. A conversion in one step is
        the same only if the first step loses nothing. Otherwise the parameter's own type is allocated, and converted
        later.
        """
        own = target.tensor.dtype
        if self._dtype is None or not target.tensor.is_floating_point():
            return own
        saved = target.value.dtype
        lossless = saved == own or (own in _HOLDS_HALF and saved in (torch.float16, torch.bfloat16, torch.float32))
        return self._dtype if target.tensor.is_meta or lossless else own

    def _fresh_bytes(self, target: Target) -> int:
        return target.tensor.numel() * self._final_dtype(target).itemsize

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        if self._session is None:
            return
        self.match = match_weights(module, self._given, incompatible_keys)
        if not self._strict:
            missing = incompatible_keys.missing_keys
            follow_recipes(module, set(missing), self._session.device, self._dtype)
            materialize(module, missing, self._session.device, self._dtype)


def _first_hook(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    """Registers a load_state_dict pre-hook before :func:`fill_before_load`, which then finds nothing to do."""
    handle: RemovableHandle = module.register_load_state_dict_pre_hook(hook)
    hooks: Any = module._load_state_dict_pre_hooks  # torch (2.13) can put only other hooks first.
    if any(getattr(other, "hook", other) is fill_before_load for other in hooks.values()):
        hooks.move_to_end(handle.id, last=False)
    return handle


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
