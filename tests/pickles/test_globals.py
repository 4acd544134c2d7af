"""Names that ``weights_only`` refuses: torch decides; the error gives their places and how to allow them."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.tensor  # allows its classes, once
from torch import nn

from lightning_memload import UnsafeGlobalsError, WeightsSource, load_weights, open_checkpoint, save_directory
from lightning_memload.formats import load_mapped
from lightning_memload.pickles import allow_globals, holds_refused, refused_globals
from tests.formats.files import quantised, save_dcp


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.99])


class Mode(enum.Enum):
    FAST = 1


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


class Words(dict):  # type: ignore[type-arg]
    """A dict of a class of its own, as many configurations are."""


class Numbers(list):  # type: ignore[type-arg]
    pass


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


# What hyperparameters hold. torch can build these once they are allowed.
ALLOWABLE: dict[str, Callable[[], Any]] = {
    "namespace": lambda: argparse.Namespace(a=1, b=[2]),
    "dataclass": Settings,
    "enum": lambda: Mode.FAST,
    "slots": Slots,
    "number of numpy": lambda: np.float64(3.0),
    "array of numpy": lambda: np.arange(6, dtype=np.int16),
    "dtype of numpy": lambda: np.dtype("bool"),
    "path": lambda: pathlib.PurePosixPath("/data"),
    "partial": lambda: functools.partial(pathlib.PurePosixPath, "a"),
    "time": lambda: datetime.timedelta(seconds=1),
    "set": lambda: frozenset([1]),
    "class": lambda: Settings,
    "empty defaultdict": lambda: collections.defaultdict(list),
    "module": lambda: nn.Linear(1, 1),
}
# torch cannot put items into these, allowed or not.
NEVER: dict[str, Callable[[], Any]] = {
    "deque": lambda: collections.deque([1, 2]),
}
WITH_ITEMS: dict[str, Callable[[], Any]] = {
    "dict": lambda: Words(a=1),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "dict of dataclasses": lambda: Words(a=Settings()),
}
(ALLOWABLE if torch.__version__ < "2.7" else NEVER).update(WITH_ITEMS)
(ALLOWABLE if torch.__version__ >= "2.14" else NEVER)["list"] = lambda: Numbers([1, 2])
ALL = ALLOWABLE | NEVER


def save(value: Any, path: Path) -> nn.Linear:
    """A checkpoint with an object in the hyperparameters, in front of the weights, and texts that both share."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    hyper = {"weight": "bias", "optimizer": {"extra": [0, value]}}
    torch.save({"hyper_parameters": hyper, "state_dict": module.state_dict(), "note": "weight"}, path)
    return module


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.ckpt"


def refusal(path: Path) -> UnsafeGlobalsError:
    with pytest.raises(UnsafeGlobalsError) as caught:
        load_mapped(path, weights_only=True)
    return caught.value


@pytest.fixture(autouse=True)
def nothing_is_allowed_for_good() -> Any:
    before = set(torch.serialization.get_safe_globals())  # torch.distributed.tensor allows its own
    yield
    assert set(torch.serialization.get_safe_globals()) == before


class TestIndex:
    @pytest.mark.parametrize("name", ALL)
    def test_the_same_names_as_torch_finds(self, path: Path, name: str) -> None:
        save(ALL[name](), path)
        theirs = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        ours = {item.name for item in refused_globals(open_checkpoint(path).globals)}
        # The class of a dtype of numpy is in no file by name, and torch asks for it all the same.
        assert {item for item in ours if not item.startswith("numpy.dtypes.")} == theirs

    def test_places(self, path: Path) -> None:
        save(argparse.Namespace(inner=[Settings(), Mode.FAST]), path)
        places = {item.name: item.place for item in open_checkpoint(path).globals}
        assert places == {
            "argparse.Namespace": "hyper_parameters.optimizer.extra[1]",
            f"{__name__}.Settings": "hyper_parameters.optimizer.extra[1].inner[0]",
            f"{__name__}.Mode": "hyper_parameters.optimizer.extra[1].inner[1]",
        }

    def test_in_keys_attributes_and_at_the_root(self, path: Path) -> None:
        torch.save({Mode.FAST: 1}, path)
        assert [item.place for item in open_checkpoint(path).globals] == ["(the whole object)"]
        tensor = torch.ones(2)
        tensor.note = Settings()
        torch.save({"a": tensor}, path)
        assert ("a.note", f"{__name__}.Settings") in [(i.place, i.name) for i in open_checkpoint(path).globals]

    def test_weights_alone_name_nothing(self, path: Path) -> None:
        torch.save(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(), path)
        assert open_checkpoint(path).globals == ()

    def test_what_a_user_allowed_is_not_refused(self, path: Path) -> None:
        save(Settings(), path)
        found = open_checkpoint(path).globals
        with torch.serialization.safe_globals([Settings]):
            assert refused_globals(found) == ()
        assert refused_globals(found) == found

    def test_names_that_are_no_names(self, path: Path) -> None:
        """Protocol 4 takes any text for a name."""
        pickled = b"\x80\x04\x8c\x03a\nb\x8c\x03c\nd\x93."
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
        (found,) = open_checkpoint(path).globals
        assert refused_globals([found]) == (found,)


