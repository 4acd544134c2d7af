"""Checkpoints behind a web server, with every fault that a network has: right values or a clear error."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_memload import load_weights, meta_init, open_checkpoint, verify_checkpoint
from lightning_memload.errors import CheckpointReadError, ChecksumError, MemloadError
from lightning_memload.save import save_directory
from lightning_memload.storage import places
from lightning_memload.storage.object_store import ObjectStore
from tests.fresh_process import run_fresh
from tests.storage.web_server import WebServer, serve

pytest.importorskip("obstore")

WIDTH, DEPTH = 256, 24


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    # A place of its own remembers nothing of other tests.
    fresh = ObjectStore()
    monkeypatch.setitem(places.PLACES, "http", fresh)
    with serve(folder) as server:
        yield server


def build() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return build()


@pytest.fixture
def url(web: WebServer, module: nn.Module) -> str:
    """A checkpoint of 6 MB, 48 tensors."""
    torch.save({"state_dict": module.state_dict()}, web.folder / "last.ckpt")
    return f"{web.url}/last.ckpt"


def load(url: str) -> nn.Module:
    with meta_init():
        module = build()
    load_weights(module, url)
    return module


def assert_equal(module: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_few_requests_whatever_the_number_of_tensors(web: WebServer, url: str, module: nn.Module) -> None:
    """The first bytes, with the pickle, and the last ones, with the directory. Then the weights, and nothing twice."""
    index = open_checkpoint(url)
    assert len(index) == 2 * DEPTH
    assert len(web.requests) == 2
    assert_equal(load(url), module)
    size = (web.folder / "last.ckpt").stat().st_size
    read = sum(end - start for start, end in web.requests)
    assert len(web.requests) <= 4
    assert read <= size + (3 << 20)


def test_many_tensors_take_no_more_requests(web: WebServer) -> None:
    """With classes in the file too, which torch.load builds from a copy without the tensors."""
    for name, extra in (("plain", None), ("classes", torch.Size([1]))):
        values = {f"layer.{number}": torch.full((2000,), float(number)) for number in range(500)}
        torch.save({"state_dict": values, "extra": extra, "hyper": {1, 2}}, web.folder / name)
        web.requests.clear()
        assert len(open_checkpoint(f"{web.url}/{name}")) == 500
        assert len(web.requests) <= 3
        module = nn.ParameterDict({f"layer_{number}": nn.Parameter(torch.zeros(2000)) for number in range(500)})
        load_weights(module, f"{web.url}/{name}", rename={r"layer\.": "layer_"})
        assert all((module[f"layer_{number}"] == number).all() for number in range(500))
        assert len(web.requests) <= 6, web.requests


def test_a_part_of_the_weights_is_a_part_of_the_bytes(web: WebServer, url: str) -> None:
    with meta_init():
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2)))
    web.requests.clear()
    load_weights(module, url, strict=False)
    assert sum(end - start for start, end in web.requests) <= (2 << 20) + 2 * WIDTH * (WIDTH + 1) * 4 + (64 << 10)


@pytest.mark.parametrize("format", ["directory", "safetensors"])
def test_directories(web: WebServer, module: nn.Module, format: str) -> None:
    """A web server has no lists of files: only a file can be named there."""
    save_directory({"state_dict": module.state_dict()}, web.folder / "saved", safetensors=format == "safetensors")
    if format == "directory":
        with pytest.raises((MemloadError, OSError)):
            load(f"{web.url}/saved")
        return
    (file,) = (web.folder / "saved").glob("*.safetensors")
    assert_equal(load(f"{web.url}/saved/{file.name}"), module)


@pytest.mark.parametrize("seed", range(3))
def test_connections_that_are_cut_anywhere(web: WebServer, url: str, module: nn.Module, seed: int) -> None:
    """Every third reply breaks off after a random number of bytes. What has arrived is not asked for again."""
    choose = random.Random(seed)
    web.fault = lambda number, start, end: f"cut:{choose.randrange(end - start)}" if choose.random() < 0.33 else None
    assert_equal(load(url), module)
    assert verify_checkpoint(url).is_verified
    size = (web.folder / "last.ckpt").stat().st_size
    assert sum(end - start for start, end in web.requests) < 12 * size


def test_host_memory_is_that_of_the_weights(web: WebServer) -> None:
    """In a fresh process: the weights, once, and what 16 connections hold. A copy of the file would be twice that."""
    torch.save({f"{number}": torch.ones(4 << 20) for number in range(12)}, web.folder / "large.pt")
    program = """
