"""Compare ways to load weights from a file into a model: the usual ways, this project's, and other packages.

Every row is one short function that builds a GPT-2 with an untied head, loads it, and returns it on the device. Every
row runs once in each repetition, in a fresh process. All rows read files with the same weights. Each process first
loads a tiny model, which takes the one-time costs: imports, the CUDA context, and with the meta device 1.4 to 4.8 s of
torch. Its time has a column of its own, "first model". Measured are then: building the model, loading it, and reading
every weight once, which includes the cost of a file that is only mapped. Memory is the rise above the level before the
row.

    python examples/benchmarks/weight_loading.py --size gpt2-xl --device cuda --output weight-loading.json

The first five rows are the methods of the notebook "Memory-efficient model weight loading" (S. Raschka, LLMs from
scratch, chapter 5). Where the notebook builds a model on the CPU and moves it, these rows build it on its device.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    Deliver,
    ProcessFailed,
    above,
    aligned,
    digest,
    evict,
    flush,
    header,
    median,
    number,
    positive,
    run_fresh,
    synchronize,
    versions,
    warm,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt

from lightning_memload import load_weights, meta_init
from lightning_memload.memory import MemoryMonitor

# "tiny" is for tests, and for the load before the measurement, which takes the one-time costs of a process.
SIZES = {
    "tiny": gpt.GPTConfig(num_layers=2, num_heads=2, width=64, vocabulary_size=256, context_length=64),
    **gpt.SIZES,
}
PACKAGES = (
    "safetensors",
    "accelerate",
    "fastsafetensors",
    "runai-model-streamer",
    "tensorizer",
    "instanttensor",
    "flashpack",
)
# A method, which safetensors has since 0.9.0rc1.
PREFETCH = "safetensors.safe_open.prefetch"
ROW_TIMEOUT_SECONDS = 300
LEAST_COMPARED_BYTES = 16 << 20  # A ratio to less memory than this would be noise.


class GPT2(nn.Module):
    """GPT-2 with an untied head, which has its own weights. All weights have torch's default initial values."""

    def __init__(self, config: gpt.GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(gpt.Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)


@dataclass(frozen=True, slots=True)
class Files:
    """The paths of the files that hold the same weights in different formats."""

    folder: Path

    @property
    def pt(self) -> Path:
        """The state dict, written by ``torch.save``."""
        return self.folder / "model.pt"

    @property
    def safetensors(self) -> Path:
        """The state dict in one safetensors file."""
        return self.folder / "model.safetensors"

    @property
    def tensors(self) -> Path:
        """A folder with one ``.pt`` per tensor."""
        return self.folder / "tensors"

    @property
    def tensorizer(self) -> Path:
        """The module in tensorizer's own format. Exists only where tensorizer is installed."""
        return self.folder / "model.tensors"

    @property
    def flashpack(self) -> Path:
        """The state dict in flashpack's own format. Exists only where flashpack is installed."""
        return self.folder / "model.flashpack"

    @property
    def digest(self) -> Path:
        """The digest of the weights. It is written last: if it exists, the other files are complete."""
        return self.folder / "digest"


# The rows -------------------------------------------------------------------------------------------------------------

Load = Callable[[gpt.GPTConfig, Files, torch.device], nn.Module]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to load.

    Attributes:
        label: Its name in the table.
        reads: The attribute of ``Files`` that names its file.
        group: ``"usual"`` (torch alone), ``"ours"`` (this project) or ``"peer"`` (another package).
        load: Builds the model, loads it, and returns it.
        requires: The module that must be installed, or ``PREFETCH``.
        only: The only type of device that it supports. ``None``: every type.
    """

    label: str
    reads: str
    group: str
    load: Load
    requires: str = "torch"
    only: str | None = None


ROWS: dict[str, Row] = {}


def row(label: str, *, reads: str, group: str = "usual", **limits: str) -> Callable[[Load], Load]:
    """Return a decorator that adds a function to ``ROWS``. The name of the function is the name of the row."""

    def enter(load: Load) -> Load:
        ROWS[load.__name__.replace("_", "-")] = Row(label, reads, group, load, **limits)
        return load

    return enter


@row("baseline: `torch.load` onto the device, `load_state_dict`", reads="pt")
def baseline(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Holds two full sets of weights on the device at once."""
    with device:
        model = GPT2(config)
    model.load_state_dict(torch.load(files.pt, map_location=device, weights_only=True))
    return model


@row("sequential: `torch.load` on the CPU, copy one by one", reads="pt")
def sequential(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Holds one set of weights on the device and another one in host memory."""
    with device:
        model = GPT2(config)
    state_dict = torch.load(files.pt, map_location="cpu", weights_only=True)
    for name, tensor in model.state_dict().items():
        tensor.copy_(state_dict[name])
    return model


@row("meta device, `to_empty`, `torch.load` onto the device, copy", reads="pt")
def meta_direct(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Initialises no weights and needs no host memory, but holds two sets of weights on the device."""
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device=device)
    state_dict = torch.load(files.pt, map_location=device, weights_only=True)
    for name, tensor in model.state_dict().items():
        tensor.copy_(state_dict[name])
    return model


@row("meta device, `mmap=True`, `assign=True`", reads="pt")
def mmap_assign(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The weights are mapped pages of the file, which are read when they are first used: by ``to``, or by the model."""
    with torch.device("meta"):
        model = GPT2(config)
    state_dict = torch.load(files.pt, map_location="cpu", mmap=True, weights_only=True)
    model.load_state_dict(state_dict, assign=True)
    return model.to(device)


@row("one file per tensor", reads="tensors")
def per_tensor(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Holds only one tensor at a time in host memory."""
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.load(files.tensors / f"{name}.pt", map_location="cpu", weights_only=True))
    return model


@row("**lightning_memload**", reads="pt", group="ours")
def ours_pt(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Allocates every tensor once, on the device, fills it from the file, and compares checksums."""
    with meta_init():
        model = GPT2(config)
    load_weights(model, files.pt, device=device)
    return model


@row("**lightning_memload**", reads="safetensors", group="ours")
def ours_safetensors(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Does the same as ``ours_pt`` with safetensors, which contain no checksums."""
    with meta_init():
        model = GPT2(config)
    load_weights(model, files.safetensors, device=device)
    return model


@row("**lightning_memload**, `host_budget_mib=8`", reads="safetensors", group="ours", only="cuda")
def ours_safetensors_8_mib(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Does the same with a small budget, which is a hard limit of the host memory."""
    with meta_init():
        model = GPT2(config)
    load_weights(model, files.safetensors, device=device, host_budget_mib=8)
    return model


@row('**lightning_memload**, `mode="assign"`', reads="pt", group="ours", only="cpu")
def ours_assign_pt(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The weights are the file's pages."""
    with meta_init():
        model = GPT2(config)
    load_weights(model, files.pt, device=device, mode="assign")
    return model


@row('**lightning_memload**, `mode="assign"`', reads="safetensors", group="ours", only="cpu")
def ours_assign_safetensors(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The weights are the file's pages."""
    with meta_init():
        model = GPT2(config)
    load_weights(model, files.safetensors, device=device, mode="assign")
    return model


@row("safetensors: `load_file`, `assign=True`", reads="safetensors", group="peer")
def safetensors_assign(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """As its documentation loads a file; on the CPU the weights are the file's pages."""
    with torch.device("meta"):
        model = GPT2(config)
    model.load_state_dict(load_file(files.safetensors, device=str(device)), assign=True)
    return model


@row("safetensors: `safe_open`, copy one by one", reads="safetensors", group="peer")
def safetensors_copy(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The weights get memory of their own."""
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device=device)
    with safe_open(files.safetensors, framework="pt", device=str(device)) as file:
        for name, tensor in model.state_dict().items():
            tensor.copy_(file.get_tensor(name))
    return model


def prefetched(config: gpt.GPTConfig, files: Files, device: torch.device, threads: int) -> nn.Module:
    """The tensors of ``safe_open(...).prefetch()`` belong to the caller, so no copy is needed."""
    with torch.device("meta"):
        model = GPT2(config)
    with safe_open(files.safetensors, framework="pt") as file, file.prefetch(device=str(device), threads=threads) as it:
        model.load_state_dict(dict(it), assign=True)
    return model


@row("safetensors 0.9: `prefetch`, 8 threads", reads="safetensors", group="peer", requires=PREFETCH, only="cuda")
def safetensors_prefetch_8(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Reads with the default number of threads."""
    return prefetched(config, files, device, threads=8)


@row("safetensors 0.9: `prefetch`, 16 threads", reads="safetensors", group="peer", requires=PREFETCH, only="cuda")
def safetensors_prefetch_16(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Reads with more threads, as its authors do in their measurements."""
    return prefetched(config, files, device, threads=16)


@row("accelerate: `load_checkpoint_and_dispatch`", reads="safetensors", group="peer", requires="accelerate")
def accelerate(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Loads all layers onto one device."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with init_empty_weights():
        model = GPT2(config)
    return load_checkpoint_and_dispatch(model, str(files.safetensors), device_map={"": str(device)})


@row("fastsafetensors: `fastsafe_open`", reads="safetensors", group="peer", requires="fastsafetensors")
def fastsafetensors(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """All weights are parts of one buffer. GPUDirect Storage is off, because few machines are set up for it."""
    from fastsafetensors import fastsafe_open

    with torch.device("meta"):
        model = GPT2(config)
    with fastsafe_open(str(files.safetensors), device=str(device), nogds=True) as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)  # noqa: SIM118
    return model


@row("Run:ai Model Streamer", reads="safetensors", group="peer", requires="runai_model_streamer")
def runai(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The streamer's tensors belong to the caller, so no copy is needed."""
    from runai_model_streamer import SafetensorsStreamer

    with torch.device("meta"):
        model = GPT2(config)
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(files.safetensors), device=str(device))
        model.load_state_dict(dict(streamer.get_tensors()), assign=True)
    return model


@row("tensorizer, its own format", reads="tensorizer", group="peer", requires="tensorizer")
def tensorizer(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The deserializer puts the parameters into the module itself."""
    from tensorizer import TensorDeserializer

    with torch.device("meta"):
        model = GPT2(config)
    with TensorDeserializer(str(files.tensorizer), device=device) as file:
        file.load_into_module(model)
    return model


@row("flashpack, its own format", reads="flashpack", group="peer", requires="flashpack")
def flashpack(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """All weights are parts of a few large buffers."""
    from flashpack import assign_from_file

    with torch.device("meta"):
        model = GPT2(config)
    assign_from_file(model, str(files.flashpack), device=device)
    return model


@row("InstantTensor", reads="safetensors", group="peer", requires="instanttensor", only="cuda")
def instanttensor(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The package's tensors are clones that belong to the caller, so no further copy is needed."""
    from instanttensor import safe_open as instant_open

    with torch.device("meta"):
        model = GPT2(config)
    with instant_open(str(files.safetensors), framework="pt", device=device) as file:
        model.load_state_dict(dict(file.tensors()), assign=True)
    return model


# Measuring ------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status.

    The status is 1 if weights are wrong, or if a row fails that is not another package's.
    """
    options = parse(arguments)
    files = Files(options.data / options.size)
    skipped = unavailable(options)
    names = [name for name in options.rows if name not in skipped]
    if not all(is_saved(Files(options.data / size), names) for size in ("tiny", options.size)):
        run_fresh(save, options)
    results: dict[str, list[dict[str, Any]]] = {}
    report = summarize(options, arguments, files, results, skipped)
    for repetition in range(options.repetitions):
        for name in names:
            if name in skipped:
                continue
            for path in parts(getattr(files, ROWS[name].reads)):
                (evict if options.cold else warm)(path)
            load = os.getloadavg()[0]
            run = {**run_row(options, name), "load_average": load}
            if "error" in run:
                skipped[name] = run["error"]
            else:
                results.setdefault(name, []).append(run)
                print(f"  {name} #{repetition + 1}: {run['seconds']:.2f} s", file=sys.stderr, flush=True)
            # The report is written after every run, so that an interrupted benchmark keeps its results.
            report = summarize(options, arguments, files, results, skipped)
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    failed = [name for name in skipped.keys() & set(names) if ROWS[name].group != "peer"]
    return 0 if report["correct"] and not failed else 1


def attempt(deliver: Deliver, options: argparse.Namespace, name: str) -> None:
    """Measure one row and deliver its figures, or its error."""
    try:
        deliver(measure(options, name))
    except Exception as error:
        traceback.print_exc()
        message = str(error).replace(str(options.data), "DATA").strip().partition("\n")[0]
        deliver({"error": f"{type(error).__name__}: {message}"})


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Load a tiny model and then one row's model, and return the figures of the second load."""
    load = ROWS[name].load
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    started = time.perf_counter()
    read_once(load(SIZES["tiny"], Files(options.data / "tiny"), device))
    first_seconds = time.perf_counter() - started
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    with MemoryMonitor(device) as monitor:
        started = time.perf_counter()
        model = load(SIZES[options.size], Files(options.data / options.size), device)
        synchronize()
        loaded = time.perf_counter()
        read_once(model)
        ended = time.perf_counter()
    peaks = monitor.peaks
    file_start_bytes = peaks.rss_start_bytes - (peaks.anonymous_start_bytes or 0) - (peaks.shmem_start_bytes or 0)
    return {
        "first_seconds": first_seconds,
        "seconds": loaded - started,
        "read_once_seconds": ended - started,
        "gpu_peak_bytes": above(peaks.cuda_allocated_start_bytes, peaks.cuda_allocated_peak_bytes),
        "gpu_reserved_peak_bytes": above(peaks.cuda_reserved_start_bytes, peaks.cuda_reserved_peak_bytes),
        # From the driver, at the end. Only this figure includes memory that a package allocates without torch.
        "gpu_driver_end_bytes": free_bytes and free_bytes - torch.cuda.mem_get_info(device)[0],
        "host_anonymous_peak_bytes": peaks.host_above_start_bytes,
        "host_file_backed_peak_bytes": above(file_start_bytes, peaks.file_backed_peak_bytes),
        "host_rss_peak_bytes": above(peaks.rss_start_bytes, peaks.rss_peak_bytes),
        "peaks": peaks.as_dict(),
        "digest": digest(model, []),
        "on_device": all(tensor.device == device for tensor in model.state_dict().values()),
    }


@torch.no_grad()
def read_once(model: nn.Module) -> None:
    """Read every weight on its device, as the first use of the model does."""
    for parameter in model.parameters():
        parameter.sum()
    synchronize()


# Files ----------------------------------------------------------------------------------------------------------------


def save(deliver: Deliver, options: argparse.Namespace) -> None:
    """Write the files of both sizes: the tiny model and the model of the command line."""
    for size in {"tiny", options.size}:
        save_model(SIZES[size], Files(options.data / size), torch.device(options.device))
    deliver(None)


def save_model(config: gpt.GPTConfig, files: Files, device: torch.device) -> None:
    """Write the same weights in every format. They are created on the device, because a GPU does this faster."""
    files.tensors.mkdir(parents=True, exist_ok=True)
    files.digest.unlink(missing_ok=True)
    torch.manual_seed(0)
    with device:
        model = GPT2(config)
    state_dict = model.state_dict()
    torch.save(state_dict, files.pt)
    save_file(state_dict, files.safetensors, metadata={"format": "pt"})  # transformers writes it, accelerate needs it
    for name, tensor in state_dict.items():
        torch.save(tensor, files.tensors / f"{name}.pt")
    try:
        from tensorizer import TensorSerializer
    except ImportError:
        pass
    else:
        serializer = TensorSerializer(str(files.tensorizer))
        serializer.write_module(model)
        serializer.close()
    try:
        from flashpack import pack_to_file
    except ImportError:
        pass
    else:
        pack_to_file(state_dict, str(files.flashpack), target_dtype=None)
    for source in (files.pt, files.safetensors, files.tensors, files.tensorizer, files.flashpack):
        for path in parts(source):
            flush(path)
    files.digest.write_text(digest(model, []))


def is_saved(files: Files, names: Sequence[str]) -> bool:
    """Return whether the files that the rows read exist and are complete."""
    return files.digest.exists() and all(getattr(files, ROWS[name].reads).exists() for name in names)


def parts(path: Path) -> list[Path]:
    """Return the files at a path: the file itself, or the files in the folder. Empty if nothing exists."""
    return sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []


# Processes, figures, table --------------------------------------------------------------------------------------------


def unavailable(options: argparse.Namespace) -> dict[str, str]:
    """Return the chosen rows that cannot run here, each with the reason."""
    reasons = {}
    for name in options.rows:
        if ROWS[name].only not in (None, torch.device(options.device).type):
            reasons[name] = f"only for {ROWS[name].only}"
        elif ROWS[name].requires == PREFETCH:
            if not hasattr(safe_open, "prefetch"):
                reasons[name] = "needs safetensors 0.9"
        elif importlib.util.find_spec(ROWS[name].requires) is None:
            reasons[name] = "not installed"
    return reasons


def run_row(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run one row in a fresh process and return its figures, or ``{"error": reason}``."""
    try:
        return dict(run_fresh(attempt, options, name, timeout_seconds=ROW_TIMEOUT_SECONDS))
    except ProcessFailed as error:
        return {"error": str(error)}


def summarize(
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
    files: Files,
    results: dict[str, list[dict[str, Any]]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Return the report: medians over the repetitions, the rows that did not run, and all single runs."""
    saved = files.digest.read_text()
    figures = [name for name in next(iter(results.values()), [{}])[0] if name.endswith(("_bytes", "seconds"))]
    rows: dict[str, dict[str, Any]] = {}
    for name in [name for name in ROWS if name in results]:
        runs = results[name]
        rows[name] = {figure: median([run[figure] for run in runs]) for figure in figures}
        rows[name]["correct"] = all(run["digest"] == saved and run["on_device"] for run in runs)
        rows[name]["repetitions"] = len(runs)
    return {
        **header("weight-loading", arguments),
        "versions": versions(*PACKAGES),
        "size": options.size,
        "device": options.device,
        "page_cache": "cold" if options.cold else "warm",
        # Load of the last minute, including this benchmark. Well above 1, other programs used the machine too.
        "load_average": statistics.median([run["load_average"] for runs in results.values() for run in runs] or [0]),
        "weights_bytes": files.safetensors.stat().st_size,
        "rows": rows,
        "not_run": skipped,
        "correct": all(entry["correct"] for entry in rows.values()),
        "against_peer": against_peer(rows),
        "runs": results,
    }


def against_peer(rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Compare this project's fastest row from safetensors with the fastest row of another package.

    The time is that until every weight has been read once. Returns ``None`` if one of the two rows is missing.
    """

    def fastest(names: list[str]) -> str | None:
        return min(names, key=lambda name: rows[name]["read_once_seconds"], default=None)

    peer = fastest([name for name in rows if ROWS[name].group == "peer" and rows[name]["correct"]])
    ours = fastest([name for name in rows if ROWS[name].group == "ours" and ROWS[name].reads == "safetensors"])
    if peer is None or ours is None:
        return None
    return {
        "ours": ours,
        "fastest_peer": peer,
        "times_as_fast": rows[peer]["read_once_seconds"] / rows[ours]["read_once_seconds"],
        "host_anonymous_ratio": ratio(rows[ours], rows[peer], "host_anonymous_peak_bytes"),
        "host_rss_ratio": ratio(rows[ours], rows[peer], "host_rss_peak_bytes"),
        "gpu_ratio": ratio(rows[ours], rows[peer], "gpu_peak_bytes"),
    }


def ratio(ours: dict[str, Any], peer: dict[str, Any], figure: str) -> float | None:
    """Return our figure divided by the peer's; ``None`` if the peer's is unknown or below ``LEAST_COMPARED_BYTES``."""
    return ours[figure] / peer[figure] if (peer[figure] or 0) >= LEAST_COMPARED_BYTES else None


COLUMNS = {
    "GPU peak, GiB": ("gpu_peak_bytes", GIB),
    "anonymous, GiB": ("host_anonymous_peak_bytes", GIB),
    "file-backed, GiB": ("host_file_backed_peak_bytes", GIB),
    "RSS, GiB": ("host_rss_peak_bytes", GIB),
    "loaded, s": ("seconds", 1),
    "and read once, s": ("read_once_seconds", 1),
    "first model, s": ("first_seconds", 1),
}


def cells(report: dict[str, Any], name: str) -> list[str]:
    """Return one row of the table: label, file that it reads, figures, and whether the weights are right."""
    entry = report["rows"][name]
    figures = [number(entry.get(figure), unit) for figure, unit in COLUMNS.values()]
    reads = {"tensors": "a folder", "tensorizer": "its own", "flashpack": "its own"}.get(
        ROWS[name].reads, f"`.{ROWS[name].reads}`"
    )
    return [ROWS[name].label, reads, *figures, "yes" if entry["correct"] else "**no**"]


def table(report: dict[str, Any]) -> str:
    """Return the medians as a table, with the rows that did not run below."""
    lines = [f"{report['size']} on {report['device']}, {report['page_cache']} page cache, medians"]
    rows = [["", "reads", *COLUMNS, "right"], *(cells(report, name) for name in report["rows"])]
    lines.extend(aligned(rows, 2))
    lines.extend(f"not run: {name}: {reason}" for name, reason in report["not_run"].items())
    lines.append(json.dumps(report["against_peer"]))
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2-small", help="size of the model (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if available, else cpu"
    )
    parser.add_argument("--repetitions", type=positive, default=3, help="default: %(default)s")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"default: all. The rows: {', '.join(ROWS)}",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/weight-loading"), help="folder for the files (default: %(default)s)"
    )
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before every row")
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
