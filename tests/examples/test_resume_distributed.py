"""The benchmark of a resume by several processes: which figures of which rank it shows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

GIB = 1 << 30


def rank(seconds: float, read: int, received: int | None, host: int) -> dict[str, Any]:
    known = received is not None
    return {
        "seconds": seconds,
        "host_above_start_bytes": host * GIB,
        "cuda_allocated_peak_bytes": None,
        "transfer_seconds": 0.5 if known else None,
        "bytes_read": read * GIB if known else None,
        "bytes_received": received * GIB if received is not None else None,
        "read": "stripes" if known else None,
        "read_reason": "2 ranks have the same checkpoint" if known else None,
        "digest": "0",
    }


def test_table_shows_the_last_rank_to_start_and_the_most_of_all(import_benchmark: Callable[[str], ModuleType]) -> None:
    benchmark = import_benchmark("resume_distributed")
    runs = {
        "stock": [[rank(9.0, 0, None, 8), rank(4.0, 0, None, 7)]],
        "stripes": [[rank(6.0, 2, 3, 1), rank(1.0, 3, 2, 2)], [rank(7.0, 2, 3, 1), rank(2.0, 3, 2, 2)]],
    }
    result = {
        "benchmark": "resume-distributed",
        "size": "demo",
        "devices": 2,
        "strategy": "ddp",
        "device": "cpu",
        "checkpoint_bytes": 5 * 10**9,
        "load_average": 0.5,
        "machine": {"gpu": None, "cpus": 2, "memory_bytes": 24 * GIB},
        "versions": {"torch": "2", "lightning": "2"},
        "command": "python examples/benchmarks/resume_distributed.py",
        "variants": {name: benchmark.summarize(of_variant) for name, of_variant in runs.items()},
    }
    assert benchmark.cells(result, "stock") == ["stock Lightning", "4.00", "-", "-", "-", "8.00", "-"]
    assert benchmark.cells(result, "stripes") == ['read="stripes"', "1.50", "0.50", "3.00", "3.00", "2.00", "-"]
    rendered = import_benchmark("render").render(result)
    assert '| read="stripes" | 1.50 | 0.50 | 3.00 | 3.00 | 2.00 | - |' in rendered
    assert "2 processes with ddp, on the CPU" in rendered
