"""Streaming into optimizers, behind torch's own ``load_state_dict``.

A pre-hook allocates every state tensor on the device and with the dtype that torch would convert it to, streams the
values into it, and returns it. torch then converts nothing, so each state exists once, on its device. A state that
torch does not convert stays the same object, and moves from the file to ordinary memory.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_memload.errors import OptimizerMismatchError, listed
from lightning_memload.restore.overlap import Overlap
from lightning_memload.restore.placement import Placement, PlannedState, fill_in
from lightning_memload.restore.session import RestoreSession
from lightning_memload.restore.settling import (
    Settlement,
    mapped_bytes,
    plan_settlements,
    settle_alone,
    tensors_by_storage,
)
from lightning_memload.restore.state_stream import StateStream

__all__ = ["OptimizerRestore"]

# Parts of names that torch.compile and activation checkpointing add, and that no strategy saves.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")


class OptimizerRestore:
    """Makes the ``load_state_dict`` of optimizers stream from the mapped checkpoint while it is installed.

    A wrapper needs no hooks of its own: the torch optimizers in its attributes are found, and their states are streamed
    when the wrapper loads them. All other tensors that the wrapper gets are the mapped ones.

    Args:
        optimizers: Any objects with a ``load_state_dict``.
        session: The restore.
        name: Their name in messages. Their number is added.
        parameters: The module's parameters by name, for checkpoints that keep the states under these names, as
            distributed ones do.
        loaded: The loaded checkpoint. Tensors of it that share memory with a state that stays as it is share the
            state's new memory too.
        stream: States that are on their way already. The caller closes it.
        overlap: Lets states arrive after the load. The caller must call its :meth:`Overlap.guard` then.

    Raises:
        OptimizerMismatchError: (from ``load_state_dict``) The checkpoint's names are not those of the parameters that
            the optimizer updates.

    Peak memory: the states, once, on their device, and the session's staging ring.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        session: RestoreSession,
        *,
        name: str = "optimizer_states",
        parameters: Mapping[str, torch.Tensor] | None = None,
        loaded: Any = None,
        stream: StateStream | None = None,
        overlap: Overlap | None = None,
    ) -> None:
        self._session: RestoreSession | None = session
        self._parameters = parameters or {}
        self._loaded = loaded
        self._stream = stream
        self._overlap = overlap
        self._owners: dict[int, list[torch.Tensor]] | None = None
        self._known: set[int] = set()
        self._names: dict[int, str] = {}
        self._handles = []
        for number, optimizer in enumerate(optimizers):
            for hooked in _optimizers_with_hooks(optimizer):
                if id(hooked) not in self._names:
                    self._names[id(hooked)] = f"{name}[{number}]"
                    # torch's own: a wrapper may forward the method to an optimizer that is met later anyway.
                    self._handles.append(Optimizer.register_load_state_dict_pre_hook(hooked, self._before_load))

    def remove(self) -> None:
        """Removes the hooks. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._session = self._loaded = self._owners = self._stream = self._overlap = None
        self._parameters = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerRestore:
        # A copy of the optimizer that is made during the restore has the hook too. It ends with this object.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_session": None}  # A pickled optimizer has a hook that does nothing.

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        session = self._session
        if session is None:
            return None
        name = self._names.get(id(optimizer), "optimizer")
        if self._is_followed(optimizer):
            nbytes = mapped_bytes(state_dict, session)
            warnings.warn(
                f"{name} has load_state_dict pre-hooks that were registered after on_fit_start of "
                f"MemoryEfficientRestore began. They see the states as the checkpoint has them, so {nbytes} bytes are "
                "copied by torch instead of streamed. Register them in configure_optimizers.",
                stacklevel=2,
            )
            return None
        state_dict = _in_live_order(state_dict, optimizer, self._parameters, name)
        saved_groups = state_dict.get("param_groups", [])
        if [len(group["params"]) for group in saved_groups] != [len(g["params"]) for g in optimizer.param_groups]:
            return state_dict  # torch refuses this; no byte need be read for that
        parameters: dict[Any, tuple[torch.Tensor, dict[str, Any]]] = {}
        for saved, group in zip(saved_groups, optimizer.param_groups, strict=True):
            for number, parameter in zip(saved["params"], group["params"], strict=True):
                parameters[number] = (parameter, saved)
        placement = Placement(session)
        state = {
            number: placement.place(value, f"{name}.state.{number}", *parameters.get(number, (None, {})))
            for number, value in state_dict.get("state", {}).items()
        }
        settlements = self._settle(session, placement.kept, state_dict)
        planned: list[PlannedState | Settlement] = [*placement.planned.values(), *settlements]
        overlap = self._overlap
        if overlap is not None and not overlap.accepts(optimizer, planned):
            overlap = None
        if self._stream is not None:
            simple = [item for item in planned if not isinstance(item, Settlement) or item.is_simple]
            self._stream.take(simple, filled=overlap is None)
        left = [plan for plan in planned if plan.destination is None]
        needed: Counter[torch.device] = Counter()
        for plan in left:
            needed[plan.device] += plan.nbytes
        session.require(needed)
        moves = [plan.allocate() for plan in left]
        if overlap is not None:
            overlap.defer(optimizer, planned, moves)
        else:
            session.move(moves)
            for settlement in settlements:
                settlement.end()
        if not placement.planned:
            return state_dict  # All states are still the objects that they were.
        return {**state_dict, "state": {number: fill_in(value) for number, value in state.items()}}

    def _is_followed(self, optimizer: Optimizer) -> bool:
        """Whether hooks run after this one, which must not get states that are moved or converted already."""
        *_, last = optimizer._optimizer_load_state_dict_pre_hooks.values()
        return last != self._before_load

    def _settle(
        self, session: RestoreSession, kept: Mapping[str, torch.Tensor], state_dict: dict[str, Any]
    ) -> list[Settlement]:
        """Plans ordinary memory for all states that torch takes as they are."""
        alone = settle_alone(kept)
        settled = {id(tensor) for settlement in alone for tensor in settlement.tensors}
        shared = {name: tensor for name, tensor in kept.items() if id(tensor) not in settled}
        if not shared:
            return alone
        if self._owners is None:
            self._owners = tensors_by_storage(self._loaded, session.checkpoint)
            self._known = {id(tensor) for tensors in self._owners.values() for tensor in tensors}
        others = tensors_by_storage(state_dict, session.checkpoint, self._known)
        return [*alone, *plan_settlements(shared, self._owners, others)]


def _optimizers_with_hooks(optimizer: Any) -> Iterator[Optimizer]:
    """An optimizer and those that it wraps, as far as they have torch's hooks: each once, wrappers first."""
    seen: set[int] = set()
    queue = deque([optimizer])
    while queue:
        item = queue.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple)):
            queue.extend(item)
        elif item is optimizer or _is_optimizer(type(item)):
            # Of the object itself: a wrapper that forwards attributes shows the hooks of another one. They have no
            # public name (torch 2.6 to 2.14), and a subclass that never calls Optimizer.__init__ lacks them.
            own: dict[str, Any] = getattr(item, "__dict__", {})
            if isinstance(item, Optimizer) and isinstance(own.get("_optimizer_load_state_dict_pre_hooks"), dict):
                yield item
            queue.extend(value for name, value in own.items() if name not in ("state", "param_groups"))


