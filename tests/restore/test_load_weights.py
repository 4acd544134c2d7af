"""load_weights: any module, any part of a checkpoint, nothing read or changed that is not asked for."""

from __future__ import annotations

import copy
import errno
import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_memload import (
    CheckpointFormatError,
    ChecksumError,
    IncompatibleWeightsError,
    InsufficientMemoryError,
    MetaTensorError,
    UnsafeGlobalsError,
    load_weights,
    meta_init,
    open_checkpoint,
    save_directory,
)
from lightning_memload.restore import (
    RestoreSession,
    free_memory,
    given_pages,
    overlaps,
    record_checks,
    session,
    targets,
)
from lightning_memload.transfer.engine import Transfer
from tests.formats.files import as_bytes
from tests.fresh_process import run_fresh

MIB = 1 << 20


class Net(nn.Module):
    """A body with a buffer of each kind, and a head that may be tied to it."""

    def __init__(self, classes: int = 5, tied: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 11 if tied else classes, bias=not tied)
        if tied:
            self.head.weight = self.body[0].weight  # type: ignore[assignment]
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pt"


@pytest.fixture(params=["small", "streamed"])
def is_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tiny tensors of modules that load in their own way are torch's to copy, or streamed as large ones are."""
    if request.param == "streamed":
        monkeypatch.setattr(session, "_SMALL_BYTES", -1)
    return bool(request.param == "small")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that every session read."""
    counted: list[int] = []
    close = RestoreSession.close

    def closing(self: RestoreSession, **kwargs: Any) -> int:
        counted.append(self.stats.bytes_read)
        return close(self, **kwargs)

    monkeypatch.setattr(RestoreSession, "close", closing)
    return counted


def assert_equal(module: nn.Module, expected: nn.Module) -> None:
    ours, theirs = module.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert as_bytes(value) == as_bytes(theirs[name]), name


def frozen(module: nn.Module) -> dict[str, bytes]:
    return {name: as_bytes(value) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("mode", ["copy", "assign"])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_like_torch(path: Path, mode: Any, meta: bool, tied: bool) -> None:
    saved = Net(tied=tied)
    torch.save(saved.state_dict(), path)
    with meta_init(meta):
        module = Net(tied=tied)
    parameters = list(module.parameters())
    keys = load_weights(module, path, mode=mode)
    assert keys.missing_keys == []
    assert keys.unexpected_keys == []
    assert_equal(module, saved)
    assert all(ours is before for ours, before in zip(module.parameters(), parameters, strict=True))
    assert torch.equal(module.table, torch.arange(4.0))  # type: ignore[arg-type]
    module.body[1](torch.ones(2, 8)).sum().backward()


def test_nothing_of_the_file_is_left(path: Path) -> None:
    torch.save(Net().state_dict(), path)
    load_weights(Net(), path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    descriptors = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if number != "3"
                   and os.path.exists(f"/proc/self/fd/{number}")]  # fmt: skip
    assert str(path) not in descriptors


class TestWhere:
    @pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "module", "params", "weights"])
    def test_found_by_itself(self, path: Path, name: str) -> None:
        saved = Net()
        torch.save({"epoch": 3, name: saved.state_dict(), "optimizer": {"state": {}}}, path)
        module = Net()
        load_weights(module, path)
        assert_equal(module, saved)

    def test_tensors_beside_it_make_no_state_dict_of_the_checkpoint(self, path: Path) -> None:
        torch.save({"state_dict": Net().state_dict(), "best_acc1": torch.tensor(0.7), "epoch": 3}, path)
        assert load_weights(Net(), path) == ([], [])

    @pytest.mark.parametrize("key", ["ema.params", "a.b"])
    def test_by_key(self, path: Path, key: str) -> None:
        saved = Net()
        content: dict[str, Any] = {"state_dict": Net().state_dict(), "ema": {"params": saved.state_dict()}}
        content["a.b"] = saved.state_dict()  # a key with a dot of its own
        torch.save(content, path)
        module = Net()
        load_weights(module, path, key=key)
        assert_equal(module, saved)

    @pytest.mark.parametrize("key", ["ema", "epoch", "state_dict.body", "state_dict.body.1.weight"])
    def test_not_there(self, path: Path, key: str) -> None:
        torch.save({"epoch": 3, "state_dict": Net().state_dict()}, path)
        with pytest.raises(
            CheckpointFormatError, match=rf"No state dict is at '{key}' in .*whose top level has 'epoch'"
        ):
            load_weights(Net(), path, key=key)

    def test_none_at_all(self, path: Path) -> None:
        torch.save({"epoch": 3, "optimizer": {"lr": 1.0}}, path)
        with pytest.raises(CheckpointFormatError, match=r"No state dict is found.*'epoch', 'optimizer'"):
            load_weights(Net(), path)
        torch.save(torch.ones(3), path)
        with pytest.raises(CheckpointFormatError, match=r"No state dict is found.*a Tensor"):
            load_weights(Net(), path)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
    def test_a_subclass_that_torch_builds_by_itself(self, path: Path) -> None:
        expected, module = Net(), Net()
        masked = torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))
        torch.save({"state_dict": expected.state_dict(), "masked": masked}, path)
        with pytest.warns(UserWarning, match="subclass that torch builds in the ordinary way only"):
            load_weights(module, path, weights_only=False)
        assert_equal(module, expected)

    def test_a_legacy_file_is_loaded_with_a_warning(self, path: Path) -> None:
        saved = Net()
        torch.save(saved.state_dict(), path, _use_new_zipfile_serialization=False)
        with meta_init():
            module = Net()
        with pytest.warns(UserWarning, match="the whole checkpoint in host memory"):
            load_weights(module, path)
        assert_equal(module, saved)


class TestNames:
    def test_prefix_and_patterns(self, path: Path) -> None:
        saved = Net()
        renamed = {
            "model." + name.replace("body.1.", "encoder.layer.").replace("head", "lm_head"): value
            for name, value in saved.state_dict().items()
        }
        torch.save(renamed, path)
        module = Net()
        load_weights(module, path, strip_prefix="model.", rename={r"encoder\.layer\.": "body.1.", r"^lm_head": "head"})
        assert_equal(module, saved)

    def test_a_collision(self, path: Path) -> None:
        torch.save({"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, path)
        with pytest.raises(ValueError, match=r"gives 'a\.weight' and 'b\.weight' the same name 'weight'"):
            load_weights(nn.LayerNorm(2), path, rename={r"^[ab]\.": ""})

    @pytest.mark.parametrize("argument", ["include", "exclude", "rename"])
    def test_no_regular_expression(self, path: Path, argument: str) -> None:
        torch.save(Net().state_dict(), path)
        value: Any = {"(": ""} if argument == "rename" else "("
        with pytest.raises(ValueError, match=rf"{argument}: '\(' is no regular expression"):
            load_weights(Net(), path, **{argument: value})

    def test_missing_and_unexpected_are_named_and_nothing_changes(self, path: Path) -> None:
        state = Net().state_dict()
        del state["head.weight"], state["scale"]
        state["extra"] = torch.ones(1)
        torch.save(state, path)
        module = Net()
        before = frozen(module)
        with pytest.raises(
            IncompatibleWeightsError, match=r"2 missing: head\.weight, scale|2 missing: scale, head"
        ) as caught:
            load_weights(module, path)
        assert "1 unexpected: extra" in str(caught.value)
        assert "Nothing was changed" in str(caught.value)
        assert set(caught.value.missing_keys) == {"head.weight", "scale"}
        assert caught.value.unexpected_keys == ("extra",)
        assert frozen(module) == before

    def test_not_strict(self, path: Path) -> None:
        saved = Net()
        state = saved.state_dict()
        del state["head.weight"], state["head.bias"]
        state["extra"] = torch.ones(1)
        torch.save(state, path)
        with meta_init():
            module = Net()
        keys = load_weights(module, path, strict=False)
        assert set(keys.missing_keys) == {"head.weight", "head.bias"}
        assert keys.unexpected_keys == ["extra"]
        bound = 8**-0.5
        assert 0 < module.head.weight.abs().max() <= bound  # as nn.Linear initialises it

    def test_a_tied_parameter_may_be_in_the_file_once(self, path: Path) -> None:
        saved = Net(tied=True)
        state = saved.state_dict()
        del state["head.weight"]
        torch.save(state, path)
        with meta_init():
            module = Net(tied=True)
        assert load_weights(module, path).missing_keys == ["head.weight"]
        assert_equal(module, saved)
        assert module.head.weight is module.body[0].weight

    def test_all_shapes_together(self, path: Path) -> None:
        torch.save(Net(classes=7).state_dict(), path)
        module = Net()
        before = frozen(module)
        with pytest.raises(IncompatibleWeightsError) as caught:
            load_weights(module, path, strict=False)
        assert caught.value.mismatched_shapes == {"head.weight": ((7, 8), (5, 8)), "head.bias": ((7,), (5,))}
        assert "head.weight has shape (5, 8) in the module and (7, 8) on disk" in str(caught.value)
        assert frozen(module) == before

    def test_modules_that_load_in_their_own_way(self, path: Path) -> None:
        class Renames(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(3))

            def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
                if prefix + "old" in state_dict:
                    state_dict[prefix + "weight"] = state_dict.pop(prefix + "old")
                super()._load_from_state_dict(state_dict, prefix, *args)

        module = nn.Sequential(Renames(), nn.Linear(2, 2))
        state = {**module.state_dict(), "0.old": torch.arange(3.0)}
        del state["0.weight"]
        torch.save(state, path)
        load_weights(module, path)
        assert torch.equal(module[0].weight, torch.arange(3.0))  # type: ignore[arg-type]
        del state["0.old"]
        torch.save(state, path)
        with pytest.raises(IncompatibleWeightsError, match=r"1 missing: 0\.weight\nOther weights were loaded"):
            load_weights(module, path)


def test_what_failed_is_gone_without_the_garbage_collector(path: Path) -> None:
    module = Net()
    torch.save(module.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[next(iter(open_checkpoint(path).storages)).offset + 1] ^= 1
    path.write_bytes(data)
    counts = []
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(ChecksumError):
                load_weights(module, path)
            counts.append((len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(str(path))))
    finally:
        gc.enable()
    assert counts[0] == counts[-1]
    assert counts[0][1] == 0


class Versioned(nn.Module):
    """Converts what its first version saved, told by the version in the state dict, as torch documents it."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = -state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Transposes(nn.Module):
    """Hands a view of what it gets on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(300, 300))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t()
        super()._load_from_state_dict(state_dict, prefix, *args)


def swap(state: dict[str, Any], a: str, b: str) -> None:
    state[a], state[b] = state[b], state[a]


def copy_and_change(state: dict[str, Any], a: str, b: str) -> None:
    state[b] = state[a]
    state[a] = state[a] + 1


AFTERWARDS: dict[str, Callable[[dict[str, Any], str, str], object]] = {
    "swaps": swap,
    "copies": copy_and_change,
    "changes": lambda state, a, b: state[a].mul_(2),
    "transposes": lambda state, a, b: state.update({a: state[a].t()}),
    "goes through numpy": lambda state, a, b: state.update({a: torch.from_numpy(state[a].numpy() * 2)}),
    "fuses": lambda state, a, b: state.update({a: state[a] / 3 + state[b]}),
}


class GoesOn(nn.Module):
    """Changes what its children get, after it has called torch's."""

    def __init__(self, then: str) -> None:
        super().__init__()
        self.then = AFTERWARDS[then]
        self.own = nn.Parameter(torch.randn(3))
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.then(state_dict, f"{prefix}a.weight", f"{prefix}b.0.weight")


