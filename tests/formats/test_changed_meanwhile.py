"""A checkpoint that is replaced, or cut short, at any moment while it is read: one of the two or an error, no mixture.

The moments are the calls of the system that reading makes, one after the other, before and after each.
"""

from __future__ import annotations

import builtins
import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_memload import verify_checkpoint
from lightning_memload.errors import MemloadError
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.restore import Move, RestoreSession
from lightning_memload.save import save_directory, save_torch
from lightning_memload.storage import replacement
from lightning_memload.transfer import LazyRing, choose_layout
from tests.formats.files import tensors_of
from tests.fresh_process import run_fresh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings, and names that are exchanged, need Linux")

CALLS = ((os, "open"), (os, "preadv"), (os, "pread"), (os, "stat"), (builtins, "open"), (torch, "load"))


def state(number: int) -> dict[str, Any]:
    """Two such states have the same sizes, so nothing but their contents tells them apart."""
    weights = {f"layer{key}": torch.full((1500,), float(number)) for key in range(2)}
    return {"epoch": torch.tensor(number), "number": number, "state_dict": weights}


def write_safetensors(value: dict[str, Any], path: Path) -> None:
    save_file({"epoch": value["epoch"], **value["state_dict"]}, path)


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "torch": functools.partial(save_torch, durable=False),
    "directory": functools.partial(save_directory, durable=False),
    "safetensors": write_safetensors,
}


class Moments:
    """Lets something happen at one of the calls that reading makes."""

    def __init__(self, moment: int, action: Callable[[], object]) -> None:
        self._left = moment
        self._action = action
        self.has_come = False
        self._originals = [(place, name, getattr(place, name)) for place, name in CALLS]

    def __enter__(self) -> Moments:
        for place, name, original in self._originals:
            setattr(place, name, self._watching(original))
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, original in self._originals:
            setattr(place, name, original)

    def _watching(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            try:
                return original(*args, **kwargs)
            finally:
                self._pass()

        return call

    def _pass(self) -> None:
        self._left -= 1
        if self._left == -1:
            self.has_come = True
            self.__exit__()
            self._action()
            self.__enter__()


def restore(path: Path) -> set[int]:
    """Loads and streams everything; returns which states the values are of."""
    loaded, mapped = load_mapped(path, weights_only=True)
    tensors = dict(tensors_of(loaded))
    kept = loaded["epoch"]
    ring = LazyRing(choose_layout(512 << 10, 1), pinned=False)
    session = RestoreSession(mapped, device=torch.device("cpu"), ring=ring)
    try:
        destinations = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
        session.move([Move(str(key), tensor, destinations[key]) for key, tensor in tensors.items()])
        assert session.bytes_copied_ordinarily == 0
    except BaseException:
        session.close(detach=False)
        raise
    session.close()  # what is kept becomes ordinary memory
    found = {int(value) for tensor in destinations.values() for value in tensor.unique()}
    return found | {int(kept), loaded.get("number", int(kept))}


def index(path: Path) -> set[int]:
    assert len(open_checkpoint(path)) == 3
    return {1}


def verify(path: Path) -> set[int]:
    report = verify_checkpoint(path)
    assert not report.is_damaged, str(report)
    return {1}


@pytest.mark.parametrize("read", [restore, index, verify], ids=lambda read: read.__name__)
@pytest.mark.parametrize("format", WRITERS)
def test_replaced(format: str, read: Callable[[Path], set[int]], tmp_path: Path) -> None:
    """By another of the same sizes. What replaces in one step is always read as one of the two."""
    write, path, other = WRITERS[format], tmp_path / "last", tmp_path / "other"

    def replace() -> None:
        if path.is_dir():
            assert replacement._exchange(str(other), str(path))
            shutil.rmtree(other)
        else:
            os.replace(other, path)

    seen: list[set[int]] = []
    for moment in range(10_000):
        for number, place in ((1, path), (2, other)):
            write(state(number), place)
        with Moments(moment, replace) as moments:
            seen.append(read(path))
        if not moments.has_come:
            break
        assert seen[-1] in ({1}, {2}), f"at moment {moment}"
    assert len(seen) > 15
    if read is restore:
        assert {1} in seen
        assert {2} in seen


def cut_at_every_moment(path: str, format: str, length: int) -> list[Any]:
    """Cuts the largest file, at each moment in a process of its own: what became of each."""
    outcomes: list[Any] = []
    for moment in range(10_000):
        if os.path.isdir(path):
            shutil.rmtree(path)
        WRITERS[format](state(1), Path(path))
        files = [file for file in (Path(path), *Path(path).rglob("*")) if file.is_file()]
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, attempt(Path(path), max(files, key=os.path.getsize), moment, length).encode())
            os._exit(0)
        os.close(writing)
        with open(reading) as stream:
            outcomes.append(stream.read())
        status = os.waitpid(child, 0)[1]
        outcomes[-1] = outcomes[-1] or f"it ended with status {status}"
        if outcomes[-1] == "never":
            return outcomes
    return outcomes


def attempt(path: Path, file: Path, moment: int, length: int) -> str:
    try:
        with Moments(moment, lambda: os.truncate(file, length)) as moments:
            found = restore(path)
    except MemloadError as error:
        return f"error: {error}" if str(path) in str(error) else f"an error without the path: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "never" if not moments.has_come else "whole" if found == {1} else f"a mixture: {found}"


@pytest.mark.first("length")
@pytest.mark.parametrize("length", [0, 5000])
@pytest.mark.parametrize("format", WRITERS)
def test_cut_short(format: str, length: int, tmp_path: Path) -> None:
    """A change in place. Values that were read before are right; otherwise this package raises an error."""
    outcomes = run_fresh(f"{__name__}:cut_at_every_moment", path=tmp_path / "last", format=format, length=length).result
    assert outcomes.pop() == "never"
    assert len(outcomes) > 15
    others = [outcome for outcome in outcomes if outcome != "whole" and not outcome.startswith("error: ")]
    assert not others
    assert any(outcome.startswith("error: ") for outcome in outcomes)
