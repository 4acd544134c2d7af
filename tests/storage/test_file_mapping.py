"""The mapping: who wrote where, and letting go of the file while its tensors live on."""

from __future__ import annotations

import gc
import mmap
import os
import weakref
from contextlib import closing
from pathlib import Path

import pytest
import torch

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.formats import load_mapped
from lightning_memload.storage import FileSet
from lightning_memload.storage.file_mapping import FileMapping
from tests.formats.files import as_bytes, layouts
from tests.fresh_process import run_fresh
from tests.storage.watching import traces

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(not FileMapping.supported, reason="mappings need Linux")


def load(path: Path, **tensors: torch.Tensor) -> tuple[dict[str, torch.Tensor], MappedCheckpoint]:
    torch.save(tensors, path)
    return load_mapped(path, weights_only=True)


class TestWhoWrote:
    @pytest.fixture
    def loaded(self, path: Path) -> tuple[dict[str, torch.Tensor], MappedCheckpoint]:
        # Each four pages long, so that every one has pages of its own.
        return load(path, a=torch.zeros(4096), b=torch.ones(4096), c=torch.ones(4096))

    @pytest.mark.parametrize("way", ["in-place", "item", "numpy", "data", "copy", "view", "no_grad", "set_zero"])
    def test_a_write_is_seen_however_it_was_made(
        self, loaded: tuple[dict[str, torch.Tensor], MappedCheckpoint], way: str, path: Path
    ) -> None:
        state, mapped = loaded
        original = path.read_bytes()
        assert all(mapped.locate(tensor) is not None for tensor in state.values())
        tensor = state["b"]
        if way == "in-place":
            tensor.add_(1)
        elif way == "item":
            tensor[2000] = 5
        elif way == "numpy":
            tensor.numpy()[7] = 3
        elif way == "data":
            tensor.data.mul_(2)
        elif way == "copy":
            tensor.copy_(torch.ones(4096))  # the very same values: still no longer the file's pages
        elif way == "view":
            tensor.view(64, 64)[3, 3] = 2
        elif way == "no_grad":
            torch.nn.init.zeros_(tensor)
        else:
            tensor.zero_()
        assert mapped.locate(tensor) is None
        assert mapped.locate(state["b"].view(64, 64)) is None
        assert path.read_bytes() == original

    def test_reading_is_no_writing(self, loaded: tuple[dict[str, torch.Tensor], MappedCheckpoint]) -> None:
        state, mapped = loaded
        assert sum(tensor.sum().item() for tensor in state.values()) == 8192
        assert all(mapped.locate(tensor) is not None for tensor in state.values())

    def test_pages_of_others_are_left_alone(self, loaded: tuple[dict[str, torch.Tensor], MappedCheckpoint]) -> None:
        state, mapped = loaded
        state["a"][0] = 1
        assert mapped.locate(state["a"]) is None
        assert mapped.locate(state["c"]) is not None
        assert mapped.locate(state["a"][3000:]) is not None

    def test_a_neighbour_in_the_same_page_is_not_trusted(self, path: Path) -> None:
        state, mapped = load(path, a=torch.zeros(8), b=torch.ones(8))
        state["a"][0] = 1
        assert mapped.locate(state["b"]) is None
        assert as_bytes(state["b"]) == as_bytes(torch.ones(8))

    def test_a_long_tensor(self, path: Path) -> None:
        # More pages than the page table is read at once: 256 MiB.
        with open(path, "wb") as file:
            file.truncate(300 << 20)
        with closing(FileSet([path])) as source:
            mapping = FileMapping(source)
            whole = torch.empty(0, dtype=torch.uint8).set_(mapping.storage(0, 300 << 20))
            assert mapping.are_pristine([(0, 300 << 20)]) == [True]
            whole[-1] = 1
            assert mapping.are_pristine([(0, 300 << 20), (0, (300 << 20) - PAGE)]) == [False, True]

    def test_a_system_that_does_not_tell(
        self, loaded: tuple[dict[str, torch.Tensor], MappedCheckpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object) -> int:
            raise PermissionError

        state, mapped = loaded
        monkeypatch.setattr(os, "open", refuse)
        assert mapped.locate(state["a"]) is None

    def test_a_fork_sees_its_own_writes(self, path: Path) -> None:
        program = """
import os, torch
from lightning_memload.formats import load_mapped
torch.save({"a": torch.ones(4096)}, ARGS["path"])
state, mapped = load_mapped(ARGS["path"], weights_only=True)
assert mapped.locate(state["a"]) is not None  # opens this process's page table
child = os.fork()
if child == 0:
    before = mapped.locate(state["a"]) is not None
    state["a"].numpy()[0] = 2
    os._exit(0 if before and mapped.locate(state["a"]) is None else 1)
RESULT = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), mapped.locate(state["a"]) is not None]
"""
        assert run_fresh(program, path=path).result == [0, True]


class TestStorages:
    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, 0), (0, 101), (100, 1), (99, 2)])
    def test_beyond_the_file(self, path: Path, offset: int, nbytes: int) -> None:
        path.write_bytes(bytes(100))
        with closing(FileSet([path])) as source, pytest.raises(ValueError, match="100 mapped bytes"):
            FileMapping(source).storage(offset, nbytes)

    def test_referenced_bytes_follow_the_tensors(self, path: Path) -> None:
        state, mapped = load(path, a=torch.zeros(100), b=torch.ones(50))
        assert mapped.mapping.referenced_bytes == 600
        view = state["a"][5:]
        del state["a"]
        assert mapped.mapping.referenced_bytes == 600
        del view
        assert mapped.mapping.referenced_bytes == 200
        state.clear()
        assert mapped.mapping.referenced_bytes == 0


