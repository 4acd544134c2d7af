"""Elements of tensors that are read part by part: the same as those of the whole tensor, wherever it is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_memload import open_checkpoint
from lightning_memload.checkpoint import Checkpoint
from lightning_memload.checkpoint.elements import ElementReader, is_in_order
from lightning_memload.errors import CheckpointReadError
from lightning_memload.storage import FileSet
from tests.formats.dcp_shards import sharded, write_shards
from tests.formats.files import ALL_DTYPES, as_bytes, layouts, of_dtype


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Checkpoint, FileSet]]:
    index = open_checkpoint(path)
    source = FileSet([span.path for span in index.files])
    with contextlib.closing(source):
        yield index, source


@pytest.mark.parametrize("name", layouts())
def test_every_run_of_every_layout(name: str, tmp_path: Path) -> None:
    expected = layouts()[name]
    torch.save({"tensor": expected}, tmp_path / "file.pt")
    flat = expected.reshape(-1)
    numel = expected.numel()
    with opened(tmp_path / "file.pt") as (index, source):
        reader = ElementReader.of(index["tensor"], source)
        assert reader.numel == numel
        for start in range(0, numel, max(1, numel // 9)):
            for count in (1, 2, 19, numel - start):
                count = min(count, numel - start)
                assert torch.equal(reader.read(start, count), flat[start : start + count])


@pytest.mark.parametrize("cuts", [(3,), (1, 4), (2, 3), (2, 2, 2), (5, 1, 3)])
def test_every_run_of_a_tensor_in_chunks(cuts: tuple[int, ...], tmp_path: Path) -> None:
    expected = torch.arange(7 * 5 * 6).view(7, 5, 6)
    path = write_shards(tmp_path / "shards", {"tensor": sharded(expected, *cuts)})
    with opened(path) as (index, source):
        reader = ElementReader.of(index["tensor"], source)
        for start in range(0, 210, 13):
            for count in (1, 4, 31, 77, 210):
                count = min(count, 210 - start)
                assert torch.equal(reader.read(start, count), expected.view(-1)[start : start + count])


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = of_dtype(dtype, 36)
    torch.save({"plain": plain, "turned": plain.view(6, 6).t()}, tmp_path / "file.pt")
    with opened(tmp_path / "file.pt") as (index, source):
        assert as_bytes(ElementReader.of(index["plain"], source).read(5, 20)) == as_bytes(plain[5:25])
        turned = plain.view(6, 6).t().contiguous().view(-1)
        assert as_bytes(ElementReader.of(index["turned"], source).read(5, 20)) == as_bytes(turned[5:25])


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    torch.save({"tensor": torch.ones(9000)}, tmp_path / "file.pt")
    with opened(tmp_path / "file.pt") as (index, source):
        reader = ElementReader.of(index["tensor"], source)
        with (tmp_path / "file.pt").open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(CheckpointReadError, match=r"tensor needs .* bytes more"):
            reader.read(0, 9000)


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [((), (), True), ((3,), (1,), True), ((3,), (2,), False), ((1, 3), (7, 1), True), ((2, 3), (1, 2), False)],
)
def test_order(shape: tuple[int, ...], stride: tuple[int, ...], expected: bool) -> None:
    assert is_in_order(shape, stride) is expected