def _is_optimizer(kind: type) -> bool:
    return all(callable(getattr(kind, name, None)) for name in ("step", "load_state_dict"))


def _in_live_order(
    state_dict: dict[str, Any], optimizer: Optimizer, parameters: Mapping[str, torch.Tensor], name: str
) -> dict[str, Any]:
    """Puts the names of saved parameters in the order of the live ones. torch uses the order only.

    Returns:
        The state dict, as it is unless its groups list parameters by name.
    """
    saved_groups = state_dict.get("param_groups", [])
    saved_ids = [saved for group in saved_groups for saved in group["params"]]
    if not parameters or not saved_ids or not all(isinstance(saved, str) for saved in saved_ids):
        return state_dict
    if len(saved_groups) != len(optimizer.param_groups):
        return state_dict  # torch refuses this
    live = {_WRAPPERS.sub("", full_name): parameter for full_name, parameter in parameters.items()}
    groups = []
    for number, (saved, group) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        found = {name: live.get(name, live.get(_WRAPPERS.sub("", name))) for name in saved["params"]}
        names = {id(parameter): name for name, parameter in found.items() if parameter is not None}
        ids = {id(parameter) for parameter in group["params"]}
        surplus = [name for name, parameter in found.items() if id(parameter) not in ids]
        lacking = [live_name for live_name, p in live.items() if id(p) in ids and id(p) not in names]
        unnamed = len(ids - {id(parameter) for parameter in live.values()})
        if surplus or lacking or unnamed:
            raise OptimizerMismatchError(
                f"{name}.param_groups[{number}] of the checkpoint is for {len(saved['params'])} parameters by name, "
                f"the optimizer's is for {len(group['params'])}. "
                + (f"Not among the optimizer's: {listed(surplus)}. " if surplus else "")
                + (f"Missing from the checkpoint's: {listed(lacking)}. " if lacking else "")
                + (f"{unnamed} of the optimizer's are no parameters of the module. " if unnamed else "")
                + "Configure the optimizer as it was when the checkpoint was saved, or rename the states in "
                "on_load_checkpoint.",
                missing=tuple(lacking),
                unexpected=tuple(surplus),
            )
        groups.append({**saved, "params": [names[id(parameter)] for parameter in group["params"]]})
    return {**state_dict, "param_groups": groups}