class TestTheError:
    @pytest.mark.parametrize("name", ALLOWABLE)
    def test_following_its_words_loads_the_file(self, path: Path, name: str) -> None:
        save(ALLOWABLE[name](), path)
        error = refusal(path)
        lines = [line.strip() for line in str(error).splitlines() if line.startswith("    ")]
        assert lines[-1].startswith("torch.serialization.add_safe_globals([")
        before = torch.serialization.get_safe_globals()
        try:
            exec("\n".join(lines), {})
            torch.load(path, weights_only=True)
            load_mapped(path, weights_only=True)
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)
        with allow_globals(list(error.places)):
            load_mapped(path, weights_only=True)
        assert all(place.startswith("hyper_parameters.optimizer.extra[1]") for place in error.places.values())

    @pytest.mark.parametrize("name", NEVER)
    def test_what_torch_never_builds_is_said(self, path: Path, name: str) -> None:
        save(NEVER[name](), path)
        error = refusal(path)
        assert "under weights_only=True, allowed or not" in str(error)
        assert "add_safe_globals" not in str(error)
        with allow_globals(list(error.places)), pytest.raises(pickle.UnpicklingError):
            load_mapped(path, weights_only=True)

    def test_code_is_named_and_not_run(self, path: Path, tmp_path: Path) -> None:
        save(Evil(tmp_path / "mark"), path)
        assert list(refusal(path).places) == [f"{os.system.__module__}.system"]
        assert "allowed or not" in str(refusal(path))
        assert not (tmp_path / "mark").exists()

    def test_a_class_that_an_allowed_function_makes(self, path: Path) -> None:
        save(made_by_function(), path)
        assert list(refusal(path).places) == [f"{__name__}.make"]
        with torch.serialization.safe_globals([make]):
            assert list(refusal(path).places) == [f"{__name__}.Made"]
        with torch.serialization.safe_globals([make, Made]):
            load_mapped(path, weights_only=True)

    def test_in_every_format(self, tmp_path: Path) -> None:
        state = {"state_dict": {"weight": torch.ones(2)}, "config": argparse.Namespace(a=1)}
        save_directory(state, tmp_path / "directory")
        save_dcp(state, tmp_path / "dcp")
        (tmp_path / "bin").mkdir()
        torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
        for name in ("directory", "dcp", "bin"):
            assert "argparse.Namespace" in refusal(tmp_path / name).places
            assert [item.name for item in open_checkpoint(tmp_path / name).globals] == ["argparse.Namespace"]
            module = nn.Module()
            module.weight = nn.Parameter(torch.zeros(2))
            load_weights(module, tmp_path / name)
            assert module.weight.tolist() == [1.0, 1.0]


class Made:
    def __reduce__(self) -> Any:
        return make, (), {"value": 1}


def make() -> Made:
    return Made()


def made_by_function() -> Made:
    return Made()


