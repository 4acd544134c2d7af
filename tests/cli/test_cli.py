"""The command line: what it prints, its exit status, and what it leaves alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lightning_memload
from lightning_memload.cli import main
from tests.formats.files import quantised, save_sparse, storage_pickle, tensor_pickle, write_zip
from tests.fresh_process import run_fresh


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tied = torch.ones(6, 4)
    torch.save({"state_dict": {"weight": tied, "tied": tied, "scalar": torch.tensor(3)}}, tmp_path / "sound.ckpt")
    data = bytearray((tmp_path / "sound.ckpt").read_bytes())
    data[lightning_memload.open_checkpoint(tmp_path / "sound.ckpt").storages[0].offset] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(data)
    save_file({"weight": torch.ones(3)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.ckpt").write_text("hello")
    return tmp_path


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (["sound.ckpt"], 0),
        (["plain.safetensors"], 3),
        (["text.ckpt"], 2),
        (["absent.ckpt"], 2),
        (["damaged.ckpt"], 1),
        (["sound.ckpt", "plain.safetensors"], 3),
        (["plain.safetensors", "text.ckpt"], 2),
        (["text.ckpt", "damaged.ckpt", "sound.ckpt"], 1),
    ],
)
def test_status_of_verify(names: list[str], status: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *(str(folder / name) for name in names)]) == status
    shown = capsys.readouterr()
    assert all(name in shown.out + shown.err for name in names)


def test_verify_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "--threads", "2", str(folder / "sound.ckpt"), str(folder / "damaged.ckpt")])
    shown = capsys.readouterr().out
    with zipfile.ZipFile(folder / "sound.ckpt") as file:  # torch 2.6 writes smaller ones
        num_bytes = sum(item.file_size for item in file.infolist())
    assert f"sound.ckpt (torch): verified. {num_bytes} bytes in " in shown
    assert "damaged, 1 problem." in shown
    assert "96 bytes of state_dict.weight at byte" in shown
    main(["verify", "--quiet", str(folder / "sound.ckpt"), str(folder / "plain.safetensors")])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [[], ["verify"], ["inspect"], ["verify", "x", "--threads", "0"], ["lose"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: lightning-memload" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_help_tells_the_exit_status(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert "Exit status: 0" in capsys.readouterr().out


def test_inspect_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "sound.ckpt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["state_dict.weight", "6x4", "float32", "96"],
        ["state_dict.tied", "6x4", "float32", "96", "shares", "the", "storage", "of", "state_dict.weight"],
        ["state_dict.scalar", "scalar", "int64", "8"],
    ]
    assert "(torch): 3 tensors, 104 bytes in 2 storages; 1 file of " in lines[-1]
    assert main(["inspect", "--json", str(folder / "sound.ckpt")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["ties"] == [["state_dict.weight", "state_dict.tied"]]
    assert content["tensors"][2]["dtype"] == "int64"
    assert content["tensor_bytes"] == 104
    assert main(["inspect", str(folder / "text.ckpt")]) == 2
    assert "none of the known formats" in capsys.readouterr().err


def test_inspect_prints_no_control_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = b"X\x05\x00\x00\x00\x1b[2Jx"
    write_zip(tmp_path / "odd", b"\x80\x02}" + key + tensor_pickle(storage_pickle()) + b"s.", {"0": bytes(16)})
    assert main(["inspect", str(tmp_path / "odd")]) == 0
    assert r"\x1b[2Jx" in capsys.readouterr().out


def test_inspect_reads_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sparse(tmp_path / "large.ckpt", {"weight": 40 << 30})
    assert main(["inspect", str(tmp_path / "large.ckpt")]) == 0
    assert "42,949,672,960" in capsys.readouterr().out


def test_as_a_program(folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "lightning_memload", "verify", "damaged.ckpt"]
    root = str(Path(lightning_memload.__file__).parent.parent)
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "damaged.ckpt (torch): damaged" in done.stdout


def test_lightning_is_not_imported(folder: Path) -> None:
    program = """
import sys
from lightning_memload.cli import main
main(["verify", ARGS["path"]])
main(["inspect", ARGS["path"]])
RESULT = [name for name in ("lightning", "pytorch_lightning", "lightning_fabric") if name in sys.modules]
"""
    assert run_fresh(program, path=folder / "sound.ckpt").result == []


def test_a_name_that_the_output_has_no_letters_for(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "名.pt")
    for verb in ("verify", "inspect"):
        done = subprocess.run(
            [sys.executable, "-m", "lightning_memload", verb, str(tmp_path / "名.pt")],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert r"\u540d.pt" in done.stdout


def test_inspect_lists_special_tensors_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {
        "quantised": quantised(torch.ones(2, 3)),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(4, device="meta"),
        "plain": torch.ones(2),
        "config": argparse.Namespace(size=torch.Size([3])),
    }
    torch.save(state, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "quantised 2x3 qint8 6 quantized" in lines
    assert "sparse 3x3 float32 60 sparse_coo" in lines
    assert "meta 4 float32 0 meta" in lines
    assert "plain 2 float32 8" in lines
    assert "1 class that torch.load(weights_only=True) refuses:" in lines
    assert "argparse.Namespace, at config" in lines
    assert any(line.startswith("3 classes and functions that it allows: ") and "torch.Size" in line for line in lines)
    assert main(["inspect", "--json", str(tmp_path / "file.pt")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"name": "argparse.Namespace", "place": "config", "allowed": False} in answer["globals"]
    assert {"name": "meta", "kind": "meta", "shape": [4], "dtype": "float32", "nbytes": 0} in answer["special"]


def test_inspect_lists_subclasses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2, 3).as_subclass(Tagged)}, tmp_path / "file.pt")
    assert main(["inspect", str(tmp_path / "file.pt")]) == 0
    assert f"weight 2x3 float32 24 {__name__}.Tagged" in " ".join(capsys.readouterr().out.split())


class Tagged(torch.Tensor):
    pass
