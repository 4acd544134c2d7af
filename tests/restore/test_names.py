"""The places and the names of the weights in a checkpoint: found where they are unique, otherwise suggested."""

from __future__ import annotations

import collections
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload import CheckpointFormatError, IncompatibleWeightsError, load_weights, meta_init
from lightning_memload.restore.state_dict import find_state_dict, match_compiled, suggest_renaming
from tests.formats.files import as_bytes

Weights = dict[str, Any]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.fixture
def weights() -> Weights:
    torch.manual_seed(1)
    return net().state_dict()


def others() -> Weights:
    torch.manual_seed(2)
    return net().state_dict()


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def assert_loads(value: Any, weights: Weights, path: Path, **options: Any) -> None:
    torch.save(value, path)
    module = net()
    load_weights(module, path, **options)
    assert {name: as_bytes(tensor) for name, tensor in module.state_dict().items()} == {
        name: as_bytes(tensor) for name, tensor in weights.items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.pt"


class TestTheOnlyOne:
    WRAPPED: tuple[Callable[[Weights], Any], ...] = (
        lambda w: {"epoch": 1, "state_dict_ema": w},
        lambda w: {"params_ema": w},
        lambda w: {"ema": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda w: {"generator": w, "optim_g": {"by_name": {"0.weight": torch.ones(2)}}, "step": 3},
        lambda w: {"model": {"language_model": {"encoder": w}}},
        lambda w: {"model": w, "model_ema": {"count": 3}},
        lambda w: [w],
        lambda w: (w, {"lr": 1}),
    )

    @pytest.mark.parametrize("wrap", WRAPPED)
    def test_is_found(self, wrap: Callable[[Weights], Any], weights: Weights, path: Path) -> None:
        assert_loads(wrap(weights), weights, path)

    def test_usual_names_come_first(self, weights: Weights, path: Path) -> None:
        assert_loads({"state_dict_ema": others(), "state_dict": weights}, weights, path)
        assert_loads({"state_dict_ema": weights, "state_dict": others()}, weights, path, key="state_dict_ema")

    def test_of_several_the_keys_are_named(self, weights: Weights, path: Path) -> None:
        torch.save({"teacher": weights, "student": {"net.a": others()}, "epoch": 1}, path)
        with pytest.raises(CheckpointFormatError) as error:
            load_weights(net(), path)
        assert "holds 2 state dicts" in str(error.value)
        assert "key='teacher' (7 entries), key='student.net.a' (7 entries)" in str(error.value)
        assert_loads({"teacher": others(), "student": {"net.a": weights}}, weights, path, key="student.net.a")

    def test_a_wrong_key_names_the_right_ones(self, weights: Weights, path: Path) -> None:
        torch.save({"teacher": weights, "epoch": 1}, path)
        with pytest.raises(CheckpointFormatError, match=r"No state dict is at 'model'.*Choose one of key='teacher'"):
            load_weights(net(), path, key="model")

    def test_within_a_list(self, weights: Weights, path: Path) -> None:
        torch.save([others(), weights], path)
        with pytest.raises(CheckpointFormatError, match=r"key='0' \(7 entries\), key='1' \(7 entries\)"):
            load_weights(net(), path)
        assert_loads([others(), weights], weights, path, key="1")

    def test_what_refers_to_itself(self, weights: Weights) -> None:
        loop: dict[str, Any] = {"epoch": 1}
        loop["self"] = loop
        with pytest.raises(CheckpointFormatError, match="No state dict is found"):
            find_state_dict(loop, "file")
        assert find_state_dict({"loop": loop, "a": {"b": weights}}, "file") is weights


class TestPickledModules:
    def test_stand_for_their_weights(self, path: Path) -> None:
        module = net()
        for value in (module, {"model": module, "ema": None, "epoch": -1}, {"ema": module, "epoch": 1}):
            assert_loads(value, module.state_dict(), path, weights_only=False)
        assert_loads({"model": module, "ema": None}, module.state_dict(), path, weights_only=False, key="model")

    def test_torchscript(self, path: Path) -> None:
        module = net()
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(module), buffer)
            path.write_bytes(buffer.getvalue())
            loaded = net()
            load_weights(loaded, path, weights_only=False)
        assert torch.equal(loaded[0].weight, module[0].weight)  # type: ignore[arg-type]


class TestPrefixes:
    @pytest.mark.parametrize("prefix", ["module.", "model.", "net.backbone.", "module._orig_mod."])
    def test_the_error_gives_the_argument(self, prefix: str, weights: Weights, path: Path) -> None:
        torch.save({"state_dict": prefixed(prefix, weights)}, path)
        with pytest.raises(IncompatibleWeightsError) as error:
            load_weights(net(), path)
        assert f"strip_prefix={prefix!r}" in str(error.value)
        assert_loads(prefixed(prefix, weights), weights, path, strip_prefix=prefix)

    def test_a_prefix_that_the_module_has(self, weights: Weights, path: Path) -> None:
        torch.save(weights, path)
        module = nn.DataParallel(net())
        with pytest.raises(IncompatibleWeightsError, match=r"use rename=\{'\^': 'module\.'\}"):
            load_weights(module, path)
        load_weights(module, path, rename={"^": "module."})
        assert torch.equal(module.module[0].weight, weights["0.weight"])  # type: ignore[arg-type]

    def test_with_others_beside(self) -> None:
        given = ["n_averaged", *(f"module.{number}.weight" for number in range(9))]
        expected = [f"{number}.weight" for number in range(10)]
        assert suggest_renaming(given, expected) == "strip_prefix='module.', exclude=['^n_averaged$']"
        many = [f"beside.{number}" for number in range(4)]
        assert suggest_renaming([*given, *many], expected) == "strip_prefix='module.'"

    def test_an_averaged_model(self, weights: Weights, path: Path) -> None:
        """The error names the file, and gives every argument that is needed."""
        module = net()
        module.load_state_dict(weights)
        averaged = torch.optim.swa_utils.AveragedModel(module).state_dict()
        torch.save(averaged, path)
        with pytest.raises(IncompatibleWeightsError) as error:
            load_weights(net(), path)
        assert str(error.value).startswith(f"{path} does not fit Sequential:\n  6 missing: 0.weight, ")
        assert f"use strip_prefix='module.', exclude={['^n_averaged$']}." in str(error.value)
        assert_loads(averaged, weights, path, strip_prefix="module.", exclude=["^n_averaged$"])

    def test_nothing_where_it_would_not_help(self) -> None:
        assert suggest_renaming(["a.weight", "b.bias"], ["a.weight", "c.bias"]) is None
        assert suggest_renaming([], ["a"]) is suggest_renaming(["a"], []) is None

    def test_many_names_take_no_longer(self) -> None:
        names = [f"a.b.c.d.e.f.{number}.weight" for number in range(100_000)]
        assert suggest_renaming(["module." + name for name in names], names) == "strip_prefix='module.'"


class Compiled(nn.Module):
    """A module like one of ``torch.compile``, without a compiler."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class TestCompiled:
    @pytest.mark.slow
    def test_taken_off_and_put_on(self, weights: Weights, path: Path) -> None:
        assert_loads(prefixed("_orig_mod.", weights), weights, path)
        torch.save(weights, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the modules that the first use imports
            compiled = torch.compile(net())
        for module in (Compiled(net()), compiled):
            keys = load_weights(module, path)  # type: ignore[arg-type]
            assert not keys.missing_keys
            assert not keys.unexpected_keys
            assert as_bytes(module._orig_mod[0].weight) == as_bytes(weights["0.weight"])

    @pytest.mark.parametrize("saved_compiled", [False, True])
    @pytest.mark.parametrize("meta", [False, True])
    def test_in_the_middle(self, saved_compiled: bool, meta: bool, path: Path) -> None:
        def make(compiled: bool) -> nn.Module:
            inner: nn.Module = nn.Sequential(Compiled(nn.Linear(2, 2)) if compiled else nn.Linear(2, 2))
            return nn.ModuleDict({"a": Compiled(inner) if compiled else inner, "b": nn.Linear(2, 2)})

        saved = make(saved_compiled)
        torch.save(saved.state_dict(), path)
        with meta_init(enabled=meta):
            module = make(not saved_compiled)
        load_weights(module, path)
        ours, theirs = (list(m.state_dict().values()) for m in (module, saved))
        assert [as_bytes(tensor) for tensor in ours] == [as_bytes(tensor) for tensor in theirs]

    def test_versions_follow(self, path: Path) -> None:
        """A batch norm of version 1 has no counter, and gets the one that torch gives it."""
        torch.save(net().state_dict(), path)
        state = torch.load(path)
        assert state._metadata["1"]["version"] == 2
        seen: list[Any] = []

        class Versioned(nn.BatchNorm1d):
            def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
                seen.append(local_metadata.get("version"))
                super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

        load_weights(Compiled(nn.Sequential(nn.Linear(4, 4), Versioned(4))), path)
        assert seen == [2]

    def test_only_where_nothing_else_differs(self) -> None:
        assert match_compiled(["_orig_mod.a", "b"], ["a", "b"]) == {"_orig_mod.a": "a"}
        assert match_compiled(["a", "_orig_mod.a"], ["a"]) == {}
        assert match_compiled(["x._orig_mod.a", "_orig_mod.x.a"], ["x.a"]) == {}
        assert match_compiled(["a"], ["_orig_mod.a", "x"]) == {"a": "_orig_mod.a"}
        assert match_compiled(["my_orig_mod.a"], ["mya"]) == {}
        assert match_compiled(["a"], ["a"]) == {}
        assert match_compiled(["other"], ["_orig_mod.a"]) == {}


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.register_load_state_dict_pre_hook(lambda *_: None)  # type: ignore[no-untyped-call]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.body.emb.weight


@pytest.mark.parametrize("name", ["body.emb.weight", "head.weight"])
def test_a_tied_weight_whose_owner_has_a_hook(name: str, path: Path) -> None:
    value = torch.randn(7, 4)
    torch.save(collections.OrderedDict({name: value}), path)
    module = Tied()
    load_weights(module, path)
    assert torch.equal(module.head.weight, value)
    assert module.head.weight is module.body.emb.weight


@pytest.mark.parametrize("strict", [True, False])
def test_the_error_names_the_checkpoint(strict: bool, tmp_path: Path) -> None:
    """Not the part of the module that was looked at last, and no way out that was taken already."""
    path = tmp_path / "other.pt"
    torch.save({"other": torch.ones(2)}, path)
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(IncompatibleWeightsError) as caught:
        load_weights(module, path, strict=strict)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path} does not fit Sequential:")
    assert ("strict=False" in str(caught.value)) == strict
