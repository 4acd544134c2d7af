"""Leases: the kernel tells before a file changes, and what lay in it is ordinary memory by then."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload.errors import DetachedError
from lightning_memload.formats import load_mapped
from lightning_memload.storage import FileMapping, FileSet, FileWatch, lease, steps
from tests.fresh_process import run_fresh
from tests.storage.watching import REWRITES, join_watches, traces, watches_end

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leases need Linux")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    join_watches()


def is_leased(path: Path) -> bool:
    """Whether a writer would have to wait, without making it wait. Asking breaks the lease."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return True
    return False


HARMLESS: dict[str, Callable[[Path], object]] = {
    "read": lambda path: path.read_bytes(),
    "copied": lambda path: shutil.copy(path, path.with_name("copy")),
    "linked": lambda path: os.link(path, path.with_name("link")),
    "renamed": lambda path: path.rename(path.with_name("renamed")),
    "replaced": lambda path: (path.with_name("new").write_bytes(b"new"), path.with_name("new").replace(path)),
    "removed": lambda path: path.unlink(),
    "permissions": lambda path: path.chmod(0o600),
}


class TestMapped:
    @pytest.mark.parametrize("way", REWRITES)
    def test_rewritten(self, way: str, path: Path) -> None:
        torch.save({"a": torch.arange(9000.0), "b": torch.ones(3), "dropped": torch.zeros(9000)}, path)
        state, mapped = load_mapped(path)
        assert mapped.watch() is None
        state["b"].add_(1)
        view = state["a"][5:7]
        del state["dropped"]
        with (
            pytest.warns(UserWarning, match=r"checkpoint\.pt is being rewritten in place.* take \d+ bytes of memory"),
            watches_end(),
        ):
            REWRITES[way](path)
        assert torch.equal(state["a"], torch.arange(9000.0))
        assert torch.equal(view, torch.tensor([5.0, 6.0]))
        assert torch.equal(state["b"], torch.full((3,), 2.0))
        assert mapped.locate(state["a"]) is None
        assert traces(path) == (False, False)

    @pytest.mark.parametrize("way", HARMLESS)
    def test_left_as_it_is(self, way: str, path: Path) -> None:
        torch.save({"a": torch.arange(9000.0)}, path)
        state, mapped = load_mapped(path)
        (thread,) = watched(mapped)
        HARMLESS[way](path)
        assert not thread._is_broken()
        assert mapped.locate(state["a"]) is not None
        mapped.detach()
        assert not thread.files.files[0].is_open

    def test_a_detach_ends_it(self, path: Path) -> None:
        torch.save({"a": torch.arange(9000.0)}, path)
        state, mapped = load_mapped(path)
        watched(mapped)
        mapped.detach()
        assert traces(path) == (False, False)
        assert not is_leased(path)
        assert state["a"].sum() == torch.arange(9000.0).sum()

    def test_nothing_is_said_where_nothing_is_in_use(self, path: Path) -> None:
        torch.save({"a": torch.arange(9000.0)}, path)
        state, mapped = load_mapped(path)
        watched(mapped)
        state.clear()
        path.write_bytes(b"other")
        join_watches()
        assert mapped.detach() == 0

    def test_a_finalizer_lets_go_within_the_detach(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save({"a": torch.arange(9000.0)}, path)
        state, mapped = load_mapped(path)
        take_out, inner = FileMapping._unmap_file, []

        def collecting(self: FileMapping, *args: Any) -> Any:
            inner.append(self.detach())
            return take_out(self, *args)

        monkeypatch.setattr(FileMapping, "_unmap_file", collecting)
        assert mapped.detach() > 0
        assert inner == [0]
        assert torch.equal(state["a"], torch.arange(9000.0))


def watched(mapped: Any) -> list[Any]:
    assert mapped.watch() is None
    return [thread for thread in threading.enumerate() if thread.name == "memload-lease"]


class TestRefused:
    def refusal(self, *paths: Path) -> str | None:
        with closing(FileSet(paths)) as source:
            return FileWatch(source).begin()

    def test_nothing_to_watch(self) -> None:
        assert self.refusal() == "none of its tensors lies in a file"

    def test_open_for_writing(self, path: Path) -> None:
        with open(path, "wb"):
            assert self.refusal(path) == "the file is open for writing"
        assert not is_leased(path)

    def test_one_of_two(self, path: Path, tmp_path: Path) -> None:
        path.write_bytes(b"first")
        with open(tmp_path / "second", "wb"):
            assert self.refusal(path, tmp_path / "second") == "the file is open for writing"
        assert not is_leased(path)
        assert traces(path) == (False, False)

    def test_too_many(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = [tmp_path / str(number) for number in range(70)]
        for path in paths:
            path.write_bytes(b"x")
        with closing(FileSet(paths)) as source:
            monkeypatch.setattr(lease, "_MOST_FILES", 70)
            watch = FileWatch(source)
            assert watch.begin() is None
            assert is_leased(paths[69])
            monkeypatch.setattr(lease, "_MOST_FILES", 69)
            assert FileWatch(source).begin() == "there are 70 files, and 69 at most are kept open for that"
        monkeypatch.setattr(lease.resource, "getrlimit", lambda kind: (40, 40))
        assert self.refusal(*paths[:11]) == "there are 11 files, and 10 at most are kept open for that"

    def test_replaced_before(self, tmp_path: Path) -> None:
        """Of many files each is opened anew, by its name, which may be another file's by then."""
        paths = [tmp_path / str(number) for number in range(70)]
        for path in paths:
            path.write_bytes(b"x")
        with closing(FileSet(paths)) as source:
            (tmp_path / "new").write_bytes(b"x")
            (tmp_path / "new").replace(paths[3])
            assert "was changed since" in str(FileWatch(source).begin())

    @pytest.mark.parametrize(
        ("kind", "said"), [("nfs4", "on nfs4, writes"), (None, "on an unknown file system, writes")]
    )
    def test_where_others_write_unseen(
        self, kind: str | None, said: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path.write_bytes(b"x")
        monkeypatch.setattr(lease, "_file_system_of", lambda descriptor: kind)
        assert str(self.refusal(path)).startswith(said)
        assert not is_leased(path)

    def test_the_kind_of_a_file_system(self, path: Path) -> None:
        path.write_bytes(b"x")
        with open(path) as file, open("/proc/self/status") as other:
            assert lease._file_system_of(file.fileno()) in lease._LOCAL_FILE_SYSTEMS
            assert lease._file_system_of(other.fileno()) == "proc"
        assert lease._file_system_of(1 << 20) is None

    def test_changed_before(self, path: Path) -> None:
        path.write_bytes(b"x")
        with closing(FileSet([path])) as source:
            path.write_bytes(b"longer")
            assert "was changed" in str(FileWatch(source).begin())
        assert not is_leased(path)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
    def test_another_user(self) -> None:
        program = """
import os
from lightning_memload.storage import FileSet, FileWatch
os.setresuid(65534, 65534, 0)
RESULT = FileWatch(FileSet([ARGS["path"]])).begin()
os.setresuid(0, 0, 0)
"""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            path.write_bytes(b"x")
            Path(folder).chmod(0o755)
            assert run_fresh(program, path=path).result == "the file belongs to another user"

    def test_a_writer_that_comes_before_the_mapping(self, path: Path) -> None:
        path.write_bytes(bytes(100))
        with closing(FileSet([path])) as source:
            watch = FileWatch(source)
            assert watch.begin() is None
            path.write_bytes(bytes(50))
            join_watches()
            with pytest.raises(DetachedError, match="being rewritten"):
                FileMapping(source, watch)


def test_the_kernel_waits_no_longer(path: Path) -> None:
    """A copy that takes longer than the kernel waits may be a mixture. Here the time of the file tells it."""
    path.write_bytes(bytes(100))
    watch = FileWatch(FileSet([path]))
    assert watch.begin() is None

    def late() -> int:
        os.utime(path, (1, 1))
        return 100

    watch.guard(late)
    with (
        pytest.warns(UserWarning, match=r"not all of its bytes could be copied.*lease-break-time.*may be wrong"),
        watches_end(),
    ):
        path.write_bytes(b"x")


def test_a_failure_lets_the_writer_go(path: Path) -> None:
    path.write_bytes(bytes(100))
    watch = FileWatch(FileSet([path]))
    assert watch.begin() is None

    def fail() -> int:
        raise MemoryError("no memory")

    watch.guard(fail)
    with (
        pytest.warns(UserWarning, match=r"\(no memory\)\. Weights that were assigned from it may be wrong"),
        watches_end(),
    ):
        path.write_bytes(b"x")


class TestProcesses:
    def test_a_forked_child_holds_nothing(self, path: Path) -> None:
        """And ending one takes nothing from the parent; the killed parent's file is free while the child lives on."""
        program = """
import os, signal, sys, torch
from lightning_memload.formats import load_mapped
path = ARGS["path"]
torch.save({"a": torch.ones(9000)}, path)
def is_leased():
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return True
    return False
state, mapped = None, None
(read, write), (done_read, done_write) = os.pipe(), os.pipe()
middle = os.fork()
if middle == 0:
    state, mapped = load_mapped(path)
    assert mapped.watch() is None
    first = os.fork()
    if first == 0:
        os._exit(0)
    assert os.waitpid(first, 0)[1] == 0
    (thread,) = [t for t in __import__("threading").enumerate() if t.name == "memload-lease"]
    assert not thread._is_broken()
    if os.fork() == 0:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        os.write(write, b"%d" % [os.readlink(link) for link in links if os.path.exists(link)].count(path))
        os.close(done_write)
        os.read(done_read, 1)
        os._exit(0)
    signal.pause()
descriptors = int(os.read(read, 10))
os.kill(middle, signal.SIGKILL)
os.waitpid(middle, 0)
RESULT = [descriptors, is_leased(), path in open("/proc/self/maps").read()]
os.write(done_write, b"x")
"""
        # One descriptor: the checkpoint's own, which a fork has always inherited.
        assert run_fresh(program, path=path).result == [1, False, False]

    def test_a_process_ends_while_it_watches(self, path: Path) -> None:
        program = """
import atexit, torch
from lightning_memload.formats import load_mapped
torch.save({"a": torch.ones(9000)}, ARGS["path"])
state, mapped = load_mapped(ARGS["path"])
assert mapped.watch() is None
def rewrite():
    open(ARGS["path"], "wb").close()
    print(state["a"].sum().item(), flush=True)
atexit.register(rewrite)
"""
        answer = run_fresh(program, path=path)
        assert answer.stdout.strip() == "9000.0"
        assert "being rewritten in place" in answer.stderr

    def test_signals_of_the_user_are_left_alone(self, path: Path) -> None:
        """The kernel would send SIGIO, which ends a process that does not handle it."""
        program = """
import signal, torch
from lightning_memload.formats import load_mapped
seen = []
for number in (signal.SIGIO, signal.SIGURG, signal.SIGUSR1, signal.SIGRTMAX):
    signal.signal(number, lambda number, frame: seen.append(number))
torch.save({"a": torch.ones(9000)}, ARGS["path"])
state, mapped = load_mapped(ARGS["path"])
assert mapped.watch() is None
open(ARGS["path"], "wb").close()
signal.raise_signal(signal.SIGUSR1)
RESULT = [[int(number) for number in seen], state["a"].sum().item()]
"""
        assert run_fresh(program, path=path).result == [[10], 9000.0]


class TestSteps:
    """Pages are exchanged between the writes of optimizers, not within."""

    class Slow(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})
            self.begun, self.goes_on = threading.Event(), False

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if closure is not None:
                closure()
            self.begun.set()
            while not self.goes_on:
                pass
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(1)

    def test_a_step_is_waited_for(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save({"a": torch.ones(9000)}, path)
        state, mapped = load_mapped(path)
        assert mapped.watch() is None
        optimizer = self.Slow([torch.nn.Parameter(state["a"])])
        stepping = threading.Thread(target=optimizer.step)
        stepping.start()
        assert optimizer.begun.wait(60)
        waits = threading.Event()
        monkeypatch.setattr(steps.time, "sleep", lambda seconds: waits.set() or threading.Event().wait(seconds))
        taken_out: list[bool] = []

        def write() -> None:
            writer = threading.Thread(target=path.write_bytes, args=(b"x",))
            writer.start()
            assert waits.wait(60)
            taken_out.append(mapped.locate(state["a"]) is None)
            optimizer.goes_on = True
            for thread in (stepping, writer):
                thread.join(60)

        with pytest.warns(UserWarning, match="rewritten in place"), watches_end():
            write()
        assert taken_out == [False]
        assert torch.equal(state["a"], torch.full((9000,), 2.0))

    def test_a_closure_is_not(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lightning runs training_step there, which may save over the file itself, in this very thread."""
        torch.save({"a": torch.ones(9000)}, path)
        state, mapped = load_mapped(path)
        assert mapped.watch() is None
        optimizer = self.Slow([torch.nn.Parameter(state["a"])])
        optimizer.goes_on = True

        def fail(seconds: float) -> None:
            raise AssertionError("it waits")

        monkeypatch.setattr(steps.time, "sleep", fail)
        with pytest.warns(UserWarning, match="rewritten in place"), watches_end():
            optimizer.step(lambda: path.write_bytes(b"x"))
        assert torch.equal(state["a"], torch.full((9000,), 2.0))


def test_torch_is_as_it_was_afterwards(path: Path) -> None:
    opens = torch.serialization._open_zipfile_writer
    torch.save({"a": torch.ones(9000)}, path)
    first, second = load_mapped(path), load_mapped(path)
    for _, mapped in (first, second):
        assert mapped.watch() is None
    first[1].detach()
    assert torch.serialization._open_zipfile_writer is not opens
    torch.save({"a": torch.ones(3)}, path.with_name("other"))
    assert second[1].mapping.offset_of(second[0]["a"]) is not None
    second[1].detach()
    assert torch.serialization._open_zipfile_writer is opens


def test_the_probe_sees_a_lease(path: Path) -> None:
    path.write_bytes(b"x")
    assert not is_leased(path)
    held = FileWatch(FileSet([path]))
    assert held.begin() is None
    assert is_leased(path)
