"""The exchange of one round of stripes between all ranks, with the default process group.

A collective needs every rank, in the same order. So it is started only in the thread that restores, and only after all
ranks have agreed to it. No wait for a collective is without an end: with NCCL it would hang if a rank were killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_memload.distributed.companions import Companions, LostCompanion

__all__ = ["Exchange"]

_FIRST_POLL_SECONDS = 50e-6
_LAST_POLL_SECONDS = 2e-3
_LOOK_SECONDS = 1.0
# After a collective has failed: a rank that gives no sign for so long is dead, and is looked for as long.
_DEAD_SECONDS = 2.0
_SEARCH_SECONDS = 8.0


class Exchange:
    """Sends the stripes of each rank to all others.

    Args:
        companions: The other ranks, which all share what they read.
        device: The device of the stripes.
    """

    def __init__(self, companions: Companions, device: torch.device) -> None:
        self._companions = companions
        self._gathers = _backend_of(device) == "nccl"
        self.rank, self.num_ranks = companions.rank, companions.world_size

    @staticmethod
    def find_obstacle(device: torch.device) -> str | None:
        """Why the default process group cannot exchange memory of a device, ``None`` if it can."""
        backend = _backend_of(device)
        if (device.type, backend) in (("cpu", "gloo"), ("cuda", "nccl")):
            return None
        return f"the process group exchanges memory on {device.type} with {backend or 'no backend'}"

    def start(self, stripes: torch.Tensor) -> list[Any]:
        """Starts to send the stripe of this rank to all others, and to receive theirs.

        Args:
            stripes: The stripes, one row for each rank, ``uint8``, on the device, contiguous. The row of this rank is
                filled. Until the end of the exchange, no row may be used.

        Returns:
            The work in progress, for :meth:`finish`.
        """
        if self._gathers:
            # The new name (torch 2.13) of the second one, which warns there.
            gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
            return [gather(stripes.view(-1), stripes[self.rank], async_op=True)]
        # all_gather of gloo copies everything twice, into memory of its own: 0.30 s for 3 x 32 MiB on one host, and
        # three broadcasts take 0.10 s.
        return [torch.distributed.broadcast(stripes[rank], rank, async_op=True) for rank in range(self.num_ranks)]

    def finish(self, works: list[Any], meanwhile: Callable[[], object]) -> None:
        """Waits for the end of an exchange. On a GPU, the current stream waits for it too.

        Args:
            works: The work in progress.
            meanwhile: Called again and again during the wait.

        Raises:
            LostCompanion: A rank has left, is dead, or its exchange has failed.
        """
        pause, looked_at = _FIRST_POLL_SECONDS, time.monotonic()
        for work in works:
            while not work.is_completed():
                meanwhile()
                time.sleep(pause)
                pause = min(2 * pause, _LAST_POLL_SECONDS)
                if time.monotonic() - looked_at > _LOOK_SECONDS:
                    self._companions.look()
                    looked_at = time.monotonic()
            try:
                work.wait()
            except RuntimeError as error:  # also DistBackendError
                self._find_lost(error)

    def _find_lost(self, error: RuntimeError) -> None:
        """Raises with the rank because of which a collective has failed. The error of the backend does not tell it."""
        deadline = time.monotonic() + _SEARCH_SECONDS
        while time.monotonic() < deadline:
            try:
                self._companions.look(_DEAD_SECONDS)
            except LostCompanion as lost:
                raise lost from error
            time.sleep(_LOOK_SECONDS / 4)
        raise error


def _backend_of(device: torch.device) -> str | None:
    """The backend of the default process group for a type of device."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    backends = dict(part.split(":") for part in torch.distributed.get_backend_config().split(","))
    return backends.get(device.type)
