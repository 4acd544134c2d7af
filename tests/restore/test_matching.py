"""Whether a state dict fits a module: the verdict is that of torch, and the error is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload.errors import IncompatibleWeightsError
from lightning_memload.restore.matching import (
    WeightsMatch,
    incompatible,
    match_weights,
    module_keys,
    short_errors,
    walk_apart,
)


class Tied(nn.Module):
    """Two names for one parameter, a buffer that is saved, one that is not, and state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("saved", torch.zeros(1))
        self.register_buffer("forgotten", torch.zeros(1), persistent=False)

    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Own(nn.Linear):
    """A module with its own loading code, which takes any shape."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        pass


def fit(module: nn.Module, state_dict: dict[str, Any], *, strict: bool = True) -> Any:
    with short_errors(module, state_dict, strict=strict, path="model.ckpt"):
        return module.load_state_dict(state_dict, strict=strict)


def test_keys_are_those_of_the_state_dict() -> None:
    for module in (Tied(), nn.Sequential(Tied(), nn.BatchNorm1d(2), nn.LSTM(1, 1))):
        assert module_keys(module) == list(module.state_dict())


def test_submodules_are_marked_with_all_that_is_in_them() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    paths = [(path, apart) for path, _, apart in walk_apart(module, lambda child: isinstance(child, nn.Sequential))]
    assert paths == [("", False), ("0", False), ("1", True), ("1.0", True)]
    assert [path for path, _ in paths] == [name for name, _ in module.named_modules(remove_duplicate=False)]


class TestBeforeAnythingChanges:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"0.weight": None}, "1 missing: 0.weight"),
            ({"other": torch.zeros(1)}, "1 unexpected: other"),
            ({"0.bias": torch.zeros(9)}, "0.bias has shape (3,) in the module and (9,) on disk"),
        ],
        ids=["missing", "unexpected", "shape"],
    )
    def test_the_verdict_of_torch(self, change: dict[str, Any], words: str) -> None:
        module = nn.Sequential(nn.Linear(2, 3))
        given = {name: torch.full_like(value, 5) for name, value in module.state_dict().items()} | change
        given = {name: value for name, value in given.items() if value is not None}
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict"):
            nn.Sequential(nn.Linear(2, 3)).load_state_dict(given)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(IncompatibleWeightsError, match="Nothing was changed") as caught:
            fit(module, given)
        assert words in str(caught.value)
        assert all(value.equal(before[name]) for name, value in module.state_dict().items())

    def test_all_problems_in_one_error(self) -> None:
        given = {"weight": torch.zeros(1), "other": torch.zeros(1)}
        with pytest.raises(IncompatibleWeightsError) as caught:
            fit(nn.Linear(2, 3), given)
        error = caught.value
        assert (error.missing_keys, error.unexpected_keys) == (("bias",), ("other",))
        assert error.mismatched_shapes == {"weight": ((1,), (3, 2))}

    def test_one_name_of_a_tied_parameter_is_enough(self) -> None:
        """Some formats store it once. torch alone calls the other name missing."""
        with short_errors(Tied(), Tied().state_dict() | {}, strict=True, path="model.ckpt"):
            pass
        once = {name: value for name, value in Tied().state_dict().items() if name != "head.weight"}
        with short_errors(Tied(), once, strict=True, path="model.ckpt"):
            pass

    def test_without_strict_only_shapes_count(self) -> None:
        keys = fit(nn.Linear(2, 3), {"weight": torch.zeros(3, 2), "other": torch.zeros(1)}, strict=False)
        assert (keys.missing_keys, keys.unexpected_keys) == (["bias"], ["other"])
        with pytest.raises(IncompatibleWeightsError, match="has shape"):
            fit(nn.Linear(2, 3), {"weight": torch.zeros(1)}, strict=False)

    def test_a_prefix_is_named(self) -> None:
        given = {f"model.{name}": value for name, value in nn.Linear(2, 3).state_dict().items()}
        with pytest.raises(IncompatibleWeightsError, match=r"The names differ by a prefix: use strip_prefix='model\.'"):
            fit(nn.Linear(2, 3), given)

    def test_modules_with_their_own_code_decide_themselves(self) -> None:
        fit(nn.Sequential(Own(2, 3)), {"0.weight": torch.zeros(7)})


class TestWithinTheBlock:
    def test_an_error_of_torch_becomes_short(self) -> None:
        """The differences come from the restore, since torch lists every name."""
        match = WeightsMatch(1, 2, new=("bias",), unused=("other",))
        with (
            pytest.raises(IncompatibleWeightsError, match="Other weights were loaded") as caught,
            short_errors(Own(2, 3), {}, strict=True, path="model.ckpt", match=lambda: match),
        ):
            nn.Linear(2, 3).load_state_dict({"other": torch.zeros(1), "weight": torch.zeros(9)})
        assert (caught.value.missing_keys, caught.value.unexpected_keys) == (("bias",), ("other",))
        assert "size mismatch for weight" in str(caught.value)
        assert "Missing key(s)" not in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)

    def test_another_error_is_left_alone(self) -> None:
        error = RuntimeError("CUDA out of memory")
        with pytest.raises(RuntimeError) as caught, short_errors(Own(1, 1), {}, strict=True, path="model.ckpt"):
            raise error
        assert caught.value is error


class TestMatch:
    def match(self, module: nn.Module, given: dict[str, Any], wants: Any = lambda _: True) -> WeightsMatch | None:
        return match_weights(module, given, module.load_state_dict(given, strict=False), wants)

    def test_no_difference(self) -> None:
        assert self.match(nn.Linear(2, 3), nn.Linear(2, 3).state_dict()) is None
        assert self.match(nn.Linear(2, 3), {"weight": torch.zeros(3, 2)}, lambda name: name == "weight") is None

    def test_differences(self) -> None:
        found = self.match(nn.Linear(2, 3), {"weight": torch.zeros(3, 2), "other": torch.zeros(1)})
        assert found == WeightsMatch(1, 2, new=("bias",), unused=("other",))
        assert str(found) == "1 of 2 tensors loaded; new: bias; unused in the file: other"
        assert not found.is_nothing

    def test_nothing_fits(self) -> None:
        found = self.match(nn.Linear(2, 3), {"other": torch.zeros(1)})
        assert found is not None
        assert found.is_nothing


def test_the_error_names_ten_and_the_number() -> None:
    error = incompatible(nn.Linear(1, 1), "model.ckpt", [f"layer{n}" for n in range(30)], (), {}, done="Done.")
    assert "model.ckpt does not fit Linear:\n  30 missing: layer0, " in str(error)
    assert "layer9" in str(error)
    assert "layer10" not in str(error)
    assert "strict=False ignores all of these names" in str(error)
    assert len(error.missing_keys) == 30
