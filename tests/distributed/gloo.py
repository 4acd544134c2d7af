"""Ranks of a process group with gloo, each in a process of its own, without Lightning."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_memload.distributed import Companions

__all__ = ["met_companions", "run_ranks"]

_REPOSITORY = Path(__file__).resolve().parent.parent.parent


def run_ranks(
    function: str, num_ranks: int, folder: Path, *, timeout_seconds: float = 120, **arguments: Any
) -> list[dict[str, Any] | None]:
    """Calls a function once in each rank.

    Args:
        function: ``"module:name"``. It gets ``arguments``, and returns what JSON can hold.
        num_ranks: Number of ranks.
        folder: A folder for the results.
        timeout_seconds: After this all ranks are killed. A rank that is stopped by a signal is killed when rank 0 ends.
        **arguments: Anything that JSON can hold.

    Returns:
        For each rank: ``{"result": ...}``, ``{"error": ..., "type": ...}``, or ``None`` if it was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {
        **os.environ,
        "PYTHONPATH": str(_REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(num_ranks),
    }
    files = [folder / f"rank{rank}.json" for rank in range(num_ranks)]
    command = [sys.executable, "-m", "tests.distributed.gloo", function, json.dumps(arguments)]
    processes = [
        subprocess.Popen([*command, str(file)], env={**variables, "RANK": str(rank)}) for rank, file in enumerate(files)
    ]
    try:
        deadline = time.monotonic() + timeout_seconds
        while any(process.poll() is None for process in processes[1:] or processes):
            if time.monotonic() > deadline or any(_is_stopped(process.pid) for process in processes):
                break
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def _is_stopped(process_id: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def met_companions() -> Companions:
    """The companions of this rank, which share what they read."""
    companions = Companions.announce(agrees=False, shares=True)
    assert companions is not None
    dist.barrier()
    companions.meet()
    return companions


def _main(function: str, arguments: str, file: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    module, name = function.split(":")
    try:
        result = {"result": getattr(importlib.import_module(module), name)(**json.loads(arguments))}
    except Exception as error:
        traceback.print_exc()
        result = {"error": str(error), "type": type(error).__name__}
    Path(file).write_text(json.dumps(result))
    os._exit(0)  # The group may be broken, and its end would wait for other ranks.


if __name__ == "__main__":
    _main(*sys.argv[1:])
