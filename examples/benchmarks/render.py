"""Render the measured results into the README: the figures there are never typed.

Reads every JSON file in ``results/`` and replaces what stands between the two marks in the README.

    python examples/benchmarks/render.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from resume import GIB, VARIANTS, number

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
START, END = "<!-- results: examples/benchmarks/render.py -->", "<!-- end of results -->"


def main() -> int:
    """Write the tables into the README."""
    README.write_text(with_results(README.read_text()))
    return 0


def with_results(text: str) -> str:
    """Return the README's text with the tables of all results."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    tables = [render(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    return "\n\n".join([before + START, *tables, END + after])


def render(result: dict[str, Any]) -> str:
    """Return one result as a Markdown table with its machine, versions and command."""
    machine, versions = result["machine"], result["versions"]
    place = machine["gpu"] or "CPU only"
    memory = number(machine["memory_bytes"], GIB)
    stock = result["variants"]["stock"]
    size = f"{result['checkpoint_bytes'] / 1e9:.2f} GB"
    software = f"torch {versions['torch']}, Lightning {versions['lightning']}"
    lines = [
        f"**{result['size']} with AdamW, a checkpoint of {size} in a warm page cache.** "
        f"{place}, {machine['cpus']} cores, "
        f"{memory} GiB of memory, {software}; median of {stock['repetitions']}. All ways gave the same bits: "
        f"{'yes' if result['equal'] else 'no'}.",
        "",
        "| | `fit()` to training, s | times faster | host memory above start, GiB | GPU peak, GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant, row in result["variants"].items():
        cells = [
            VARIANTS[variant],
            number(row["seconds"], 1),
            f"{stock['seconds'] / row['seconds']:.1f}",
            number(row["host_above_start_bytes"], GIB),
            number(row["cuda_allocated_peak_bytes"], GIB),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.extend(["", f"`{result['command']}`"])
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