class RenamedEmbedding(nn.Embedding):
    """Has a way of its own, which does nothing here."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "old" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "old")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Tied(nn.Module):
    """One weight, or one memory, under two names, of which one loads in its own way."""

    def __init__(self, own_way_first: bool, one_object: bool) -> None:
        super().__init__()
        kinds = (RenamedEmbedding, nn.Embedding) if own_way_first else (nn.Embedding, RenamedEmbedding)
        self.a, self.b = (kind(4, 4) for kind in kinds)
        self.b.weight = self.a.weight if one_object else nn.Parameter(self.a.weight.data)


class ResetsLater(nn.Module):
    """Changes what torch loads after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: Any) -> None:
        self.a.reset_parameters()


class Online(nn.Linear):
    """Copies itself to a target that torch loads after it."""

    target: list[nn.Linear]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.target[0].weight.copy_(self.weight)


class Anchor(nn.Linear):
    """Keeps what it was loaded with, and changes the state dict, which is nothing to its weight."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.anchor = state_dict[f"{prefix}weight"]
        with torch.no_grad():
            state_dict[f"{prefix}bias"].mul_(3)


class Touches(nn.Module):
    """Changes the weight of another one."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]

    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: Any) -> None:
        with torch.no_grad():
            self.other[0].weight.add_(1)


