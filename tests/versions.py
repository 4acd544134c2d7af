"""Runs tests with other versions of Python, torch and Lightning, each in a fresh environment, and prints a table.

    python tests/versions.py 3.10:2.6.0:2.5.0 3.13:2.14.1:2.6.6 [--names pytorch_lightning] [--tests tests/plugins]

A combination is ``python:torch:lightning``. Each takes an environment of up to 8 GB, since plain torch wheels are built
for CUDA; it is removed when its tests have run. What follows ``--`` goes to pip: an index with CPU wheels, say.
Interpreters are looked for on the PATH (with pyenv: ``PYENV_VERSION=3.10.13:3.13.0 make test-versions``).
The first name runs the tests of all rooms, the others a tenth of the cases of tests/plugins.
Exits with 1 if a test failed or an environment could not be made.

Rows that passed are recorded in docs/versions.json, and README's table is made from that file. What was printed
elsewhere, or before, is recorded from its lines, with the day and the commit of that run:

    python tests/versions.py --record printed.txt --date 2026-01-31 --commit 0123abc
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
RECORD = REPOSITORY / "docs" / "versions.json"
TABLE = REPOSITORY / "README.md"
BEGIN, END = "<!-- versions: tests/versions.py -->\n", "<!-- end of versions -->\n"


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
    """The result of one combination under one of Lightning's names."""

    combination: Combination
    name: str
    outcome: str
    seconds: float
    is_good: bool

    def line(self) -> str:
        python, torch, lightning = self.combination.python, self.combination.torch, self.combination.lightning
        return f"{python:8} {torch:10} {lightning:10} {self.name:18} {self.seconds:6.0f} s  {self.outcome}"


@dataclass(frozen=True, slots=True)
class Proof:
    """A combination whose tests passed.

    Attributes:
        python: Version of Python.
        torch: Version of torch.
        lightning: Version of Lightning.
        name: The name under which the tests imported Lightning.
        tests_passed: How many tests passed.
        date: The day, as in 2026-01-31.
        commit: The commit that was tested, as git abbreviates it.
    """

    python: str
    torch: str
    lightning: str
    name: str
    tests_passed: int
    date: str
    commit: str


def read_proofs() -> list[Proof]:
    """The recorded proofs."""
    return [Proof(**entry) for entry in json.loads(RECORD.read_text())]


def proofs_in(lines: Iterable[str], date: str, commit: str) -> list[Proof]:
    """The proofs that printed rows are: those of runs in which no test failed."""
    found = []
    for line in lines:
        row = re.match(r"(\d[\w.]*) +(\d[\w.+]*) +(\d[\w.]*) +([a-z_.]+) +\d+ s  (.*\b(\d+) passed\b.*)$", line)
        if row is not None and not re.search(r"\d (?:failed|errors?)\b", row[5]):
            found.append(Proof(row[1], row[2], row[3], row[4], int(row[6]), date, commit))
    return found


def merge(known: Iterable[Proof], new: Iterable[Proof]) -> list[Proof]:
    """All proofs, sorted by versions. A new one takes the place of one of the same versions and name."""
    merged = {(proof.python, proof.torch, proof.lightning, proof.name): proof for proof in (*known, *new)}

    def order(proof: Proof) -> tuple[list[int], ...]:
        versions = (proof.python, proof.torch, proof.lightning)
        return tuple([int(number) for number in re.findall(r"\d+", version)] for version in versions)

    return sorted(sorted(merged.values(), key=lambda proof: proof.name), key=order)


def table(proofs: Iterable[Proof]) -> str:
    """The proofs as a table of Markdown. Empty if there is none."""
    rows = [
        f"| {proof.python} | {proof.torch} | {proof.lightning} | `{proof.name}` | {proof.tests_passed:,} "
        f"| {proof.date}, {proof.commit} |"
        for proof in proofs
    ]
    head = ["| Python | torch | Lightning | imported as | tests passed | on |", "|---|---|---|---|---:|---|"]
    return "\n".join(["", *head, *rows, "", ""]) if rows else ""


def rendered(text: str, proofs: Iterable[Proof]) -> str:
    """A text with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(proofs)}{END}{after}"


def record(lines: Iterable[str], date: str, commit: str) -> int:
    """Records the proofs among printed rows and renews the table. Returns their number."""
    new = proofs_in(lines, date, commit)
    proofs = merge(read_proofs(), new)
    RECORD.write_text(json.dumps([asdict(proof) for proof in proofs], indent=2) + "\n")
    TABLE.write_text(rendered(TABLE.read_text(), proofs))
    return len(new)


def present_commit() -> str:
    """The commit of this working tree, as git abbreviates it. ``"unknown"`` where git or its repository is missing."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


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
    parser.add_argument("--record", type=Path, help="record the rows of this text, and run nothing")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="the day of the run")
    parser.add_argument("--commit", default=None, help="the commit that was tested: the present one by default")
    options = parser.parse_args(own)
    commit = options.commit or present_commit()
    if options.record is not None:
        print(f"{record(options.record.read_text().splitlines(), options.date, commit)} rows are recorded in {RECORD}")
        return 0
    rows: list[Row] = []
    for combination in options.combinations:
        with tempfile.TemporaryDirectory(prefix="versions-") as folder:
            os.chmod(folder, 0o755)  # A test gives up the rights of root, and still has to import.
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
    # A part of the tests proves less than the table says.
    if options.tests is None:
        record([row.line() for row in rows if row.is_good], options.date, commit)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
