"""The README keeps its word: its program runs and is short; its table, and those of the docs, are the results."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_program_is_whole_and_short(tmp_path: Path) -> None:
    match = re.search(r"<!-- program -->\n```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    program = match[1]
    assert len(program.splitlines()) <= 15
    # The layers only as small as a test needs; everything else as printed.
    (tmp_path / "program.py").write_text(program.replace("4096", "64"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    printed = re.search(r"```text\n(Restored.*?)\n", README)
    assert printed is not None
    assert printed[1] in output
    for line in ("open ", "weights ", "optimizers ", "total ", "mode copy (training writes to the weights)"):
        assert line in output


def texts(picture: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)<", picture)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_pictures_are_the_measured_results() -> None:
    """Not byte by byte: each version of matplotlib draws in its own way."""
    program = (
        "import json, sys; sys.path.insert(0, 'examples/benchmarks'); import draw; "
        "print(json.dumps({path.name: text for path, text in draw.drawn().items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    drawn = json.loads(done.stdout)
    assert {"summary-h100-light.svg", "summary-h100-dark.svg", "curves-cpu-light.svg"} <= set(drawn)
    for name, picture in drawn.items():
        assert texts((ROOT / "docs" / "assets" / name).read_text()) == texts(picture), "run make figures"
        assert name in README or name in (ROOT / "docs" / "benchmarks.md").read_text()
    assert "11.7 times as fast" in texts(drawn["summary-h100-dark.svg"])


def test_tables_are_the_measured_results() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "import sys; sys.path.insert(0, 'examples/benchmarks'); import render; "
            "sys.exit(any(file.read_text() != text for file, text in render.rendered().items()))",
        ],
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, "run python examples/benchmarks/render.py"
