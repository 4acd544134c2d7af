"""Runs tests with other versions of Python, torch and Lightning, each in a fresh environment, and prints a table.

    python tests/versions.py 3.10:2.6.0:2.5.0 3.13:2.14.1:2.6.6 [--names pytorch_lightning] [--tests tests/plugins]

A combination is ``python:torch:lightning``. Each takes an environment of up to 8 GB, since plain torch wheels are built
for CUDA; it is removed when its tests have run. What follows ``--`` goes to pip: an index with CPU wheels, say.
Interpreters are looked for on the PATH (with pyenv: ``PYENV_VERSION=3.10.13:3.13.0 make test-versions``).
The first name runs the tests of all rooms, the others a tenth of the cases of tests/plugins.
Exits with 1 if a test failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# The oldest with the oldest and the newest with the newest that the project knows.
COMBINATIONS = ("3.10:2.6.0:2.5.0", "3.13:2.14.1:2.6.6")
NAMES = ("lightning.pytorch", "pytorch_lightning")
# Every folder of tests but these, and no peaks: what a process takes depends on what a version imports.
LEFT_OUT = ("endurance", "examples", "gpu", "memory")
ROOMS = sorted({test.parent.name for test in REPOSITORY.glob("tests/*/test_*.py")} - {*LEFT_OUT})
TESTS = (*(f"tests/{room}" for room in ROOMS), "-m", "not memory")
# The other name changes which package is imported, and nothing else: every tenth case, as `make test-names`.
OTHER_NAME = ("tests/plugins", "--ignore=tests/plugins/test_packages.py", "--every", "10", "-m", "not memory")


@dataclass(frozen=True, slots=True)
class Combination:
    """Versions that go together. ``python`` is a version, found as ``python3.13``, or the path of an interpreter."""

    python: str
    torch: str
    lightning: str

    @classmethod
    def parse(cls, text: str) -> Combination:
        parts = text.split(":")
        if len(parts) != 3:
            raise argparse.ArgumentTypeError(f"expected python:torch:lightning, got {text!r}")
        return cls(*parts)

    def interpreter(self) -> str:
        found = shutil.which(self.python) or shutil.which(f"python{self.python}")
        if found is None:
            raise OSError(f"there is no python{self.python} on the PATH; give the path of the interpreter")
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one combination under one of Lightning's names."""

    combination: Combination
    name: str
    outcome: str
    seconds: float
    is_good: bool

    def line(self) -> str:
        python, torch, lightning = self.combination.python, self.combination.torch, self.combination.lightning
        return f"{python:8} {torch:10} {lightning:10} {self.name:18} {self.seconds:6.0f} s  {self.outcome}"


def install(combination: Combination, folder: Path, pip_arguments: list[str]) -> Path:
    """Makes an environment; returns its interpreter.

    Raises:
        OSError: There is no such interpreter.
        subprocess.CalledProcessError: It could not be made.
    """
    subprocess.run([combination.interpreter(), "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    # Both packages in one version: pip would take the newest of the one that is not named.
    packages = [f"{name}=={combination.lightning}" for name in ("lightning", "pytorch-lightning")]
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-cache-dir",
        f"torch=={combination.torch}",
        *packages,
    ]
    subprocess.run([*command, "-e", f"{REPOSITORY}[dev]", *pip_arguments], check=True)
    return python


def run_tests(combination: Combination, python: Path, name: str, tests: list[str]) -> Row:
    """Runs the tests in an environment, under one of Lightning's names."""
    started = time.monotonic()
    environment = {**os.environ, "TEST_LIGHTNING": name}
    command = [str(python), "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    # Print everything: the environment is removed before anyone can look into it.
    found = re.search(r"^=+ (?:FAILURES|ERRORS) =+$.*", done.stdout, re.MULTILINE | re.DOTALL)
    if found is not None:
        print(found[0], flush=True)
    summary = next((line for line in reversed(lines) if re.search(r"\d+ \w+.* in ", line)), (lines or ["nothing"])[-1])
    return Row(combination, name, summary.strip("= "), time.monotonic() - started, done.returncode == 0)


def main(arguments: list[str]) -> int:
    """Runs all combinations; returns the exit status."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, pip_arguments = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = [*map(Combination.parse, COMBINATIONS)]
    parser.add_argument("combinations", nargs="*", type=Combination.parse, default=default)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, help="of Lightning's packages")
    parser.add_argument("--tests", type=shlex.split, help="what to give to pytest, with each name")
    options = parser.parse_args(own)
    rows: list[Row] = []
    for combination in options.combinations:
        with tempfile.TemporaryDirectory(prefix="versions-") as folder:
            try:
                python = install(combination, Path(folder), pip_arguments)
            except (OSError, subprocess.CalledProcessError) as error:
                rows.append(Row(combination, "-", f"not installed: {error}", 0, is_good=False))
                print(rows[-1].line(), flush=True)
            else:
                for name in options.names:
                    tests = options.tests or [*(TESTS if name == options.names[0] else OTHER_NAME)]
                    rows.append(run_tests(combination, python, name, tests))
                    print(rows[-1].line(), flush=True)
    print(f"\n{'python':8} {'torch':10} {'lightning':10} {'imported as':18} {'time':>8}  outcome")
    print("\n".join(row.line() for row in rows))
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
