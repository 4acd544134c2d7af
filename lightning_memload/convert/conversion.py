"""Converts a checkpoint: opens it without reading tensors, chooses and renames its weights, and streams the bytes."""

from __future__ import annotations

import errno
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_memload.convert.safetensors import INDEX_FILE, WeightsWriter
from lightning_memload.convert.streaming import StreamedTensors
from lightning_memload.convert.weights import Selection, WeightsChoice, select
from lightning_memload.errors import CheckpointFormatError, CheckpointReadError, CheckpointWriteError
from lightning_memload.pickles import SafeGlobal, holds_refused
from lightning_memload.restore import open_any
from lightning_memload.save import Save, plan_directory_save, plan_torch_save
from lightning_memload.save.saving import DEFAULT_BUDGET_BYTES, default_save_threads
from lightning_memload.storage.places import path_of
from lightning_memload.transfer.threads import check_num_threads

__all__ = ["ConvertStats", "TargetFormat", "convert_checkpoint"]

TargetFormat = Literal["torch", "safetensors", "directory"]
_SUFFIXES: dict[str, TargetFormat] = {
    ".ckpt": "torch", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".safetensors": "safetensors",
}  # fmt: skip

_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, slots=True)
class ConvertStats:
    """The figures of a conversion.

    Attributes:
        path: The new checkpoint.
        format: Its format: ``"torch"``, ``"safetensors"`` or ``"directory"``.
        files: The names of the files in it, if it is a directory of safetensors files. Empty otherwise.
        num_weights: Number of weights that were chosen. 0 if everything is written as it is.
        bytes_written: Size of all files.
        seconds: Wall time.
        dropped: The parts of the source that are not in the new checkpoint, by their keys, such as
            ``"optimizer_states"``.
        left_out: Names of weights that are not in the new checkpoint because its format cannot hold them.
        ties: For each weight that safetensors stores under another name, because both share their values: that name.
    """

    path: str
    format: TargetFormat
    files: tuple[str, ...]
    num_weights: int
    bytes_written: int
    seconds: float
    dropped: tuple[str, ...]
    left_out: tuple[str, ...]
    ties: Mapping[str, str]


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: TargetFormat | None = None,
    parts: Literal["all", "weights"] = "all",
    key: str | None = None,
    dtype: torch.dtype | None = None,
    strip_prefix: str = "",
    rename: Mapping[str, str] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    shard_bytes: int | None = None,
    overwrite: bool = False,
    weights_only: bool | None = True,
    safe_globals: Sequence[SafeGlobal] = (),
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertStats:
    """Writes a checkpoint again: in another format, only its weights, with other names or in another dtype.

    Bytes go from the source to the target part by part. Their checksums are compared on the way where the source has
    some. The target appears in one atomic step when it is complete and on the disk. Ties, views and strides are kept
    where the format can. safetensors stores tied weights once, and names them in its metadata. The source is unchanged.

    Args:
        source: A checkpoint of any format that ``open_checkpoint`` reads, a distributed one too.
        target: A local path, whose parent exists.
        format: ``"torch"``: one file of ``torch.save``. ``"safetensors"``: the weights in one file, or in a directory
            with ``shard_bytes``. ``"directory"``: as ``save_directory`` writes it. ``None``: by the suffix of
            ``target``, ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` or ``.safetensors``; safetensors with ``shard_bytes``.
        parts: ``"weights"``: ignore everything else. A Lightning checkpoint becomes what Lightning saves with
            ``save_weights_only=True`` if the target is a ``.ckpt`` or a directory. Else the target is a state dict.
            safetensors always holds weights only.
        key: Key of the state dict in the source, joined by dots. ``None``: it is searched for.
        dtype: The dtype of floating-point weights. Optimizer states, and integer and complex weights, keep theirs.
            ``None``: that of the source.
        strip_prefix: Prefix that is removed from the names of weights that start with it.
        rename: Regular expressions and their replacements, applied to the names of weights in this order.
        include: Regular expressions. Only weights whose new name has a match are written. Empty: all.
        exclude: Regular expressions. Weights whose new name has a match are not written.
        shard_bytes: Write a directory of safetensors files with the index that Hugging Face reads. Each file has at
            most so many bytes of tensors, unless one tensor is larger.
        overwrite: Replace an existing checkpoint at ``target``. It stays until the new one is complete.
        weights_only: Passed to ``torch.load``. ``False`` runs code of the source.
        safe_globals: Classes, functions or their dotted names that ``weights_only`` allows.
        num_threads: Number of threads that read and write. ``None`` means the number of CPUs, at most 4.
        progress: Called after every part with the bytes done and all bytes, one call at a time.

    Returns:
        The figures.

    Raises:
        FileNotFoundError: There is no source.
        FileExistsError: ``target`` exists and ``overwrite`` is ``False``, or it is not a checkpoint that can be
            replaced.
        CheckpointFormatError: The source is not a checkpoint, or has no such weights.
        ChecksumError: The source is damaged. There is no new target.
        CheckpointReadError: Reading failed, or the source was changed meanwhile. There is no new target.
        CheckpointWriteError: Writing failed. There is no new target.
        UnsafeGlobalsError: ``weights_only`` refuses classes of what is to be written.
        ValueError: The format is unknown, two weights get the same name, or an argument does not fit the format.

    Peak memory: some 64 MiB for tensors of any size, the index, and all objects that are not tensors. Tensors in
    objects of other classes than dict, list and tuple, and a file of torch < 1.6, are read whole.
    """
    started = time.perf_counter()
    check_num_threads(num_threads)
    name, place = path_of(source), os.fspath(target)
    kind = _choose_format(place, format, shard_bytes)
    _check_dtype(dtype)
    if parts not in ("all", "weights"):
        raise ValueError(f"parts must be 'all' or 'weights', got {parts!r}.")
    _check_target(name, place, is_sharded=shard_bytes is not None, overwrite=overwrite)
    only_weights = parts == "weights" or kind == "safetensors"
    choice = WeightsChoice(key, strip_prefix, rename or {}, include, exclude)
    loaded, mapped = open_any(name, weights_only, safe_globals, erases=only_weights)
    try:
        # Without a choice, a file with several state dicts is converted too.
        keeps_all = not only_weights and dtype is None and choice.is_everything
        chosen = Selection(loaded, name, {}, OrderedDict()) if keeps_all else select(loaded, name, choice)
        is_lightning = kind == "directory" or os.path.splitext(place)[1] == ".ckpt"
        obj = chosen.object_of(kind, only_weights=only_weights, as_lightning=is_lightning)
        if mapped.refusal is not None and holds_refused(obj):
            raise mapped.refusal
        streaming = StreamedTensors(mapped, progress)
        chosen.convert(streaming, dtype)
        obj = streaming.replace_all(obj)
        threads = num_threads or default_save_threads()
        save, writer = _plan(kind, obj, chosen, place, streaming, shard_bytes, threads)
        stats = _run(save, streaming, threads)
    finally:
        mapped.source.close()
    return ConvertStats(
        path=place,
        format=kind,
        files=tuple(writer.file_names) if writer is not None and writer.is_directory else (),
        num_weights=len(chosen.weights),
        bytes_written=stats,
        seconds=time.perf_counter() - started,
        dropped=chosen.dropped,
        left_out=tuple(writer.left_out) if writer is not None else (),
        ties=writer.ties if writer is not None else {},
    )


