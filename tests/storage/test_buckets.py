"""Which library reads a bucket: obstore, or fsspec where obstore cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_memload import load_weights, open_checkpoint
from lightning_memload.storage import Place, buckets, places
from lightning_memload.storage.fsspec_files import FsspecFile
from lightning_memload.storage.object_store import ObjectFile
from tests.storage.web_server import WebServer, serve

pytest.importorskip("obstore")


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setitem(places.PLACES, "http", buckets.Buckets())
    with serve(tmp_path) as server:
        torch.save({"weight": torch.ones(300, 300), "bias": torch.ones(300)}, tmp_path / "a.pt")
        yield server


def load(url: str) -> torch.nn.Module:
    module = torch.nn.Linear(300, 300)
    load_weights(module, url)
    assert (module.weight == 1).all()
    return module


def test_obstore_is_first(web: WebServer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(f"{web.url}/a.pt")
    assert isinstance(places.open_file(f"{web.url}/a.pt"), ObjectFile)


def test_fsspec_where_obstore_cannot(web: WebServer) -> None:
    """It is told once for a bucket, with the reason."""
    refused = 1
    web.fault = lambda number, *_: 403 if number < refused else None
    with pytest.warns(UserWarning, match=r"obstore cannot read http://127\.0\.0\.1:\d+, and fsspec can.*credentials"):
        open_checkpoint(f"{web.url}/a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(f"{web.url}/a.pt")
        assert isinstance(places.open_file(f"{web.url}/a.pt"), FsspecFile)


@pytest.mark.filterwarnings("ignore:obstore cannot read")
def test_where_neither_can(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web.fault = lambda *_: 403
    with pytest.raises(OSError, match=r"403|the credentials are missing"):
        open_checkpoint(f"{web.url}/a.pt")

    def no_package() -> Place:
        raise OSError("fsspec cannot open this URL")

    monkeypatch.setitem(places.PLACES, "http", buckets.Buckets())
    monkeypatch.setattr(buckets, "_fsspec", no_package)
    with pytest.raises(PermissionError, match="the credentials are missing"):
        open_checkpoint(f"{web.url}/a.pt")


def test_signed_urls(web: WebServer) -> None:
    load(f"{web.url}/a.pt?X-Signature=abc")


def test_without_obstore(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_has_obstore", lambda: False)
    load(f"{web.url}/a.pt")
    assert isinstance(places.open_file(f"{web.url}/a.pt"), FsspecFile)


def test_what_is_missing_is_missing(web: WebServer) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint(f"{web.url}/nothing.pt")
