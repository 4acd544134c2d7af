"""Handles a damaged checkpoint at ``ckpt_path``: the error names an intact one, or an intact one is restored instead.

Every rank may have its own file on its own disk, so every rank verifies its own file. If a file is damaged, all ranks
restore one checkpoint that has the same name and contents on all of them, or all ranks raise.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lightning_memload.distributed import Companions, LostCompanion
from lightning_memload.errors import (
    CheckpointFormatError,
    CheckpointReadError,
    MemloadError,
    UnmappableCheckpointError,
    listed,
)
from lightning_memload.formats import checkpoints_in, is_checkpoint
from lightning_memload.plugins.seams import restore_from
from lightning_memload.storage.local import boot_id
from lightning_memload.verify import (
    Siblings,
    Verdict,
    find_siblings,
    fingerprint,
    is_training_checkpoint,
    judge_sibling,
    list_siblings,
    verify_checkpoint,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["OnCorrupt", "choose_intact", "name_intact_sibling"]

OnCorrupt = Literal["raise", "previous"]

_log = logging.getLogger(__name__)

# The error waits at most this long for the search for an intact checkpoint. Lightning's launcher and torchrun kill all
# processes some seconds after the first one has died.
_SEARCH_SECONDS = 5.0
_MAX_LISTED = 3


def name_intact_sibling(exception: BaseException, path: str, trainer: pl.Trainer, *, advise_option: bool) -> None:
    """Adds the newest intact checkpoint of the same directory to the error of a damaged checkpoint.

    With several processes, the error and the addition are also logged as soon as they are known: the failure of another
    rank may end this process before it raises.

    Args:
        exception: Any error of a restore. Errors other than those of a damaged checkpoint are not changed.
        path: The checkpoint.
        trainer: The Trainer.
        advise_option: Whether to recommend ``on_corrupt="previous"``.
    """
    if not isinstance(exception, (CheckpointFormatError, CheckpointReadError)) or not os.path.lexists(path):
        return
    path = os.path.abspath(path)
    is_others = getattr(exception, "rank", None) not in (None, trainer.global_rank)
    if is_others and not os.path.abspath(exception.path).startswith(path):
        return  # Another rank has a file of its own, and that one is damaged.
    if _is_folder_of_checkpoints(path):
        return  # The path is the folder of the checkpoints, and the error names them.
    _log_on_rank(trainer, str(exception.args[0]))
    words = _search(exception, path, trainer, advise_option=advise_option)
    if words is not None:
        _log_on_rank(trainer, words)
        exception.args = (f"{exception.args[0]} {words}", *exception.args[1:])


def _search(
    exception: CheckpointFormatError | CheckpointReadError, path: str, trainer: pl.Trainer, *, advise_option: bool
) -> str | None:
    """Return a sentence about the checkpoints beside a damaged one, ``None`` if nothing is known."""
    folder = os.path.dirname(path)
    newest: list[str] = []
    found: list[Siblings] = []

    def search() -> None:
        # An error of the search must not replace the error of the restore.
        with contextlib.suppress(Exception):
            newest.extend(itertools.islice(filter(is_training_checkpoint, list_siblings(path)), 1))
            if newest:
                _log_on_rank(trainer, f"The newest other checkpoint in {folder} is {newest[0]}. It is being verified.")
            found.append(find_siblings(path, timeout_seconds=_SEARCH_SECONDS))

    # In a thread: a read from a disk that hangs does not end at a deadline.
    thread = threading.Thread(target=search, name="memload_siblings", daemon=True)
    thread.start()
    thread.join(_SEARCH_SECONDS + 0.5)
    siblings = found[0] if found else Siblings(None, (), tuple(newest))
    if siblings.intact is not None:
        exception.intact_sibling = siblings.intact
        words = (
            f"The newest intact checkpoint in {folder} is {siblings.intact}: resume with ckpt_path={siblings.intact!r}"
        )
        return words + (
            ", or use MemoryEfficientRestore(on_corrupt='previous') to do so automatically." if advise_option else "."
        )
    if siblings.unknown:
        (candidate, *_), tried = siblings.unknown, _also_damaged(siblings.damaged)
        return (
            f"The newest other checkpoint in {folder} is {candidate}{tried}. It could not be verified within "
            f"{_SEARCH_SECONDS:.0f} s. Use lightning_memload.verify_checkpoint({candidate!r}) to verify it."
        )
    return f"There is no intact checkpoint in {folder}{_also_damaged(siblings.damaged)}." if found else None


@dataclass(frozen=True, slots=True)
class _Finding:
    """The state of one rank's own ``ckpt_path``. It is sent to the other ranks as JSON.

    Attributes:
        path: The rank's ``ckpt_path``, ``None`` if the rank restores no checkpoint.
        file: The identity of the file: equal in all processes of a machine that see the same file.
        problems: The damage that was found. ``None`` if another rank verifies the same file.
        exists: Whether the path exists.
    """

    path: str | None
    file: str = ""
    problems: Sequence[str] | None = ()
    exists: bool = True


def choose_intact(path: str | None, trainer: pl.Trainer, companions: Companions | None) -> str | None:
    """Verifies a checkpoint, and chooses the newest intact one in its directory if it is damaged.

    Every rank verifies its own file. Ranks of one machine that have the same file verify it once. All ranks choose the
    same checkpoint: the newest one that has the same name and contents in the directories of all ranks. If a single
    process finds no intact checkpoint, the path itself is returned, and loading it raises the error.

    Args:
        path: The value of ``ckpt_path``, ``None`` on a rank that restores no checkpoint.
        trainer: The Trainer. Its ``ckpt_path`` becomes the chosen checkpoint.
        companions: The other processes, ``None`` for a single process.

    Returns:
        The path that this rank restores.

    Raises:
        CheckpointFormatError: The file of a rank is damaged or missing, and no other checkpoint is intact on all ranks.
            Raised on every rank.
        MemloadError: Another rank failed in the meantime.
    """
    if trainer.world_size > 1 and (companions is None or not companions.can_agree):
        if path is not None:
            warnings.warn(
                f"MemoryEfficientRestore(on_corrupt='previous') is ignored on rank {trainer.global_rank}: all ranks "
                "must choose another checkpoint together, but not every rank has this option, or the processes have no "
                "process group with a key-value store. Pass the callback with this option to the Trainer of every "
                "rank.",
                stacklevel=2,
            )
        return path
    complete = os.path.abspath(path) if path is not None and os.path.exists(path) else path
    try:
        chosen = _choose(complete, companions, trainer.global_rank)
    except LostCompanion as error:
        raise MemloadError(
            f"The ranks cannot choose a checkpoint to restore instead of a damaged one, since {error}. See the error "
            f"of that rank. ckpt_path of rank {trainer.global_rank}: {path}."
        ) from error
    if chosen == complete:
        return path
    if chosen != path:
        restore_from(trainer, chosen)
    return chosen


def _choose(path: str | None, companions: Companions | None, rank: int) -> str | None:
    answers = _exchange(asdict(_verify_own(path, companions)), companions, rank)
    findings = _resolved({other: _Finding(**finding) for other, finding in answers.items()})
    bad = {other: finding for other, finding in findings.items() if finding.problems}
    if not bad or not any(finding.exists for finding in findings.values()):
        return path  # A path that exists on no rank is a mistake, not damage.
    listings: dict[int, list[str]] = {}
    if path is not None and all(finding.path is not None for finding in findings.values()):
        listings = _exchange(_names(path, is_sound=rank not in bad), companions, rank)
    names = listings[min(listings)] if listings else []
    common = [name for name in names if all(name in listing for listing in listings.values())]
    damaged: list[str] = []
    for name in common:
        assert path is not None
        candidate = os.path.join(os.path.dirname(path), name)
        verdict = _judge(candidate, companions, rank)
        if verdict == "damaged":
            damaged.append(candidate)
        elif verdict == "intact":
            if rank == 0:
                one = len({finding.path for finding in findings.values()}) == 1
                chosen = f"{candidate} instead" if one else f"{name} instead, beside each rank's own ckpt_path"
                where = " on all ranks" if len(findings) > 1 else ""
                warnings.warn(
                    f"{_described(findings, bad)} Resuming from {chosen}, the newest other checkpoint there that is "
                    f"intact{where}{_also_damaged(damaged)}.",
                    stacklevel=2,
                )
            return candidate
    if len(findings) == 1:
        return path
    raise CheckpointFormatError(
        f"{_described(findings, bad)} on_corrupt='previous' finds no other checkpoint that is intact, with the same "
        f"name and contents, beside the ckpt_path of every rank{_also_damaged(damaged)}. "
        f"{_not_common(listings, common)}Pass a ckpt_path that is intact on all {len(findings)} ranks.",
        path=str(next(iter(bad.values())).path),
    )


def _verify_own(path: str | None, companions: Companions | None) -> _Finding:
    """Verifies the file at a path, unless another rank verifies it."""
    if path is None:
        return _Finding(None)
    if not os.path.exists(path):
        if "://" not in path:
            return _Finding(path, problems=("it does not exist.",), exists=False)
        warnings.warn(f"on_corrupt='previous' is ignored: {path} is not a local file.", stacklevel=2)
        return _Finding(path)
    if _is_folder_of_checkpoints(path):
        return _Finding(path)
    file = _identity(path)
    if companions is not None and file and not companions.claim(file):
        return _Finding(path, file, problems=None)
    try:
        report = verify_checkpoint(path, progress=False if companions is None else companions.sign)
        problems = [str(item) for item in report.damage]
    except UnmappableCheckpointError:
        problems = []  # The format of torch < 1.6, or compressed: it has no checksums.
    except CheckpointFormatError as error:
        problems = [str(error)]
    except Exception as error:
        warnings.warn(f"{path} could not be verified before it is restored: {error}", stacklevel=2)
        problems = []
    shown = [problem.removeprefix(f"{path} is damaged: ") for problem in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        shown[-1] += f" (and {len(problems) - _MAX_LISTED} more problems)"
    return _Finding(path, file, tuple(shown))


def _judge(candidate: str, companions: Companions | None, rank: int) -> Verdict:
    """Whether a checkpoint is intact, and the same, on all ranks."""
    file = _identity(candidate)
    mine: list[str | None] = [file, None, None]
    if companions is None or not file or companions.claim(file):
        verdict = judge_sibling(candidate, progress=_silent if companions is None else companions.sign)
        mine = [file, verdict, fingerprint(candidate) if companions is not None else None]
    answers = list(_exchange(mine, companions, rank).values())
    # For each file, the result of the rank that verified it.
    files = {file or str(number): (verdict, mark) for number, (file, verdict, mark) in enumerate(answers) if verdict}
    verdicts = {verdict for verdict, _ in files.values()}
    if verdicts != {"intact"}:
        return "damaged" if "damaged" in verdicts else "other"
    marks = {mark for _, mark in files.values()}
    return "intact" if len(files) == 1 or (len(marks) == 1 and None not in marks) else "other"


def _silent(*_: int) -> None:
    """Reports no progress."""


def _names(path: str, *, is_sound: bool) -> list[str]:
    """Return the names a rank could restore, newest first: those beside its file, and its own if it is intact."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [os.path.basename(sibling) for sibling in list_siblings(path)]
    return [os.path.basename(path), *names] if is_sound else names


