"""The host memory of a restore on the CPU: each bound as a formula, with stock Lightning on the same file beside it.

Every figure comes from a fresh process. In the formulas W is the bytes of the weights; AdamW's states are 2 W, and so
a checkpoint is 3 W. SLACK is for what belongs to no tensor: the Trainer, threads and their stacks, loaded code.
Figures are counted above the process *without the model*: everything imported, the Trainer made. A model that was
built before the restore is then W of them, and one built under ``meta_init`` nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_memload import open_checkpoint
from lightning_memload.memory import MemoryPeaks
from tests.fresh_process import FreshResult, run_fresh

pytestmark = [
    pytest.mark.memory,
    pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is known on Linux only"),
]

MIB = 1 << 20
SLACK = 32 * MIB
# What surviving at full speed takes above the memory itself (MemoryPeaks.required_bytes).
SPEED = 128 * MIB
BUDGET_MIB = 16

# 96, 120, 59, 23 and 2 MiB: W is 300 MiB, the checkpoint 943 MB.
LARGE_WIDTHS = [4096, 6144, 5120, 3000, 2000, 300]
# 40, 39, 1 and less: W is 80 MiB. A block between 128 KiB and 32 MiB that was freed may stay with glibc's malloc, which
# then looks like a leak in processes that restore again and again; larger ones always go back to the kernel.
SMALL_WIDTHS = [2048, 5120, 2000, 130, 40]
NUM_PROCESSES = 2  # at a time: much of each is one thread that imports
NUM_TESTS_FOR_ALL = 8  # so many tests selected: all processes are started ahead

PROGRAM = "tests.memory.restore_in_process"


@dataclass(frozen=True)
class Way:
    """One way to restore. ``mode=None`` is stock Lightning."""

    stage: str
    mode: str | None
    meta: bool = False
    checkpoint: str = "large.ckpt"
    host_budget_mib: int = 128


STOCK_FIT, STOCK_VALIDATE = Way("fit", None), Way("validate", None)
FIT, FIT_META = Way("fit", "copy"), Way("fit", "copy", meta=True)
VALIDATE, VALIDATE_META = Way("validate", "copy"), Way("validate", "copy", meta=True)
VALIDATE_AUTO = Way("validate", "auto", meta=True)  # which assigns
WAYS = (STOCK_FIT, FIT, FIT_META, STOCK_VALIDATE, VALIDATE, VALIDATE_META, VALIDATE_AUTO)

# dtype of the file -> the stock way, ours
CASTS = {
    dtype: (
        Way("fit", None, checkpoint=f"{dtype}.ckpt"),
        Way("fit", "copy", checkpoint=f"{dtype}.ckpt", host_budget_mib=BUDGET_MIB),
    )
    for dtype in ("float64", "bfloat16")
}

REPEATED = [("fit", "copy"), ("validate", "assign")]


@dataclass(frozen=True)
class Damage:
    """A restore that meets a flipped byte.

    Attributes:
        stage: What the restore is for.
        meta: Whether the module is built under ``meta_init``.
        name: The tensor that is damaged, close to the end of what the stage reads.
        num_weights: What was allocated until then, in W.
    """

    stage: str
    meta: bool
    name: str
    num_weights: int


DAMAGED = [
    Damage("fit", False, "optimizer_states[0].state[9].exp_avg_sq", num_weights=2),
    Damage("validate", True, "state_dict.norm.bias", num_weights=1),
]


@dataclass(frozen=True)
class Measured:
    """The figures of one restore, in bytes.

    Attributes:
        weight_bytes: W.
        state_bytes: AdamW's states, 0 for ``validate``.
        without_model_bytes: Anonymous memory before the model was built.
        without_model_required_bytes: The smallest memory limit that the process survives then.
        peaks: Of the window, see ``MemoryMonitor``.
        held: Mappings and descriptors of the checkpoint when everything was restored.
        settled_bytes: Anonymous memory when what was replaced has been freed, which happens in the background.
        digests: Of every restored tensor.
        report: The callback's own.
    """

    weight_bytes: int
    state_bytes: int
    without_model_bytes: int
    without_model_required_bytes: int
    peaks: MemoryPeaks
    held: list[str]
    settled_bytes: int
    digests: dict[str, str]
    report: dict[str, Any] | None

    @property
    def start(self) -> int:
        """The memory above that of the process without the model when the restore began."""
        return known(self.peaks.anonymous_start_bytes) - self.without_model_bytes

    @property
    def peak(self) -> int:
        """The highest sample above the memory of the process without the model."""
        return known(self.peaks.anonymous_peak_bytes) - self.without_model_bytes

    @property
    def peak_bound(self) -> int:
        """The most that can have stood there, a spike between two samples included: from the kernel's own RSS mark."""
        return known(self.peaks.anonymous_upper_bound_bytes) - self.without_model_bytes

    @property
    def end(self) -> int:
        """The memory above it when everything was restored."""
        return known(self.peaks.anonymous_end_bytes) - self.without_model_bytes

    @property
    def rise(self) -> int:
        """The highest sample above the memory when the restore began."""
        return known(self.peaks.anonymous_above_start_bytes)


