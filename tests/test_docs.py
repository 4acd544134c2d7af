"""The documentation keeps its word: its programs run, its names exist, its pages are complete."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import lightning_memload
from lightning_memload import cli, errors
from tests import versions
from tests.floors import FLOORS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
COMPILED_ONLY = "<!-- compiled only: "
_FENCE = re.compile(
    r"^(?P<before>[^\n]*)\n(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
# What other tests hold: README's program.
PROGRAM = "<!-- program -->"


@dataclass(frozen=True)
class Block:
    """A fenced block of a text, with the line that it begins in and the line above it."""

    language: str
    text: str
    line: int
    above: str


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(text):
        lines = [line.removeprefix(match["indent"]) for line in match["text"].splitlines()]
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(match["language"], "\n".join(lines) + "\n", line, match["before"].strip()))
    return found


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def programs_of(file: Path) -> list[Block]:
    blocks = [block for block in blocks_of(file.read_text()) if block.language == "python"]
    return [block for block in blocks if block.above != PROGRAM and not block.above.startswith(COMPILED_ONLY)]


def docstrings_of(file: Path) -> list[tuple[int, str]]:
    """The docstrings of a source, each with the line that it begins in."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                found.append((first.lineno, str(first.value.value)))
    return found


def examples_of(file: Path) -> list[tuple[int, doctest.Example]]:
    """The lines after ``>>>`` in the docstrings of a source, each with its line in the file."""
    return [
        (line + example.lineno, example)
        for line, text in docstrings_of(file)
        for example in doctest.DocTestParser().get_examples(text)
    ]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


# Runs the blocks of each page one after the other, each with its own file name and lines in tracebacks, and each page
# in a directory and with names of its own. What needs a GPU in the text runs on the CPU here.
RUNNER = """
import json, os, pathlib, traceback
failures, start = {}, pathlib.Path.cwd()
for number, (page, blocks) in enumerate(json.loads(pathlib.Path("pages.json").read_text()).items()):
    (start / str(number)).mkdir()
    os.chdir(start / str(number))
    names = {"__name__": "__main__"}
    try:
        for file, line, text in blocks:
            exec(compile("\\n" * (line - 1) + text.replace('"cuda"', '"cpu"'), file, "exec"), names)
    except Exception:
        failures[page] = traceback.format_exc()
(start / "failures.json").write_text(json.dumps(failures))
"""


def run_pages(pages: dict[str, list[tuple[str, int, str]]], folder: Path) -> dict[str, str]:
    """Runs the blocks (file, line, text) of pages in a process of their own; returns the tracebacks of those that fail.

    One process for all of them, since it takes longest to import Lightning.
    """
    (folder / "pages.json").write_text(json.dumps(pages))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    failures: dict[str, str] = json.loads((folder / "failures.json").read_text())
    return failures


PAGES_WITH_PROGRAMS = [file for file in TEXTS if programs_of(file)]
SOURCES_WITH_EXAMPLES = [file for file in sorted((ROOT / "lightning_memload").rglob("*.py")) if examples_of(file)]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    setting = ("docs_setting.py", 1, (ROOT / "tests" / "docs_setting.py").read_text())
    pages = {
        relative(file): [setting, *((relative(file), block.line, block.text) for block in programs_of(file))]
        for file in PAGES_WITH_PROGRAMS
    }
    for file in SOURCES_WITH_EXAMPLES:
        pages[relative(file)] = [
            setting,
            *((relative(file), line, example.source) for line, example in examples_of(file)),
        ]
    return run_pages(pages, tmp_path_factory.mktemp("pages"))


