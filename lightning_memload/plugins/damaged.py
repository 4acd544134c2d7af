"""What happens when the checkpoint of ``ckpt_path`` is damaged: an error that helps, or another checkpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import UnmappableCheckpoint
from lightning_memload.errors import CheckpointFormatError, CheckpointReadError
from lightning_memload.restore import find_siblings
from lightning_memload.transfer import verify_checkpoint

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["OnCorrupt", "choose_intact", "name_intact_sibling"]

OnCorrupt = Literal["raise", "previous"]

# An error that is about to be raised waits no longer than this for what it could say more.
_SEARCH_SECONDS = 60.0
_MAX_LISTED = 3


def name_intact_sibling(exception: BaseException, path: str, *, advise_option: bool) -> None:
    """Adds to the error of a damaged checkpoint which one in the same directory is intact.

    Args:
        exception: Any error of a restore; others are left alone.
        path: The checkpoint.
        advise_option: Tell of ``on_corrupt="previous"`` too.
    """
    if isinstance(exception, UnmappableCheckpoint) or not os.path.lexists(path):
        return
    if not isinstance(exception, (CheckpointFormatError, CheckpointReadError)):
        return
    try:
        siblings = find_siblings(path, timeout_seconds=_SEARCH_SECONDS)
    except Exception:
        return  # what went wrong first is what the user must see
    folder = os.path.dirname(path) or "."
    if siblings.intact is not None:
        exception.intact_sibling = siblings.intact
        words = (
            f"The newest intact checkpoint in {folder} is {siblings.intact}: resume with ckpt_path={siblings.intact!r}"
        )
        words += ", or let MemoryEfficientRestore(on_corrupt='previous') do so by itself." if advise_option else "."
    elif siblings.unknown:
        words = f"Whether {siblings.unknown[0]} is intact could not be told in {_SEARCH_SECONDS:.0f} s."
    else:
        words = f"There is no intact checkpoint in {folder}" + _counted(siblings.damaged) + "."
    exception.args = (f"{exception.args[0]} {words}", *exception.args[1:])


def choose_intact(path: str, trainer: pl.Trainer) -> str:
    """Verifies a checkpoint, and chooses the newest intact one in its directory if it is damaged.

    Rank 0 decides for all; every rank must call it. When there is no other choice it is the path itself, whose error
    then comes from loading it.

    Args:
        path: What ``ckpt_path`` names.
        trainer: The Trainer, which henceforth says that the chosen one is its ``ckpt_path``.
    """
    chosen = path
    if trainer.is_global_zero:
        # Whatever goes wrong, the other ranks wait for an answer.
        try:
            chosen = _choose(path)
        except Exception as error:
            rank_zero_warn(f"{path} could not be verified before it is restored: {error}")
    chosen = trainer.strategy.broadcast(chosen)
    if chosen != path:
        # Not the public setter: it would make the path that of all later calls too.
        trainer._checkpoint_connector._ckpt_path = chosen
    return chosen


def _choose(path: str) -> str:
    if not os.path.exists(path):
        rank_zero_warn(f"on_corrupt='previous' is ignored: {path} is not a local file.")
        return path
    try:
        report = verify_checkpoint(path)
    except UnmappableCheckpoint:
        return path  # of torch < 1.6, or compressed: nobody can tell
    except CheckpointFormatError as error:
        problems = [str(error)]
    else:
        if not report.is_damaged:
            return path
        problems = [str(item) for item in report.damage]
    siblings = find_siblings(path)
    if siblings.intact is None:
        return path
    more = f" (and {len(problems) - _MAX_LISTED} more problems)" if len(problems) > _MAX_LISTED else ""
    known = f"{path} is damaged: "
    found = " ".join(problems[:_MAX_LISTED]).removeprefix(known)
    rank_zero_warn(
        f"{known}{found}{more} Resuming from {siblings.intact} instead, the newest checkpoint beside it that is "
        f"intact{_counted(siblings.damaged)}."
    )
    return siblings.intact


def _counted(damaged: tuple[str, ...]) -> str:
    return f" ({', '.join(damaged[:_MAX_LISTED])} damaged as well)" if damaged else ""
