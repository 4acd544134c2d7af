"""The prefix of ``torch.compile`` in names is removed and added by the Trainer, for weights and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload import MemoryEfficientRestore, load_from_checkpoint, meta_init
from lightning_memload.restore import optimizer as optimizers
from tests.plugins.harness import TRUSTED, Case, TinyModule, adamw, assert_same, make_trainer, resume, write_checkpoint


class Compiled(nn.Module):
    """A module like one of ``torch.compile``, without a compiler."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any) -> Any:
        return self._orig_mod(*args)


class Plain(TinyModule):
    def __init__(self) -> None:
        super().__init__(adamw)


class WithCompiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first = Compiled(self.first)  # type: ignore[assignment]


KINDS: tuple[type[Plain], ...] = (Plain, WithCompiled)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(("saved", "live"), [KINDS, KINDS[::-1]])
def test_a_resume_under_the_other_names(saved: type[Plain], live: type[Plain], meta: bool, tmp_path: Path) -> None:
    path = write_checkpoint(Case(saved), tmp_path)
    stock_module, _ = resume(Case(saved), path, tmp_path, None)

    def build() -> Plain:
        with meta_init(enabled=meta):
            return live()

    module, _ = resume(Case(build), path, tmp_path, MemoryEfficientRestore(mode="copy"))
    assert_same(stock_module.losses, module.losses, "losses")
    assert_same(list(stock_module.state_dict().values()), list(module.state_dict().values()), "weights")


def test_a_hook_that_renames_by_itself(tmp_path: Path) -> None:
    path = write_checkpoint(Case(WithCompiled), tmp_path)

    class Renames(Plain):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            assert "first._orig_mod.weight" in state
            checkpoint["state_dict"] = {name.replace("_orig_mod.", ""): value for name, value in state.items()}

    module, _ = resume(Case(Renames), path, tmp_path, MemoryEfficientRestore(mode="copy"))
    stock_module, _ = resume(Case(Renames), path, tmp_path, None)
    assert_same(dict(stock_module.state_dict()), dict(module.state_dict()), "weights")


def test_evaluation_and_load_from_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(Case(WithCompiled), tmp_path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    module = Plain()
    trainer = make_trainer(tmp_path, callbacks=[MemoryEfficientRestore()])
    trainer.predict(module, module.train_dataloader(), ckpt_path=str(path), **TRUSTED)
    assert_same(list(saved.values()), list(module.state_dict().values()), "weights")
    module = load_from_checkpoint(Plain, path, weights_only=False)
    assert_same(list(saved.values()), list(module.state_dict().values()), "weights")


@pytest.mark.parametrize("saved", ["first.weight", "first._orig_mod.weight"])
@pytest.mark.parametrize("live", ["first.weight", "first._orig_mod.weight"])
def test_names_of_optimizer_states(saved: str, live: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    state = {"state": {}, "param_groups": [{"params": [saved]}]}
    ordered = optimizers._in_live_order(state, torch.optim.SGD([parameter], 0.1), {live: parameter}, "optimizer")
    assert ordered["param_groups"] == [{"params": [saved]}]
