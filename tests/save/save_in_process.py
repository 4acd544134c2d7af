"""The program of the fresh processes of these tests: one state, saved and measured, or saved until killed.

``python -m tests.save.save_in_process FOLDER TIMES [FORMAT]`` kills so many writers at random moments and prints what
it found; the format is one of ``WRITERS``. ``... FOLDER TIMES trainings ASYNCHRONOUS [FORMAT]`` kills trainings with
two ModelCheckpoints in one directory and ``save_last="link"``; the format is one of a ``StreamingCheckpointIO``, and
``ASYNCHRONOUS`` is ``False``, ``True``, ``until_step`` or ``snapshot``.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import random
import signal
import struct
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_memload import verify_checkpoint
from lightning_memload.formats import load_mapped
from lightning_memload.memory import MemoryMonitor
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.save import save_directory, save_torch, write_torch
from lightning_memload.storage import replacement

__all__ = ["WRITERS", "kill_trainings", "kill_writers", "measure"]

_PROGRESS = struct.Struct("<q")
_FROZEN = torch.arange(1 << 18)
WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "torch": save_torch,
    "directory": save_directory,
    "links": lambda state, path: save_directory(state, path, link_unchanged_from=path),
    "safetensors+state": lambda state, path: save_directory(state, path, safetensors=True),
}


def make_state(num_bytes: int) -> dict[str, Any]:
    """Weights, a tie, and two optimizer states for each weight; every page touched."""
    count = num_bytes // 3 // (16 << 20)
    weights = {f"layer{number}.weight": torch.full((4 << 20,), number + 0.5) for number in range(count)}
    states = {
        number: {"step": torch.tensor(3.0), "exp_avg": weight + 1, "exp_avg_sq": weight + 2}
        for number, weight in enumerate(weights.values())
    }
    weights["tied"] = weights["layer0.weight"]
    return {"epoch": 1, "state_dict": weights, "optimizer_states": [{"state": states, "param_groups": []}]}


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


def measure(path: str, num_bytes: int, known_bytes: int, host_budget_mib: int) -> dict[str, Any]:
    """Saves one state in every way, stock last.

    Args:
        path: Where.
        num_bytes: Of the state.
        known_bytes: What ``known`` holds for a moment.
        host_budget_mib: Of our plugin.

    Returns:
        For each way ``rise`` and ``rise_bound`` of anonymous memory, by samples and by the kernel's mark, and
        ``file_bytes``. The ways: ``ours`` and ``stock``, the plugins; ``staged``: host memory through the ring, as a
        device's would go; ``stream``: in order, as to a remote file; ``known``: no save, but a known allocation.
    """
    from tests.lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    from lightning_memload import StreamingCheckpointIO

    state = make_state(num_bytes)
    ours = StreamingCheckpointIO(host_budget_mib=host_budget_mib)
    ours.save_checkpoint({"warm": torch.ones(1)}, path)  # threads, modules
    results: dict[str, Any] = {}

    @contextlib.contextmanager
    def measured(way: str) -> Iterator[None]:
        monitor = MemoryMonitor()
        with monitor:
            yield
        peaks = monitor.peaks
        assert peaks.anonymous_upper_bound_bytes is not None
        assert peaks.anonymous_start_bytes is not None
        results[way] = {
            "rise": peaks.anonymous_above_start_bytes,
            "rise_bound": peaks.anonymous_upper_bound_bytes - peaks.anonymous_start_bytes,
            "file_bytes": os.path.getsize(path),
        }
        os.unlink(path)

    with measured("ours"):
        ours.save_checkpoint(state, path)
    with measured("staged"):
        in_host_memory = SavedStorage.is_in_host_memory
        SavedStorage.is_in_host_memory = property(lambda self: False)  # type: ignore[assignment, method-assign]
        ours.save_checkpoint(state, path)
        SavedStorage.is_in_host_memory = in_host_memory  # type: ignore[method-assign]
    assert ours.last_save is not None
    results["staged"]["staging_bytes"] = ours.last_save.staging_bytes
    with measured("stream"):
        Path(path).touch()
        write_torch(state, _Nowhere(), name=path)  # type: ignore[arg-type]
    with measured("known"):
        Path(path).touch()
        held = torch.ones(known_bytes, dtype=torch.uint8)
        time.sleep(0.05)
        del held
    with measured("stock"):
        TorchCheckpointIO().save_checkpoint(state, path)
    return results


def kill_writers(folder: str, times: int, format: str = "torch", seed: int = 0) -> dict[str, Any]:
    """Kills so many processes in their second save, each before or after a random call of the system, and looks around.

    Args:
        folder: Where, an empty one; made if there is none.
        times: How many.
        format: What they save: one of ``WRITERS``.
        seed: Of the moments.

    Returns:
        ``kills``; ``in_the_middle``: after how many a temporary file was left; ``most_left``: the most files that were
        left beside the checkpoint at any time; ``saves``: how many were completed.

    Raises:
        AssertionError: A checkpoint did not load, was of mixed content, or not the newest that was complete.
    """
    torch.set_num_threads(1)  # threads of torch do not survive a fork
    path = Path(folder, "last.ckpt")
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = random.Random(seed)
    result = {"kills": 0, "in_the_middle": 0, "most_left": 0, "saves": 0}
    newest = 0
    for _ in range(times):
        seen = _run_writer(path, newest, moments.random(), WRITERS[format])
        done, begun = max(-number for number in seen), max(seen)
        content = _content(path)
        assert done <= content <= begun <= done + 1, (done, content, begun)
        left = len(os.listdir(folder)) - 1
        result["kills"] += 1
        result["in_the_middle"] += left > 0
        result["most_left"] = max(result["most_left"], left)
        result["saves"] += done - newest
        newest = content
    return result


def _run_writer(path: Path, newest: int, moment: float, save: Callable[[Any, Path], Any]) -> list[int]:
    """A process that saves states of increasing number and dies in the second save.

    Args:
        path: Where.
        newest: The number before the first.
        moment: When it dies, as a fraction of the calls that the first save made.
        save: Writes a state.

    Returns:
        The numbers of the saves that it began, and negative those that it completed, in their order.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            calls = _Calls()
            for number in range(newest + 1, sys.maxsize):
                state = {"number": number, "large": torch.full((3 << 20,), number, dtype=torch.int64)}
                # A file of its own for each, and each is synced, in a directory.
                num_small = 100 if save is save_torch else 8
                state["frozen"] = _FROZEN
                state |= {f"small{key}": torch.full((key,), number) for key in range(num_small)}
                os.write(writing, _PROGRESS.pack(number))
                save(state, path)
                os.write(writing, _PROGRESS.pack(-number))
                calls.die_at(int(moment * calls.count))
        finally:
            os._exit(1)
    os.close(writing)
    seen = []
    while data := os.read(reading, _PROGRESS.size):
        seen.append(int(_PROGRESS.unpack(data)[0]))
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    return seen


