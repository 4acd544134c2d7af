"""The comparison of two checkpoints: counts that a person can check, every dtype, every format, bounded memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_memload import CheckpointFormatError, TensorDiff, diff_checkpoints, save_directory
from tests.formats.dcp_shards import sharded, write_shards
from tests.formats.files import ALL_DTYPES, of_dtype
from tests.fresh_process import run_fresh

NAN = math.nan


def diff(folder: Path, first: Any, second: Any, **options: Any) -> Any:
    torch.save(first, folder / "first.ckpt")
    torch.save(second, folder / "second.ckpt")
    return diff_checkpoints(folder / "first.ckpt", folder / "second.ckpt", **options)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, -4.0], [1.0, 3.0, 4.0], (2, 2, 0, 8.0, 2.0)),
        ([0.0, 1.0], [-0.0, 1.0], (0, 1, 0, 0.0, 0.0)),
        ([NAN, 1.0, 5.0], [2.0, NAN, 4.0], (3, 3, 2, 1.0, 0.2)),
        ([math.inf, -math.inf, 1.0], [-math.inf, -math.inf, 1.0], (1, 1, 0, math.inf, math.inf)),
        ([math.inf, 1.0], [1.0, 1.0], (1, 1, 0, math.inf, math.inf)),
    ],
)
def test_counts(first: list[float], second: list[float], expected: tuple[Any, ...], tmp_path: Path) -> None:
    report = diff(tmp_path, {"state_dict": {"x": torch.tensor(first)}}, {"state_dict": {"x": torch.tensor(second)}})
    assert not report.is_equal
    (found,) = report.different
    different, bits, nan, max_abs, max_relative = expected
    assert (found.name, found.num_values) == ("x", len(first))
    assert (found.num_different, found.num_different_bits, found.num_nan) == (different, bits, nan)
    assert found.max_abs == max_abs
    assert found.max_relative == pytest.approx(max_relative)


def test_nans_are_equal_bit_for_bit(tmp_path: Path) -> None:
    values = torch.tensor([NAN, 1.0, math.inf])
    assert diff(tmp_path, {"x": values}, {"x": values.clone()}).is_equal
    other = values.clone()
    other.view(torch.int32)[0] ^= 1  # another NaN
    (found,) = diff(tmp_path, {"x": values}, {"x": other}).different
    assert found == TensorDiff("x", 3, num_different=0, num_different_bits=1)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    values = of_dtype(dtype)
    other = values.clone()
    other.view(torch.uint8)[11 * dtype.itemsize] ^= 1
    assert diff(tmp_path, {"x": values}, {"x": values.clone()}).is_equal
    (found,) = diff(tmp_path, {"x": values}, {"x": other}).different
    assert (found.num_values, found.num_different_bits) == (37, 1)


def test_a_difference_in_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_memload.diff.checkpoints._BLOCK_ELEMENTS", 7)
    values = torch.arange(100.0).view(10, 10)
    for position in (0, 6, 7, 55, 99):
        other = values.clone()
        other.view(-1)[position] += 2.0
        (found,) = diff(tmp_path, {"x": values}, {"x": other}).different
        assert (found.num_values, found.num_different, found.max_abs) == (100, 1, 2.0)
        # The same values in another order of the file.
        turned = other.t().contiguous().t()
        (found,) = diff(tmp_path, {"x": values}, {"x": turned}).different
        assert (found.num_different, found.max_abs) == (1, 2.0)


def test_names_shapes_and_dtypes(tmp_path: Path) -> None:
    first = {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(2), "same": torch.ones(3)}
    second = {"z": torch.ones(2), "b": torch.ones(3, 2), "c": torch.ones(2).half(), "same": torch.ones(3)}
    report = diff(tmp_path, first, second)
    assert (report.only_in_first, report.only_in_second) == (("a",), ("z",))
    assert report.shapes == {"b": ((2, 3), (3, 2))}
    assert report.dtypes == {"c": (torch.float32, torch.float16)}
    assert (report.num_compared, report.bytes_compared, report.different) == (1, 12, ())
    assert not report.is_equal


def test_optimizer_on_demand(tmp_path: Path) -> None:
    first: dict[str, Any] = {
        "state_dict": {"x": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "callbacks": {"mine": torch.ones(1)},
    }
    second = {**first, "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}]}
    assert diff(tmp_path, first, second).is_equal
    (found,) = diff(tmp_path, first, second, optimizer=True).different
    assert (found.name, found.num_different) == ("optimizer_states[0].state[0].exp_avg", 3)


def test_formats_are_compared_with_one_another(tmp_path: Path) -> None:
    weights = {"net.weight": torch.randn(6, 4), "net.bias": torch.randn(6)}
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    torch.save({"model": weights}, tmp_path / "b.pt")
    torch.save(weights, tmp_path / "c.pt")
    save_file(weights, tmp_path / "d.safetensors")
    save_directory({"state_dict": weights}, tmp_path / "e")
    write_shards(tmp_path / "f", {name: sharded(tensor, 2) for name, tensor in weights.items()})
    for name in ("b.pt", "c.pt", "d.safetensors", "e", "f"):
        report = diff_checkpoints(tmp_path / "a.ckpt", tmp_path / name)
        assert report.is_equal
        assert report.num_compared == 2


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    state = {"x": torch.ones(300_000), "y": torch.ones(5)}
    diff(tmp_path, state, state, progress=lambda done, total: seen.append((done, total)), num_threads=2)
    assert seen[-1] == (1_200_020, 1_200_020)
    assert sorted(seen) == seen


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=r"first.ckpt has no weights to compare"):
        diff(tmp_path, {"state_dict": {}}, {"state_dict": {}})
    with pytest.raises(FileNotFoundError):
        diff_checkpoints(tmp_path / "absent", tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        diff_checkpoints(tmp_path / "first.ckpt", tmp_path / "first.ckpt", num_threads=0)


def test_a_view_that_repeats_its_elements(tmp_path: Path) -> None:
    few, many = torch.ones(1).expand(100), torch.ones(1).expand(1 << 40)
    assert diff(tmp_path, {"x": few}, {"x": few}).is_equal
    with pytest.raises(CheckpointFormatError, match="x repeats its elements to 4398046511104 bytes"):
        diff(tmp_path, {"x": many}, {"x": many})


MEASURE = """
import torch
from lightning_memload import MemoryMonitor, diff_checkpoints
torch.ones(300_000).abs().isnan().nonzero()
diff_checkpoints(ARGS["small"], ARGS["small"])
with MemoryMonitor() as monitor:
    if ARGS["stock"]:
        a, b = (torch.load(path, mmap=False, weights_only=True) for path in (ARGS["first"], ARGS["second"]))
        differ = sum(int((a[name] != b[name]).sum()) for name in a)
    else:
        differ = sum(found.num_different for found in diff_checkpoints(ARGS["first"], ARGS["second"]).different)
RESULT = {"peak": monitor.peaks.anonymous_above_start_bytes, "differ": differ}
"""


@pytest.mark.memory
def test_memory_is_bounded(tmp_path: Path) -> None:
    values = torch.randn(48 << 20)  # 192 MiB
    torch.save({"x": values}, tmp_path / "first.pt")
    values[::3] += 1
    torch.save({"x": values}, tmp_path / "second.pt")
    torch.save({"x": torch.ones(9)}, tmp_path / "small.pt")
    paths: dict[str, Any] = {name: tmp_path / f"{name}.pt" for name in ("first", "second", "small")}
    stock = run_fresh(MEASURE, stock=True, **paths).result
    ours = run_fresh(MEASURE, stock=False, **paths).result
    assert ours["differ"] == stock["differ"] == 16 << 20
    assert stock["peak"] > 2 * values.nbytes
    assert ours["peak"] < 64 << 20
