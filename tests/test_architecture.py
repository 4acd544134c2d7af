"""The shape of the house: who may import whom, what an import costs, what is public, what a text may say."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_memload
from tests.floors import FLOORS
from tests.fresh_process import FreshProcessError, run_fresh

PACKAGE = "lightning_memload"
REPOSITORY = Path(__file__).resolve().parent.parent

# A format imports nothing of another one, but for archives of torch, which others hold inside.
WINGS = "formats"
WINGS_FOR_ALL = {"torch_zip"}
ROOMS_WITH_LIGHTNING = {"plugins"}
NAMES_WITH_LIGHTNING = {"MemoryEfficientRestore", "StreamingCheckpointIO", "load_from_checkpoint"}
LIGHTNING_PACKAGES = {"lightning", "pytorch_lightning", "lightning_fabric"}

IMPORT_BUDGET_SECONDS = 0.050

# Spelt in two halves, so that this file does not contain what it forbids.
REGISTRY_HOSTS = ("py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "conda.ana" + "conda.org")
MACHINE_PATH = re.compile(r"(?<![\w.\-}*])/(?:work|root|home|Users)/")


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every module that a source imports, anywhere in it, with its line; relative names are made absolute.

    ``from a import b`` yields ``a.b``: whether ``b`` is a module or a name of ``a``, it lies in the room of ``a.b``,
    except directly under the package, where the caller has to tell them apart.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - (node.level - 1)]
                origin = ".".join([*parents, *([origin] if origin else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of a module that are against the floors, as one line each."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else None
    if room is not None and room not in FLOORS:
        return [f"{module}: '{room}' is no room; give it a floor"]
    found = []
    for line, imported in imports_of(source, module, is_package=is_package):
        target = imported.split(".")
        if target[0] in LIGHTNING_PACKAGES and room not in ROOMS_WITH_LIGHTNING:
            found.append(f"{module}:{line} imports {imported}: only {sorted(ROOMS_WITH_LIGHTNING)} may")
        if target[0] != PACKAGE or room is None:
            continue
        if len(target) == 1 or target[1] not in FLOORS:
            found.append(f"{module}:{line} imports {imported} from the roof, not from the room it lives in")
        elif target[1] != room and FLOORS[target[1]] >= FLOORS[room]:
            direction = "up" if FLOORS[target[1]] > FLOORS[room] else "across"
            found.append(f"{module}:{line} imports {imported}, which goes {direction}")
        elif room == WINGS and len(parts) > 2 and is_other_wing(parts[2], target[2:3]):
            found.append(f"{module}:{line} imports {imported}, which is another format's")
    return found


def is_other_wing(wing: str, target: list[str]) -> bool:
    """Whether a module of one format imports from another format, or from the registry."""
    wings = {folder.name for folder in (REPOSITORY / PACKAGE / WINGS).iterdir() if folder.is_dir()}
    return wing in wings and bool({*target} & ((wings | {"registry"}) - {wing} - WINGS_FOR_ALL))


def package_files() -> list[Path]:
    return sorted((REPOSITORY / PACKAGE).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


class TestFloors:
    def test_no_import_goes_up_or_across(self) -> None:
        found = []
        for file in package_files():
            found += violations(file.read_text(), module_name(file), is_package=file.name == "__init__.py")
        assert not found, "\n".join(found)

    def test_every_room_of_the_design_is_read(self) -> None:
        read = {module_name(file).split(".")[1] for file in package_files() if file.parent.name != PACKAGE}
        files = {"errors", "units", "collector", "bytes", "frames", "torch_private", "__main__"}
        assert read == set(FLOORS) - files

    @pytest.mark.parametrize(
        ("module", "source", "complaint"),
        [
            ("transfer.plan", "from lightning_memload.restore import meta_init", "goes up"),
            ("transfer.plan", "import lightning_memload.plugins.callback", "goes up"),
            ("transfer.plan", "from lightning_memload import restore", "goes up"),
            ("transfer.plan", "from ..restore import meta_init", "goes up"),
            ("transfer.plan", "from .. import report", "goes up"),
            ("transfer.plan", "def f():\n    from lightning_memload.report import RestoreReport", "goes up"),
            ("transfer.plan", "if TYPE_CHECKING:\n    from lightning_memload.restore import X", "goes up"),
            ("transfer.plan", "importlib.import_module('lightning_memload.restore')", "goes up"),
            ("errors", "from lightning_memload.memory import MemoryPeaks", "goes up"),
            ("storage.local", "from lightning_memload.memory import MemoryMonitor", "goes across"),
            ("memory.monitor", "from ..storage import FileSet", "goes across"),
            ("formats.dcp.reader", "from lightning_memload.formats.safetensors.header import X", "another format's"),
            ("formats.torch_zip.reader", "from lightning_memload.formats import registry", "another format's"),
            ("formats.safetensors.reader", "from lightning_memload.formats.registry import X", "another format's"),
            ("cli.inspect", "from lightning_memload.plugins import MemoryEfficientRestore", "goes across"),
            ("restore.weights", "from lightning_memload import open_checkpoint", "from the roof"),
            ("restore.weights", "import lightning_memload", "from the roof"),
            ("restore.weights", "import lightning.pytorch as pl", "only ['plugins'] may"),
            ("report.table", "def f():\n    from lightning.pytorch import Trainer", "only ['plugins'] may"),
            ("memory.monitor", "from pytorch_lightning.callbacks import Callback", "only ['plugins'] may"),
            ("cli.inspect", "__import__('lightning')", "only ['plugins'] may"),
            ("odds_and_ends", "", "is no room"),
        ],
    )
    def test_violation_is_caught(self, module: str, source: str, complaint: str) -> None:
        (found,) = violations(source, f"{PACKAGE}.{module}")
        assert complaint in found

    def test_relative_import_of_a_package_is_read_from_the_package_itself(self) -> None:
        # In transfer/__init__.py one dot is transfer itself, and two are the roof.
        assert violations("from .plan import Plan", f"{PACKAGE}.transfer", is_package=True) == []
        (found,) = violations("from ..report import table", f"{PACKAGE}.transfer", is_package=True)
        assert "goes up" in found

    def test_roof_may_name_rooms_but_not_lightning(self) -> None:
        assert violations("from lightning_memload.plugins import X", PACKAGE, is_package=True) == []
        (found,) = violations("import lightning", PACKAGE, is_package=True)
        assert "only ['plugins'] may" in found

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("transfer.engine", "from lightning_memload.transfer.plan import Plan\nfrom .ring import Ring"),
            ("transfer.engine", "from lightning_memload.checkpoint import Checkpoint"),
            ("formats.dcp.reader", "from lightning_memload.formats.torch_zip.records import read_records"),
            ("formats.registry", "from lightning_memload.formats.dcp.reader import DcpDirectory"),
            ("transfer.engine", "from lightning_memload import errors\nimport torch"),
            ("plugins.callback", "import lightning.pytorch as pl\nfrom lightning_memload.report import RestoreReport"),
            ("report.table", "import lightning_utilities"),
        ],
    )
    def test_what_keeps_the_floors_passes(self, module: str, source: str) -> None:
        assert violations(source, f"{PACKAGE}.{module}") == []


MEASURE_IMPORT = """
import sys, time
import torch
start = time.perf_counter()
exec(ARGS["statement"], {})
seconds = time.perf_counter() - start
RESULT = {"seconds": seconds, "lightning": sorted(set(ARGS["packages"]) & set(sys.modules))}
"""


def measure_import(statement: str, *, num_runs: int) -> tuple[float, set[str]]:
    """The least seconds a statement takes after ``import torch``, and the Lightning packages it brought in.

    The least of several runs: other load on the machine can only add to a run, never take from it.
    """
    seconds, packages = float("inf"), set[str]()
    for _ in range(num_runs):
        answer = run_fresh(MEASURE_IMPORT, statement=statement, packages=sorted(LIGHTNING_PACKAGES))
        seconds = min(seconds, answer.result["seconds"])
        packages |= set(answer.result["lightning"])
    return seconds, packages


TESTS = REPOSITORY / "tests"
# In programs too that a test starts, which are texts.
IMPORT_OF_A_TEST = re.compile(
    r"\b(?:from|import)\s+tests\.(?:\w+\.)*test_\w+|\bfrom\s+tests[\w.]*\s+import\s.*\btest_\w+"
)
FUNCTION_OF_A_TEST = re.compile(r"[\"'](tests\.(?:\w+\.)*test_\w+):\w+[\"']")


def imports_of_tests(text: str, module: str) -> list[str]:
    """The places where a text imports from a test, or has another process call a function of another test."""
    found = [match[0] for match in IMPORT_OF_A_TEST.finditer(text)]
    return found + [match[0] for match in FUNCTION_OF_A_TEST.finditer(text) if match[1] != module]


class TestTests:
    def test_no_test_imports_from_a_test(self) -> None:
        """Tests share modules that are no tests, so a change to a test changes no other one."""
        found = {relative(file): imports_of_tests(file.read_text(), module_name(file)) for file in TESTS.rglob("*.py")}
        assert {file: lines for file, lines in found.items() if lines} == {}

    @pytest.mark.parametrize(
        "text",
        [
            "from tests.room.{}_load import stream",
            "import tests.{}_docs",
            "from tests.room import files, {}_load",
            "PROGRAM = 'from tests.room.{}_load import stream'",
            "run_fresh('tests.room.{}_load:measure')",
        ],
    )
    def test_an_import_from_a_test_is_caught(self, text: str) -> None:
        assert len(imports_of_tests(text.format("test"), "tests.test_docs")) == 1

    @pytest.mark.parametrize(
        "text", ["from tests.formats.files import latest_of", "run_fresh('tests.{}_docs:measure')"]
    )
    def test_what_is_no_import_from_a_test_passes(self, text: str) -> None:
        assert imports_of_tests(text.format("test"), "tests.test_docs") == []


class TestImportCost:
    def test_import_is_cheap_and_leaves_lightning_alone(self) -> None:
        seconds, packages = measure_import("import lightning_memload", num_runs=3)
        assert packages == set()
        assert seconds < IMPORT_BUDGET_SECONDS

    def test_names_below_the_plugins_leave_lightning_alone(self) -> None:
        names = sorted(set(lightning_memload.__all__) - NAMES_WITH_LIGHTNING)
        _, packages = measure_import(f"from lightning_memload import {', '.join(names)}", num_runs=1)
        assert packages == set()

    @pytest.mark.first("name")
    @pytest.mark.parametrize("name", sorted(NAMES_WITH_LIGHTNING))
    def test_the_check_can_fail(self, name: str) -> None:
        # The same measurement sees Lightning, and its price, as soon as one of these names is touched.
        seconds, packages = measure_import(f"import lightning_memload; lightning_memload.{name}", num_runs=1)
        assert "lightning" in packages
        assert seconds > IMPORT_BUDGET_SECONDS

    def test_a_statement_that_fails_is_not_a_cheap_one(self) -> None:
        with pytest.raises(FreshProcessError, match="has no attribute 'MemoryEficientRestore'"):
            measure_import("import lightning_memload; lightning_memload.MemoryEficientRestore", num_runs=1)


def public_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest: the order that the linter's rule RUF022 keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def modules() -> list[str]:
    return [PACKAGE, *(found.name for found in pkgutil.walk_packages(lightning_memload.__path__, f"{PACKAGE}."))]


class TestPublicNames:
    @pytest.mark.parametrize("name", modules())
    def test_all_is_sorted_and_resolves(self, name: str) -> None:
        module = importlib.import_module(name)
        public = list(getattr(module, "__all__", []))
        assert public == sorted(public, key=public_order)
        assert len(public) == len(set(public))
        assert [entry for entry in public if not hasattr(module, entry)] == []

    @pytest.mark.parametrize("name", sorted(set(lightning_memload.__all__) - {"__version__"}))
    def test_every_public_name_says_what_it_is(self, name: str) -> None:
        documentation = getattr(lightning_memload, name).__doc__
        assert documentation is not None
        assert documentation.strip()

    def test_dir_lists_names_before_they_are_touched(self) -> None:
        program = "import lightning_memload; RESULT = dir(lightning_memload)"
        assert set(lightning_memload.__all__) <= set(run_fresh(program).result)

    def test_unknown_name_is_an_attribute_error(self) -> None:
        name = "meta_unit"
        with pytest.raises(AttributeError, match="module 'lightning_memload' has no attribute 'meta_unit'"):
            getattr(lightning_memload, name)

    def test_public_order_is_the_linters(self) -> None:
        shuffled = ["open", "Index", "LIMIT_BYTES", "close", "Block"]
        assert sorted(shuffled, key=public_order) == ["LIMIT_BYTES", "Block", "Index", "close", "open"]


def text_complaints(text: str) -> list[str]:
    """Words in a text that hold on one machine only: registries and absolute paths."""
    found = [f"names the host {host}" for host in REGISTRY_HOSTS if host in text]
    return found + [f"has the machine path {match[0]}..." for match in MACHINE_PATH.finditer(text)]


def text_files() -> list[Path]:
    roots = ["*.md", "*.toml", "*.txt", "*.yml", "*.cff", ".pre-commit-config.yaml", "Makefile", ".ci/run"]
    files = [file for pattern in roots for file in REPOSITORY.glob(pattern)]
    for folder in (PACKAGE, "examples", "docs", ".github"):
        for suffix in ("py", "md", "json", "yaml", "yml", "txt", "csv", "svg", "css"):
            files += (REPOSITORY / folder).rglob(f"*.{suffix}")
    return sorted(files)


class TestTexts:
    @pytest.mark.parametrize("file", [*package_files(), *(REPOSITORY / "examples").rglob("*.py")], ids=relative)
    def test_program_compiles(self, file: Path) -> None:
        compile(file.read_text(), str(file), "exec", dont_inherit=True)

    @pytest.mark.parametrize("file", text_files(), ids=relative)
    def test_text_holds_on_every_machine(self, file: Path) -> None:
        assert text_complaints(file.read_text()) == []

    def test_the_texts_that_matter_are_read(self) -> None:
        read = set(map(relative, text_files()))
        assert {"README.md", "Makefile", "pyproject.toml", "lightning_memload/errors.py"} <= read
        assert {"mkdocs.yml", "docs/index.md", ".github/workflows/ci.yml", "SECURITY.md"} <= read

    @pytest.mark.parametrize(
        "text",
        [
            f"https://{REGISTRY_HOSTS[0]}/simple",
            "open('" + "/ro" + "ot/model.ckpt')",
            "see " + "/wo" + "rk/main",
            '"' + "/ho" + 'me/someone/run"',
        ],
    )
    def test_text_of_one_machine_is_caught(self, text: str) -> None:
        assert len(text_complaints(text)) == 1

    @pytest.mark.parametrize("text", ["runs/work/last.ckpt", "{folder}/home/last.ckpt", "/proc/self/status", "a / b"])
    def test_other_text_passes(self, text: str) -> None:
        assert text_complaints(text) == []


# Sizes ----------------------------------------------------------------------------------------------------------------

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_DEPTH = 400, 60, 5
# One branch for each instruction of a pickle, as in an interpreter.
LONG_FUNCTIONS = {"lightning_memload/pickles/plain.py: _run"}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef)


def code_lines(function: ast.FunctionDef) -> int:
    """The lines of a function without its docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring_lines = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring_lines


def depth(node: ast.AST) -> int:
    """The depth of the blocks within a node. An ``elif`` is at the level of its ``if``."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / PACKAGE).rglob("*.py")), ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_files_and_functions_are_short(file: Path) -> None:
    text, name = file.read_text(), file.relative_to(REPOSITORY).as_posix()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {f"{name}: {node.name}" for node in functions if code_lines(node) > MAX_FUNCTION_LINES}
    assert long <= LONG_FUNCTIONS
    assert {node.name for node in functions if depth(node) > MAX_DEPTH} == set()


def test_sizes_are_measured() -> None:
    text = """
def function():
    \"\"\"A docstring.

    Two more lines.
    \"\"\"
    for a in b:
        if a:
            pass
        elif b:
            with c:
                pass
"""
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    assert (code_lines(function), depth(function)) == (7, 3)
