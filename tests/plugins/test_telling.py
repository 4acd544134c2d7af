"""Messages about a restore: ignored options, hyperparameters that a directory does not give, tensors on meta."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tests.lightning as L
from lightning_memload import StreamingCheckpointIO
from lightning_memload.plugins.telling import meta_error, warn_of_hyperparameters, warn_of_ignored_options

SAVED = {"hyper_parameters": {"width": 8, "other": 1, "_class_path": "x"}}


class Net(L.LightningModule):
    """A module that LightningCLI has built, or not."""

    def __init__(self, width: int = 3, **instantiator: Any) -> None:
        super().__init__()
        self.save_hyperparameters({"width": width} | instantiator)


class TestIgnoredOptions:
    def warn(self, io: Any, asynchronous: Any = False, format: Any = "torch", **loading: bool) -> None:
        saving = {"asynchronous": (asynchronous, False), "format": (format, "torch")}
        warn_of_ignored_options(io, saving=saving, loading=loading)

    def test_options_that_have_an_effect(self) -> None:
        self.warn(StreamingCheckpointIO(asynchronous=True, format="directory"), True, "directory", safe_globals=True)
        self.warn(None)

    @pytest.mark.parametrize("io", [None, StreamingCheckpointIO()], ids=["another", "ours"])
    def test_saving(self, io: Any) -> None:
        with pytest.warns(UserWarning, match=r"asynchronous_save='until_step'\) is ignored: the CheckpointIO"):
            self.warn(io, "until_step")
        with pytest.warns(UserWarning, match=r"save_format='directory'\) is ignored: the CheckpointIO"):
            self.warn(io, format="directory")

    def test_loading(self) -> None:
        with pytest.warns(UserWarning, match=r"MemoryEfficientRestore\(verify\) is ignored: it does not load"):
            self.warn(None, verify=True, other=False)


class TestHyperparameters:
    def test_a_difference_is_told(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="width is 3 in the module and 8 in the checkpoint"):
            warn_of_hyperparameters(str(tmp_path), SAVED, Net(_instantiator="cli"))

    def test_nothing_to_tell(self, tmp_path: Path) -> None:
        file = tmp_path / "last.ckpt"
        file.touch()
        warn_of_hyperparameters(str(tmp_path), SAVED, Net())
        warn_of_hyperparameters(str(tmp_path), SAVED, Net(8, _instantiator="cli"))
        warn_of_hyperparameters(str(file), SAVED, Net(_instantiator="cli"))
        warn_of_hyperparameters(str(tmp_path), {}, Net(_instantiator="cli"))
        warn_of_hyperparameters(str(tmp_path), None, Net(_instantiator="cli"))


@pytest.mark.parametrize(
    ("path", "parameters", "buffers", "words"),
    [
        (None, ["weight"], [], "Pass ckpt_path=..., or build the module without meta_init()"),
        ("last.ckpt", ["weight"], ["mask"], "Loading last.ckpt gave it no values"),
        ("last.ckpt", [], ["mask"], "does not hold these buffers (non-persistent buffers are never saved)"),
    ],
)
def test_tensors_on_meta(path: str | None, parameters: list[str], buffers: list[str], words: str) -> None:
    module: Any = SimpleNamespace()
    error = meta_error(module, path, parameters, buffers)
    assert error.names == (*parameters, *buffers)
    assert words in str(error)
