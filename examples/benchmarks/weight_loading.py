"""Measure how weights get from a file into a model: the usual ways, this project's, and what else is installed.

Every row is one short function that builds a GPT-2 with an untied head, loads it, and returns it on the device. Every
row runs in fresh processes, interleaved over the repetitions, on files that hold the same weights. Outside the figures
are: imports, the CUDA context, and whatever else happens only once, because every row first loads a tiny model; and
starting the process. Inside are: building the model, loading it, and then reading every weight once, so that a file
that is only mapped is paid for too. Memory is counted above its level before the row.

    python examples/benchmarks/weight_loading.py --size gpt2-xl --device cuda --output weight-loading.json

The first five rows are the methods of the notebook "Memory-efficient model weight loading" (S. Raschka, LLMs from
scratch, chapter 5). Where the notebook builds a model on the CPU and moves it, these build it where it belongs.
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

# A size for tests, and for the load before the clock that brings in everything that a process needs only once.
SIZES = {
    "tiny": gpt.GPTConfig(num_layers=2, num_heads=2, width=64, vocabulary_size=256, context_length=64),
    **gpt.SIZES,
}
PACKAGES = ("safetensors", "accelerate", "fastsafetensors", "runai-model-streamer", "tensorizer", "instanttensor")
ROW_TIMEOUT_SECONDS = 300
LEAST_COMPARED_BYTES = 16 << 20


class GPT2(nn.Module):
    """GPT-2 whose head has weights of its own, drawn as torch draws them."""

    def __init__(self, config: gpt.GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(gpt.Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)


@dataclass(frozen=True, slots=True)
class Files:
    """Where the same weights lie in every form."""

    folder: Path

    @property
    def pt(self) -> Path:
        """What ``torch.save`` made of the state dict."""
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
        """The module in tensorizer's own format; only where that is installed."""
        return self.folder / "model.tensors"

    @property
    def digest(self) -> Path:
        """The checksum of the weights. Written last: where it is, the other files are whole."""
        return self.folder / "digest"


# The rows -------------------------------------------------------------------------------------------------------------

Load = Callable[[gpt.GPTConfig, Files, torch.device], nn.Module]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to load.

    Attributes:
        label: What it does, for the table.
        reads: The attribute of ``Files`` that it reads.
        group: Whose way it is: ``"usual"``, ``"ours"`` or ``"peer"``.
        load: Builds and loads.
        requires: The module that must be installed.
        only: The one type of device that it is for. ``None``: every type.
    """

    label: str
    reads: str
    group: str
    load: Load
    requires: str = "torch"
    only: str | None = None


ROWS: dict[str, Row] = {}


def row(label: str, *, reads: str, group: str = "usual", **limits: str) -> Callable[[Load], Load]:
    """Enter a function into the table; its name is the row's."""

    def enter(load: Load) -> Load:
        ROWS[load.__name__.replace("_", "-")] = Row(label, reads, group, load, **limits)
        return load

    return enter


@row("baseline: `torch.load` onto the device, `load_state_dict`", reads="pt")
def baseline(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Two full sets of weights are on the device at once."""
    with device:
        model = GPT2(config)
    model.load_state_dict(torch.load(files.pt, map_location=device, weights_only=True))
    return model


@row("sequential: `torch.load` on the CPU, copy one by one", reads="pt")
def sequential(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """One set is on the device, another one in host memory."""
    with device:
        model = GPT2(config)
    state_dict = torch.load(files.pt, map_location="cpu", weights_only=True)
    for name, tensor in model.state_dict().items():
        tensor.copy_(state_dict[name])
    return model


@row("meta device, `to_empty`, `torch.load` onto the device, copy", reads="pt")
def meta_direct(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Initialises nothing and leaves the host alone, but has two sets on the device again."""
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device=device)
    state_dict = torch.load(files.pt, map_location=device, weights_only=True)
    for name, tensor in model.state_dict().items():
        tensor.copy_(state_dict[name])
    return model


