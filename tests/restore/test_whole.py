"""Small checkpoints of many tensors, which are read as a whole: as stock loads them, verified, and free of the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_memload import CheckpointReadError, ChecksumError, load_weights, open_checkpoint
from lightning_memload.restore import RestoreSession, whole
from lightning_memload.restore.optimizer import OptimizerRestore
from lightning_memload.restore.weights_source import open_any
from lightning_memload.restore.whole import WholeCheckpoint
from lightning_memload.transfer import start_ring
from tests.formats.files import as_bytes

CPU = torch.device("cpu")
MANY = 1000


class Bag(nn.Module):
    """Many parameters, of several shapes and types, and a few buffers."""

    def __init__(self, seed: int, number: int = MANY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        dtypes = (torch.float32, torch.float64, torch.bfloat16)
        for index in range(number):
            shape = ((3,), (2, 3), ())[index % 3]
            value = torch.randn(shape, generator=generator).to(dtypes[index % 7 % 3])
            self.register_parameter(f"w{index}", nn.Parameter(value))
        self.register_buffer("flags", torch.randint(2, (5,), generator=generator).bool())
        self.register_buffer("empty", torch.empty(0, 2))


def save_torch(module: nn.Module, path: Path) -> None:
    torch.save(module.state_dict(), path)


def save_safetensors(module: nn.Module, path: Path) -> None:
    save_file(dict(module.state_dict()), path)


SAVERS: dict[str, Callable[[nn.Module, Path], None]] = {"pt": save_torch, "safetensors": save_safetensors}


@pytest.fixture(params=SAVERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of ``Bag(1)`` in each format."""
    path = tmp_path / f"weights.{request.param}"
    SAVERS[request.param](Bag(1), path)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A checkpoint of ``Bag(1)`` with checksums."""
    path = tmp_path / "weights.pt"
    save_torch(Bag(1), path)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[WholeCheckpoint]:
    """The checkpoints that were read as a whole."""
    found: list[WholeCheckpoint] = []
    read = WholeCheckpoint.read

    def reading(*args: Any, **kwargs: Any) -> WholeCheckpoint | None:
        result = read(*args, **kwargs)
        found.extend([result] if result is not None else [])
        return result

    monkeypatch.setattr(WholeCheckpoint, "read", reading)
    return found


def frozen(module: nn.Module) -> dict[str, bytes]:
    return {name: as_bytes(value) for name, value in module.state_dict().items()}


def damage(path: Path, name: str) -> None:
    data = bytearray(path.read_bytes())
    data[open_checkpoint(path)[name].storage.offset + 1] ^= 1
    path.write_bytes(data)


def test_like_torch(path: Path, reads: list[WholeCheckpoint]) -> None:
    module = Bag(2)
    parameters = list(module.parameters())
    load_weights(module, path)
    assert frozen(module) == frozen(Bag(1))
    assert all(new is old for new, old in zip(module.parameters(), parameters, strict=True))
    assert len(reads) == 1
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_parameters_of_other_types_get_what_torch_gives_them(path: Path, reads: list[WholeCheckpoint]) -> None:
    module, expected = Bag(2).half(), Bag(3).half()
    expected.load_state_dict(Bag(1).state_dict())
    load_weights(module, path)
    assert frozen(module) == frozen(expected)
    assert reads


def test_tied_and_overlapping_parameters(tmp_path: Path, reads: list[WholeCheckpoint]) -> None:
    """torch copies in its own order: the last value stays."""

    def tied(seed: int) -> Bag:
        module = Bag(seed)
        module.w3 = module.w0
        module.w6 = nn.Parameter(module.w9.detach()[:2])
        return module

    saved, module, expected = Bag(1), tied(2), tied(2)
    del saved.w6
    state = {**saved.state_dict(), "w6": torch.tensor([7.0, 8.0], dtype=module.get_parameter("w6").dtype)}
    torch.save(state, tmp_path / "weights.pt")
    load_weights(module, tmp_path / "weights.pt")
    expected.load_state_dict(state)
    assert frozen(module) == frozen(expected)
    assert reads


@pytest.mark.parametrize(
    "limits", [{"_MANY": MANY + 10}, {"_WHOLE_BYTES": 1000}], ids=["few tensors", "a large checkpoint"]
)
def test_others_are_streamed(
    limits: dict[str, int], path: Path, reads: list[WholeCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(whole, name, value)
    module = Bag(2)
    load_weights(module, path)
    assert frozen(module) == frozen(Bag(1))
    assert not reads


@pytest.mark.parametrize("mode", ["copy", "assign"])
def test_modules_on_meta_and_pages_are_not_torchs_to_fill(mode: Any, path: Path, reads: list[WholeCheckpoint]) -> None:
    module = Bag(2)
    if mode == "copy":
        module.w7 = nn.Parameter(torch.empty_like(module.get_parameter("w7"), device="meta"))
    load_weights(module, path, mode=mode)
    assert frozen(module) == frozen(Bag(1))
    assert not reads


def test_a_checkpoint_above_the_budget_is_streamed(path: Path, reads: list[WholeCheckpoint]) -> None:
    _, mapped = open_any(path, True)
    assert whole.is_worth_reading(mapped, mapped.source.nbytes)
    assert not whole.is_worth_reading(mapped, mapped.source.nbytes - 1)
    mapped.detach()


def test_damage_is_named(archive: Path) -> None:
    damage(archive, "w500")
    module = Bag(2)
    with pytest.raises(ChecksumError, match=r"of w500 at byte") as caught:
        load_weights(module, archive)
    assert caught.value.key == "w500"
    assert frozen(module) == frozen(Bag(2))
    load_weights(module, archive, verify=False)


def test_what_the_module_does_not_take_may_be_damaged(archive: Path, reads: list[WholeCheckpoint]) -> None:
    damage(archive, "w500")
    module = Bag(2)
    load_weights(module, archive, exclude="^w500$")
    expected = {**frozen(Bag(1)), "w500": as_bytes(Bag(2).get_parameter("w500"))}
    assert frozen(module) == expected
    assert reads


class TestSession:
    """A user may change the loaded tensors, and others the file, before a value is used."""

    @pytest.fixture
    def opened(self, archive: Path) -> Any:
        state, mapped = open_any(archive, True)
        ring = start_ring(CPU, 128 << 20)
        session = RestoreSession(mapped, device=CPU, ring=ring)
        yield state, session
        session.close(detach=False)

    def test_a_written_tensor_keeps_what_was_written(self, opened: Any) -> None:
        state, session = opened
        state["w9"].fill_(5.0)
        assert session.read_whole()
        assert torch.equal(state["w9"], torch.full_like(state["w9"], 5.0))
        expected = Bag(1).state_dict()
        for name, value in state.items():
            assert name == "w9" or as_bytes(value) == as_bytes(expected[name]), name

    def test_a_written_tensor_is_not_compared(self, archive: Path, opened: Any) -> None:
        state, session = opened
        damage(archive, "w9")
        state["w9"].fill_(5.0)
        assert session.read_whole()

    def test_everything_is_counted(self, archive: Path, opened: Any) -> None:
        state, session = opened
        session.read_whole()
        assert session.stats.bytes_read == archive.stat().st_size
        assert session.stats.bytes_verified == sum(value.nbytes for value in state.values())
        assert session.bytes_copied_ordinarily == 0

    def test_the_file_may_be_truncated_afterwards(self, archive: Path, opened: Any) -> None:
        state, session = opened
        session.read_whole()
        os.truncate(archive, 100)
        expected = Bag(1).state_dict()
        assert all(as_bytes(value) == as_bytes(expected[name]) for name, value in state.items())

    def test_a_file_that_was_truncated_before_is_an_error(self, archive: Path, opened: Any) -> None:
        _, session = opened
        os.truncate(archive, 5000)
        with pytest.raises(CheckpointReadError, match="truncated while it was restored"):
            session.read_whole()

    def test_a_session_that_was_closed_reads_nothing(self, opened: Any) -> None:
        _, session = opened
        session.close()
        assert not session.read_whole()


def make_trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.ParameterList(torch.full((2,), float(number)) for number in range(MANY // 2))
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
def test_optimizer_states_get_memory_of_their_own(share: bool, tmp_path: Path) -> None:
    """Each a storage of its own that is no longer the file's, but for those that shared one in the checkpoint."""
    module, optimizer = make_trained()
    state_dict = optimizer.state_dict()
    if share:
        steps = torch.ones(MANY // 2)
        for number, state in state_dict["state"].items():
            state["step"] = steps[number]
    path = tmp_path / "optimizer.ckpt"
    torch.save({"state_dict": module.state_dict(), "optimizer": state_dict}, path)
    loaded, mapped = open_any(path, True)
    session = RestoreSession(mapped, device=CPU, ring=start_ring(CPU, 128 << 20))
    assert session.read_whole()
    _, restored = make_trained()
    hooks = OptimizerRestore([restored], session, loaded=loaded)
    restored.load_state_dict(loaded["optimizer"])
    hooks.remove()
    del loaded
    assert session.close() == 0
    ours, theirs = restored.state_dict()["state"], state_dict["state"]
    for number, state in theirs.items():
        assert {name: as_bytes(value) for name, value in ours[number].items()} == {
            name: as_bytes(value) for name, value in state.items()
        }
    storages = {value.untyped_storage().data_ptr() for state in ours.values() for value in state.values()}
    assert len(storages) == (MANY + 1 if share else 3 * MANY // 2)
    resizable = [value.untyped_storage().resizable() for state in ours.values() for value in state.values()]
    assert all(resizable)