def _identity(path: str) -> str:
    """Return a word that is equal in two processes if they see the same file, ``""`` if it is unknown."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    # Inode numbers are unique on one machine only.
    machine = boot_id()
    if machine is None:
        return ""
    return f"{machine} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _exchange(message: Any, companions: Companions | None, rank: int) -> dict[int, Any]:
    return {rank: message} if companions is None else companions.agree(message)


def _resolved(findings: dict[int, _Finding]) -> dict[int, _Finding]:
    """Fills in the problems of each rank whose file another rank has verified."""
    known = {finding.file: finding.problems for finding in findings.values() if finding.problems is not None}
    return {
        rank: finding if finding.problems is not None else replace(finding, problems=known[finding.file])
        for rank, finding in findings.items()
    }


def _described(findings: Mapping[int, _Finding], bad: Mapping[int, _Finding]) -> str:
    """Return the damage: one sentence for each damaged file, with the ranks that have it."""
    ranks: dict[tuple[str | None, bool, tuple[str, ...]], list[int]] = {}
    for rank, finding in bad.items():
        ranks.setdefault((finding.path, finding.exists, tuple(finding.problems or ())), []).append(rank)
    sentences = []
    for (path, exists, problems), whose in ranks.items():
        where = "" if len(whose) == len(findings) else f" on rank {listed(whose)} of {len(findings)}"
        sentences.append(f"{path} is damaged{where}: {' '.join(problems)}" if exists else f"{path} is missing{where}.")
    if len(bad) < len(findings) and not all(finding.path for finding in findings.values()):
        sentences.append("Other ranks restore no checkpoint.")
    return " ".join(sentences)


def _not_common(listings: Mapping[int, list[str]], common: list[str]) -> str:
    """Return one sentence for each file that only some of the ranks have."""
    names = dict.fromkeys(name for listing in listings.values() for name in listing if name not in common)
    having = {name: [rank for rank, listing in listings.items() if name in listing] for name in names}
    return "".join(f"Only rank {listed(having[name])} can restore {name}. " for name in list(names)[:_MAX_LISTED])


def _is_folder_of_checkpoints(path: str) -> bool:
    """Whether a path is a directory that contains checkpoints and is not a checkpoint itself."""
    return os.path.isdir(path) and not is_checkpoint(path) and bool(checkpoints_in(path))


def _also_damaged(damaged: Sequence[str]) -> str:
    return f" ({', '.join(damaged[:_MAX_LISTED])} damaged as well)" if damaged else ""


def _log_on_rank(trainer: pl.Trainer, message: str) -> None:
    """Logs an error immediately, on every rank, if there are several. Unconfigured logging prints it to stderr."""
    if trainer.world_size > 1:
        _log.error("[rank %d of %d] %s", trainer.global_rank, trainer.world_size, message)