@row("meta device, `mmap=True`, `assign=True`", reads="pt")
def mmap_assign(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The weights are the file's pages, which are read when they are first touched: by ``to``, or by the first use."""
    with torch.device("meta"):
        model = GPT2(config)
    state_dict = torch.load(files.pt, map_location="cpu", mmap=True, weights_only=True)
    model.load_state_dict(state_dict, assign=True)
    return model.to(device)


@row("one file per tensor", reads="tensors")
def per_tensor(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Only one tensor at a time is in host memory."""
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.load(files.tensors / f"{name}.pt", map_location="cpu", weights_only=True))
    return model


@row("**lightning_memload**", reads="pt", group="ours")
def ours_pt(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Every tensor gets its memory on the device once, filled straight from the file; checksums are compared."""
    with meta_init():
        model = GPT2(config)
    load_weights(model, files.pt, device=device)
    return model


@row("**lightning_memload**", reads="safetensors", group="ours")
def ours_safetensors(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The same from safetensors, which holds no checksums."""
    with meta_init():
        model = GPT2(config)
    load_weights(model, files.safetensors, device=device)
    return model


@row("**lightning_memload**, `host_budget_mib=8`", reads="safetensors", group="ours", only="cuda")
def ours_safetensors_8_mib(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """The budget is a hard bound, and may be small."""
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


@row("accelerate: `load_checkpoint_and_dispatch`", reads="safetensors", group="peer", requires="accelerate")
def accelerate(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """All layers on one device."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with init_empty_weights():
        model = GPT2(config)
    return load_checkpoint_and_dispatch(model, str(files.safetensors), device_map={"": str(device)})


@row("fastsafetensors: `fastsafe_open`", reads="safetensors", group="peer", requires="fastsafetensors")
def fastsafetensors(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """All weights are parts of one buffer. Without GPUDirect Storage, which few machines are set up for."""
    from fastsafetensors import fastsafe_open

    with torch.device("meta"):
        model = GPT2(config)
    with fastsafe_open(str(files.safetensors), device=str(device), nogds=True) as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)  # noqa: SIM118
    return model


@row("Run:ai Model Streamer", reads="safetensors", group="peer", requires="runai_model_streamer")
def runai(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Its tensors belong to the caller."""
    from runai_model_streamer import SafetensorsStreamer

    with torch.device("meta"):
        model = GPT2(config)
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(files.safetensors), device=str(device))
        model.load_state_dict(dict(streamer.get_tensors()), assign=True)
    return model


@row("tensorizer, its own format", reads="tensorizer", group="peer", requires="tensorizer")
def tensorizer(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Puts the parameters in place by itself."""
    from tensorizer import TensorDeserializer

    with torch.device("meta"):
        model = GPT2(config)
    with TensorDeserializer(str(files.tensorizer), device=device) as file:
        file.load_into_module(model)
    return model


@row("InstantTensor", reads="safetensors", group="peer", requires="instanttensor", only="cuda")
def instanttensor(config: gpt.GPTConfig, files: Files, device: torch.device) -> nn.Module:
    """Its tensors are clones that belong to the caller."""
    from instanttensor import safe_open as instant_open

    with torch.device("meta"):
        model = GPT2(config)
    with instant_open(str(files.safetensors), framework="pt", device=device) as file:
        model.load_state_dict(dict(file.tensors()), assign=True)
    return model


# Measuring ------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
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
            # After every run, so that one that is cut short leaves what it has measured.
            report = summarize(options, arguments, files, results, skipped)
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    failed = [name for name in skipped.keys() & set(names) if ROWS[name].group != "peer"]
    return 0 if report["correct"] and not failed else 1


def attempt(deliver: Deliver, options: argparse.Namespace, name: str) -> None:
    """Measure one row; a failure is a result too."""
    try:
        deliver(measure(options, name))
    except Exception as error:
        traceback.print_exc()
        message = str(error).replace(str(options.data), "DATA").strip().partition("\n")[0]
        deliver({"error": f"{type(error).__name__}: {message}"})


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Load one row's model, after a tiny one, and tell what that took."""
    load = ROWS[name].load
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    read_once(load(SIZES["tiny"], Files(options.data / "tiny"), device))
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
        "seconds": loaded - started,
        "read_once_seconds": ended - started,
        "gpu_peak_bytes": above(peaks.cuda_allocated_start_bytes, peaks.cuda_allocated_peak_bytes),
        "gpu_reserved_peak_bytes": above(peaks.cuda_reserved_start_bytes, peaks.cuda_reserved_peak_bytes),
        # As the driver sees it, at the end: what a peer allocates beside torch's allocator is in here only.
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
    """Read every weight on its device, as the first use would."""
    for parameter in model.parameters():
        parameter.sum()
    synchronize()


# Files ----------------------------------------------------------------------------------------------------------------


def save(deliver: Deliver, options: argparse.Namespace) -> None:
    """Write the weights of both sizes."""
    for size in {"tiny", options.size}:
        save_model(SIZES[size], Files(options.data / size), torch.device(options.device))
    deliver(None)


def save_model(config: gpt.GPTConfig, files: Files, device: torch.device) -> None:
    """Write the same weights in every form. They are made on the device, where that takes no time."""
    files.tensors.mkdir(parents=True, exist_ok=True)
    files.digest.unlink(missing_ok=True)
    torch.manual_seed(0)
    with device:
        model = GPT2(config)
    state_dict = model.state_dict()
    torch.save(state_dict, files.pt)
    save_file(state_dict, files.safetensors, metadata={"format": "pt"})  # as transformers says it, and accelerate asks
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
    for source in (files.pt, files.safetensors, files.tensors, files.tensorizer):
        for path in parts(source):
            flush(path)
    files.digest.write_text(digest(model, []))


def is_saved(files: Files, names: Sequence[str]) -> bool:
    """Whether the files that the rows read are there and whole."""
    return files.digest.exists() and all(getattr(files, ROWS[name].reads).exists() for name in names)


def parts(path: Path) -> list[Path]:
    """The files of a source: itself, or what is in the folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []


# Processes, figures, table --------------------------------------------------------------------------------------------


def unavailable(options: argparse.Namespace) -> dict[str, str]:
    """The rows that cannot run here, and why."""
    reasons = {}
    for name in options.rows:
        if ROWS[name].only not in (None, torch.device(options.device).type):
            reasons[name] = f"only for {ROWS[name].only}"
        elif importlib.util.find_spec(ROWS[name].requires) is None:
            reasons[name] = "not installed"
    return reasons


def run_row(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run one row in a fresh process and return what it found, or why it failed."""
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
    """Everything that was measured, medians over the repetitions first."""
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
        # Of the last minute, this benchmark itself included: well above 1, others were using the machine too.
        "load_average": statistics.median([run["load_average"] for runs in results.values() for run in runs] or [0]),
        "weights_bytes": files.safetensors.stat().st_size,
        "rows": rows,
        "not_run": skipped,
        "correct": all(entry["correct"] for entry in rows.values()),
        "against_peer": against_peer(rows),
        "runs": results,
    }


def against_peer(rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """This project's fastest way from safetensors against the fastest of all peers, until the weights are read once."""

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
    """Ours by theirs; ``None`` where the peer's is unknown, or next to nothing."""
    return ours[figure] / peer[figure] if (peer[figure] or 0) >= LEAST_COMPARED_BYTES else None


COLUMNS = {
    "GPU peak, GiB": ("gpu_peak_bytes", GIB),
    "anonymous, GiB": ("host_anonymous_peak_bytes", GIB),
    "file-backed, GiB": ("host_file_backed_peak_bytes", GIB),
    "RSS, GiB": ("host_rss_peak_bytes", GIB),
    "loaded, s": ("seconds", 1),
    "and read once, s": ("read_once_seconds", 1),
}


def cells(report: dict[str, Any], name: str) -> list[str]:
    """One row of the table: its label, what it reads, its figures, and whether the weights are right."""
    entry = report["rows"][name]
    figures = [number(entry[figure], unit) for figure, unit in COLUMNS.values()]
    reads = {"tensors": "a folder", "tensorizer": "its own"}.get(ROWS[name].reads, f"`.{ROWS[name].reads}`")
    return [ROWS[name].label, reads, *figures, "yes" if entry["correct"] else "**no**"]


def table(report: dict[str, Any]) -> str:
    """Format the medians for people."""
    lines = [f"{report['size']} on {report['device']}, {report['page_cache']} page cache, medians"]
    rows = [["", "reads", *COLUMNS, "right"], *(cells(report, name) for name in report["rows"])]
    lines.extend(aligned(rows, 2))
    lines.extend(f"not run: {name}: {reason}" for name, reason in report["not_run"].items())
    lines.append(json.dumps(report["against_peer"]))
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2-small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--data", type=Path, default=Path("runs/weight-loading"), help="where the files are kept")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before every row")
    parser.add_argument("--output", type=Path, help="write everything to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