class TestDetach:
    def test_keeps_every_value_and_no_trace_of_the_file(self, path: Path) -> None:
        torch.save(layouts(), path)
        expected = torch.load(path)
        state, mapped = load_mapped(path, weights_only=True)
        state["view"].add_(1)  # written pages survive as well
        expected["view"].add_(1)
        addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
        assert traces(path) == (True, True)
        copied = mapped.mapping.detach()
        assert traces(path) == (False, False)
        assert 0 < copied < os.path.getsize(path) + PAGE
        assert {name: tensor.data_ptr() for name, tensor in state.items()} == addresses
        for name, tensor in state.items():
            assert as_bytes(tensor) == as_bytes(expected[name]), name
            assert mapped.locate(tensor) is None
        path.unlink()
        state["view"].zero_()
        assert mapped.mapping.detach() == 0

    def test_only_what_is_alive_is_copied(self, path: Path) -> None:
        state, mapped = load(path, a=torch.zeros(1 << 20), b=torch.ones(1 << 10), c=torch.ones(1 << 20))
        keep = state["b"]
        state.clear()
        assert mapped.mapping.detach() <= keep.nbytes + 2 * PAGE
        assert torch.equal(keep, torch.ones(1 << 10))

    def test_nothing_alive(self, path: Path) -> None:
        state, mapped = load(path, a=torch.zeros(1 << 20))
        state.clear()
        assert mapped.mapping.detach() == 0
        assert traces(path) == (False, False)

    def test_in_several_chunks(self, path: Path) -> None:
        program = """
import gc, torch
from lightning_memload.formats import load_mapped
from lightning_memload.memory import MemoryMonitor
from lightning_memload.memory.host import read_status
path, count = ARGS["path"], (100 << 20) // 8
torch.save({"drop": torch.zeros(1 << 20), "big": torch.arange(count), "small": torch.ones(3)}, path)
state, mapped = load_mapped(path, weights_only=True)
del state["drop"]
start = read_status().anonymous_bytes
with MemoryMonitor() as monitor:
    copied = mapped.mapping.detach()
peak = monitor.peaks.anonymous_peak_bytes - start
equal = torch.equal(state["big"], torch.arange(count))
state["big"].add_(1)
written = state["big"][-1].item() == count and state["big"][0].item() == 1
left = path in open("/proc/self/maps").read()
del mapped
again = state["small"].sum().item()
before = read_status().anonymous_bytes
state.clear(); gc.collect()
RESULT = [copied, peak, equal, written, left, again, before - read_status().anonymous_bytes]
"""
        copied, peak, equal, written, left, again, freed = run_fresh(program, path=path).result
        assert 100 << 20 <= copied <= (100 << 20) + 4 * PAGE
        assert peak <= copied + (32 << 20) + (4 << 20)
        assert (equal, written, left, again) == (True, True, False, 3.0)
        assert freed >= 100 << 20

    def test_a_failure_leaves_the_tensors_as_they_are(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_memload.storage import file_mapping as mapping

        def refuse(*args: object) -> None:
            raise OSError(12, "no memory")

        state, mapped = load(path, a=torch.arange(5000.0))
        with monkeypatch.context() as patch:
            patch.setattr(mapping, "move_memory", refuse)
            with pytest.raises(OSError, match="no memory"):
                mapped.mapping.detach()
        assert torch.equal(state["a"], torch.arange(5000.0))
        mapped.mapping.detach()
        assert torch.equal(state["a"], torch.arange(5000.0))
        assert traces(path) == (False, False)


class TestEndOfLife:
    def test_tensors_outlive_the_mapping_object(self, path: Path) -> None:
        state, mapped = load(path, a=torch.arange(3000.0))
        gone = weakref.ref(mapped.mapping)
        del mapped
        gc.collect()
        assert gone() is None
        assert torch.equal(state["a"], torch.arange(3000.0))
        state.clear()
        gc.collect()
        assert traces(path) == (False, False)

    @pytest.mark.parametrize("detach", [True, False])
    def test_many_cycles_leave_nothing(self, path: Path, detach: bool) -> None:
        torch.save({"a": torch.ones(20_000), "b": torch.ones(3)}, path)

        def figures() -> tuple[int, int]:
            gc.collect()
            return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())

        def cycle() -> None:
            state, mapped = load_mapped(path, weights_only=True)
            mapped.locate(state["a"])
            if detach:
                state.pop("b")
                mapped.mapping.detach()
            state["a"].add_(1)

        for _ in range(3):
            cycle()
        descriptors, maps = figures()
        for _ in range(60):
            cycle()
        assert figures()[0] == descriptors
        assert figures()[1] <= maps + 10

    def test_exit_handlers_may_read_the_parameters(self, path: Path) -> None:
        program = """
import atexit
def last():  # registered before anything is imported, so it runs after all others
    print(state["a"].sum().item(), flush=True)
atexit.register(last)
import sys, torch
from lightning_memload.formats import load_mapped
torch.save({"a": torch.ones(1 << 16)}, ARGS["path"])
state, mapped = load_mapped(ARGS["path"], weights_only=True)
sys.modules["kept"] = state
"""
        assert run_fresh(program, path=path).stdout.strip() == "65536.0"
