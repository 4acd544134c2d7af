"""Moves bytes from a source into tensors: the plan, the staging ring with its hard budget, and the threads."""

from lightning_memload.transfer.engine import (
    Record,
    TensorCopy,
    TransferStats,
    available_cpus,
    default_threads,
    start_ring,
    transfer,
)
from lightning_memload.transfer.staging import (
    MIN_BUDGET_BYTES,
    LazyRing,
    RingLayout,
    StagingRing,
    check_host_budget,
    check_num_threads,
    choose_layout,
)
from lightning_memload.transfer.verify import VerifyReport, verify_checkpoint

__all__ = [
    "MIN_BUDGET_BYTES",
    "LazyRing",
    "Record",
    "RingLayout",
    "StagingRing",
    "TensorCopy",
    "TransferStats",
    "VerifyReport",
    "available_cpus",
    "check_host_budget",
    "check_num_threads",
    "choose_layout",
    "default_threads",
    "start_ring",
    "transfer",
    "verify_checkpoint",
]