def kill_trainings(
    folder: str, times: int, asynchronous: Any = True, format: str = "torch", seed: int = 0
) -> dict[str, Any]:
    """Kills so many trainings at random moments, each of which resumes from what the one before left as "last".

    Args:
        folder: Where, an empty one; made if there is none.
        times: How many.
        asynchronous: ``asynchronous_save`` of the callback. ``"snapshot"``: ``True``, with ``save_snapshot="auto"``.
        format: Its ``save_format``.
        seed: Of the moments.

    Returns:
        ``kills``; ``one_older``: after how many "last" was one save older than with stock Lightning; ``no_last``: after
        how many there was none, since Lightning was about to make the link anew; ``most_left``: the most temporary
        names that were left at any time; ``steps``: how many were trained.

    Raises:
        AssertionError: A name that Lightning could resume from holds something else than one whole state, or "last" is
            older than that.
    """
    import tests.plugins.harness  # noqa: F401 - once, and not in each child

    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    moments = random.Random(seed)
    result = {"kills": 0, "one_older": 0, "no_last": 0, "most_left": 0, "steps": 0}
    newest: Path | None = None
    allowed = 1 if asynchronous in ("until_step", "snapshot") else 0
    for _ in range(times):
        done, begun = _run_training(folder, newest, moments.random(), asynchronous, format)
        names = [path for path in Path(folder).iterdir() if not path.name.startswith(".memload-")]
        steps = {path: _step_of(path) for path in names if path.exists()}
        last = Path(folder, "last.ckpt")
        # Lightning removes the old target, or the link, and makes the link anew then: there may be none for a moment.
        newest = last if last in steps else max(steps, key=lambda path: steps[path])
        assert done - allowed <= steps[newest] <= begun, (done, begun, steps)
        result["kills"] += 1
        result["one_older"] += steps[newest] < done
        result["no_last"] += newest != last
        result["most_left"] = max(result["most_left"], len(os.listdir(folder)) - len(names))
        result["steps"] = max(result["steps"], steps[newest])
    return result