class TestBlocks:
    @pytest.mark.parametrize("file", TEXTS, ids=relative)
    def test_fences_are_pairs_and_say_their_language(self, file: Path) -> None:
        fences = re.findall(r"^ *```.*$", file.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(file.read_text()))
        assert {block.language for block in blocks_of(file.read_text())} <= {"python", "console", "yaml", "text"}

    @pytest.mark.parametrize("file", TEXTS, ids=relative)
    def test_python_compiles(self, file: Path) -> None:
        for block in blocks_of(file.read_text()):
            if block.language == "python":
                compile("\n" * (block.line - 1) + block.text, relative(file), "exec", dont_inherit=True)

    @pytest.mark.parametrize("file", [*PAGES_WITH_PROGRAMS, *SOURCES_WITH_EXAMPLES], ids=relative)
    def test_programs_run(self, file: Path, failures: dict[str, str]) -> None:
        assert relative(file) not in failures, failures[relative(file)]

    @pytest.mark.parametrize("file", SOURCES_WITH_EXAMPLES, ids=relative)
    def test_examples_of_docstrings_promise_no_output(self, file: Path) -> None:
        """They run as the programs of the pages do, and what they print is not compared."""
        assert [(line, example.want) for line, example in examples_of(file) if example.want] == []

    def test_examples_of_docstrings_are_found(self, tmp_path: Path) -> None:
        lines = [
            '    """One.',
            "",
            "    Example:",
            '        >>> for a in "ab":',
            "        ...     b = a",
            "        >>> b",
        ]
        (tmp_path / "a.py").write_text("\n".join(["class A:", *lines, '    """', ""]))
        found = [(line, example.source) for line, example in examples_of(tmp_path / "a.py")]
        assert found == [(5, 'for a in "ab":\n    b = a\n'), (7, "b\n")]
        assert {"meta.py", "load_weights.py", "callback.py"} <= {file.name for file in SOURCES_WITH_EXAMPLES}

    @pytest.mark.parametrize("file", TEXTS, ids=relative)
    def test_yaml_names_what_exists(self, file: Path) -> None:
        for block in blocks_of(file.read_text()):
            if block.language == "yaml":
                yaml.safe_load(block.text)
                for name in re.findall(r"class_path: (\S+)", block.text):
                    module, _, attribute = name.rpartition(".")
                    assert hasattr(importlib.import_module(module), attribute)

    @pytest.mark.parametrize("file", TEXTS, ids=relative)
    def test_commands_exist(self, file: Path) -> None:
        commands = [block for block in blocks_of(file.read_text()) if block.language == "console"]
        for line in "".join(block.text for block in commands).splitlines():
            assert line.startswith("$ "), line
            words = shlex.split(line[2:], comments=True)
            if words[0] == "make":
                assert words[1] in targets()
            elif words[0] == "lightning-memload":
                with pytest.raises(SystemExit) as exit:
                    cli.main([words[1], "--help"])
                assert exit.value.code == 0
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file()
            else:
                assert words[0] in {"git", "pip", "pre-commit"}

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("above\n```python\na = 1\n```\n", [("python", "a = 1\n", 3, "above")]),
            ("- item\n\n  ```yaml\n  a:\n    b\n  ```\n", [("yaml", "a:\n  b\n", 4, "")]),
            ("x\n```text\n1\n```\ny\n```\n2\n```\n", [("text", "1\n", 3, "x"), ("", "2\n", 7, "y")]),
        ],
    )
    def test_blocks_are_found(self, text: str, found: list[tuple[str, str, int, str]]) -> None:
        assert [(block.language, block.text, block.line, block.above) for block in blocks_of(text)] == found

    def test_a_program_that_fails_is_told_with_its_line(self, tmp_path: Path) -> None:
        failures = run_pages({"bad.md": [("bad.md", 7, "1 / 0\n")], "good.md": [("good.md", 1, "x = 1\n")]}, tmp_path)
        assert set(failures) == {"bad.md"}
        assert 'File "bad.md", line 7' in failures["bad.md"]


