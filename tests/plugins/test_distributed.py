"""Two processes with gloo: started one by one by Lightning, and forked and spawned by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fresh_process import run_program
from tests.plugins.harness import Case, TinyModule, adamw, make_trainer, write_checkpoint
from tests.plugins.restored import flip_byte
from tests.plugins.two_ranks import ranks

# Several fits in one process group: each rank has a folder of its own, and its own idea of the callback.
UNEQUAL = """
import json
import os
import pathlib
import warnings

import torch

from lightning_memload import MemoryEfficientRestore
from tests.plugins.harness import TRUSTED, TinyModule, adamw, make_trainer


def fit(name, options, checkpoint="last.ckpt"):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    folder = pathlib.Path(os.environ["MEMLOAD_TEST_FOLDER"])
    restore = MemoryEfficientRestore(**options[rank]) if options[rank] is not None else None
    torch.manual_seed(2)
    module = TinyModule(adamw)
    trainer = make_trainer(folder, [restore] if restore else [], max_epochs=2, devices=2, strategy="ddp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=folder / f"node{rank}" / checkpoint, **TRUSTED)
    result = {
        "losses": [loss.item().hex() for loss in module.losses],
        "weights": [p.detach().flatten()[0].item().hex() for p in module.parameters()],
        "path": str(trainer.ckpt_path),
        "report": restore and restore.report.as_dict(),
        "warnings": [str(item.message) for item in caught],
    }
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    fit("stock", [None, None])
    fit("rank 0 only", [{}, None])
    fit("rank 1 only", [None, {"on_corrupt": "previous"}])
    fit("both", [{"log": False, "on_corrupt": "previous"}, {"on_corrupt": "previous"}])
    fit("damaged", [{"on_corrupt": "previous"}] * 2, "damaged.ckpt")
    fit("error", [{}, {}], "damaged.ckpt")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def stock(path: Path) -> list[dict[str, Any]]:
    """The stock run; how the processes were started changes no loss."""
    return ranks(path, path.parent / "stock", "ddp_fork", ours=False)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork", "ddp_spawn"])
@pytest.mark.first("strategy")
def test_ranks_train_as_stock(strategy: str, path: Path, stock: list[dict[str, Any]], tmp_path: Path) -> None:
    ours = ranks(path, tmp_path / "ours", strategy, ours=True)
    for rank, (expected, actual) in enumerate(zip(stock, ours, strict=True)):
        assert expected["losses"]
        assert actual["losses"] == expected["losses"]
        assert actual["weights"] == expected["weights"]
        assert actual["ours"] == "StreamingCheckpointIO"
        assert actual["held"] == 0
        report = actual["report"]
        assert (report["mode"], report["world_size"], report["rank"]) == ("copy", 2, rank)
        assert [phase["name"] for phase in report["phases"]] == ["open", "weights", "optimizers"]
    # Every rank knows the same maxima.
    maxima = ours[0]["report"]["maxima"]
    assert maxima == ours[1]["report"]["maxima"]
    peaks = [result["report"]["total"]["peaks"]["anonymous_peak_bytes"] for result in ours]
    assert [result["report"]["maxima_ranks"] for result in ours] == [[0, 1]] * 2
    largest = maxima["host_anonymous_peak"]
    assert largest["value"] == max(peaks)
    assert peaks[largest["rank"]] == largest["value"]
    assert ours[0]["losses"] != ours[1]["losses"]


@pytest.mark.lightning_only
def test_forked_ranks_share_what_they_read(path: Path, stock: list[dict[str, Any]], tmp_path: Path) -> None:
    ours = ranks(path, tmp_path / "ours", "ddp_fork", ours=True, read="stripes", worth_bytes=0)
    for expected, actual in zip(stock, ours, strict=True):
        assert (actual["losses"], actual["weights"]) == (expected["losses"], expected["weights"])
        assert actual["report"]["read"] == "stripes"
        assert actual["held"] == 0
    read = [result["report"]["total"]["bytes_read"] for result in ours]
    assert [result["report"]["bytes_received"] for result in ours] == read[::-1]


@pytest.mark.lightning_only
def test_ranks_that_are_not_alike(path: Path, tmp_path: Path) -> None:
    """No rank waits for one that does not take part, and all train as stock, with the same checkpoint."""
    for rank in range(2):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        for name in ("last.ckpt", "damaged.ckpt"):
            shutil.copyfile(path, folder / name)
    flip_byte(tmp_path / "node1" / "damaged.ckpt", "state_dict.second.weight")
    program = tmp_path / "program.py"
    program.write_text(UNEQUAL)
    done = run_program(program, MEMLOAD_TEST_FOLDER=str(tmp_path))

    def results(name: str) -> list[dict[str, Any]]:
        files = [tmp_path / f"{name}.{rank}.json" for rank in range(2)]
        assert all(file.exists() for file in files), done.stdout[-2000:] + done.stderr[-6000:]
        return [json.loads(file.read_text()) for file in files]

    stock = results("stock")
    for name, reporting in {"rank 0 only": [0], "rank 1 only": [1], "both": [0, 1], "damaged": [0, 1]}.items():
        for rank, (expected, actual) in enumerate(zip(stock, results(name), strict=True)):
            assert actual["losses"] == expected["losses"], name
            assert actual["weights"] == expected["weights"], name
            assert actual["path"] == str(tmp_path / f"node{rank}" / "last.ckpt")
            report = actual["report"]
            assert (report is not None) is (rank in reporting)
            if report is not None:
                assert report["maxima_ranks"] == reporting
                assert report["maxima"]["host_anonymous_peak"]["rank"] in reporting
            told = [words for words in actual["warnings"] if "on_corrupt" in words or "Resuming" in words]
            assert len(told) == ((name == "rank 1 only" and rank == 1) or (name == "damaged" and rank == 0)), told
    # The rank that finds the damage tells of it, and the run ends.
    assert done.returncode != 0
    assert not list(tmp_path.glob("error.*.json"))
    assert f"[rank 1 of 2] {tmp_path}/node1/damaged.ckpt is damaged: " in done.stderr
    assert (
        f"[rank 1 of 2] The newest intact checkpoint in {tmp_path}/node1 is {tmp_path}/node1/last.ckpt" in done.stderr
    )


@pytest.mark.parametrize("save_format", ["directory", "safetensors+state"])
@pytest.mark.first("save_format")
def test_launchers_get_the_weights_in_every_format(
    save_format: str, path: Path, stock: list[dict[str, Any]], tmp_path: Path
) -> None:
    """They are loaded in the main process, where the callback has not been set up."""
    ours = ranks(path, tmp_path / "ours", "ddp_fork", ours=True, save_format=save_format)
    assert ours[0]["weights"] == stock[0]["weights"]
    assert json.loads((tmp_path / "ours" / "main.json").read_text()) == stock[0]["weights"]


def test_launchers_pass_a_bare_state_dict(tmp_path: Path) -> None:
    """The end of a fork or spawn launcher: save the weights in the worker, load them in the main process."""
    from lightning_memload import StreamingCheckpointIO

    module = TinyModule()
    trainer = make_trainer(tmp_path, plugins=[StreamingCheckpointIO()])
    io = trainer.strategy.checkpoint_io
    io.save_checkpoint(module.state_dict(), tmp_path / ".temp.ckpt")
    with torch.no_grad():
        expected = {name: value.clone() for name, value in module.state_dict().items()}
        for parameter in module.parameters():
            parameter.zero_()
    module.load_state_dict(io.load_checkpoint(tmp_path / ".temp.ckpt", weights_only=True))
    (tmp_path / ".temp.ckpt").unlink()
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name])