def _run_training(
    folder: str, checkpoint: Path | None, moment: float, asynchronous: Any, format: str
) -> tuple[int, int]:
    """A process that trains and dies; the steps whose saves all had returned, and that of the last that had begun."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            _train(folder, checkpoint, moment, asynchronous, format, writing)
        finally:
            os._exit(1)
    os.close(writing)
    done = begun = 0
    while data := os.read(reading, _PROGRESS.size):
        (number,) = _PROGRESS.unpack(data)
        begun, done = max(begun, number), max(done, -number)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    return done, begun


def _train(folder: str, checkpoint: Path | None, moment: float, asynchronous: Any, format: Any, progress: int) -> None:
    import logging
    import warnings

    from tests.lightning.pytorch.callbacks import ModelCheckpoint

    import tests.lightning as L
    from lightning_memload import MemoryEfficientRestore
    from tests.plugins.harness import TRUSTED

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    calls = _Calls()

    class Counting(L.LightningModule):
        """Each step makes each weight larger by one."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.zeros(1 << 18) for _ in range(4)])
            self.frozen = torch.nn.Parameter(_FROZEN.float(), requires_grad=False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return -sum(weight.sum() for weight in self.weights)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    class Progress(L.Callback):
        """Tells which saves are about to begin, and which have returned."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            os.write(progress, _PROGRESS.pack(-trainer.global_step))

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, number: int) -> None:
            os.write(progress, _PROGRESS.pack(trainer.global_step))
            if trainer.fit_loop.total_batch_idx == first_batch[0] + 2:
                # Of two steps: the first writes all at once, and from the second on it may be late.
                calls.die_at(int(moment * 2 * calls.count))
            elif first_batch[0] < 0:
                first_batch[0] = trainer.fit_loop.total_batch_idx
                calls.die_at(sys.maxsize)

    first_batch = [-1]
    saving: dict[str, Any] = {"asynchronous_save": asynchronous}
    if asynchronous == "snapshot":
        saving = {"asynchronous_save": True, "save_snapshot": "auto"}
    options: dict[str, Any] = {"filename": "{step}", "monitor": "step", "mode": "max"}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            MemoryEfficientRestore(save_format=format, log=False, **saving),
            Progress(),
            ModelCheckpoint(folder, save_top_k=1, every_n_train_steps=1, save_last="link", **options),
            ModelCheckpoint(folder, save_top_k=2, every_n_train_steps=2, **options),
        ],
    )
    data: Any = torch.utils.data.DataLoader(torch.zeros(10_000, 1))  # type: ignore[arg-type]
    trainer.fit(Counting(), data, ckpt_path=checkpoint, **TRUSTED)


def _step_of(path: Path) -> int:
    """The step of the training whose state a checkpoint holds, all of which must be there."""
    if path.is_dir():
        assert verify_checkpoint(path).is_verified, path
    else:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path
    state, _ = load_mapped(path, weights_only=False)
    step = int(state["global_step"])
    for name, weight in state["state_dict"].items():
        assert torch.equal(weight, _FROZEN.float() if name == "frozen" else torch.full_like(weight, step)), (path, name)
    return step


class _Calls:
    """Counts the calls that a save makes to the system, from all threads, and ends the process at one of them."""

    NAMES = (
        *((os, name) for name in ("open", "pwrite", "pwritev", "posix_fadvise", "ftruncate", "fsync", "close")),
        *((os, name) for name in ("preadv", "link", "replace", "rename", "mkdir", "unlink", "rmdir")),
        (builtins, "open"),
        (replacement, "_exchange"),
    )

    def __init__(self) -> None:
        self.count = 0
        self._last = sys.maxsize
        self._lock = threading.Lock()
        for place, name in self.NAMES:
            setattr(place, name, self._counting(getattr(place, name)))

    def die_at(self, call: int) -> None:
        """Kills the process at this call, the next one being number 0."""
        with self._lock:
            self.count, self._last = 0, call

    def _counting(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                number, self.count = self.count, self.count + 1
            if number >= self._last and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if number >= self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def _content(path: Path) -> int:
    """The number of the state in a checkpoint, all of which must be there."""
    if path.is_dir():
        assert verify_checkpoint(path).is_verified
        state, _ = load_mapped(path, weights_only=True)
    else:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        state = torch.load(path)
    number = state.pop("number")
    assert torch.equal(state.pop("frozen"), _FROZEN)
    assert all((tensor == number).all() for tensor in state.values())
    return int(number)


def main(arguments: list[str]) -> dict[str, Any]:
    """The options of the command line."""
    folder, times, *more = arguments
    if more[:1] != ["trainings"]:
        return kill_writers(folder, int(times), *more)  # type: ignore[arg-type]
    asynchronous = {"False": False, "True": True}.get(more[1], more[1])
    return kill_trainings(folder, int(times), asynchronous, *more[2:])  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
