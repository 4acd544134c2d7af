"""Writing a directory of single tensors: little memory, all or nothing, and only what is used."""

from __future__ import annotations

import fcntl
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import verify_checkpoint
from lightning_memload.errors import CheckpointFormatError, CheckpointWriteError
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.pickles.pickling import SavedStorage
from lightning_memload.save import directory as writer
from lightning_memload.save import save_directory, save_torch
from lightning_memload.storage import replacement
from tests.fresh_process import run_fresh
from tests.save.steps import of_step, step_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def data_files(path: Path) -> dict[str, int]:
    return {name: (path / "tensors" / name).stat().st_size for name in sorted(os.listdir(path / "tensors"))}


class TestWhatIsWritten:
    def test_ties_share_a_file_and_views_bring_only_their_span(self, path: Path) -> None:
        large, tied = torch.arange(100_000.0), torch.ones(6, 6)
        save_directory(
            {"view": large[500:600], "other": large[550:700:2], "tied": tied, "row": tied[3], "again": tied,
             "nothing": large[9:9], "scalar": torch.arange(1000)[999]},
            path,
        )  # fmt: skip
        assert data_files(path) == {"00000.bin": 812, "00001.bin": 144, "00002.bin": 64}
        loaded, _ = load_mapped(path, weights_only=True)
        assert loaded["view"].tolist() == large[500:600].tolist()
        assert loaded["other"].tolist() == large[550:700:2].tolist()
        assert loaded["view"][50:].data_ptr() == loaded["other"].data_ptr()
        assert loaded["again"] is loaded["tied"]
        assert loaded["row"].data_ptr() == loaded["tied"].data_ptr() + 72
        assert (loaded["nothing"].shape, loaded["scalar"].item()) == ((0,), 999)

    def test_views_of_several_widths(self, path: Path) -> None:
        """Types without a storage class of their own may share one; what is cut off must suit them all."""
        raw = torch.arange(250, dtype=torch.uint8)
        saved = {"narrow": raw[100:200].view(torch.uint16), "wide": raw[104:200].view(torch.uint64)}
        save_directory(saved, path)
        loaded, _ = load_mapped(path, weights_only=True)
        assert data_files(path) == {"00000.bin": 200 - 64}
        assert all(
            torch.equal(loaded[name].view(torch.uint8), value.view(torch.uint8)) for name, value in saved.items()
        )

    def test_pieces_through_the_staging_buffer(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As from a device, on any machine: tests/gpu has the real thing."""
        weight = torch.randn((9 << 18) + 1)
        saved = {"weight": weight, "view": weight[5 << 18 : 6 << 18], "small": torch.ones(3)}
        with monkeypatch.context() as patch:
            patch.setattr(SavedStorage, "is_in_host_memory", property(lambda self: False))
            stats = save_directory(saved, path, host_budget_bytes=4 << 20, num_threads=3)
        assert 0 < stats.staging_bytes <= 4 << 20
        loaded, _ = load_mapped(path, weights_only=True)
        assert torch.equal(loaded["weight"], weight)
        assert torch.equal(loaded["view"], weight[5 << 18 : 6 << 18])
        assert loaded["small"].tolist() == [1, 1, 1]

    def test_what_an_object_makes_while_it_is_saved(self, path: Path) -> None:
        save_directory({"made": Making(), "weight": torch.ones(3)}, path)
        loaded, _ = load_mapped(path, weights_only=False)
        assert loaded["made"].tensor.tolist() == [0, 1, 2, 3, 4]
        assert len(data_files(path)) == 2

    def test_a_tensor_whose_memory_was_taken_away(self, path: Path) -> None:
        tensor = torch.ones(50)
        tensor.untyped_storage().resize_(0)
        save_directory({"kept": torch.ones(2)}, path)
        with pytest.raises(CheckpointFormatError, match="does not fit its storage of 0 bytes"):
            save_directory({"gone": tensor}, path)
        assert [tensor.name for tensor in open_checkpoint(path)] == ["kept"]

    def test_everything_is_on_disk_before_it_has_its_name(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[str] = []
        original = os.fsync

        def note(descriptor: int) -> None:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            synced.append("/".join(part for part in Path(name).parts[-2:] if not part.endswith(".tmp")))
            assert path.exists() == (name == str(path.parent))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        save_directory(of_step(1), path)
        files = {"tensors/00000.bin", "tensors/00001.bin", "state.pt", "manifest.json"}
        assert files < set(synced)
        assert len(synced) == len(files) + 3
        assert synced[-1].endswith(path.parent.name)


class Making:
    tensor: torch.Tensor

    def __getstate__(self) -> dict[str, Any]:
        return {"tensor": torch.arange(5)}


@pytest.mark.memory
def test_memory_of_writing(path: Path) -> None:
    program = """
import torch
from lightning_memload.memory import MemoryMonitor
from lightning_memload.memory.host import read_status
from lightning_memload.save import save_directory
save_directory({"a": torch.ones(9).t()}, ARGS["path"])
state = {number: torch.full((100 << 18,), float(number)) for number in range(3)}
RESULT = []
def by_bytes():
    import io
    torch.save(state, io.BytesIO())
for write in (lambda: save_directory(state, ARGS["path"]), by_bytes):
    start = read_status().anonymous_bytes
    with MemoryMonitor() as monitor:
        write()
    RESULT.append(monitor.peaks.anonymous_peak_bytes - start)
"""
    ours, naive = run_fresh(program, path=path).result
    assert ours <= 16 << 20
    assert naive >= 290 << 20
    assert sum(data_files(path).values()) == 300 << 20


class TestManyStorages:
    def test_the_smallest_stay_together(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(writer, "_MAX_FILES", 2)
        large = torch.arange(5000.0)
        state = {"a": torch.ones(3), "b": large[100:900], "c": torch.zeros(2000), "d": torch.full((900,), 2.0)}
        state |= {"tied": state["a"], "none": torch.empty(0), "view": large[500:]}
        save_directory(state, path)
        assert data_files(path) == {"00001.bin": 4 * 4900 + 400 % 64, "00002.bin": 8000}
        assert verify_checkpoint(path).is_verified
        loaded, mapped = load_mapped(path, weights_only=True)
        for name, value in state.items():
            assert torch.equal(loaded[name], value)
            assert loaded[name].stride() == value.stride()
        assert loaded["tied"].data_ptr() == loaded["a"].data_ptr()
        assert loaded["view"].data_ptr() == loaded["b"].data_ptr() + 1600
        mapped.detach()
        stats = save_directory({**state, "c": torch.ones(2000)}, path, link_unchanged_from=path)
        assert stats.bytes_linked == data_files(path)["00001.bin"]

    def test_an_object_that_differs_from_one_pickling_to_the_next(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "_MAX_FILES", 1)
        save_directory({"made": Made(), "a": torch.ones(3)}, path)
        assert data_files(path) == {}
        loaded, mapped = load_mapped(path, weights_only=False)
        assert torch.equal(loaded["made"].tensor, torch.full((1000,), 7.0))
        assert torch.equal(loaded["a"], torch.ones(3))
        mapped.detach()


class Made:
    """Pickles a tensor that it makes for the occasion."""

    def __getstate__(self) -> dict[str, torch.Tensor]:
        return {"tensor": torch.full((1000,), 7.0)}


class TestReplacing:
    def test_old_for_new_and_nothing_left(self, path: Path) -> None:
        for step in range(3):
            save_directory(of_step(step), path)
            assert step_of(path) == step
            assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("exchanges", [True, False])
    def test_a_checkpoint_of_another_format(self, path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not exchanges:
            monkeypatch.setattr(replacement, "_exchange", lambda first, second: False)
        saves: list[Any] = [
            save_torch,
            save_directory,
            save_torch,
            partial(save_directory, safetensors=True),
            save_torch,
        ]
        for step, save in enumerate(saves):
            save(of_step(step), path)
            assert step_of(path) == step
            assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("save", [save_torch, save_directory])
    def test_a_failure_leaves_one_of_another_format(
        self, path: Path, save: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        other: Any = save_directory if save is save_torch else save_torch
        other(of_step(1), path)
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            save(of_step(2), path)
        assert step_of(path) == 1
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("can_link", [True, False])
    def test_what_is_not_of_the_checkpoint_stays(
        self, path: Path, can_link: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any, **options: Any) -> None:
            raise OSError(1, "Operation not permitted")

        if not can_link:
            monkeypatch.setattr(os, "link", refuse)
        save_directory(of_step(1), path)
        (path / "config.json").write_text("{}")
        (path / "notes" / "deep").mkdir(parents=True)
        (path / "notes" / "deep" / "thesis.tex").write_text("text")
        (path / "current").symlink_to("notes")
        for safetensors in (False, True, False):
            save_directory(of_step(2), path, safetensors=safetensors)
            assert step_of(path) == 2
            assert (path / "config.json").read_text() == "{}"
            assert (path / "notes" / "deep" / "thesis.tex").read_text() == "text"
            assert os.readlink(path / "current") == "notes"
            own = ["model.safetensors"] if safetensors else ["tensors"]
            assert sorted(os.listdir(path)) == sorted(
                [*own, "config.json", "current", "manifest.json", "notes", "state.pt"]
            )
        with pytest.raises(CheckpointWriteError, match="Is a directory"):
            save_torch(of_step(3), path)
        assert step_of(path) == 2
        assert os.listdir(path.parent) == [path.name]

    def test_a_file_puts_back_what_a_killed_writer_renamed(self, path: Path) -> None:
        save_directory(of_step(1), path)
        os.rename(path, path.parent / f".{path.name}.0123456789ab.previous")
        save_torch(of_step(2), path)
        assert step_of(path) == 2
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("exchanges", [True, False])
    @pytest.mark.parametrize("safetensors", [False, True])
    def test_a_link_is_replaced_and_its_target_stays(
        self, path: Path, tmp_path: Path, safetensors: bool, exchanges: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not exchanges:
            monkeypatch.setattr(replacement, "_exchange", lambda first, second: False)
        save_directory(of_step(1), path, safetensors=safetensors)
        run = tmp_path / "run"
        run.mkdir()
        (run / "last").symlink_to(path)
        (run / "dangling").symlink_to("nowhere")
        for name in ("last", "dangling"):
            save_directory(of_step(2), f"{run}/{name}/", safetensors=safetensors)
            assert not (run / name).is_symlink()
            assert step_of(run / name) == 2
        assert step_of(path) == 1
        assert sorted(os.listdir(run)) == ["dangling", "last"]

    def test_in_a_folder_that_is_a_link(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "run").symlink_to(path.parent, target_is_directory=True)
        save_directory(of_step(1), tmp_path / "run" / path.name)
        assert (tmp_path / "run").is_symlink()
        assert step_of(path) == 1

    def test_a_process_killed_at_any_moment(self, path: Path) -> None:
        program = """
import os, shutil, signal, warnings
from lightning_memload.save import save_directory
from lightning_memload.storage import replacement
from lightning_memload.save import directory as writer
from tests.save.steps import of_step, step_of
from pathlib import Path
warnings.simplefilter("ignore")
path = Path(ARGS["path"])
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def after(function):
    def call(*args, **kwargs):
        function(*args, **kwargs)
        die()
    return call
def half_removed(folder, **kwargs):
    os.unlink(os.path.join(folder, "state.pt"))
    die()
patches = [
    (writer.LinkingFiles, "write", die), (writer, "make_manifest", die), (replacement, "_put_in_place", die),
    (replacement, "_exchange", after(replacement._exchange)), (shutil, "rmtree", die), (shutil, "rmtree", half_removed),
]
RESULT = []
for module, name, replacement in patches:
    save_directory(of_step(1), path)
    child = os.fork()
    if child == 0:
        setattr(module, name, replacement)
        save_directory(of_step(2), path)
        os._exit(1)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found, beside = step_of(path), len(os.listdir(path.parent)) - 1
    save_directory(of_step(3), path)
    RESULT.append([killed, found, beside, step_of(path), len(os.listdir(path.parent)) - 1])
"""
        old, new = [-9, 1, 1, 3, 0], [-9, 2, 1, 3, 0]
        assert run_fresh(program, path=path).result == [old, old, old, new, new, new]

    def test_a_living_writer_is_left_alone(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        waiting, go_on = threading.Event(), threading.Event()
        original = writer.make_manifest

        def wait(*args: Any) -> bytes:
            if threading.current_thread() is slow:
                waiting.set()
                assert go_on.wait(60)
            return original(*args)

        monkeypatch.setattr(writer, "make_manifest", wait)
        slow = threading.Thread(target=save_directory, args=(of_step(1), path))
        slow.start()
        assert waiting.wait(60)
        save_directory(of_step(2), path)
        assert step_of(path) == 2
        assert len(os.listdir(path.parent)) == 2
        go_on.set()
        slow.join()
        assert step_of(path) == 1
        assert os.listdir(path.parent) == [path.name]

    def test_a_directory_that_another_writer_sweeps_at_once(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flock = fcntl.flock
        removed: list[Any] = []

        def swept(descriptor: int, operation: int) -> None:
            if not removed:
                removed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
                os.rmdir(removed[0])
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", swept)
        save_directory(of_step(1), path)
        assert removed[0].endswith(".tmp")
        assert step_of(path) == 1

    def test_neighbours_are_not_ours(self, path: Path) -> None:
        leftover = f".memload-{replacement._boot()}-0123456789abcdef.tmp"
        others = [f"{leftover}.txt", ".other.0123456789ab.previous", f".{path.name}.xyz.previous"]
        for name in others:
            (path.parent / name).mkdir()
        (path.parent / leftover).symlink_to(path.parent / others[0])
        save_directory(of_step(1), path)
        assert len(os.listdir(path.parent)) == 5

    @pytest.mark.parametrize("failing", ["object", "disk"])
    def test_a_failure_leaves_the_old_one(self, path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        save_directory(of_step(1), path)
        if failing == "disk":
            monkeypatch.setattr(os, "fsync", refuse)
        error = OSError if failing == "disk" else Exception
        with pytest.raises(error, match="No space left" if failing == "disk" else "lambda"):
            save_directory({**of_step(2), **({"bad": lambda: 1} if failing == "object" else {})}, path)
        assert step_of(path) == 1
        assert os.listdir(path.parent) == [path.name]

    def test_other_things_are_not_replaced(self, path: Path, tmp_path: Path) -> None:
        path.mkdir()
        save_directory(of_step(1), path)  # an empty directory is nothing to lose
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "thesis.tex").write_text("text")
        (tmp_path / "file").write_text("text")
        for name in ("notes", "file"):
            with pytest.raises(FileExistsError, match="is neither a checkpoint directory"):
                save_directory(of_step(2), tmp_path / name)
        assert (tmp_path / "notes" / "thesis.tex").read_text() == "text"


class TestWithoutExchange:
    """File systems that cannot exchange two names."""

    @pytest.fixture(autouse=True)
    def refusing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replacement, "_exchange", lambda first, second: False)

    def test_old_for_new(self, path: Path) -> None:
        for step in range(3):
            save_directory(of_step(step), path)
            assert step_of(path) == step
        assert os.listdir(path.parent) == [path.name]

    def test_a_failure_between_the_two_steps(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_directory(of_step(1), path)
        original = os.rename

        def refuse(source: str, target: str) -> None:
            if source.endswith(".tmp") and not os.path.exists(target):
                raise OSError(5, "Input/output error")
            original(source, target)

        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            save_directory(of_step(2), path)
        assert step_of(path) == 1
        assert os.listdir(path.parent) == [path.name]

    def test_a_process_killed_between_the_two_steps(self, path: Path) -> None:
        save_directory(of_step(1), path)
        path.rename(path.parent / f".{path.name}.0123456789ab.previous")
        with pytest.raises(FileNotFoundError):
            open_checkpoint(path)
        with pytest.raises(AttributeError):
            save_directory({"bad": lambda: 1}, path)
        assert step_of(path) == 1
        assert os.listdir(path.parent) == [path.name]


def test_without_locks_nothing_is_swept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(37, "No locks available")

    leftover = path.parent / f".memload-{replacement._boot()}-0123456789abcdef.tmp"
    leftover.mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    save_directory(of_step(1), path)
    assert step_of(path) == 1
    assert leftover.exists()
