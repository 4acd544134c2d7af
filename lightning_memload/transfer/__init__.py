"""Moves bytes between files and tensors: the plan, the staging ring with its hard budget, and the threads."""

from lightning_memload.transfer.compare import compare_records
from lightning_memload.transfer.copies import TensorCopy, TransferStats
from lightning_memload.transfer.engine import transfer
from lightning_memload.transfer.staging import (
    MIN_BUDGET_BYTES,
    LazyRing,
    RingLayout,
    StagingRing,
    check_host_budget,
    choose_layout,
    start_ring,
)
from lightning_memload.transfer.striped import StripedTransfer
from lightning_memload.transfer.threads import (
    Latch,
    available_cpus,
    check_num_threads,
    check_whole,
    default_threads,
    run_threads,
    start_thread,
)

__all__ = [
    "MIN_BUDGET_BYTES",
    "Latch",
    "LazyRing",
    "RingLayout",
    "StagingRing",
    "StripedTransfer",
    "TensorCopy",
    "TransferStats",
    "available_cpus",
    "check_host_budget",
    "check_num_threads",
    "check_whole",
    "choose_layout",
    "compare_records",
    "default_threads",
    "run_threads",
    "start_ring",
    "start_thread",
    "transfer",
]