class Runs:
    """Runs functions of the program, each with the same arguments once in this module, some processes at a time."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.folder = folder
        self._pool = pool
        self._started: dict[str, Future[FreshResult]] = {}

    def start(self, function: str, **kwargs: Any) -> Future[FreshResult]:
        key = json.dumps([function, kwargs], default=os.fspath)
        if key not in self._started:
            self._started[key] = self._pool.submit(run_fresh, f"{PROGRAM}:{function}", **kwargs)
        return self._started[key]

    def write(self) -> list[Future[FreshResult]]:
        small = {f"{dtype}.ckpt": dtype for dtype in ("float32", "float64", "bfloat16")}
        return [
            self.start("write", folder=self.folder, widths=LARGE_WIDTHS, dtypes={"large.ckpt": "float32"}),
            self.start("write", folder=self.folder, widths=SMALL_WIDTHS, dtypes=small),
        ]

    def calibrate(self) -> Future[FreshResult]:
        return self.start("calibrate", folder=self.folder, widths=SMALL_WIDTHS, num_bytes=256 * MIB)

    def restore(self, way: Way, **kwargs: Any) -> Future[FreshResult]:
        return self.start(
            "measure",
            path=self.folder / way.checkpoint,
            widths=LARGE_WIDTHS if way.checkpoint == "large.ckpt" else SMALL_WIDTHS,
            stage=way.stage,
            mode=way.mode,
            meta=way.meta,
            host_budget_mib=way.host_budget_mib,
            **kwargs,
        )

    def repeat(self, stage: str, mode: str) -> Future[FreshResult]:
        path = self.folder / "float32.ckpt"
        return self.start("repeat", path=path, widths=SMALL_WIDTHS, times=10, stage=stage, mode=mode)

    def fail(self, damage: Damage) -> Future[FreshResult]:
        path = self.folder / f"damaged-{damage.name}.ckpt"
        if not path.exists():
            shutil.copyfile(self.folder / "float32.ckpt", path)
            flip_byte(path, damage.name)
        return self.start("fail", path=path, widths=SMALL_WIDTHS, stage=damage.stage, meta=damage.meta)

    def measure(self, *ways: Way) -> list[Measured]:
        return [figures(run.result()) for run in [self.restore(way) for way in ways]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("restore_peaks")
    try:
        with ThreadPoolExecutor(NUM_PROCESSES) as pool:
            runs = Runs(folder, pool)
            writers = runs.write()
            runs.calibrate()
            for writer in writers:
                writer.result()
            if sum(item.path == request.path for item in request.session.items) > NUM_TESTS_FOR_ALL:
                # In the order of the tests, so that no core waits for one of them to ask.
                for way in (*WAYS, *(way for ways in CASTS.values() for way in ways)):
                    runs.restore(way)
                for stage, mode in REPEATED:
                    runs.repeat(stage, mode)
                for damage in DAMAGED:
                    runs.fail(damage)
            yield runs
    finally:
        shutil.rmtree(folder)  # two GB, which pytest would keep


def figures(run: FreshResult) -> Measured:
    assert not run.killed
    result = run.result
    return Measured(
        weight_bytes=result["weight_bytes"],
        state_bytes=result["state_bytes"],
        without_model_bytes=result["without_model_bytes"],
        without_model_required_bytes=result["without_model_required_bytes"],
        peaks=MemoryPeaks(**result["peaks"]),
        held=result["held"],
        settled_bytes=result["settled_bytes"],
        digests=result["digests"],
        report=result["report"],
    )


def known(figure: int | None) -> int:
    assert figure is not None
    return figure


def test_the_meter_sees_a_known_allocation(runs: Runs) -> None:
    """256 MiB that a module's ``on_fit_start`` holds for a moment, where a restore would be: 256 MiB +- 4 MiB.

    The same fit without the allocation rises by nothing that matters, so what is measured below is the restore.
    """
    rises = runs.calibrate().result().result
    assert abs(rises["known"] - 256 * MIB) < 4 * MIB
    assert rises["first"] < 4 * MIB
    assert rises["nothing"] < 4 * MIB


def test_the_checkpoint_is_what_the_formulas_say(runs: Runs) -> None:
    """At least 800 MB, W of weights and 2 W of states; AdamW's step counts and the pickle are the rest."""
    file_bytes = (runs.folder / "large.ckpt").stat().st_size
    (fit,) = runs.measure(FIT)
    assert file_bytes >= 800e6
    assert fit.weight_bytes >= 267e6
    assert abs(fit.state_bytes - 2 * fit.weight_bytes) < MIB
    assert abs(file_bytes - 3 * fit.weight_bytes) < MIB