import torch
from torch import nn
from lightning_memload import MemoryMonitor, load_weights, meta_init
load = lambda name, size, count: load_weights(build(size, count), ARGS["url"] + name)
def build(size, count):
    with meta_init():
        return nn.ParameterDict({str(n): nn.Parameter(torch.empty(size)) for n in range(count)})
load("/small.pt", 10, 1)  # the libraries
with MemoryMonitor() as monitor:
    module = build(4 << 20, 12)
    load_weights(module, ARGS["url"] + "/large.pt")
RESULT = monitor.peaks.host_above_start_bytes
assert all((parameter == 1).all() for parameter in module.values())
"""
    torch.save({"0": torch.ones(10)}, web.folder / "small.pt")
    weights = 12 * (16 << 20)
    rise = run_fresh(program, url=web.url).result
    assert weights <= rise + (1 << 20)
    assert rise <= weights + (48 << 20)


def test_bursts_of_errors(web: WebServer, url: str, module: nn.Module) -> None:
    web.fault = lambda number, *_: 503 if number % 4 < 2 else None
    assert_equal(load(url), module)


@pytest.mark.long
def test_a_server_that_stays_broken(web: WebServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the object and the range, and no thread is left."""
    monkeypatch.setattr("lightning_memload.storage.object_store._FIRST_PAUSE_SECONDS", 0.001)
    threads = threading.active_count()
    web.fault = lambda number, start, end: "cut:0" if start > 0 and number > 1 else None
    with pytest.raises(
        CheckpointReadError, match=r"last\.ckpt failed at byte \d+: .*GET bytes=\d+-\d+ brought nothing"
    ):
        load(url)
    assert threading.active_count() <= threads


def test_an_object_that_was_replaced(web: WebServer, url: str, module: nn.Module) -> None:
    """With tags the server refuses; without them the time of the change tells."""

    def replace(number: int, start: int, end: int) -> None:
        if number == 1:
            other = {name: value + 1 for name, value in module.state_dict().items()}
            torch.save({"state_dict": other}, web.folder / "last.ckpt")

    web.fault = replace
    with pytest.raises((CheckpointReadError, OSError), match="was replaced since it was opened"):
        load(url)


def test_a_body_that_is_too_short_is_never_taken_for_data(web: WebServer, url: str, module: nn.Module) -> None:
    web.fault = lambda number, start, end: f"short:{(end - start) // 2}" if number in (2, 3) else None
    assert_equal(load(url), module)


def test_a_server_without_ranges(web: WebServer, url: str) -> None:
    web.has_ranges = False
    with pytest.raises(MemloadError, match="sends whole files only"):
        open_checkpoint(url)


def test_damage_is_found_on_the_way(web: WebServer, url: str) -> None:
    index = open_checkpoint(url)
    _, position = index.place(index["state_dict.3.weight"].file_range[0])
    data = bytearray((web.folder / "last.ckpt").read_bytes())
    data[position + 11] ^= 1
    (web.folder / "flipped.ckpt").write_bytes(data)
    with pytest.raises(ChecksumError, match=r"state_dict\.3\.weight"):
        load(f"{web.url}/flipped.ckpt")
    report = verify_checkpoint(f"{web.url}/flipped.ckpt")
    assert [damage.key for damage in report.damage] == ["state_dict.3.weight"]


@pytest.mark.parametrize("status", [401, 403])
def test_credentials(web: WebServer, url: str, status: int) -> None:
    web.fault = lambda *_: status
    with pytest.raises(PermissionError, match="credentials"):
        open_checkpoint(url)


def test_no_such_object(web: WebServer) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint(f"{web.url}/nothing.ckpt")


def test_a_signature_is_never_shown(web: WebServer, url: str) -> None:
    """A signed URL goes to fsspec, whose errors name the whole of it."""
    web.fault = lambda *_: 403
    with pytest.raises((MemloadError, OSError)) as raised:
        open_checkpoint(f"{web.url}/last.ckpt?X-Signature=secret")
    cause: BaseException | None = raised.value
    assert "secret" not in str(cause).replace(f"{web.url}/last.ckpt?X-Signature=secret", "")
