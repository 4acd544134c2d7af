"""The verb ``convert``: its options, what it prints, and what it says of losses."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import open_checkpoint
from lightning_memload.cli import main
from lightning_memload.cli.arguments import renaming, size_in_bytes


@pytest.fixture
def source(tmp_path: Path) -> str:
    tied = torch.randn(3, 4)
    state = {"state_dict": {"m.net.w": tied, "m.net.tied": tied, "m.head": torch.ones(2)}, "epoch": 3}
    torch.save(state, tmp_path / "source.ckpt")
    return str(tmp_path / "source.ckpt")


def test_options(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target.safetensors"
    options = ["--dtype", "bfloat16", "--strip-prefix", "m.", "--rename", "net=body", "--exclude", "head"]
    assert main(["convert", source, str(target), *options]) == 0
    (tensor,) = open_checkpoint(target)
    assert (tensor.name, tensor.dtype) == ("body.w", torch.bfloat16)
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{target} (safetensors): 2 weights, ")
    assert shown.err.splitlines() == [
        "not written: epoch",
        "tied weights, stored under the first name only: body.tied (as body.w)",
    ]
    assert main(["convert", source, str(tmp_path / "all"), "--format", "directory", "--threads", "1"]) == 0
    assert len(open_checkpoint(tmp_path / "all")) == 3


def test_json_and_quiet(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", source, str(tmp_path / "target"), "--shard-size", "40B"]
    with pytest.raises(SystemExit):
        main(words)
    assert "'40B' is not a size such as 5GB or 500MiB" in capsys.readouterr().err
    words[-1] = "40"
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert answer["ties"] == {"m.net.tied": "m.net.w"}
    assert main([*words, "--quiet", "--force"]) == 0
    assert capsys.readouterr() == ("", "")


def test_refusals(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "target.ckpt")
    assert main(["convert", source, target]) == 0
    capsys.readouterr()
    for words, message in (
        ([source, target], "exists; --force replaces it"),
        ([source, str(tmp_path / "unknown")], "The format of "),
        ([source, target, "--force", "--dtype", "large"], "torch has no such dtype"),
        ([str(tmp_path / "absent"), target, "--force"], "No such file or directory"),
    ):
        assert main(["convert", *words]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert "ValueError" not in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""


def test_classes_that_need_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"state_dict": {"x": torch.ones(2)}, "hyper_parameters": Namespace(width=1)}
    torch.save(state, tmp_path / "source.ckpt")
    words = ["convert", str(tmp_path / "source.ckpt"), str(tmp_path / "target.ckpt")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "  argparse.Namespace, at hyper_parameters\n" in told
    assert "--trust loads it" in told
    assert main([*words, "--trust"]) == 0
    assert torch.load(tmp_path / "target.ckpt", weights_only=False)["hyper_parameters"] == Namespace(width=1)


def test_a_warning_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["convert", str(tmp_path / "old.pt"), str(tmp_path / "new.pt")]) == 0
    told = capsys.readouterr().err
    assert told.startswith("lightning-memload convert: ")
    assert "It is loaded the ordinary way: the whole checkpoint in host memory." in told
    assert told.count("\n") == 1
    assert torch.equal(torch.load(tmp_path / "new.pt")["x"], torch.ones(2))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("500kb", 500_000),
        ("17", 17),
        ("0", None),
        ("GB", None),
        ("1XB", None),
    ],
)
def test_sizes(word: str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(Exception, match="is not a size"):
            size_in_bytes(word)
    else:
        assert size_in_bytes(word) == expected


@pytest.mark.parametrize(("word", "expected"), [("a=b", ("a", "b")), ("a=b=c", ("a=b", "c")), ("a=", ("a", ""))])
def test_renaming(word: str, expected: Any) -> None:
    assert renaming(word) == expected
    for wrong in ("a", "=b", "(=b"):
        with pytest.raises(Exception, match=r"is not of the form|is not a regular expression"):
            renaming(wrong)