def test_fit_peaks_at_what_training_holds(runs: Runs) -> None:
    """``fit``: 3 W, weights and states, each once. Stock: the model and the whole checkpoint beside it, 4 W.

    Of the 3 W the module is W before the restore begins, so the restore itself adds 2 W. Stock adds 3 W.
    """
    stock, ours = runs.measure(STOCK_FIT, FIT)
    weights = ours.weight_bytes
    assert abs(ours.start - weights) <= SLACK
    assert ours.peak <= 3 * weights + SLACK
    assert ours.peak_bound <= 3 * weights + SLACK
    assert ours.rise <= 2 * weights + SLACK
    assert stock.peak >= 4 * weights - SLACK
    assert stock.rise >= 3 * weights - SLACK


def test_fit_of_a_meta_built_module_peaks_at_what_training_holds(runs: Runs) -> None:
    """The same 3 W, none of which is there before. Stock, which cannot restore such a module, builds it: 4 W."""
    stock, ours = runs.measure(STOCK_FIT, FIT_META)
    weights = ours.weight_bytes
    assert ours.start <= SLACK
    assert ours.peak <= 3 * weights + SLACK
    assert ours.peak_bound <= 3 * weights + SLACK
    assert stock.peak >= 4 * weights - SLACK


def test_validate_peaks_at_the_weights(runs: Runs) -> None:
    """``validate``, copied: W, however the module is built. Stock reads the states too, so 4 W as for ``fit``."""
    stock, built, meta = runs.measure(STOCK_VALIDATE, VALIDATE, VALIDATE_META)
    weights = built.weight_bytes
    assert abs(built.start - weights) <= SLACK
    assert built.rise <= SLACK
    assert meta.start <= SLACK
    for ours in (built, meta):
        assert ours.peak <= weights + SLACK
        assert ours.peak_bound <= weights + SLACK
    assert stock.peak >= 4 * weights - SLACK


def test_validate_assigned_takes_no_memory_of_its_own(runs: Runs) -> None:
    """Parameters that are the file's pages: nothing above the start, and nothing stays.

    Stock, in the place of nothing, adds 3 W and keeps W.
    """
    stock, ours = runs.measure(STOCK_VALIDATE, VALIDATE_AUTO)
    weights = ours.weight_bytes
    assert ours.report is not None
    assert ours.report["mode"] == "assign"
    assert ours.rise <= SLACK
    assert ours.settled_bytes - ours.without_model_bytes <= SLACK
    assert ours.held, "the parameters should lie in the file"
    assert stock.rise >= 3 * weights - SLACK
    assert stock.end >= weights - SLACK


@pytest.mark.parametrize(
    ("stock", "others"),
    [(STOCK_FIT, (FIT, FIT_META)), (STOCK_VALIDATE, (VALIDATE, VALIDATE_META, VALIDATE_AUTO))],
    ids=["fit", "validate"],
)
def test_every_restored_tensor_is_the_stock_one(runs: Runs, stock: Way, others: tuple[Way, ...]) -> None:
    """Cheap is easy if it is wrong: type, shape and SHA-256 of every weight and every state."""
    expected, *found = runs.measure(stock, *others)
    num_parameters = 2 * len(LARGE_WIDTHS)
    # AdamW: two moments and a step count each.
    assert len(expected.digests) == num_parameters * (4 if stock.stage == "fit" else 1)
    for ours in found:
        assert ours.digests == expected.digests


@pytest.mark.parametrize("way", [FIT, FIT_META, VALIDATE, VALIDATE_META], ids=["fit", "fit-meta", "eval", "eval-meta"])
def test_copied_nothing_of_the_checkpoint_stays(runs: Runs, way: Way) -> None:
    """When training or evaluation starts: W (+ 2 W) of anonymous memory, and the file neither mapped nor open.

    That the file would be seen is shown by the parameters that are assigned, in a process of the same kind.
    """
    ours, assigned = runs.measure(way, VALIDATE_AUTO)
    assert abs(ours.end - ours.weight_bytes - ours.state_bytes) <= SLACK
    assert ours.held == []
    assert assigned.held


