"""The messages of a restore about its weights: new names, unused names, and no match at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload import (
    IncompatibleWeightsError,
    MemoryEfficientRestore,
    WeightsSource,
    load_from_checkpoint,
    load_weights,
)
from tests.plugins.harness import FEATURES, TRUSTED, Recorded, make_trainer


class Net(Recorded):
    """Two layers whose names a test chooses."""

    def __init__(self, body: str = "body", head: str = "head", strict: bool = False, width: int = 4) -> None:
        super().__init__()
        self.names = body, head
        self.add_module(body, nn.Linear(FEATURES, width))
        self.add_module(head, nn.Linear(width, FEATURES))
        self.strict_loading = strict

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        body, head = (getattr(self, name) for name in self.names)
        return head(body(inputs))


def with_new_head(strict: bool = False) -> Net:
    return Net(head="cls", strict=strict)


def with_new_names() -> Net:
    return Net("trunk", "cls")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt"


LINE = "2 of 4 tensors loaded; new: cls.weight, cls.bias; unused in the file: head.weight, head.bias"


def run(way: str, module: Any, path: Path, **source: Any) -> None:
    """Loads the weights into a module and trains or evaluates it, in one of the ways."""
    if way == "weights_from":
        restore = MemoryEfficientRestore(weights_from=WeightsSource(path, strict=False, **source), log=False)
        make_trainer(path.parent, [restore], max_steps=1).fit(module)
        return
    restore = MemoryEfficientRestore(log=False, restore=["weights"] if way == "fit" else None)
    trainer = make_trainer(path.parent, [restore], max_steps=1)
    (trainer.fit if way == "fit" else trainer.validate)(module, ckpt_path=path, **TRUSTED)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


class Evaluated(Net):
    """A module that can be validated."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.loss(*batch)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.mark.parametrize("way", ["weights_from", "fit", "validate"])
def test_one_line_tells_what_is_new_and_unused(way: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run(way, Evaluated(head="cls"), path)
    lines = [record.getMessage() for record in caplog.records if "tensors loaded" in record.getMessage()]
    assert lines == [f"{path}: {LINE}"]


def test_where_all_match_nothing_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run("fit", Net(), path)
        run("weights_from", with_new_head(), path, rename={"head": "cls"})
        run("weights_from", with_new_head(), path, exclude="head|cls")
    assert "tensors loaded" not in caplog.text


@pytest.mark.parametrize("source", [{}, {"rename": {"body": "encoder"}, "exclude": "head"}])
def test_nothing_that_matches_is_an_error(path: Path, source: Any) -> None:
    module = with_new_names()
    before = weights_of(module)
    with pytest.raises(IncompatibleWeightsError, match=r"trunk\.weight[\s\S]*unexpected[\s\S]*rename=") as caught:
        run("weights_from", module, path, **source)
    words = str(caught.value)
    assert "strict=False" not in words or words.index("rename=") < words.index("strict=False")
    assert_unchanged(module, before)
    with pytest.raises(IncompatibleWeightsError, match="rename="):
        load_weights(module, path, strict=False)


@pytest.mark.parametrize("way", ["fit", "validate"])
def test_nothing_that_matches_through_ckpt_path_is_a_warning(path: Path, way: str) -> None:
    with pytest.warns(UserWarning, match=r"0 of 4 tensors loaded; new: trunk\.weight[\s\S]*rename="):
        run(way, Evaluated("trunk", "cls"), path)


def test_nothing_that_matches_is_a_warning_where_lightning_accepts_it(path: Path) -> None:
    with pytest.warns(UserWarning, match="0 of 4 tensors loaded"):
        load_from_checkpoint(Net, path, body="trunk", head="cls")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"head": "cls"}, r"2 missing: cls\.weight, cls\.bias\n  2 unexpected: head\.weight, head\.bias"),
        ({"width": 5}, r"body\.weight has shape \(5, 6\) in the module and \(4, 6\) on disk"),
    ],
)
@pytest.mark.parametrize("way", ["fit", "validate"])
def test_a_wrong_model_through_ckpt_path(path: Path, way: str, arguments: Any, words: str) -> None:
    module = Evaluated(strict=True, **arguments)
    before = weights_of(module)
    with pytest.raises(RuntimeError, match=words) as caught:
        run(way, module, path)
    assert isinstance(caught.value, IncompatibleWeightsError)
    assert "Nothing was changed" in str(caught.value)
    assert "strict" not in str(caught.value)
    assert_unchanged(module, before)


class Stack(Recorded):
    """Many layers; if they load in a way of their own, what they lack is known afterwards only."""

    def __init__(self, number: int, own: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(number))
        if own:
            self.register_load_state_dict_pre_hook(lambda *_: None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers[0](inputs)


@pytest.mark.parametrize("own", [False, True])
def test_of_many_names_the_first_ten_and_a_count(tmp_path: Path, own: bool) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(Stack(1, own))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(RuntimeError, match=r"60 missing: layers\.1\.weight") as caught:
        run("fit", Stack(31, own), tmp_path / "one.ckpt")
    assert "and 50 more" in str(caught.value)
    assert len(str(caught.value)) < 900


def forgive(module: nn.Module, keys: Any) -> None:
    """As models do that leave something out of their checkpoints."""
    keys.missing_keys.clear()
    keys.unexpected_keys.clear()


@pytest.mark.parametrize("way", ["fit", "validate"])
def test_what_a_post_hook_forgives_is_no_error(path: Path, way: str) -> None:
    module = Evaluated(head="cls", strict=True)
    module.register_load_state_dict_post_hook(forgive)
    run(way, module, path)
    load_weights(module, path)


class Odd(nn.Module):
    def __init__(self, scale: torch.Tensor, part: nn.Module | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.register_module("part", part)


def test_what_torch_takes_is_taken(tmp_path: Path) -> None:
    """One element for a scalar, and names below a child that is None."""
    torch.save(Odd(torch.arange(1.0), nn.Linear(1, 1)).state_dict(), tmp_path / "saved.pt")
    expected, module = (Odd(torch.tensor(7.0), None) for _ in range(2))
    expected.load_state_dict(torch.load(tmp_path / "saved.pt"))
    load_weights(module, tmp_path / "saved.pt")
    assert module.scale.item() == expected.scale.item() == 0.0


class Loads(Net):
    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.load_state_dict({"body.weight": torch.ones(4, FEATURES)}, strict=False)


def test_a_load_of_the_user_in_a_hook_is_not_judged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whether names must match is known of Lightning's own load only."""
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run("fit", Loads(strict=True), path)
    assert "tensors loaded" not in caplog.text
