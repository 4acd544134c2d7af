"""The command line: what it prints, its exit status, and what it leaves alone."""

from __future__ import annotations

import argparse
import io
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
from lightning_memload.cli.progress import Progress
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
    summary = capsys.readouterr().out.splitlines()
    assert summary[0].startswith(f"{folder}/sound.ckpt (torch): 3 tensors, 104 bytes in 2 storages; 1 file of ")
    assert [line.split() for line in summary[2:]] == [
        ["section", "tensors", "values", "bytes", "size", "dtypes"],
        ["weights", "3", "25", "104", "104", "bytes", "float32,", "int64"],
        ["1", "storage", "shared", "by", "several", "tensors:"],
        ["state_dict.weight,", "state_dict.tied"],
    ]
    assert main(["inspect", "--tensors", str(folder / "sound.ckpt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(summary)] == summary
    assert [line.split() for line in lines[len(summary) + 1 :]] == [
        ["state_dict.weight", "6x4", "float32", "96"],
        ["state_dict.tied", "6x4", "float32", "96", "shares", "the", "storage", "of", "state_dict.weight"],
        ["state_dict.scalar", "scalar", "int64", "8"],
    ]
    assert main(["inspect", "--json", str(folder / "sound.ckpt")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["ties"] == [["state_dict.weight", "state_dict.tied"]]
    assert content["tensors"][2]["dtype"] == "int64"
    assert content["tensor_bytes"] == 104
    assert content["sections"] == [
        {"name": "weights", "tensors": 3, "values": 25, "nbytes": 104, "dtypes": {"float32": 2, "int64": 1}}
    ]
    assert main(["inspect", str(folder / "text.ckpt")]) == 2
    assert "none of the known formats" in capsys.readouterr().err


def test_inspect_prints_no_control_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = b"X\x05\x00\x00\x00\x1b[2Jx"
    write_zip(tmp_path / "odd", b"\x80\x02}" + key + tensor_pickle(storage_pickle()) + b"s.", {"0": bytes(16)})
    assert main(["inspect", "--tensors", str(tmp_path / "odd")]) == 0
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
from lightning_memload.cli.progress import Progress
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
    assert main(["inspect", "--tensors", str(tmp_path / "file.pt")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "quantised 2x3 qint8 6 quantized" in lines
    assert "sparse 3x3 float32 60 sparse_coo" in lines
    assert "meta 4 float32 0 meta" in lines
    assert "plain 2 float32 8" in lines
    assert "1 class that torch.load(weights_only=True) refuses:" in lines
    assert "argparse.Namespace, at config" in lines
    allowed = " ".join(lines).partition("3 classes and functions that it allows: ")[2]
    assert "torch.Size" in allowed
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


def test_verify_names_a_file_once_and_prints_results_to_stdout(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("damaged.ckpt", "text.ckpt", "absent.ckpt"):
        main(["verify", str(folder / name)])
        shown = capsys.readouterr()
        assert shown.out.count(name) == 1
        assert shown.err == ""


def test_verify_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(folder / name) for name in ("sound.ckpt", "damaged.ckpt", "text.ckpt")]
    assert main(["verify", "--json", *paths]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == 1
    assert [item["status"] for item in answer["checkpoints"]] == [0, 1, 2]
    assert answer["checkpoints"][1]["damage"][0]["key"] == "state_dict.weight"
    assert "none of the known formats" in answer["checkpoints"][2]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "x", "--threads", "many"], "'many' is not a whole number of at least 1"),
        (["verify", "x", "--threads", "0"], "'0' is not a whole number of at least 1"),
        (["inspect", "x", "--match", "("], "'(' is not a regular expression: "),
    ],
)
def test_message_for_a_wrong_argument(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    shown = capsys.readouterr().err
    assert message in shown
    assert "positive_number" not in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"lightning-memload {lightning_memload.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["inspect", "--help"], ["verify", "--threads", "0", "x"]])
def test_help_imports_no_torch(words: list[str]) -> None:
    program = """
import sys
from lightning_memload.cli import main
from lightning_memload.cli.progress import Progress
try:
    main(ARGS["words"])
except SystemExit:
    pass
RESULT = sorted({"torch", "numpy", "tqdm"} & set(sys.modules))
"""
    assert run_fresh(program, words=words).result == []


def test_error_without_a_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["inspect", str(folder / "text.ckpt")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["inspect", "--debug", str(folder / "text.ckpt")]) == 2
    assert "Traceback" in capsys.readouterr().err

    def fail(path: str) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr("lightning_memload.formats.open_checkpoint", fail)
    assert main(["inspect", str(folder / "sound.ckpt")]) == 2
    expected = "lightning-memload inspect: ZeroDivisionError: a mistake of ours (--debug shows where)\n"
    assert capsys.readouterr() == ("", expected)


def test_interruption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_memload.formats.open_checkpoint", interrupt)
    assert main(["inspect", str(folder / "sound.ckpt")]) == 130


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A file with the sections of a Lightning checkpoint."""
    weights = {"net.0.weight": torch.ones(8, 4), "net.0.bias": torch.ones(8), "head.weight": torch.ones(2, 8)}
    states = {number: {"exp_avg": torch.ones(8), "step": torch.tensor(1.0)} for number in range(3)}
    checkpoint = {
        "epoch": 1,
        "state_dict": weights,
        "loops": {"fit_loop": {"epoch": 1}},
        "callbacks": {
            "Stopping{'monitor': 'loss', 'a long name': 'of more than forty characters'}": {"best": torch.ones(())}
        },
        "optimizer_states": [{"state": states, "param_groups": []}, {"state": {0: {"step": torch.ones(())}}}],
        "lr_schedulers": [{"last_epoch": 1}],
        "hyper_parameters": {"width": 8},
        "mine": torch.ones(3, dtype=torch.float64),
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_inspect_shows_sections(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(training)]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = [(item["name"], item["tensors"], item["values"], item["nbytes"]) for item in answer["sections"]]
    assert found == [
        ("weights", 3, 56, 224),
        ("optimizer 0", 6, 27, 108),
        ("optimizer 1", 1, 1, 4),
        ("callbacks", 1, 1, 4),
        ("other", 1, 3, 24),
    ]
    assert answer["without_tensors"] == ["epoch", "loops", "lr_schedulers", "hyper_parameters"]


def test_inspect_shows_a_tree(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--tree", "--match", "^state_dict", str(training)]) == 0
    lines = capsys.readouterr().out.partition("\n\nstate_dict")[2].splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["net", "2", "tensors", "160"],
        ["0", "2", "tensors", "160"],
        ["weight", "8x4", "float32", "128"],
        ["bias", "8", "float32", "32"],
        ["head", "1", "tensor", "64"],
        ["weight", "2x8", "float32", "64"],
    ]


def test_inspect_matches_and_sorts(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", "--match", r"\.weight$", "--sort", "bytes", str(training)]) == 0
    names = [tensor["name"] for tensor in json.loads(capsys.readouterr().out)["tensors"]]
    assert names == ["state_dict.net.0.weight", "state_dict.head.weight"]
    assert main(["inspect", "--sort", "name", "--match", r"\.weight$", str(training)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 12 tensors match"


@pytest.mark.parametrize("words", [["--tensors"], ["--tree"], []])
def test_inspect_keeps_to_the_width_of_the_terminal(
    words: list[str], training: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(training)
    monkeypatch.setattr("lightning_memload.cli.inspect.terminal_width", lambda: 60)
    assert main(["inspect", *words, path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if path not in line) <= 60
    monkeypatch.undo()
    assert main(["inspect", *words, path]) == 0
    assert ("of more than forty characters" in capsys.readouterr().out) == bool(words)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("lightning_memload.cli.progress._SECONDS_BETWEEN", -1.0)
    with Progress("Verifying x") as progress:
        progress(1 << 20, 4 << 20)
        assert progress.describe(1 << 20, 4 << 20, 30.0) == (
            "Verifying x: 25%, 1.00 MiB of 4.00 MiB, 34.13 KiB/s, 1:30 left"
        )
    assert "Verifying x: 25%, 1.00 MiB of 4.00 MiB" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    for stream, quiet in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        with Progress("Verifying x", quiet=quiet) as progress:
            progress(1, 2)
        assert stream.getvalue() == ""


def test_diff_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = {"same": torch.ones(3), "x": torch.tensor([1.0, 0.0]), "zero": torch.tensor([0.0]), "old": torch.ones(1)}
    second = {**first, "x": torch.tensor([1.5, float("nan")]), "zero": torch.tensor([-0.0]), "same": torch.ones(4)}
    del second["old"]
    for name, state in (("a.pt", first), ("b.pt", second)):
        torch.save(state, tmp_path / name)
    paths = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    assert main(["diff", *paths]) == 1
    *lines, same, bits_only = capsys.readouterr().out.splitlines()
    assert same == "0 of 2 compared tensors (12 bytes in each checkpoint) are the same, bit for bit"
    assert bits_only == "1 of the others have equal values with different bits, such as 0.0 and -0.0"
    assert [line.split() for line in lines] == [
        ["tensor", "values", "differ", "differ", "in", "bits", "max", "abs", "max", "relative"],
        ["x", "2", "2", "2", "0.5", "0.333", "1", "NaN", "in", "one", "only"],
        ["zero", "1", "0", "1", "0", "0"],
        ["same:", "shape", "3", "and", "4"],
        ["old:", "only", "in", paths[0]],
    ]
    assert main(["diff", "--json", *paths]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["equal"], answer["different"][0]["nan_in_one"]) == (False, 1)
    assert main(["diff", "--quiet", *paths]) == 1
    assert capsys.readouterr() == ("", "")
    assert main(["diff", paths[0], paths[0]]) == 0
    assert main(["diff", paths[0], str(tmp_path / "absent")]) == 2


def test_prefetch_prints(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "sound.ckpt"
    assert main(["prefetch", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{path}: ")
    assert " in 1 file; " in shown.out
    assert shown.err == ""
    assert main(["prefetch", "--json", str(folder)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_files"] == 4
    assert answer["bytes_read"] + answer["bytes_cached"] == sum(file.stat().st_size for file in folder.iterdir())
    monkeypatch.setattr("lightning_memload.memory.host.available_host_bytes", lambda: 100)
    assert main(["prefetch", str(path)]) == 0
    assert "do not fit into the 100 bytes of free memory" in capsys.readouterr().err
    assert main(["prefetch", str(folder / "absent")]) == 2


def test_plan_prints(training: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["plan", str(training), "--stage", "validate"]) == 0
    first, head, *rows, free = capsys.readouterr().out.splitlines()
    assert first == f"{training}, validate on cpu: weights 224 bytes, optimizer states 112 bytes"
    assert head.split("  ")[0] == "resume"
    assert [row.split("  ")[0] for row in rows] == ["stock", "copy", "copy, meta_init", "assign, meta_init"]
    assert all(row.endswith("yes") for row in rows)
    assert free.startswith("free now: ")
    assert main(["plan", "--json", "--device", "cuda", "--host-budget-mib", "16", str(training)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [way["device_bytes"] for way in answer["ways"]] == [336, 336, 336]
    monkeypatch.setattr("lightning_memload.forecast.resume_plan.available_host_bytes", lambda: 300)
    assert main(["plan", str(training)]) == 1
    assert all(row.endswith("no") for row in capsys.readouterr().out.splitlines()[2:-1])
    monkeypatch.setattr("lightning_memload.forecast.resume_plan.available_host_bytes", lambda: None)
    assert main(["plan", str(training)]) == 0
    assert "unknown" in capsys.readouterr().out