def _plan(
    kind: TargetFormat,
    obj: Any,
    chosen: Selection,
    place: str,
    streaming: StreamedTensors,
    shard_bytes: int | None,
    num_threads: int,
) -> tuple[Save, WeightsWriter | None]:
    if kind == "torch":
        return plan_torch_save(obj, place, num_threads=num_threads, content_of=streaming.content_of), None
    if kind == "directory":
        return plan_directory_save(obj, place, num_threads=num_threads, content_of=streaming.content_of), None
    tensors = {name: value for name, value in chosen.weights.items() if isinstance(value, torch.Tensor)}
    writer = WeightsWriter(tensors, shard_bytes, streaming.content_of, DEFAULT_BUDGET_BYTES, num_threads)
    writer.left_out += [name for name in chosen.weights if name not in tensors]
    if len(writer.left_out) == len(chosen.weights):
        raise CheckpointFormatError(f"{chosen.path} has no weight that safetensors can hold.", path=chosen.path)
    return Save(place, lambda: writer, durable=True), writer


def _run(save: Save, streaming: StreamedTensors, num_threads: int) -> int:
    """Writes the checkpoint and returns its size in bytes."""
    try:
        streaming.check_storages(num_threads)
        return save.run(before_commit=streaming.check_unchanged).bytes_written
    except CheckpointWriteError as error:
        if isinstance(error.__cause__, CheckpointReadError):
            raise error.__cause__ from None  # Reading failed, and writing only because of it.
        raise


def _choose_format(place: str, format: TargetFormat | None, shard_bytes: int | None) -> TargetFormat:
    suffix = os.path.splitext(place.rstrip(os.sep))[1]
    if format is None:
        format = "safetensors" if shard_bytes is not None else _SUFFIXES.get(suffix)
    if format not in ("torch", "safetensors", "directory"):
        known = ", ".join(_SUFFIXES)
        raise ValueError(
            f"The format of {place} is unknown: its suffix is none of {known}. Give format= 'torch', 'safetensors' or "
            "'directory'."
            if format is None
            else f"format must be 'torch', 'safetensors' or 'directory', got {format!r}."
        )
    if shard_bytes is not None and format != "safetensors":
        raise ValueError(f"shard_bytes is for safetensors, and the format of {place} is {format!r}.")
    if shard_bytes is not None and (shard_bytes < 1 or suffix == ".safetensors"):
        raise ValueError(
            f"shard_bytes must be at least 1, got {shard_bytes}."
            if shard_bytes < 1
            else f"With shard_bytes the target is a directory, and {place} has the suffix of a file."
        )
    return format


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype such as torch.bfloat16, got {dtype}.")


def _check_target(source: str, place: str, *, is_sharded: bool, overwrite: bool) -> None:
    if not os.path.lexists(place):
        return
    if os.path.exists(source) and os.path.realpath(place) == os.path.realpath(source):
        raise ValueError(f"{place} is the source. Write to another path.")
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "exists; allow to overwrite it, or write to another path", place)
    if is_sharded and not os.path.islink(place):
        names = os.listdir(place) if os.path.isdir(place) else [place]
        others = [
            name for name in names if not (name.startswith("model") and name.endswith((".safetensors", INDEX_FILE)))
        ]
        if others:
            raise FileExistsError(
                errno.EEXIST, f"holds other files ({others[0]}), so it is not replaced; write to another path", place
            )
