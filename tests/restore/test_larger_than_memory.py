"""A part of a checkpoint that is larger than the machine's memory: listed, and loaded in the memory of that part."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from tests.fresh_process import run_fresh

GIB = 1 << 30
MIB = 1 << 20

# 1 GiB of weights in each layer, and two layers loaded.
WIDTH = 16384
NUM_LOADED = 2

WRITE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode():
    weights = {f"layers.{i}.weight": torch.empty(ARGS["width"], ARGS["width"]) for i in range(ARGS["num_layers"])}
with torch.serialization.skip_data(materialize_fake_tensors=True):
    torch.save({"state_dict": weights}, ARGS["path"])
"""

LOAD = """
import os

import torch
from torch import nn

from lightning_memload import MemoryMonitor, load_weights, meta_init, open_checkpoint

path, width, names = ARGS["path"], ARGS["width"], ARGS["names"]
calibration = MemoryMonitor()
with calibration:
    held = torch.ones(64 << 18)  # until the end, which takes a sample
del held
with MemoryMonitor() as listing:
    index = open_checkpoint(path)
listed = {t.name: [t.nbytes, t.storage.crc32] for t in index}

# Bytes that say which tensor they are, at both ends of each.
marks = {}
with open(path, "r+b") as file:
    for number, (layer, tensor) in enumerate((layer, t) for t in index for layer in names if f".{layer}.w" in t.name):
        begin, end = tensor.file_range
        marks[layer] = [number + 0.25, number + 0.5]
        for mark, position in zip(marks[layer], (begin, end - 4)):
            os.pwrite(file.fileno(), torch.tensor(mark).numpy().tobytes(), position)

with MemoryMonitor() as monitor:
    with meta_init():
        layers = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})
        model = nn.ModuleDict({"layers": layers})
    keys = load_weights(model, path, include=[rf"^layers\\.{name}\\." for name in names])
try:
    torch.load(path, mmap=True)
    stock = "loaded"
except RuntimeError as error:
    stock = str(error)
found = {name: layers[name].weight.detach().flatten() for name in names}
RESULT = {
    "stock": stock,
    "calibration": calibration.peaks.anonymous_above_start_bytes,
    "listing": listing.peaks.anonymous_above_start_bytes,
    "loading": monitor.peaks.anonymous_above_start_bytes,
    "listed": listed,
    "keys": [list(keys.missing_keys), list(keys.unexpected_keys)],
    "marks": marks,
    "found": {name: [values[0].item(), values[-1].item()] for name, values in found.items()},
    "others": sum(int(values[1:-1].count_nonzero()) for values in found.values()),
}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder in which a large file without data takes no space."""
    if psutil.virtual_memory().available < 4 * GIB:
        pytest.skip("less than 4 GiB of memory are available")
    path = tmp_path / "sparse.ckpt"
    try:
        with path.open("wb") as file:
            file.truncate(file_bytes() + GIB)
    except OSError as error:
        pytest.skip(f"no file of this size can be made here: {error}")
    if path.stat().st_blocks * 512 > MIB:
        pytest.skip("the file system has no sparse files")
    return path


def file_bytes() -> int:
    return max(40 * GIB, psutil.virtual_memory().total * 3 // 2)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 opens no file larger than the memory")
@pytest.mark.memory
@pytest.mark.long
def test_part_of_a_checkpoint_larger_than_memory(path: Path) -> None:
    """The first and the last layer of it, P bytes: anonymous memory rises by P + 64 MiB at most, 64 MiB for a list.

    ``torch.load(mmap=True)`` maps such a file only where the kernel promises more memory than there is.
    """
    num_layers = -(-file_bytes() // GIB)
    run_fresh(WRITE, path=path, width=WIDTH, num_layers=num_layers)
    assert path.stat().st_size > 1.4 * psutil.virtual_memory().total
    names = ["0", str(num_layers - 1)]
    result = run_fresh(LOAD, path=path, width=WIDTH, names=names).result
    assert path.stat().st_blocks * 512 < 64 * MIB

    assert abs(result["calibration"] - 64 * MIB) < 8 * MIB  # imports leave some memory free
    assert result["listing"] <= 64 * MIB
    part_bytes = NUM_LOADED * GIB
    assert part_bytes - 8 * MIB <= result["loading"] <= part_bytes + 64 * MIB

    promises = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    if promises == "0" and file_bytes() > psutil.virtual_memory().total + psutil.swap_memory().total:
        assert "Cannot allocate memory" in result["stock"]

    # Without data no checksum is recorded.
    assert list(result["listed"].values()) == [[GIB, None]] * num_layers
    assert result["keys"] == [[], []]
    assert result["found"] == result["marks"]
    assert len(set(map(tuple, result["marks"].values()))) == NUM_LOADED
    assert result["others"] == 0
