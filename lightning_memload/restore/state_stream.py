"""Streams optimizer states right behind the weights, before the optimizers exist.

The file tells the size of each state, and nearly always its place: the device of the training, in the dtype of the
parameters. So a thread brings the states there while the Trainer sets up the strategy and makes the optimizers. The
load of an optimizer takes up what is where torch wants it. Everything else is freed, and streamed in the ordinary way.
A wrong guess, and an error in the thread, cost time and never a value: the ordinary way raises the same error itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from lightning_memload.checkpoint import ChunkedTensor
from lightning_memload.restore.placement import PlannedState, torch_policy
from lightning_memload.restore.session import RestoreSession
from lightning_memload.restore.settling import Settlement
from lightning_memload.restore.side_stream import SideStream
from lightning_memload.restore.storages import is_alone

__all__ = ["StateStream"]

_CPU = torch.device("cpu")
# A thread costs more time than it saves below this size, for all states together and for each on average.
_WORTH_BYTES = 4 << 20
_WORTH_BYTES_EACH = 64 << 10


class StateStream:
    """Optimizer states on the way to where torch will most likely put them.

    Create it with :meth:`begin`, in the thread that restores.

    Args:
        session: The restore.
        plans: The states to stream.

    Peak memory: the states, once, on their device, and the session's staging ring.
    """

    def __init__(self, session: RestoreSession, plans: Iterable[PlannedState]) -> None:
        self._session = session
        candidates = list(plans)
        found = session.checkpoint.locate_all([plan.value for plan in candidates])
        # Not in the file are empty tensors, and those that a hook has written to. One may be written to later, too, and
        # is then no longer where it was found.
        self._plans = {id(plan.value): (plan, chunks) for plan, chunks in zip(candidates, found, strict=True) if chunks}
        planned = [plan for plan, _ in self._plans.values()]
        self.side = SideStream(session, lambda: [plan.allocate() for plan in planned])

    @classmethod
    def begin(
        cls, session: RestoreSession, optimizer_states: Any, parameter_dtypes: frozenset[torch.dtype]
    ) -> StateStream | None:
        """Starts to stream the states of a checkpoint.

        Args:
            session: The restore. Its weights have been loaded.
            optimizer_states: What the checkpoint has under this key.
            parameter_dtypes: The floating-point types that the parameters will have when the optimizers load.

        Returns:
            ``None`` if the states are few, if they may not fit, or if their device is neither a GPU nor the CPU.
        """
        device = session.device
        if device.type not in ("cpu", "cuda") or session.is_in_memory or torch.is_inference_mode_enabled():
            return None
        plans = list(_guess(session, optimizer_states, parameter_dtypes))
        needed: dict[torch.device, int] = {}
        for plan in plans:
            needed[plan.device] = needed.get(plan.device, 0) + plan.nbytes
        if sum(needed.values()) < max(_WORTH_BYTES, _WORTH_BYTES_EACH * len(plans)) or not session.has_room(needed):
            return None
        return cls(session, plans)

    def take(self, wanted: Sequence[PlannedState | Settlement], *, filled: bool = True) -> None:
        """Gives states their destination, where the stream brings their values to the wanted place.

        Each destination is given once.

        Args:
            wanted: States that torch is about to load. Those that get no destination must be streamed.
            filled: Wait for the end of the stream, and give only what has its values. If not, the values have arrived
                when :attr:`side` is complete.
        """
        if filled:
            self.side.join()
        is_usable = self.side.is_complete if filled else self.side.wait_for_memory()
        is_wrong = not is_usable
        located = self._session.checkpoint.locate_all([state.value for state in wanted])
        for state, chunks in zip(wanted, located, strict=True):
            plan, known = self._plans.pop(id(state.value), (None, None))
            if plan is None or not is_usable or chunks is None or chunks != known:
                continue
            if (plan.device, plan.dtype) == (state.device, state.dtype):
                state.destination = plan.destination
            else:
                is_wrong = True
        if is_wrong:
            # Another place needs memory now, and the guess is wrong for the other states too.
            self.side.join()
            self._plans.clear()

    def forget(self) -> None:
        """Frees what was not taken up, as soon as the stream has ended. No optimizer loads any more."""
        self._plans.clear()

    def close(self) -> None:
        """Ends the stream, if need be in the middle, and frees what was not taken up. A second call does nothing."""
        self.side.stop()
        self.forget()


def _guess(
    session: RestoreSession, optimizer_states: Any, parameter_dtypes: frozenset[torch.dtype]
) -> Iterator[PlannedState]:
    """The states in the layout of torch's optimizers, each with the place that torch will most likely choose.

    The parameter of a state is not known yet. It is taken to be on the device of the training. If the parameters have
    several dtypes, it is taken to have that of the state.
    """
    if not isinstance(optimizer_states, (list, tuple)):
        return
    parameters = {dtype: torch.empty(0, dtype=dtype, device=session.device) for dtype in parameter_dtypes}
    only = next(iter(parameters.values())) if len(parameters) == 1 else None
    seen: set[int] = set()
    for number, state_dict in enumerate(optimizer_states):
        for saved, group, state in _states_of(state_dict):
            for key, value in state.items():
                if not isinstance(value, torch.Tensor) or id(value) in seen or not value.is_floating_point():
                    continue
                parameter = only if only is not None else parameters.get(value.dtype)
                if parameter is None or not session.checkpoint.holds(value):
                    continue
                device, dtype = torch_policy(value, key, parameter, group)
                stays = device == _CPU and dtype == value.dtype
                # A state that torch takes as it is keeps the memory that it shares with others. A chunked one has none.
                if not stays or isinstance(value, ChunkedTensor) or is_alone(value):
                    seen.add(id(value))
                    yield PlannedState(f"optimizer_states[{number}].state.{saved}.{key}", value, device, dtype)


def _states_of(state_dict: Any) -> Iterator[tuple[Any, dict[str, Any], dict[Any, Any]]]:
    """The key, the group and the state of each parameter. Nothing for another layout than that of torch."""
    if not isinstance(state_dict, dict):
        return
    states, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(states, dict) or not isinstance(groups, (list, tuple)):
        return
    group_of = {
        saved: group
        for group in groups
        if isinstance(group, dict) and isinstance(group.get("params"), (list, tuple))
        for saved in group["params"]
        if isinstance(saved, (int, str))
    }
    for saved, state in states.items():
        if isinstance(saved, (int, str)) and saved in group_of and isinstance(state, dict):
            yield saved, group_of[saved], state