def with_post_hook() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    def change(*_: Any) -> None:
        with torch.no_grad():
            module[2].weight.fill_(7)

    module[1].register_load_state_dict_post_hook(change)
    return module


def online_and_target() -> nn.Module:
    module = nn.Sequential(Online(4, 4), nn.Linear(4, 4))
    module[0].target = [module[1]]  # type: ignore[assignment]
    return module


def tied_around(between: Callable[[nn.Module], nn.Module]) -> nn.Module:
    first, last = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    last.weight = first.weight
    return nn.Sequential(first, between(last), nn.Sequential(nn.Linear(4, 4)), last)


# The number of runs of the engine: unchanged tensors are not read again.
DISTURBED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "extra state": (lambda: nn.Sequential(nn.Linear(2, 2), ResetsLater(), nn.Linear(2, 2)), 2),
    "post-hook": (with_post_hook, 2),
    "sibling": (online_and_target, 3),
    "anchor": (lambda: nn.Sequential(nn.Linear(2, 2), Anchor(4, 4)), 2),
    "tied": (lambda: tied_around(lambda last: nn.Linear(2, 2)), 1),
    "tied and changed": (lambda: tied_around(Touches), 2),
}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("mode", ["copy", "assign"])
@pytest.mark.parametrize("name", DISTURBED)
def test_what_changes_while_others_load(
    name: str, mode: Any, meta: bool, path: Path, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    make, num_transfers = DISTURBED[name]
    state = make().state_dict()
    state.update({key: torch.randn_like(value) for key, value in state.items() if isinstance(value, torch.Tensor)})
    torch.save(state, path)
    expected = make()
    expected.load_state_dict(torch.load(path))
    with meta_init(meta):
        module = make()
    transfers: list[int] = []
    run = Transfer.run
    monkeypatch.setattr(Transfer, "run", lambda self: transfers.append(1) or run(self))
    load_weights(module, path, mode=mode)
    ours, theirs = module.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(ours[key], value), key
    if mode == "copy" and not is_small:
        assert len(transfers) == num_transfers
    if name == "anchor":
        assert type(module[1].anchor) is torch.Tensor
        assert torch.equal(module[1].anchor, state["1.weight"])


@pytest.mark.usefixtures("is_small")
class TestModulesWithWaysOfTheirOwn:
    @pytest.mark.parametrize("meta", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("then", AFTERWARDS)
    @pytest.mark.parametrize("within", [False, True])
    def test_what_happens_after_torchs(
        self, path: Path, then: str, dtype: torch.dtype, meta: bool, within: bool
    ) -> None:
        def make() -> nn.Module:
            return (nn.Sequential(nn.Linear(2, 2), GoesOn(then)) if within else GoesOn(then)).to(dtype)

        torch.save({name: torch.randn(value.shape) for name, value in make().state_dict().items()}, path)
        expected = make()
        expected.load_state_dict(torch.load(path))
        with meta_init(meta):
            module = make()
        load_weights(module, path)
        assert_equal(module, expected)

    def test_an_expanded_buffer_is_refused_by_name(self, path: Path) -> None:
        module = nn.Linear(2, 2)
        module.register_buffer("wide", torch.zeros(1, 4).expand(5, 4))
        torch.save({**nn.Linear(2, 2).state_dict(), "wide": torch.ones(5, 4)}, path)
        with pytest.raises(IncompatibleWeightsError, match='the parameter named "wide"'):
            load_weights(module, path)

    @pytest.mark.parametrize("one_object", [False, True])
    @pytest.mark.parametrize("own_way_first", [False, True])
    def test_the_last_of_tied_weights_counts(self, path: Path, own_way_first: bool, one_object: bool) -> None:
        torch.save({name: torch.randn(4, 4) for name in ("a.weight", "b.weight")}, path)
        expected, module = Tied(own_way_first, one_object), Tied(own_way_first, one_object)
        expected.load_state_dict(torch.load(path))
        load_weights(module, path)
        assert_equal(module, expected)

    @pytest.mark.parametrize("prefix", ["", "model."])
    @pytest.mark.parametrize("old", [False, True])
    def test_versions_are_kept(self, path: Path, prefix: str, old: bool) -> None:
        saved = nn.Sequential(Versioned())
        with torch.no_grad():
            saved[0].weight += 3  # type: ignore[assignment]
        whole = nn.ModuleDict({"model": saved}) if prefix else saved
        state = whole.state_dict()
        torch.save({"state_dict": dict(state) if old else state}, path)
        module = nn.Sequential(Versioned())
        load_weights(module, path, strip_prefix=prefix)
        assert module[0].weight.tolist() == [-3.0 if old else 3.0] * 3

    @pytest.mark.parametrize("meta", [False, True])
    @pytest.mark.parametrize("mode", ["copy", "assign"])
    def test_a_view_of_the_value(self, path: Path, mode: Any, meta: bool) -> None:
        saved = nn.Sequential(Transposes(), nn.Linear(2, 2))
        with torch.no_grad():
            saved[0].weight.normal_()
        torch.save(saved.state_dict(), path)
        with meta_init(meta):
            module = nn.Sequential(Transposes(), nn.Linear(2, 2))
        load_weights(module, path, mode=mode)
        assert torch.equal(module[0].weight, saved[0].weight.t())  # type: ignore[arg-type]
        assert torch.equal(module[1].weight, saved[1].weight)  # type: ignore[arg-type]

    def test_batch_norms_are_foreseen(self, path: Path) -> None:
        state = Net().state_dict()
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
        module = Net()
        before = frozen(module)
        with pytest.raises(IncompatibleWeightsError, match="Nothing was changed") as caught:
            load_weights(module, path)
        assert {"body.2.weight", "body.2.running_mean"} <= set(caught.value.missing_keys)
        state["body.2.weight"] = torch.ones(9)
        torch.save(state, path)
        with pytest.raises(IncompatibleWeightsError, match=r"body\.2\.weight has shape \(8,\) in the module"):
            load_weights(module, path)
        assert frozen(module) == before
        # Files of torch < 0.4 have no such counter.
        torch.save({name: value for name, value in Net().state_dict().items() if "num_batches" not in name}, path)
        load_weights(module, path)

    def test_what_fits_them_is_known_afterwards(self, path: Path) -> None:
        torch.save({"0.weight": torch.ones(2, 2)}, path)
        with pytest.raises(IncompatibleWeightsError, match=r"size mismatch for 0\.weight[\s\S]*Other weights"):
            load_weights(nn.Sequential(Versioned()), path)


class Upgrades(nn.Module):
    """Its hook sees what is in the file, and changes what it gets."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.way = way
        self.register_load_state_dict_pre_hook(Upgrades.upgrade)  # type: ignore[no-untyped-call]

    @staticmethod
    def upgrade(self: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        q, k = f"{prefix}q.weight", f"{prefix}k.weight"
        if self.way == "swap":
            state_dict[q], state_dict[k] = state_dict[k], state_dict[q]
        elif self.way == "drop":
            del state_dict[q]
        elif self.way == "keep":
            state_dict[q] = self.q.weight.detach().clone()
        elif self.way == "in place":
            state_dict[q].mul_(2)
        elif self.way == "transpose":
            state_dict[q] = state_dict[q].t()
        elif self.way == "numpy":
            state_dict[q] = torch.from_numpy(state_dict[q].numpy() * 2)


@pytest.mark.parametrize("way", ["swap", "drop", "keep", "in place", "transpose", "numpy"])
@pytest.mark.usefixtures("is_small")
@pytest.mark.parametrize("mode", ["copy", "assign"])
def test_hooks_of_submodules_see_the_file(tmp_path: Path, way: str, mode: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save(nn.Sequential(nn.Linear(3, 3), Upgrades("none")).state_dict(), path)
    expected = nn.Sequential(nn.Linear(3, 3), Upgrades(way))
    module = nn.Sequential(nn.Linear(3, 3), Upgrades(way))
    with torch.no_grad():
        for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
            ours.copy_(theirs)
    expected.load_state_dict(torch.load(path), strict=way != "drop")
    load_weights(module, path, strict=way != "drop", mode=mode)
    assert_equal(module, expected)


class OwnLoad(nn.Linear):
    """Loads in a way of its own, as old batch norms and quantised layers do."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)


class Hooked(nn.Linear):
    """Has a hook of its own, as weight norm does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_load_state_dict_pre_hook(lambda *_: None)  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("is_small")
@pytest.mark.parametrize("kind", [nn.Linear, OwnLoad, Hooked])
@pytest.mark.parametrize("mode", ["copy", "assign"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_work_for_a_module_does_not_grow_with_the_number_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool, mode: Any, kind: type[nn.Linear]
) -> None:
    """Of tensors looked at, records compared and free memory asked for, four times the modules take four times."""

    def count(number: int) -> tuple[int, int, int]:
        looks: list[None] = []
        records: list[int] = []
        asked: list[None] = []
        is_plain, transfer, free = targets.is_plain_tensor, session.transfer, free_memory.free_device_bytes
        with monkeypatch.context() as patch:
            for owner in (targets, overlaps):
                patch.setattr(owner, "is_plain_tensor", lambda tensor: looks.append(None) or is_plain(tensor))

            def count_records(*args: Any, **kwargs: Any) -> Any:
                records.append(len(kwargs["records"]))
                return transfer(*args, **kwargs)

            patch.setattr(session, "transfer", count_records)
            patch.setattr(free_memory, "free_device_bytes", lambda device: asked.append(None) or free(device))
            path = tmp_path / f"{number}.pt"
            saved = nn.Sequential(*(kind(2, 2) for _ in range(number)))
            torch.save(saved.state_dict(), path, _use_new_zipfile_serialization=not legacy)
            loaded = nn.Sequential(*(kind(2, 2) for _ in range(number)))
            with warnings.catch_warnings():
                if legacy:
                    warnings.simplefilter("ignore")
                load_weights(loaded, path, mode=mode)
            assert_equal(loaded, saved)
        return len(looks), sum(records), len(asked)

    few, many = count(20), count(80)
    assert few[0] > 0
    assert all(after <= 4.2 * before + 8 for before, after in zip(few, many, strict=True))


@pytest.mark.parametrize("kind", [OwnLoad, Hooked])
def test_small_modules_take_one_read_together(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Linear]
) -> None:
    """A read, threads and a plan for each of thousands took 0.2 ms each."""
    calls: list[str] = []
    for owner, name in ((session, "transfer"), (record_checks, "compare_records")):
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, function=function, **k: calls.append(name) or function(*a, **k)
        )
    saved, module = (nn.Sequential(nn.Linear(2, 2), *(kind(2, 2) for _ in range(30))) for _ in range(2))
    torch.save(saved.state_dict(), path)
    load_weights(module, path)
    assert_equal(module, saved)
    assert calls == ["transfer", "compare_records"]


def damage(path: Path, name: str) -> None:
    data = bytearray(path.read_bytes())
    data[open_checkpoint(path)[name].storage.offset + 1] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("is_small")
@pytest.mark.parametrize("kind", [OwnLoad, Hooked])
def test_small_modules_are_verified(path: Path, kind: type[nn.Linear]) -> None:
    torch.save(nn.Sequential(kind(2, 2), kind(2, 2)).state_dict(), path)
    damage(path, "1.weight")
    with pytest.raises(ChecksumError, match=r"of 1\.weight at byte") as caught:
        load_weights(nn.Sequential(kind(2, 2), kind(2, 2)), path)
    assert caught.value.key == "1.weight"
    load_weights(nn.Sequential(kind(2, 2), kind(2, 2)), path, verify=False)


@pytest.mark.parametrize("offset", [40, 4 * 150_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damage_of_a_storage_of_which_a_part_is_used(path: Path, offset: int, dtype: torch.dtype) -> None:
    """A view of a larger storage is loaded. torch (2.13) compares nothing here."""
    torch.save({"weight": torch.arange(200_000.0)[:40_000].view(200, 200)}, path)
    module = nn.Linear(200, 200, bias=False, dtype=dtype)
    load_weights(module, path)
    data = bytearray(path.read_bytes())
    data[open_checkpoint(path)["weight"].storage.offset + offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="of weight at byte"):
        load_weights(module, path)
    load_weights(module, path, verify=False)


@pytest.mark.usefixtures("is_small")
def test_what_a_module_drops_may_be_damaged(path: Path) -> None:
    class Drops(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            state_dict.pop(f"{prefix}old", None)
            super()._load_from_state_dict(state_dict, prefix, *args)

    saved, module = Drops(2, 2), Drops(2, 2)
    torch.save({**saved.state_dict(), "old": torch.ones(3)}, path)
    damage(path, "old")
    load_weights(module, path)
    assert_equal(module, saved)


@pytest.mark.usefixtures("is_small")
@pytest.mark.parametrize("small_first", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_a_small_view_of_a_large_weight(path: Path, small_first: bool, within: bool) -> None:
    """torch's order decides what the shared memory has in the end."""

    def make() -> nn.Module:
        memory = torch.zeros(300, 300)
        tensors = {"large": nn.Parameter(memory), "small": nn.Parameter(memory[0])}
        module, child = Hooked(1, 1), nn.Module()
        for name in sorted(tensors, reverse=small_first):
            (child if within and name == "large" else module).register_parameter(name, tensors[name])
        module.add_module("child", child)
        return nn.Sequential(module, nn.Linear(2, 2))

    torch.save({name: torch.randn(value.shape) for name, value in make().state_dict().items()}, path)
    module, expected = make(), make()
    expected.load_state_dict(torch.load(path))
    load_weights(module, path)
    assert_equal(module, expected)


@pytest.mark.parametrize("mode", ["copy", "assign"])
def test_recurrent_layers_on_meta(path: Path, mode: Any) -> None:
    """Their weak references to their weights forbid to exchange these."""
    expected, module = nn.LSTM(2, 3, num_layers=2), nn.LSTM(2, 3, num_layers=2).to("meta")
    parameters = list(module.parameters())
    torch.save(expected.state_dict(), path)
    load_weights(module, path, device="cpu", mode=mode)
    inputs = torch.randn(4, 1, 2)
    assert torch.equal(module(inputs)[0], expected(inputs)[0])
    assert all(ours is theirs for ours, theirs in zip(module._flat_weights, module.parameters(), strict=True))
    assert all(ours is theirs for ours, theirs in zip(parameters, module.parameters(), strict=True))


def test_in_inference_mode(path: Path) -> None:
    torch.save(Net().state_dict(), path)
    with torch.inference_mode():
        load_weights(Net(), path)


class TestParts:
    def test_only_the_bytes_that_are_needed(self, path: Path, read: list[int]) -> None:
        class Large(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

        saved = Large()
        torch.save({"state_dict": saved.state_dict(), "optimizer_states": [torch.ones(100_000)]}, path)
        with meta_init():
            module = Large()
        keys = load_weights(module, path, include=r"^parts\.2\.")
        index = open_checkpoint(path)
        wanted = sum(index[f"state_dict.parts.2.{name}"].nbytes for name in ("weight", "bias"))
        assert wanted <= read[0] <= wanted + 4096  # and what lies between the two
        assert len(keys.missing_keys) == 6
        assert torch.equal(module.parts[2].weight, saved.parts[2].weight)  # type: ignore[arg-type]
        assert all(parameter.std() > 0 for parameter in module.parameters())  # the others are initialised

    def test_exclude(self, path: Path) -> None:
        saved = Net(classes=7)
        torch.save(saved.state_dict(), path)
        module = Net()
        head = copy.deepcopy(module.head)
        keys = load_weights(module, path, exclude=[r"^head\.", "running"])
        assert set(keys.missing_keys) == {"head.weight", "head.bias", "body.2.running_mean", "body.2.running_var"}
        assert torch.equal(module.head.weight, head.weight)
        assert torch.equal(module.body[1].weight, saved.body[1].weight)  # type: ignore[arg-type]

    def test_assign_copies_what_cannot_be_mapped_twice(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Linux maps some 65,000 files in a process, and a directory may have half of that."""
        tries: list[object] = []

        def refuse(source: object, watch: object) -> None:
            tries.append(source)
            raise OSError(errno.ENOMEM, "cannot map")

        monkeypatch.setattr(given_pages, "FileMapping", refuse)
        expected, module = Net(), Net()
        torch.save(expected.state_dict(), path)
        load_weights(module, path, mode="assign")
        assert_equal(module, expected)
        assert len(tries) == 1

    def test_assign_reads_nothing(self, path: Path, read: list[int]) -> None:
        torch.save(Net().state_dict(), path)
        load_weights(Net(), path, mode="assign")
        assert read == [0]


class TestDtype:
    @pytest.mark.parametrize("meta", [False, True])
    def test_the_module_has_it_afterwards(self, path: Path, meta: bool) -> None:
        saved = Net()
        torch.save(saved.state_dict(), path)
        with meta_init(meta):
            module = Net()
        load_weights(module, path, dtype=torch.bfloat16)
        assert_equal(module, copy.deepcopy(saved).to(torch.bfloat16))
        assert module.table.dtype == torch.bfloat16

    def test_a_file_in_another(self, path: Path) -> None:
        saved = Net().to(torch.float16)
        torch.save(saved.state_dict(), path)
        with meta_init():
            module = Net()
        load_weights(module, path)
        assert_equal(module, copy.deepcopy(saved).float())


class TestFailures:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ({"mode": "auto"}, "mode must be 'copy' or 'assign', got 'auto'"),
            ({"host_budget_mib": 0}, "host_budget_mib must be at least 1"),
            ({"num_threads": 0}, "num_threads must be at least 1"),
            ({"device": "meta"}, "device must be a place for values, got 'meta'"),
            ({"mode": "assign", "device": "mps"}, "mode='assign' needs the CPU"),
            ({"dtype": torch.int8}, r"dtype must be a floating-point type of torch, or None, got torch\.int8"),
            ({"dtype": "bfloat16"}, "dtype must be a floating-point type of torch, or None, got 'bfloat16'"),
            ({"rename": {"head": r"\9"}}, r"rename: '\\\\9' is no regular expression: invalid group reference 9"),
        ],
    )
    def test_arguments(self, path: Path, arguments: dict[str, Any], complaint: str) -> None:
        torch.save(Net().state_dict(), path)
        module = Net()
        before = frozen(module)
        with pytest.raises(ValueError, match=complaint):
            load_weights(module, path, **arguments)
        assert frozen(module) == before

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
    def test_no_cuda_device(self, path: Path) -> None:
        with pytest.raises(ValueError, match="device is 'cuda', but torch finds no CUDA device here"):
            load_weights(Net(), path, device="cuda")

    def test_a_selection_of_nothing(self, path: Path) -> None:
        torch.save(Net().state_dict(), path)
        with pytest.raises(CheckpointFormatError, match="has no key that include='nothing' and exclude"):
            load_weights(Net(), path, include="nothing")

    def test_no_file(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_weights(Net(), path)

    def test_a_flipped_byte(self, path: Path) -> None:
        torch.save(Net().state_dict(), path)
        start, _ = open_checkpoint(path)["body.1.weight"].file_range
        data = bytearray(path.read_bytes())
        data[start + 5] ^= 1
        path.write_bytes(data)
        module = Net()
        with pytest.raises(ChecksumError, match=r"body\.1\.weight"):
            load_weights(module, path)
        assert not any(child._load_state_dict_pre_hooks for child in module.modules())
        load_weights(module, path, verify=False)

    def test_what_does_not_fit(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save(Net().state_dict(), path)
        monkeypatch.setattr("lightning_memload.restore.free_memory.free_device_bytes", lambda device: 100)
        with meta_init():
            module = Net()
        with pytest.raises(InsufficientMemoryError, match="Nothing was changed"):
            load_weights(module, path)
        load_weights(module, path, check_fit=False)

    def test_an_empty_buffer_on_meta(self, path: Path) -> None:
        torch.save(Net().state_dict(), path)
        with torch.device("meta"):
            module = Net()
        with pytest.raises(MetaTensorError, match=r"no values for table.*meta_init") as caught:
            load_weights(module, path)
        assert caught.value.names == ("table",)

    def test_pickled_code_is_not_run(self, path: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({"state_dict": Net().state_dict(), "evil": Evil()}, path)
        load_weights(Net(), path)
        assert not (tmp_path / "ran").exists()
        torch.save({"state_dict": {**Net().state_dict(), "evil": Evil()}}, path)
        with pytest.raises(UnsafeGlobalsError, match=r"system, at state_dict\.evil"):
            load_weights(Net(), path)
        assert not (tmp_path / "ran").exists()


@pytest.mark.memory
def test_peak(tmp_path: Path) -> None:
    """In a fresh process: onto a meta-built module the weights once, against twice by torch."""
    program = """
import torch
from torch import nn
from lightning_memload import MemoryMonitor, load_weights, meta_init
def build():
    return nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(12)])
if ARGS["way"] == "write":
    torch.save({"state_dict": build().state_dict()}, ARGS["path"])
    RESULT = None
else:
    with meta_init():
        small = nn.Linear(2, 2)
    load_weights(small, ARGS["small"])  # imports, and the threads' own memory
    with MemoryMonitor() as monitor:
        if ARGS["way"] == "ours":
            with meta_init():
                module = build()
            load_weights(module, ARGS["path"])
        else:
            module = build()
            module.load_state_dict(torch.load(ARGS["path"], weights_only=True)["state_dict"])
    RESULT = monitor.peaks.anonymous_above_start_bytes
"""
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "small.pt")
    arguments = {"path": str(tmp_path / "weights.pt"), "small": str(tmp_path / "small.pt")}
    run_fresh(program, way="write", **arguments)  # type: ignore[arg-type]
    ours, stock = (run_fresh(program, way=way, **arguments).result for way in ("ours", "stock"))  # type: ignore[arg-type]
    weights = 12 * 2048 * 2048 * 4
    # The kernel counts pages per CPU, and what is free at the start may be used.
    assert weights - MIB <= ours <= weights + 16 * MIB
    assert stock >= 2 * weights - 8 * MIB


@pytest.mark.parametrize("mode", ["copy", "assign"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "folder"])
def test_a_default_device_is_for_tensors_of_users(tmp_path: Path, name: str, mode: Any) -> None:
    """As ``torch.set_default_device("cuda")`` in many scripts; meta stands for any device that is not the CPU."""
    expected = Net().state_dict()
    expected["empty"] = torch.empty(0, 3)
    {"weights.pt": torch.save, "weights.safetensors": save_file, "folder": save_directory}[name](
        expected, tmp_path / name
    )
    module = Net()
    module.register_buffer("empty", torch.ones(0, 3))
    for parameter in module.parameters():
        parameter.data.zero_()
    with torch.device("meta"):
        load_weights(module, tmp_path / name, device="cpu", mode=mode)
    for key, value in module.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_module_on_meta_imports_nothing_more(path: Path) -> None:
    """Many operations on meta tensors are written in Python; the first of them imports sympy, 0.3 s and 70 MB."""
    program = """
import sys
import torch
from torch import nn
from lightning_memload import load_weights, meta_init
with meta_init():
    module = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 3))
before = set(sys.modules)
load_weights(module, ARGS["path"])
RESULT = sorted({name.partition(".")[0] for name in sys.modules.keys() - before} - {"lightning_memload"})
"""
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 3)).state_dict(), path)
    assert "sympy" not in run_fresh(program, path=path).result