def classes() -> dict[str, list[str]]:
    """The files in which a class of each name is defined, private ones without their underscore."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "lightning_memload").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name.lstrip("_"), []).append(relative(file))
    return found


class TestNames:
    @pytest.mark.parametrize("file", TEXTS, ids=relative)
    def test_paths_in_the_text_exist(self, file: Path) -> None:
        named = re.findall(r"`((?:examples|tests|lightning_memload|docs|\.github)/[\w./-]*)`", file.read_text())
        assert [path for path in named if not (ROOT / path).exists()] == []

    @pytest.mark.parametrize("file", TEXTS, ids=relative)
    def test_make_targets_in_the_text_exist(self, file: Path) -> None:
        assert set(re.findall(r"`make ([a-z-]+)`", file.read_text())) <= targets()

    @pytest.mark.parametrize("file", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=relative)
    def test_links_lead_to_files(self, file: Path) -> None:
        links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", file.read_text())
        assert [link for link in links if not (ROOT / link).is_file()] == []

    @pytest.mark.parametrize("file", TEXTS, ids=relative)
    def test_plain_words(self, file: Path) -> None:
        if file.name != "changelog.md":
            assert re.findall(r"(?i)\b(?:who|what|which)ever\b|\bnobody\b|\bsomebody\b", file.read_text()) == []

    def test_docstrings_refer_to_names_that_exist(self) -> None:
        """A class or function that got another name is easily left in a docstring."""
        files = sorted((ROOT / "lightning_memload").rglob("*.py"))
        known = {file.stem for file in files}
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    known.add(node.name)
                elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                    known.add(node.id if isinstance(node, ast.Name) else node.attr)
        role = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([\w.]+)`")
        referred = {f"{file.name}: {name}" for file in files for name in role.findall(file.read_text())}
        assert len(referred) > 100
        missing = {name for name in referred if name.split(": ")[1].rpartition(".")[2] not in known}
        assert missing == {"__main__.py: lightning_memload.cli"}

    def test_plain_words_in_the_code(self) -> None:
        words = re.compile(r"(?i)\b(?:who|what|which)ever\b|\bnobody\b|\bsomebody\b")
        folders = ("lightning_memload", "examples", "tests")
        files = [file for name in folders for file in (ROOT / name).rglob("*.py") if file != Path(__file__)]
        assert {relative(file): found for file in files if (found := words.findall(file.read_text()))} == {}

    def test_house_has_the_floors_of_the_test(self) -> None:
        house = (ROOT / "CONTRIBUTING.md").read_text().partition("## The house")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", house, re.MULTILINE)
        shown = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
        assert shown == FLOORS

    def test_classes_are_told_apart_by_name(self) -> None:
        assert {name: files for name, files in classes().items() if len(files) > 1} == {}

    @pytest.mark.parametrize("synonym", ["section", "stretch", "piece", "fragment", "slice", "extent"])
    def test_other_words_of_the_glossary_are_not_used(self, synonym: str) -> None:
        """Each of them once meant a run of bytes, beside the words of the glossary."""
        used = {name for name in classes() if synonym in re.findall("[a-z]+", re.sub("([A-Z])", r" \1", name).lower())}
        for file in sorted((ROOT / "lightning_memload").rglob("*.py")):
            names = {node.arg for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.arg)}
            used |= {f"{file.name}: {name}" for name in names if synonym in name.split("_") or f"{synonym}s" in name}
        assert used == set()

    def test_glossary_names_classes_that_exist(self) -> None:
        glossary = (ROOT / "CONTRIBUTING.md").read_text().partition("## Glossary")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (\w[\w -]*) \|[^|]*\| `([\w.]+)` \|$", glossary, re.MULTILINE)
        assert len(rows) >= 15
        for _, name in rows:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(f"lightning_memload.{module}"), attribute), name
        assert len({word for word, _ in rows}) == len(rows)


class TestPages:
    def test_readme_is_short(self) -> None:
        assert len((ROOT / "README.md").read_text().splitlines()) < 150

    def test_every_public_name_has_its_entry(self) -> None:
        entries = [
            name for file in TEXTS for name in re.findall(r"^::: lightning_memload\.(\w+)$", file.read_text(), re.M)
        ]
        assert sorted(entries) == sorted(set(lightning_memload.__all__) - {"__version__"})

    def test_every_error_has_cause_and_remedy(self) -> None:
        text = (DOCS / "troubleshooting.md").read_text().partition("\n## ")[0]
        entries = re.split(r"^::: lightning_memload\.", text, flags=re.MULTILINE)[1:]
        classes = {name for name in lightning_memload.__all__ if name in errors.__all__}
        assert {entry.split()[0] for entry in entries} == classes
        for entry in entries:
            assert entry.count("\n**Cause.** ") == entry.count("\n**What to do.** ") == 1, entry.split()[0]

    def test_every_logged_figure_is_explained(self) -> None:
        text = (DOCS / "reading-the-numbers.md").read_text()
        explained = set(re.findall(r"`memload/(\w+)`", text))
        sources = [file.read_text() for file in sorted((ROOT / "lightning_memload" / "report").glob("*.py"))]
        logged = set(re.findall(r'"memload/(\w+)"', "".join(sources)))
        logged |= {
            f"{name}_gib" for name in importlib.import_module("lightning_memload.report.restore_report").MEMORY_FIGURES
        }
        logged |= {f"{phase}_seconds" for phase in ("open", "weights", "optimizers", "overlap")}
        logged.add(importlib.import_module("lightning_memload.plugins.figure_log").PICTURE.removeprefix("memload/"))
        assert explained == logged
        reports = ("restore_report", "save_report")
        modules = [importlib.import_module(f"lightning_memload.report.{name}") for name in reports]
        by_default = {name for module in modules for name in module._SUMMARY}
        assert {f"memload/{name}" for name in re.findall(r"\*\*`memload/(\w+)`\*\*", text)} == by_default

    def test_the_site_has_the_pictures_of_its_pages(self) -> None:
        """mkdocs gives no warning of a picture that exclude_docs keeps out."""
        (excluded,) = re.findall(r"^exclude_docs: \|\n((?:  .*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
        pictures = {name for page in DOCS.rglob("*.md") for name in re.findall(r"!\[.*\]\(([^)#]+)", page.read_text())}
        assert len(pictures) >= 4
        for name in pictures:
            assert (DOCS / name).is_file()
            assert not any(Path(name).match(pattern) for pattern in excluded.split())

    def test_site_is_built_without_a_warning(self, tmp_path: Path) -> None:
        if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")):
            pytest.skip("the extra docs is not installed; make docs does the same")
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
            cwd=ROOT,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for page in (tmp_path / "site").rglob("*.html"):
            # Roles of docstrings, and snippets, that nothing has replaced.
            assert not re.search(r":(?:class|func|meth|mod):<|--8<--", page.read_text()), page


class TestAroundTheProject:
    def test_make_docs_installs_the_extra(self) -> None:
        # Without a parser of TOML: Python 3.10 has none.
        (extra,) = re.findall(r"^docs = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        (packages,) = re.findall(r"^DOCS_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert shlex.split(packages) == json.loads(extra)

    def test_workflow_runs_make_targets(self) -> None:
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
        commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
        assert {command.split()[1] for command in commands if command.startswith("make ")} >= {
            "check",
            "test",
            "docs",
            "test-versions",
        }
        assert {command.split()[1] for command in commands if command.startswith("make ")} <= targets()

    def test_workflow_tries_the_versions_of_make(self) -> None:
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
        tried = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
        assert [entry["versions"] for entry in tried] == list(versions.COMBINATIONS)
        assert [entry["python"] for entry in tried] == [entry["versions"].split(":")[0] for entry in tried]

    @pytest.mark.parametrize(
        "file",
        [
            ROOT / "CITATION.cff",
            ROOT / ".pre-commit-config.yaml",
            *sorted((ROOT / ".github").rglob("*.yml")),
        ],
        ids=relative,
    )
    def test_yaml_is_sound(self, file: Path) -> None:
        assert isinstance(yaml.safe_load(file.read_text()), dict)

    def test_pre_commit_has_the_tested_linter(self) -> None:
        config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
        (revision,) = [repo["rev"] for repo in config["repos"] if repo["repo"].endswith("/ruff-pre-commit")]
        assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()
