"""The examples run as printed in their first lines, small, and what they print holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.fresh_process import memory_cgroup_obstacle

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str, folder: Path) -> str:
    """Run an example and return what it printed; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Future[str]]]:
    """The folder and the future output of the smallest finetuning, which runs beside the tests."""
    folder = tmp_path_factory.mktemp("finetuning")
    options = ("--size=demo", "--pretraining-steps=1", "--steps=2", "--keep")
    with ThreadPoolExecutor(1) as pool:
        yield folder, pool.submit(run_example, "finetune_low_ram.py", *options, folder=folder)
    shutil.rmtree(folder)  # the weights, which pytest would keep


@pytest.fixture
def finetuned(finetuning: tuple[Path, Future[str]]) -> tuple[Path, str]:
    """The same when it is there."""
    folder, output = finetuning
    return folder, output.result()


# First, and with the other example beside it: most of the time of each process goes into one thread that imports.
@pytest.mark.usefixtures("finetuning")
@pytest.mark.long
def test_lightning_cli_trains_resumes_and_finetunes(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    small = ("--model.width=32", "--data.num_samples=128", "--trainer.accelerator=cpu")
    train, config, finetune = (
        "lightning_cli/train.py",
        *(str(EXAMPLES / "lightning_cli" / name) for name in ("config.yaml", "finetune.yaml")),
    )
    first = run_example(train, "fit", "--config", config, *small, folder=tmp_path)
    assert "Restored" not in first
    more = ("--ckpt_path=runs/last.ckpt", "--trainer.max_epochs=3")
    resumed = run_example(train, "fit", "--config", config, *more, *small, folder=tmp_path)
    assert re.search(r"Restored runs/last.ckpt for fit\n(.*\n)+weights .*\noptimizers ", resumed)
    assert "`max_epochs=3` reached" in resumed
    finetuned = run_example(train, "fit", "--config", finetune, *small, folder=tmp_path)
    assert re.search(r"Restored runs/last.ckpt for fit\n(.*\n)+weights ", finetuned)
    assert "optimizers " not in finetuned
    assert (tmp_path / "runs" / "finetuned.ckpt").exists()


class TestFinetuneLowRam:
    def test_bodies_and_losses(self, finetuned: tuple[Path, str]) -> None:
        _, output = finetuned
        assert re.search(r"yes +every body is the pretrained one, bit for bit\n", output)
        assert re.search(r"yes +every training had the same losses, which fell\n", output)
        assert not re.search(r"^ +NO ", output, re.MULTILINE)

    def test_export_is_laid_out_as_on_the_hub(self, finetuned: tuple[Path, str]) -> None:
        folder, _ = finetuned
        (exported,) = folder.glob("runs/finetune_low_ram/*/pretrained")
        shards = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
        assert sorted(path.name for path in exported.iterdir()) == [*shards, "model.safetensors.index.json"]

    @pytest.mark.memory
    def test_what_stays_in_the_file_takes_no_memory(self, finetuned: tuple[Path, str]) -> None:
        """The body is 193 MiB. Built stock it is there; of the file's pages a process has none."""
        _, output = finetuned
        stock, ours = (int(row[1]) for row in rows(output, limit="none"))
        assert stock - ours > 0.8 * 193

    @pytest.mark.memory
    @pytest.mark.cgroup
    @pytest.mark.skipif(
        torch.__version__ < "2.7",
        reason="torch 2.6 takes more for itself than is between the two ways of so small a model",
    )
    def test_stock_is_killed_where_the_callback_trains(self, finetuned: tuple[Path, str]) -> None:
        _, output = finetuned
        assert "yes  under the limit stock was killed\n" in output
        assert "yes  under the limit the callback trained\n" in output

    @pytest.mark.memory
    def test_without_a_limit_it_says_so(self, finetuned: tuple[Path, str]) -> None:
        if memory_cgroup_obstacle() is None:
            pytest.skip("a memory cgroup can be made here")
        assert "No memory limit is set" in finetuned[1]


def rows(output: str, limit: str) -> list[tuple[str, str]]:
    """Seconds and anonymous memory (MiB) of the processes that trained, stock first."""
    found = re.findall(rf"^\S.*? {limit} +trained +([\d.]+) +(\d+) ", output, re.MULTILINE)
    assert len(found) == 2, output
    return found


def test_load_any_module(tmp_path: Path) -> None:
    output = run_example("load_any_module.py", folder=tmp_path)
    assert re.search(r"\d+ MiB onto the (cpu|cuda) in [\d.]+ s\nhost memory rose by \d+ MiB\n", output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_resume_from_bucket(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    output = run_example("resume_from_bucket.py", folder=tmp_path)
    assert "Restored s3://bucket/run/last.ckpt for fit" in output
    assert "equal weights, bit for bit: yes" in output
    assert list(tmp_path.iterdir()) == []
