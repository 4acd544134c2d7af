"""Runs the zoo: every model in a process of its own, which ends when its time is over.

    python -m tests.zoo                     # timm, torchvision, diffusers, transformers, peft: what is installed
    python -m tests.zoo timm --most 50      # the first 50 models of one library
    python -m tests.zoo transformers --heads --only Bert
    python -m tests.zoo --jobs 16           # 16 models at a time

Nothing is downloaded: the processes that build have no network. What is not compared is counted, with why.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import re
import resource
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.zoo import Comparison, NotBuiltError, TooLargeError, compare
from tests.zoo.libraries import LIBRARIES, Ways, models_of

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "MemoryError", "ENOMEM")


# The models of a library, for the processes that are forked from this one.
_models: list[Ways] = []


@dataclass
class Verdict:
    """The result for one model: ``right``, ``wrong``, ``not built as always either`` or ``skipped``."""

    status: str
    why: list[str] = field(default_factory=list)
    comparison: Comparison = field(default_factory=Comparison)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Compare models of installed libraries.")
    parser.add_argument("libraries", nargs="*", default=LIBRARIES, help=f"of {', '.join(LIBRARIES)}")
    parser.add_argument("--most", type=int, default=1 << 30, help="how many models of each library")
    parser.add_argument("--every", type=int, default=1, help="take every n-th model")
    parser.add_argument("--only", default="", help="a regular expression that is found in the names of the models")
    parser.add_argument("--heads", action="store_true", help="every class of transformers, not the plain models alone")
    parser.add_argument("--seconds", type=float, default=60, help="how long one model may take")
    parser.add_argument("--gib", type=float, default=1, help="models whose parameters are larger are skipped")
    parser.add_argument("--jobs", type=int, default=1, help="how many models to compare at a time")
    parser.add_argument("--verbose", action="store_true", help="name every model, also those that are right")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # Its downloads go past Python's sockets.
    _close_network()
    failed = 0
    for library in options.libraries:
        start = time.perf_counter()
        try:
            found = [(n, ways) for n, ways in models_of(library, heads=options.heads) if re.search(options.only, n)]
        except ImportError as error:
            print(f"{library}: not installed, skipped ({error})", flush=True)
            continue
        taken = found[:: options.every][: options.most]
        verdicts = []
        for (name, _), verdict in zip(taken, _judge_all(taken, options), strict=True):
            verdicts.append(verdict)
            if verdict.status != "right" or options.verbose:
                print(f"{library} {name}: {verdict.status}. {'; '.join(verdict.why[:5])}", flush=True)
        failed += sum(verdict.status == "wrong" for verdict in verdicts)
        print(_summary(library, len(found), verdicts, time.perf_counter() - start), flush=True)
    return 1 if failed else 0


def _summary(library: str, known: int, verdicts: list[Verdict], seconds: float) -> str:
    statuses = Counter(verdict.status for verdict in verdicts)
    right = [verdict.comparison for verdict in verdicts if verdict.status == "right"]
    counts = [f"{statuses[status]} {status}" for status in ("right", "wrong", "not built as always either", "skipped")]
    if known > len(verdicts):
        counts.append(f"{known - len(verdicts)} not asked for")
    total, in_memory = sum(item.nbytes for item in right) / 2**20, sum(item.memory_mib for item in right)
    partly = sum(bool(item.memory_mib) for item in right)
    took, meta_took = sum(item.seconds for item in right), sum(item.meta_seconds for item in right)
    return (
        f"{library}: {known} models in {seconds:.0f} s: {', '.join(counts)}. Of {total:.0f} MiB of parameters in those "
        f"that are right, {in_memory:.0f} MiB in {partly} models were built in memory. Construction took {took:.0f} s, "
        f"under meta_init {meta_took:.0f} s."
    )


# ----------------------------------------------------------------------------------------------------------------------


def _judge_all(models: list[tuple[str, Ways]], options: argparse.Namespace) -> Iterator[Verdict]:
    """Yields a verdict on each model, in order. The processes inherit the models, which cannot be pickled."""
    _models[:] = [ways for _, ways in models]
    judge = functools.partial(_judge_one, seconds=options.seconds, gib=options.gib)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(judge, range(len(models)))


def _judge_one(number: int, *, seconds: float, gib: float) -> Verdict:
    return _judge(_models[number], seconds, gib)


def _judge(ways: Ways, seconds: float, gib: float, *, ordinary: bool = False) -> Verdict:
    """Compares, or builds as always, in a process of its own, which has a limited time and memory."""
    context = multiprocessing.get_context("fork")  # The libraries are imported once.
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(ways, gib, theirs, ordinary), daemon=True)
    process.start()
    theirs.close()
    step, deadline = "began", time.monotonic() + seconds
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            message = ours.recv()
            if isinstance(message, Verdict):
                return message
            step = message
        why = f"it took more than {seconds:.0f} s, the last while it {step}"
    except EOFError:
        process.join()
        why = f"exit code {process.exitcode} while it {step}"
        if "meta_init" in step:
            return Verdict("wrong", [why])
    finally:
        process.kill()
        process.join()
        ours.close()
    if step != "was built under meta_init" or ordinary:
        return Verdict("skipped", [why])  # It says nothing of ours.
    built = _judge(ways, seconds / 4, gib, ordinary=True)
    return Verdict("wrong" if built.status == "right" else "skipped", [why, *built.why])


def _examine(ways: Ways, gib: float, connection: Connection, ordinary: bool) -> None:
    limit = int((6 * gib + 6) * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process ends)
    connection.send(_built_as_always(ways) if ordinary else _verdict(ways, gib, connection))


def _built_as_always(ways: Ways) -> Verdict:
    for build in ways:
        with contextlib.suppress(Exception):
            build()
            return Verdict("right", ["built as always it took less"])
    return Verdict("not built as always either")


def _verdict(ways: Ways, gib: float, connection: Connection) -> Verdict:
    status, why = "not built as always either", []
    for build in ways:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = compare(build, Path(folder), most_bytes=int(gib * 2**30), tell=connection.send)
            except Exception as error:
                too_large = isinstance(error, TooLargeError) or any(word in str(error) for word in _OUT_OF_MEMORY)
                if not too_large and not isinstance(error, NotBuiltError):
                    return Verdict("wrong", [traceback.format_exc(limit=-6)])
                status = "skipped" if too_large else status
                why.append(str(error) if isinstance(error, TooLargeError) or not too_large else "no memory is left")
            else:
                memory = f"in memory: {found.memory_mib} MiB, {found.why_in_memory}"
                told = found.wrong or ([memory] if found.memory_mib else [])
                return Verdict("wrong" if found.wrong else "right", told, found)
    return Verdict(status, list(dict.fromkeys(why)))


def _close_network() -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("The zoo does not use the network.")

    socket.getaddrinfo = refuse
    socket.socket.connect = refuse  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
