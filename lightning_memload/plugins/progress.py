"""The progress bar of a restore."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from lightning_memload.checkpoint import MappedCheckpoint

__all__ = ["RestoreBar"]

# Shorter restores show no bar.
_DELAY_SECONDS = 1.0
# The bar counts in GiB: tqdm's own scaling of bytes is wrong in a notebook (its bar is full at once).
_GIB = 2**30


class RestoreBar:
    """Shows how many bytes of a checkpoint have been read, once the restore takes more than a second.

    Args:
        mapped: The checkpoint.
        stage: The stage of the Trainer. Only ``"fit"`` restores optimizer states.
        num_readers: Number of processes that read the checkpoint together.
    """

    def __init__(self, mapped: MappedCheckpoint, stage: str, num_readers: int = 1) -> None:
        parts = ("state_dict", "optimizer_states") if stage == "fit" else ("state_dict",)
        # A file of weights alone has no such parts.
        restored = [tensor for tensor in mapped.index if tensor.path[0] in parts] or mapped.index
        storages = {storage.key: storage.nbytes for tensor in restored for storage in tensor.storages}
        self._bar: tqdm[Any] = tqdm(
            desc="Restoring checkpoint",
            total=sum(storages.values()) / num_readers / _GIB,
            unit="GiB",
            bar_format="{l_bar}{bar}| {n:.2f}/{total:.2f} GiB [{elapsed}<{remaining}, {rate_noinv_fmt}]",
            delay=_DELAY_SECONDS,
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, nbytes: int) -> None:
        """Counts bytes that have been read.

        The gaps between records are read as well, so the sum may exceed the total, which tqdm cannot draw.
        """
        self._bar.update(min(nbytes / _GIB, self._bar.total - self._bar.n))

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