@pytest.mark.first("dtype")
@pytest.mark.parametrize(("dtype", "itemsize"), [("float64", 8), ("bfloat16", 2)])
@pytest.mark.long
def test_a_cast_costs_the_budget(runs: Runs, dtype: str, itemsize: int) -> None:
    """Another dtype in the file than in the float32 module: destination 3 W + the staging budget.

    Stock holds module, file and converted states at once: W + (itemsize / 4) 3 W + 2 W. It frees the file's weights
    only after that, with all the rest.
    """
    stock, ours = runs.measure(*CASTS[dtype])
    weights = ours.weight_bytes
    assert abs(ours.state_bytes - 2 * weights) < MIB
    bound = 3 * weights + BUDGET_MIB * MIB + SLACK
    assert ours.peak <= bound
    assert ours.peak_bound <= bound
    assert ours.report is not None
    assert 0 < ours.report["staging_bytes"] <= BUDGET_MIB * MIB
    assert ours.digests == stock.digests
    assert stock.peak >= weights + itemsize / 4 * 3 * weights + 2 * weights - SLACK > bound


@pytest.mark.cgroup
@pytest.mark.parametrize(("stock", "way"), [(STOCK_FIT, FIT), (STOCK_VALIDATE, VALIDATE)], ids=["fit", "validate"])
@pytest.mark.first("way")
def test_survives_where_the_stock_way_is_killed(runs: Runs, stock: Way, way: Way) -> None:
    """In a memory cgroup with a limit of baseline + destination + 128 MiB, swap included.

    Baseline is what the process needs before it has a model, measured in the run without a limit: anonymous memory,
    shared memory, page tables and the resident pages of the libraries. Destination is what must stay: W for
    ``validate``, W + 2 W for ``fit``. Stock needs another W (``fit``) or 3 W, which is more than the 128 MiB and the
    libraries' pages together, the only part of the rest that the kernel could take back.
    """
    (free,) = runs.measure(way)
    weights = free.weight_bytes
    limit_bytes = free.without_model_required_bytes + weights + free.state_bytes + SPEED
    needed_by_stock = free.without_model_bytes + 4 * weights
    assert needed_by_stock > limit_bytes + SLACK, "the model is too small for this test"
    survivor, victim = [runs.restore(each, memory_limit_bytes=limit_bytes) for each in (way, stock)]
    ours = figures(survivor.result())
    assert known(ours.peaks.cgroup_limit_bytes) <= limit_bytes
    assert ours.held == []
    assert ours.peak <= weights + ours.state_bytes + SLACK
    assert ours.digests == free.digests
    assert victim.result().killed


@pytest.mark.parametrize(("stage", "mode"), REPEATED)
def test_ten_restores_leave_no_more_than_one(runs: Runs, stage: str, mode: str) -> None:
    """A new module and Trainer each time: no growth in memory, descriptors, threads or mappings.

    The eleventh module is kept, which the same figures must show: as 3 W, or as a mapping of the file.
    """
    result = runs.repeat(stage, mode).result().result
    first, *_, last = levels = result["levels"]
    assert len(levels) == 10
    assert last["anonymous_bytes"] - first["anonymous_bytes"] <= 16 * MIB
    assert last["num_descriptors"] <= first["num_descriptors"]
    assert last["num_threads"] <= first["num_threads"]
    # One more for each restore would be nine; malloc's own come and go.
    assert last["num_mappings"] - first["num_mappings"] <= 4
    assert [level["held"] for level in levels] == [[]] * 10
    kept = result["kept"]
    if mode == "copy":
        assert kept["anonymous_bytes"] - last["anonymous_bytes"] >= 3 * result["weight_bytes"] - SLACK
    else:
        assert kept["held"]


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.stage)
def test_a_failed_restore_leaves_nothing(runs: Runs, damage: Damage) -> None:
    """One flipped byte at the end: what was restored until then, 2 W of states or W of weights, goes with the error.

    Module and Trainer live on. While the error lives it holds the frames that hold the memory: the figures would tell.
    """
    result = runs.fail(damage).result().result
    before, during, after = result["before"], result["during"], result["after"]
    assert damage.name in result["message"]
    assert during["anonymous_bytes"] - before["anonymous_bytes"] >= damage.num_weights * result["weight_bytes"] - SLACK
    assert during["held"]
    assert after["anonymous_bytes"] - before["anonymous_bytes"] <= SLACK
    assert after["num_descriptors"] <= before["num_descriptors"]
    assert after["num_threads"] <= before["num_threads"]
    assert after["held"] == []


def flip_byte(path: Path, name: str) -> None:
    """Changes one bit of the first byte of a tensor in its file."""
    (tensor,) = [tensor for tensor in open_checkpoint(path) if tensor.name == name]
    with path.open("r+b") as file:
        file.seek(tensor.storage.offset)
        (byte,) = file.read(1)
        file.seek(tensor.storage.offset)
        file.write(bytes([byte ^ 0x10]))
