"""Tensors that stay in the files: a question for the shape reads nothing, and values are read once and shared."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_memload.checkpoint import ChunkedTensor, FileChunk, StorageInfo, part_of
from lightning_memload.checkpoint.chunked import ChunkedValues
from lightning_memload.checkpoint.index import ChunkInfo
from lightning_memload.checkpoint.unread import UnreadStorage, UnreadView
from lightning_memload.errors import ChecksumError
from lightning_memload.storage import FileSet

VALUES = torch.arange(12, dtype=torch.float32).view(3, 4)


class Counting(FileSet):
    """Files that count their reads."""

    def __init__(self, path: Path) -> None:
        super().__init__([path])
        self.num_reads = 0

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self.num_reads += 1
        return super().readv(buffers, offset)


@pytest.fixture
def source(tmp_path: Path) -> Counting:
    """Two parts of a tensor of three rows, the last one first: its columns 2 and 3, then its columns 0 and 1."""
    path = tmp_path / "parts.bin"
    path.write_bytes(VALUES[:, 2:].contiguous().numpy().tobytes() + VALUES[:, :2].contiguous().numpy().tobytes())
    return Counting(path)


def tensor_in(source: FileSet) -> ChunkedTensor:
    chunks = [
        ChunkInfo((0, 2), (3, 2), (2, 1), 0, StorageInfo("0", 0, 24, None, "cpu")),
        ChunkInfo((0, 0), (3, 2), (2, 1), 0, StorageInfo("1", 24, 24, None, "cpu")),
    ]
    return ChunkedTensor(ChunkedValues((3, 4), torch.float32, chunks, source, "weight"))


def test_questions_read_nothing(source: Counting) -> None:
    tensor = tensor_in(source)
    assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type) == ((3, 4), (4, 1), torch.float32, "cpu")
    assert (tensor.numel(), tensor.dim(), tensor.is_contiguous(), len(tensor)) == (12, 2, True, 3)
    assert repr(tensor) == "ChunkedTensor(shape=(3, 4), dtype=torch.float32, in 2 parts of the file)"
    assert not tensor.detach().is_read
    assert source.num_reads == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda tensor: tensor + 0,
        lambda tensor: tensor.clone(),
        lambda tensor: torch.cat([tensor[:1], tensor[1:]]),
        lambda tensor: torch.tensor(tensor.tolist()),
        lambda tensor: torch.from_numpy(tensor.numpy()),
        lambda tensor: torch.from_numpy(np.asarray(tensor)),
        lambda tensor: torch.zeros(3, 4).copy_(tensor),
        copy.deepcopy,
        lambda tensor: pickle.loads(pickle.dumps(tensor)),
    ],
)
def test_every_use_gives_the_values(use: Callable[[Any], torch.Tensor], source: Counting) -> None:
    used = use(tensor_in(source))
    assert type(used) is torch.Tensor
    assert used.equal(VALUES)
    assert source.num_reads > 0


def test_a_change_is_seen_by_detached_tensors(source: Counting) -> None:
    tensor = tensor_in(source)
    detached = tensor.detach()
    tensor[0, 0] = 100
    assert detached.is_read
    assert float(detached[0, 0]) == 100
    assert detached.data_ptr() == tensor.data_ptr()


def test_threads_read_once(source: Counting) -> None:
    tensor = tensor_in(source)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(tensor.read())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(values) for values in found}) == 1
    assert source.num_reads == 2


def test_a_tensor_that_is_read_in_inference_mode_stays_ordinary(source: Counting) -> None:
    tensor = tensor_in(source)
    with torch.inference_mode():
        tensor.read()
    assert not tensor.read().is_inference()


def test_a_chunk_is_a_view_of_the_whole_tensor() -> None:
    whole = torch.zeros(3, 4)
    chunk = FileChunk(0, (2, 1), (1, 2), (2, 2))
    chunk.within(whole).fill_(1)
    assert whole.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert FileChunk(0, (4, 1), (0, 0), (3, 4)).within(whole) is whole


class TestUnread:
    def storage(self, source: FileSet, *, crc32: int | None = None, name: str | None = "weight") -> UnreadStorage:
        return UnreadStorage(source, 0, 24, crc32, name)

    def test_tensors_on_one_storage_share_it(self, source: Counting) -> None:
        storage = self.storage(source)
        like = torch.zeros(6)
        whole = ChunkedTensor(UnreadView(storage, like))
        column = ChunkedTensor(UnreadView(storage, like.view(3, 2)[:, 1]))
        assert source.num_reads == 0
        assert (column.shape, column.stride(), column.storage_offset()) == ((3,), (2,), 1)
        whole[1] = 50
        assert column.tolist() == [50, 7, 11]
        assert source.num_reads == 1

    def test_a_chunk_says_where_the_values_are(self, source: Counting) -> None:
        view = UnreadView(self.storage(source), torch.zeros(6).view(3, 2)[:, 1])
        assert view.chunks == (FileChunk(4, (2,), (0,), (3,)),)
        assert view.memory is None
        assert UnreadView(self.storage(source), torch.zeros(0)).chunks == ()

    @pytest.mark.parametrize("name", ["weight", None])
    def test_damage(self, source: Counting, name: str | None) -> None:
        storage = self.storage(source, crc32=1, name=name)
        with pytest.raises(
            ChecksumError, match=f"the 24 bytes of {name or 'a tensor'} at byte 0 have CRC-32"
        ) as caught:
            storage.read()
        assert (caught.value.key, caught.value.expected) == (name, 1)
        assert storage.memory is None


@pytest.mark.parametrize(
    ("starts", "shape"), [((0, 0), (3, 4)), ((1, 0), (2, 4)), ((0, 1), (3, 2)), ((2, 3), (1, 1)), ((1, 0), (0, 4))]
)
def test_a_part_lies_in_the_parts_of_the_file(
    starts: tuple[int, int], shape: tuple[int, int], source: Counting, tmp_path: Path
) -> None:
    tensor = tensor_in(source)
    part = part_of(tensor, starts, shape)
    expected = part_of(VALUES, starts, shape)
    assert isinstance(part, ChunkedTensor)
    assert (part.shape, part.is_read, source.num_reads) == (expected.shape, False, 0)
    found = torch.zeros(shape)
    for chunk in part.chunks:
        place = chunk.within(found)
        place.copy_(
            torch.from_file(str(tmp_path / "parts.bin"), size=12).as_strided(
                place.shape, chunk.stride, chunk.offset // 4
            )
        )
    assert torch.equal(found, expected)
    assert torch.equal(part, expected)
    assert tensor.is_read
    assert part.is_read


def test_a_part_of_an_ordinary_tensor_is_a_view() -> None:
    part = part_of(VALUES, (1, 2), (2, 1))
    assert part.data_ptr() == VALUES[1:, 2:].data_ptr()
    assert part.tolist() == VALUES[1:3, 2:3].tolist()
