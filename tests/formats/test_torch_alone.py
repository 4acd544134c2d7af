"""Files that only torch.load can read: what weights_only refuses in them is said as for all other files."""

from __future__ import annotations

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload import MemoryEfficientRestore, load_weights
from lightning_memload.errors import UnsafeGlobalsError
from lightning_memload.formats import explain_torch_refusal, load_mapped
from tests.plugins.harness import TRUSTED, TinyModule, make_trainer


def write_legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_compressed(value: Any, path: Path) -> None:
    torch.save(value, path.with_suffix(".plain"))
    with (
        zipfile.ZipFile(path.with_suffix(".plain")) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))


WRITERS = [write_legacy, write_compressed]
# Since Python 3.13 the class is defined in another module.
POSIX_PATH = f"{PosixPath.__module__}.PosixPath"
Writer = Callable[[Any, Path], None]


class Kept:
    """A class that torch does not know."""

    def __init__(self) -> None:
        self.weight = torch.ones(3)


def refused() -> dict[str, Any]:
    tied = torch.arange(4.0)
    return {
        "state_dict": {**nn.Linear(2, 3).state_dict(), "tied": tied, "view": tied[1:3]},
        "hyper_parameters": {"arguments": Namespace(lr=0.1), "paths": [Path("a")]},
        "kept": Kept(),
    }


def message_of_zip(value: Any, path: Path) -> str:
    """The error for the same object in an ordinary file."""
    other = path.with_suffix(".zip")
    torch.save(value, other)
    with pytest.raises(UnsafeGlobalsError) as caught:
        load_mapped(other, weights_only=True)
    return str(caught.value).replace(str(other), str(path))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.filterwarnings("ignore:.*is loaded the ordinary way")
class TestRefusal:
    def test_weights(self, write: Writer, tmp_path: Path) -> None:
        path = tmp_path / "weights.pt"
        write(refused(), path)
        with pytest.raises(UnsafeGlobalsError) as caught:
            load_weights(nn.Linear(2, 3), path)
        assert str(caught.value) == message_of_zip(refused(), path)
        assert "argparse.Namespace, at hyper_parameters.arguments" in str(caught.value)
        assert set(caught.value.places) == {"argparse.Namespace", POSIX_PATH, f"{__name__}.Kept"}
        (line,) = re.findall(r"^    (torch\.serialization\.add_safe_globals.*)$", str(caught.value), re.MULTILINE)
        assert "argparse.Namespace" in line

    def test_what_is_allowed_is_not_named(self, write: Writer, tmp_path: Path) -> None:
        path = tmp_path / "weights.pt"
        write(refused(), path)
        with pytest.raises(UnsafeGlobalsError) as caught:
            load_weights(nn.Linear(2, 3), path, safe_globals=[Namespace, Kept])
        assert set(caught.value.places) == {POSIX_PATH}
        write({**nn.Linear(2, 3).state_dict(), "arguments": Namespace(lr=0.1)}, path)
        load_weights(nn.Linear(2, 3), path, safe_globals=[Namespace], strict=False)

    @pytest.mark.filterwarnings("ignore")
    def test_trainer(self, write: Writer, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, [], max_steps=1)
        trainer.fit(TinyModule())
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        checkpoint = {**torch.load(tmp_path / "plain.ckpt", weights_only=False), "arguments": Namespace(lr=0.1)}
        write(checkpoint, tmp_path / "last.ckpt")
        if not TRUSTED:
            pytest.skip("fit() of this Lightning has no weights_only")
        trainer = make_trainer(tmp_path, [MemoryEfficientRestore()], max_steps=2)
        with pytest.raises(UnsafeGlobalsError, match=r"argparse\.Namespace, at arguments"):
            trainer.fit(TinyModule(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)

    @pytest.mark.parametrize("cut", [600, 3000])
    def test_a_file_that_cannot_be_read_keeps_the_words_of_torch(self, cut: int, write: Writer, tmp_path: Path) -> None:
        path = tmp_path / "weights.pt"
        write(refused(), path)
        path.write_bytes(path.read_bytes()[:cut][:-400])
        error = pickle.UnpicklingError("the words of torch")
        assert explain_torch_refusal(str(path), error) is error

    def test_no_code_runs(self, write: Writer, tmp_path: Path) -> None:
        path, trace = tmp_path / "weights.pt", tmp_path / "trace"
        write({"a": Running(trace)}, path)
        explained = explain_torch_refusal(str(path), pickle.UnpicklingError("refused"))
        assert isinstance(explained, UnsafeGlobalsError)
        assert not trace.exists()


class Running:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)
