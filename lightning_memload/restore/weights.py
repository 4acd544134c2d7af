"""Streaming into modules, behind torch's own ``load_state_dict``.

A pre-hook brings every value to where it belongs and then puts the module's *own tensor* into the state dict, so that
torch copies a tensor onto itself, which does nothing, and keeps its checks, messages and results. The hook sits on
every submodule: a module that renames keys in a hook of its own, or is loaded by itself, is met when its turn comes.
What the hook does not recognise stays in the state dict as it is and is copied by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.errors import ChecksumError
from lightning_memload.restore.allocation import empty_on, materialize, replace_data, without_weak_references
from lightning_memload.restore.matching import WeightsMatch, is_of_restore, match_weights, module_keys, walk_apart
from lightning_memload.restore.overlaps import (
    PLAIN_TYPES,
    Sharing,
    has_memory,
    is_alias,
    is_plain_tensor,
    memory_of,
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

__all__ = ["WeightsRestore"]

# The types that hold every float16, bfloat16 and float32 value exactly.
_HOLDS_HALF = (torch.float32, torch.float64)
# To ask the system for its free memory takes some 0.5 ms: not for each of thousands of small modules.
_CHECK_BYTES = 4 << 20


class _Target(NamedTuple):
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
        assign: Make CPU parameters the file's own pages instead of copying. A parameter whose memory other parameters
            or buffers share is copied all the same, and so is one with other strides than in the file.
        keep_memory: Assign only to parameters on meta. Those that have memory are filled in place, so that whatever
            else refers to that memory sees the values.
        strict: Whether torch will refuse missing keys. If not, meta parameters that the checkpoint lacks get
            what ``meta_init`` knows that their constructor made, else what their modules' ``reset_parameters`` makes.
        later_bytes: What the restore will need later, per device, for the check before the first byte.

    Attributes:
        match: What the module got, after its ``load_state_dict``; ``None`` where every name has its counterpart.

    Peak memory: the destinations and the session's staging ring. No copy of the checkpoint.
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
        # Both are asked once: to look at the whole module or optimizer for each submodule takes the square of the time.
        self._needed_later: dict[torch.device, int] | None = None
        self._unchecked_bytes = 0
        self._sharing: Sharing | None = None
        self.match: WeightsMatch | None = None
        self._given: list[str] = []
        # What each key had in the file, and the versions of the tensors since: whether somebody changed them meanwhile.
        self._values: dict[str, torch.Tensor] = {}
        self._versions: dict[int, int] = {}
        self._disturbed: set[int] = set()
        # What torch copies by itself, by its id, and whether one of these has not its checksum.
        self._left: dict[int, tuple[torch.Tensor, ChecksumError | None]] = {}
        self._is_damaged = False
        # ScriptModules refuse hooks. A parent's hook finds their parameters; one that is loaded by itself is torch's.
        hookable = [child for child in module.modules() if not isinstance(child, torch.jit.ScriptModule)]
        self._handles = [_first_hook(child, self._before_load) for child in hookable]
        if hookable and hookable[0] is module:
            self._handles.append(module.register_load_state_dict_post_hook(self._after_load))

    def remove(self) -> None:
        """Removes the hooks. Removing twice is fine."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._root is not None:
            remove_load_hooks(self._root)
        # A copy of the module may keep this object: nothing of the restore, or of the Trainer, may hang on it.
        self._session = self._root = None
        self._later_bytes = dict
        self._sharing = None
        self._values.clear()
        self._left.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightsRestore:
        # A module that is copied during the restore takes its hooks along; they end with this one's.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_session": None, "_root": None}  # One that is pickled takes a hook along that does nothing.

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
        elif not self._is_damaged and all(id(value) in self._left for value in state_dict.values()):
            return  # torch copies all of them.
        tensors: list[tuple[str, torch.Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
        own = [(f"{prefix}{name}", tensor) for name, tensor in tensors if tensor is not None]
        overrides = _overrides_load(module)
        with unrecorded():
            for key, tensor in own:
                value = state_dict.get(key)
                if key in self._values and value is tensor and self._is_disturbed(tensor):
                    state_dict[key] = self._values[key]
                elif not overrides and is_alias(value, tensor):
                    # It has these values: torch would copy them onto themselves, byte by byte.
                    state_dict[key] = tensor
            if module._modules or any(state_dict.get(key) is not tensor for key, tensor in own):
                self._stream(session, root, module, state_dict, prefix)
            if module is root:
                self._leave(session, root, state_dict)
        for key, tensor in own:
            if key in self._values and state_dict.get(key) is tensor:
                # torch copies it onto itself now.
                self._versions[id(tensor)] = self._versions.get(id(tensor), 0) + 1

    def _leave(self, session: RestoreSession, root: nn.Module, state_dict: dict[str, Any]) -> None:
        """Leaves small tensors of modules that load in their own way to torch, which copies them into their memory."""
        values = [v for v in state_dict.values() if type(v) in PLAIN_TYPES and id(v) not in self._versions]
        on_meta = any(tensor.is_meta for tensor in (*root.parameters(), *root.buffers())) if values else False
        self._left = {} if self._assign or on_meta else session.leave_small(values)
        self._is_damaged = any(error is not None for _, error in self._left.values())

    def _is_left(self, value: torch.Tensor) -> bool:
        _, error = self._left.get(id(value), (None, None))
        if error is not None:
            raise error
        return id(value) in self._left

    def _is_disturbed(self, tensor: torch.Tensor) -> bool:
        """Whether code that ran since it was filled has changed it. Then torch's order counts, and it is filled again.

        A module's ``set_extra_state``, a post-hook, or a ``_load_from_state_dict`` may do so to modules after it.
        """
        if _version_of(tensor) != self._versions[id(tensor)]:
            self._disturbed.add(id(tensor))
        return id(tensor) in self._disturbed

    def _stream(
        self, session: RestoreSession, root: nn.Module, module: nn.Module, state_dict: dict[str, Any], prefix: str
    ) -> None:
        overrides = _overrides_load(module)
        by_tensor: dict[int, list[_Target]] = {}
        for target in _find_targets(module, state_dict, prefix):
            by_tensor.setdefault(id(target.tensor), []).append(target)
        # One tensor under several keys: torch copies one value after the other, so the last one stays.
        by_tensor = {key: targets for key, targets in by_tensor.items() if targets[-1].value is not targets[-1].tensor}
        if not by_tensor:
            return  # A parent's hook did it.
        last = [targets[-1] for targets in by_tensor.values()]
        held = {target.key for target in last if session.checkpoint.holds(target.value)}
        if not held and not any(target.tensor.is_meta for target in last):
            return  # torch copies all of them.
        if self._sharing is not None:
            self._sharing.note(module)  # Code of its own may have tied something since.
        overlapping = overlapping_ids(target.tensor for target in last)
        stream: list[_Target] = []
        fresh: list[_Target] = []
        assignable: list[_Target] = []
        for target in last:
            if id(target.tensor) in overlapping or self._is_left(target.value):
                continue  # The order in which torch fills the memory matters, or it is small.
            if target.key not in held:
                # A value that a hook made: torch copies it, into memory that has to exist.
                if target.tensor.is_meta:
                    fresh.append(target)
            elif not overrides and self._may_assign(target, session.device, root):
                assignable.append(target)
            elif overlaps_itself(target.tensor) and target.tensor.device == session.device:
                continue  # An expanded buffer: torch refuses it, and says which.
            else:
                stream.append(target)
        assign: dict[str, torch.Tensor] = {}
        pages_of_all = session.pages_of([target.value for target in assignable]) if assignable else []
        for target, pages in zip(assignable, pages_of_all, strict=True):
            if pages is None:
                stream.append(target)
            else:
                assign[target.key] = pages
        fresh.extend(target for target in stream if target.tensor.is_meta or target.tensor.device != session.device)
        if not (stream or fresh or assign):
            return
        device = session.device
        self._require(session, sum(self._fresh_bytes(target) for target in fresh))
        replacements = {target.key: self._allocate(target, device) for target in fresh}
        session.move(
            [Move(target.key, target.value, replacements.get(target.key, target.tensor.detach())) for target in stream]
        )
        # Only now, when everything has arrived, does the module change.
        replacements |= assign
        filled = [targets[-1] for targets in by_tensor.values() if targets[-1].key in replacements]
        with without_weak_references(module):
            old = [replace_data(target.tensor, replacements[target.key], name=target.key) for target in filled]
        session.free_at_end(old)
        session.bytes_assigned += sum(pages.nbytes for pages in assign.values())
        if overrides:
            return  # It may go on with the values, so it gets them, and torch copies them once more.
        done = {target.key for target in stream} | assign.keys()
        for targets in by_tensor.values():
            if targets[-1].key in done:
                for alias in targets:
                    self._values[alias.key] = alias.value
                    state_dict[alias.key] = alias.tensor
                self._versions[id(targets[-1].tensor)] = _version_of(targets[-1].tensor)

    def _require(self, session: RestoreSession, fresh_bytes: int) -> None:
        """Stops what cannot fit. Many small modules together are looked at once for every few MiB."""
        self._unchecked_bytes += fresh_bytes
        if self._needed_later is None:
            self._needed_later = self._later_bytes()
        elif self._unchecked_bytes < _CHECK_BYTES:
            return
        device = session.device
        session.require({**self._needed_later, device: self._needed_later.get(device, 0) + self._unchecked_bytes})
        self._unchecked_bytes = 0

    def _may_assign(self, target: _Target, device: torch.device, root: nn.Module) -> bool:
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


def _find_targets(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> Iterator[_Target]:
    """The pairs of tensors that torch would copy, in torch's order: parents first, parameters before buffers.

    Not those that somebody else's code is going to see or to replace before torch copies them, nor what shares memory
    with such: they are met when the turn of their own module comes.
    """
    taken: list[tuple[str, nn.Module]] = []
    left: list[nn.Module] = []
    overrides = _overrides_load(module)
    # What overrides it may go on with what its children get, after it has called torch's.
    for path, child, is_left in walk_apart(module, lambda child: overrides or _has_own_ways(child)):
        if is_left:
            left.append(child)
        else:
            taken.append((path, child))
    tensors = [tensor for child in left for tensor in (*child._parameters.values(), *child._buffers.values())]
    later = {id(tensor) for tensor in tensors} | {memory_of(tensor) for tensor in tensors if has_memory(tensor)}
    for path, child in taken:
        child_prefix = f"{prefix}{path}." if path else prefix
        # torch 2.13 has no public name for non-persistent buffers; load_state_dict itself reads this set. Filling such
        # a buffer from a key that happens to exist would hide torch's "unexpected key".
        skipped = child._non_persistent_buffers_set
        buffers = ((name, buffer) for name, buffer in child._buffers.items() if name not in skipped)
        for name, tensor in (*child._parameters.items(), *buffers):
            value = state_dict.get(child_prefix + name)
            if not isinstance(value, ChunkedTensor) and not is_plain_tensor(value):
                continue
            if not is_plain_tensor(tensor) or tensor.shape != value.shape:
                continue
            if path and later and (id(tensor) in later or (has_memory(tensor) and memory_of(tensor) in later)):
                continue
            yield _Target(child_prefix + name, tensor, value)


def _overrides_load(module: nn.Module) -> bool:
    return not type(module)._load_from_state_dict.__module__.startswith("torch.")


def _has_own_ways(module: nn.Module) -> bool:
    """Whether code that is not torch's sees the values of a module before they are there."""
    if _overrides_load(module):
        return True
    return any(not is_of_restore(hook) for hook in module._load_state_dict_pre_hooks.values())