class TestAllowing:
    def test_for_one_load_only(self, path: Path) -> None:
        module = save(Settings(), path)
        for allowed in ([Settings], [f"{__name__}.Settings"], [(Settings, f"{__name__}.Settings")]):
            loaded = nn.Linear(3, 2)
            load_weights(loaded, path, safe_globals=allowed)
            assert torch.equal(loaded.weight, module.weight)
            assert Settings not in torch.serialization.get_safe_globals()
            with pytest.raises(UnsafeGlobalsError):
                load_mapped(path, weights_only=True)

    def test_what_is_allowed_for_good_stays_allowed(self, path: Path) -> None:
        save(Settings(), path)
        with torch.serialization.safe_globals([Settings]):
            with allow_globals([Settings, argparse.Namespace]):
                pass
            assert Settings in torch.serialization.get_safe_globals()
            assert argparse.Namespace not in torch.serialization.get_safe_globals()
            load_mapped(path, weights_only=True)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (["argparse.Nmespace"], "'argparse.Nmespace' cannot be imported"),
            (["no_such_module.Name"], "No module named"),
            (["name"], "cannot be imported"),
        ],
    )
    def test_names_that_cannot_be_imported(self, wrong: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            WeightsSource("file", safe_globals=wrong)

    @pytest.mark.parametrize("wrong", ["argparse.Namespace", argparse.Namespace, [3]])
    def test_what_is_no_list_of_classes(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="safe_globals must"):
            WeightsSource("file", safe_globals=wrong)


class TestDoingWithout:
    @pytest.mark.parametrize("name", ALL)
    def test_weights_load_whatever_is_beside_them(self, path: Path, name: str) -> None:
        module = save(ALL[name](), path)
        loaded = nn.Linear(3, 2)
        load_weights(loaded, path)
        assert torch.equal(loaded.weight, module.weight)
        assert torch.equal(loaded.bias, module.bias)
        whole, mapped = load_mapped(path, weights_only=True, erases=True)
        assert mapped.refusal is not None
        assert str(mapped.refusal) == str(refusal(path))
        assert holds_refused(whole["hyper_parameters"])
        assert not holds_refused(whole["state_dict"])
        assert whole["hyper_parameters"]["weight"] == "bias"
        assert whole["note"] == "weight"

    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
    @pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14
    def test_everything_else_is_as_torch_loads_it(self, path: Path) -> None:
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        tied = torch.arange(6.0).view(2, 3)
        special = {
            "parameter": nn.Parameter(tied, requires_grad=False),
            "tied": tied,
            "view": tied.t()[1:],
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(3),
            "quantised": quantised(torch.ones(3)),
            "sparse": torch.eye(2).to_sparse(),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "complex": torch.ones(2, dtype=torch.complex64).conj(),
        }
        state = {"a": special, "weights": module.state_dict(), "numbers": [1, 2.5, None, True, 1 << 40, "ä", b"x"]}
        torch.save({"config": Words(a=Settings()), **state}, path)
        whole, _ = load_mapped(path, weights_only=True, erases=True)
        torch.save(state, path.with_name("plain"))
        expected = torch.load(path.with_name("plain"), weights_only=True)
        assert whole["numbers"] == expected["numbers"]
        assert list(whole["weights"]) == list(expected["weights"])
        assert whole["weights"]._metadata == expected["weights"]._metadata
        for name, tensor in {**expected["a"], **expected["weights"]}.items():
            ours = {**whole["a"], **whole["weights"]}[name]
            assert (type(ours), ours.dtype, ours.layout) == (type(tensor), tensor.dtype, tensor.layout)
            assert ours.requires_grad == tensor.requires_grad
            dense = [t.dequantize() if t.is_quantized else t.to_dense() for t in (ours, tensor)]
            assert torch.equal(*dense), name
            if tensor.layout is torch.strided:
                assert ours.stride() == tensor.stride()
        assert whole["a"]["tied"].data_ptr() == whole["a"]["parameter"].data_ptr()

    def test_no_code_runs_and_nothing_is_imported(self, path: Path, tmp_path: Path) -> None:
        save([Evil(tmp_path / "mark"), Settings()], path)
        load_weights(nn.Linear(3, 2), path)
        load_mapped(path, weights_only=True, erases=True)
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("value", [Settings(), torch.ones(2, 3).as_subclass(type("Own", (torch.Tensor,), {}))])
    def test_a_refused_part_of_the_weights_is_an_error(
        self, path: Path, value: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if isinstance(value, torch.Tensor):
            monkeypatch.setitem(globals(), "Own", type(value))
            monkeypatch.setattr(type(value), "__module__", __name__)
        torch.save({"state_dict": {"weight": value, "bias": torch.ones(2)}}, path)
        with pytest.raises(UnsafeGlobalsError, match=r"at state_dict\.weight"):
            load_weights(nn.Linear(3, 2), path, strict=False)

    def test_weights_within_a_refused_object_are_an_error(self, path: Path) -> None:
        torch.save(argparse.Namespace(state_dict=nn.Linear(3, 2).state_dict()), path)
        with pytest.raises(UnsafeGlobalsError, match=r"argparse\.Namespace, at \(the whole object\)"):
            load_weights(nn.Linear(3, 2), path)

    def test_the_whole_is_never_loaded_so_by_default(self, path: Path) -> None:
        save(Settings(), path)
        with pytest.raises(UnsafeGlobalsError):
            load_mapped(path)
