"""From a LightningCLI configuration, and what LightningCLI's own look at the checkpoint costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import MemoryEfficientRestore
from tests.fresh_process import run_fresh
from tests.lightning import PYTORCH
from tests.plugins.harness import TRUSTED, TinyModule

pytest.importorskip("jsonargparse")

HAS_MAPPED_LOADING = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 7)

PROGRAM = """
import warnings

import torch
from tests.lightning import PYTORCH
from tests.lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_memload import MemoryMonitor
from tests.plugins.harness import TinyModule, adamw

warnings.simplefilter("ignore")
torch.manual_seed(5)


class Configurable(TinyModule):
    def __init__(self, extra: int = 2):
        super().__init__(adamw)
        self.save_hyperparameters()
        self.extra = nn.Linear(1, extra)


if ARGS.get("mapped"):
    from torch.utils.serialization import config

    config.load.mmap = True
peaks = []
parse = LightningCLI._parse_ckpt_path


def measured(self):
    with MemoryMonitor() as monitor:
        parse(self)
    peaks.append(monitor.peaks.anonymous_above_start_bytes)


LightningCLI._parse_ckpt_path = measured
arguments = ["fit", "--config", ARGS["config"], *ARGS.get("more", [])]
cli = LightningCLI(Configurable, seed_everything_default=1, save_config_callback=None, args=arguments)
callbacks = [c for c in cli.trainer.callbacks if type(c).__name__ == "MemoryEfficientRestore"]
report = callbacks[0].report
RESULT = {
    "options": [callbacks[0]._options.mode, callbacks[0]._options.host_budget_bytes, len(callbacks)],
    "report": report and report.as_dict(),
    "losses": len(cli.model.losses),
    "peak": peaks[0],
    "extra": cli.model.hparams.extra,
}
"""

CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: {epochs}
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: lightning_memload.MemoryEfficientRestore
      init_args:
        mode: copy
        host_budget_mib: 16
        num_threads: 2
    - class_path: {package}.callbacks.ModelCheckpoint
      init_args:
        dirpath: {folder}
        filename: saved
model:
  extra: {extra}
"""


def configure(folder: Path, *, epochs: int, extra: int) -> Path:
    config = folder / f"config{epochs}.yaml"
    config.write_text(CONFIG.format(package=PYTORCH, epochs=epochs, extra=extra, folder=folder))
    return config


@pytest.mark.memory
@pytest.mark.skipif(not TRUSTED, reason="the LightningCLI of 2.5 does not look into checkpoints")
@pytest.mark.lightning_only
def test_configured_and_resumed(tmp_path: Path) -> None:
    # 3 million outputs from one input: weight and bias 12 MB each, and as much twice in the optimizer.
    extra = 3_000_000
    first = run_fresh(PROGRAM, config=configure(tmp_path, epochs=1, extra=extra)).result
    assert first["options"] == ["copy", 16 * 2**20, 1]
    assert first["report"] is None
    path = (tmp_path / "saved.ckpt").rename(tmp_path / "resumed.ckpt")
    size = path.stat().st_size
    assert size > 20e6
    config = configure(tmp_path, epochs=2, extra=extra)
    more = ["--ckpt_path", str(path), "--weights_only", "false"]
    stock = run_fresh(PROGRAM, config=config, more=more).result
    mapped = run_fresh(PROGRAM, config=config, more=more, mapped=HAS_MAPPED_LOADING).result
    for result in (stock, mapped):
        assert result["report"]["path"] == str(path)
        assert result["report"]["mode"] == "copy"
        assert result["report"]["global_step"] == 8
        assert result["losses"] == 8
        assert result["extra"] == extra
    # LightningCLI looks for hyperparameters before the callback exists; torch's own setting makes that free.
    assert stock["peak"] > 0.9 * size
    assert mapped["peak"] < 0.1 * size or not HAS_MAPPED_LOADING


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{}", (True, None)),
        ("{log: false}", (False, None)),
        ("{log: all, log_saves: false}", ("all", False)),
        ("{log: summary, log_saves: all}", ("summary", "all")),
        ("{log_saves: null}", (True, None)),
    ],
)
@pytest.mark.filterwarnings("ignore")  # jsonargparse renames its own methods
def test_what_is_logged_can_be_configured(text: str, values: tuple[Any, Any]) -> None:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MemoryEfficientRestore, "restore")
    parsed = parser.parse_args([f"--restore={text}"]).restore
    assert (parsed.log, parsed.log_saves) == values
    parser.instantiate_classes(parser.parse_args([f"--restore={text}"]))


class Sloped(TinyModule):
    """Has a hyperparameter that changes no shape."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.slope = slope

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def run_cli(folder: Path, format: Any, *words: str) -> Any:
    from tests.lightning.pytorch.cli import LightningCLI

    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "callbacks": [MemoryEfficientRestore(save_format=format)],
    }
    return LightningCLI(
        Sloped, args=list(words), trainer_defaults=defaults, save_config_callback=None, seed_everything_default=1
    )


# Of Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not TRUSTED, reason="the LightningCLI of 2.5 does not look into checkpoints")
@pytest.mark.parametrize("format", ["torch", "directory"])
def test_hyperparameters_that_a_directory_does_not_give(tmp_path: Path, format: Any) -> None:
    path = tmp_path / "saved.ckpt"
    run_cli(tmp_path, format, "fit", "--model.slope=0.3", "--trainer.max_steps=1").trainer.save_checkpoint(path)
    words = ["validate", f"--ckpt_path={path}", "--weights_only=false"]
    if format == "torch":
        assert run_cli(tmp_path, format, *words).model.slope == 0.3
        return
    with pytest.warns(UserWarning, match=r"no hyperparameters from .* slope is 0.1 in the module and 0.3 in the"):
        run_cli(tmp_path, format, *words)
    # Those that are given again are as they were: nothing to say.
    assert run_cli(tmp_path, format, *words, "--model.slope=0.3").model.slope == 0.3
