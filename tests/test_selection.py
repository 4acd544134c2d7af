"""The tests that a run takes: one row per axis, every n-th case, and unit tests without a process or a Trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fresh_process import run_fresh
from tests.unit import is_unit_test, no_process

pytest_plugins = ["pytester"]

CONFTEST = "from tests.conftest import pytest_addoption, pytest_collection_modifyitems"
PRODUCT = """
import pytest
@pytest.mark.axes("a", "b")
@pytest.mark.parametrize("a", "xyz")
@pytest.mark.parametrize("b", "xyz")
@pytest.mark.parametrize("c", "xy")
def test_product(a, b, c): ...
def test_other(): ...
"""


def taken(pytester: pytest.Pytester, program: str, *options: str) -> list[str]:
    """The names of the tests of a file that a run with these options takes."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(program)
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:cacheprovider", "-W", "ignore", *options)
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_one_row_per_axis(pytester: pytest.Pytester) -> None:
    """Of the parameters that the marker names, at most one is not its first value; the others are whole."""
    rows = {"x-x", "x-y", "x-z", "y-x", "z-x"}
    names = taken(pytester, PRODUCT)
    assert set(names) == {f"test_product[{c}-{row}]" for c in "xy" for row in rows} | {"test_other"}
    assert len(names) == 11


def test_whole_products_on_request(pytester: pytest.Pytester) -> None:
    assert len(taken(pytester, PRODUCT, "--all")) == 19


def test_the_first_value_alone(pytester: pytest.Pytester) -> None:
    program = PRODUCT.replace('axes("a", "b")', 'first("a", "c")')
    assert set(taken(pytester, program)) == {*(f"test_product[x-{b}-x]" for b in "xyz"), "test_other"}
    assert len(taken(pytester, program, "--all")) == 19


def test_every_third_case(pytester: pytest.Pytester) -> None:
    assert len(taken(pytester, PRODUCT, "--all", "--every", "3")) == 7


def test_an_axis_that_the_test_lacks_is_a_mistake(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(PRODUCT.replace('axes("a", "b")', 'axes("a", "d")'))
    result = pytester.runpytest_inprocess("--collect-only", "-p", "no:cacheprovider", "-W", "ignore")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "test_product has no parameter 'd', which its marker names" in str(result.errlines)


# Tests of several kinds, which are looked at here and not run -------------------------------------------------------


def through_a_function() -> None:
    one_more()


def one_more() -> None:
    run_fresh("RESULT = 1")


class Starting:
    def work(self) -> None:
        run_fresh("RESULT = 1")


def starting(case: object = None, starts: object = None) -> None:
    """A plain function."""


@pytest.fixture
def starts() -> None:
    one_more()


def item(request: pytest.FixtureRequest, function: object) -> pytest.Function:
    return pytest.Function.from_parent(request.node.parent, name="test_it", callobj=function)


def test_a_test_that_starts_nothing_is_a_unit_test(request: pytest.FixtureRequest) -> None:
    assert is_unit_test(item(request, lambda: starting()))
    assert is_unit_test(item(request, lambda: item))


@pytest.mark.parametrize(
    "function",
    [
        lambda: run_fresh("RESULT = 1"),
        lambda: through_a_function(),
        lambda: [one_more() for _ in range(2)],
        lambda: Starting().work(),
        lambda starts: None,
    ],
    ids=["itself", "function", "comprehension", "class", "fixture"],
)
def test_a_test_that_starts_a_process_is_none(function: object, request: pytest.FixtureRequest) -> None:
    assert not is_unit_test(item(request, function))


def test_a_process_in_a_unit_test_is_an_error() -> None:
    with no_process(), pytest.raises(AssertionError, match=r"subprocess\.Popen in a unit test"):
        subprocess.run([sys.executable, "-c", ""], check=True)
    subprocess.run([sys.executable, "-c", ""], check=True)
