"""Checkpoint files for the tests: torch's own of every kind, and zips with a pickle of our choice."""

from __future__ import annotations

import collections
import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_memload.formats.torch_zip.layout import directory, lay_out, local_header

ALL_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@dataclass
class Settings:
    """A class of a user: refused by ``weights_only=True``."""

    rate: float = 0.5
    table: torch.Tensor = field(default_factory=lambda: torch.arange(5.0))


def of_dtype(dtype: torch.dtype, numel: int = 37) -> torch.Tensor:
    """Values with all kinds of bytes, NaNs included; bools stay 0 and 1."""
    generator = torch.Generator().manual_seed(numel)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (raw & 1 if dtype is torch.bool else raw).view(dtype)


def layouts() -> dict[str, torch.Tensor]:
    base = torch.arange(240.0)
    return {
        "zero_dim": torch.tensor(3.5),
        "zero_dim_in_storage": base[7],
        "empty": torch.empty(0),
        "empty_2d": torch.empty(3, 0, dtype=torch.int16),
        "empty_view": base[5:5],
        "transposed": base.view(12, 20).t(),
        "strided": base[3:200:7],
        "expanded": base[:6].expand(4, 6),
        "expanded_scalar": torch.tensor(2.0).expand(3, 3),
        "permuted": base.view(2, 5, 24).permute(2, 0, 1),
        "overlapping": base.as_strided((10, 5), (2, 1), 9),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": base[100:140].view(5, 8),
    }


def nested() -> Any:
    tied = torch.randn(6, 6)
    return {
        "state_dict": collections.OrderedDict(weight=tied, tied=tied, row=tied[2]),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(6, 6)}}}],
        "tuple": (torch.ones(3), [torch.zeros(2, dtype=torch.int32), (torch.tensor(True),)]),
        "default": collections.defaultdict(list, {"a": [torch.ones(1)]}),
        "plain": {"epoch": 3, "name": "run", "none": None, "size": torch.Size([2, 3]), "float": 1.5},
        3: torch.ones(3),
        1.5: torch.ones(1),
    }  # fmt: skip


def tensors_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """Every strided tensor in containers, with its path as the index writes it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, (*path, key if isinstance(key, (str, int)) else repr(key)))
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from tensors_of(item, (*path, position))


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in order, as memory; equal only if equal bit for bit, NaNs and signed zeros too."""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def from_file(path: Path, file_range: tuple[int, int]) -> bytes:
    with open(path, "rb") as file:
        file.seek(file_range[0])
        return file.read(file_range[1] - file_range[0])


def write_zip(
    path: Path,
    pickled: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """An archive in torch's layout with any pickle in it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        if byteorder is not None:
            archive.writestr("archive/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def storage_pickle(
    key: bytes = b"0", numel: bytes = b"K\x04", location: bytes = b"cpu", kind: bytes = b"FloatStorage"
) -> bytes:
    """Opcodes that put a reference to a storage on the stack; ``numel`` is an opcode of its own."""
    words = b"".join(b"X" + len(word).to_bytes(4, "little") + word for word in (key, location))
    key_op, location_op = words[: 5 + len(key)], words[5 + len(key) :]
    return b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\n" + key_op + location_op + numel + b"tQ"


def tensor_pickle(
    storage: bytes, *, offset: bytes = b"K\x00", shape: bytes = b"(K\x04t", stride: bytes = b"(K\x01t"
) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + b"\x89}tR"


def save_bytes(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def save_sparse(path: Path, sizes: Mapping[str, int]) -> None:
    """A file with byte tensors of these sizes that takes no disk: no data is written."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    assert os.stat(path).st_blocks * 512 < 64 << 20


def save_dcp(state: dict[str, Any], path: Path) -> None:
    """A directory of ``torch.distributed.checkpoint``, written by this one process."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        # That there is only one process.
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path)


def quantised(values: torch.Tensor) -> torch.Tensor:
    """A tensor of torch's own quantised types, which torch 2.13 calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(values, 0.5, 0, torch.qint8)


def write_headers(entries: list[tuple[str, int]], path: Path, *, at: list[int] | None = None, crc32: int = 0) -> None:
    """A torch zip with headers and a directory, but no data: a sparse file of any size.

    Args:
        entries: Name and announced size of each record.
        path: The file.
        at: Where each record's header is, by default one after the other, as far apart as their sizes say.
        crc32: The checksum of every record.
    """
    placed = (
        lay_out(entries) if at is None else [lay_out([e], start=start)[0] for e, start in zip(entries, at, strict=True)]
    )
    with open(path, "wb") as file:
        for entry in placed:
            file.seek(entry.header_offset)
            file.write(local_header(entry))
        file.seek(placed[-1].end)
        file.write(directory(placed, [crc32] * len(placed)))
