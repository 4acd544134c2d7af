"""Loads weights into any ``nn.Module``, from any format, with the same streaming as a restore under Lightning.

:func:`load_weights` is the entry point. :class:`LoadOptions` opens and closes the session of a load outside a Trainer.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.collector import paused_collector
from lightning_memload.pickles import SafeGlobal
from lightning_memload.restore.session import RestoreSession
from lightning_memload.restore.weights_source import WeightsSource
from lightning_memload.storage.places import is_local, path_of
from lightning_memload.torch_private import IncompatibleKeys
from lightning_memload.transfer import check_host_budget, check_num_threads, start_ring

__all__ = ["LoadOptions", "load_weights"]

_T = TypeVar("_T")

_MIB = 2**20


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    mode: Literal["copy", "assign"] = "copy",
    strict: bool = True,
    key: str | None = None,
    strip_prefix: str = "",
    rename: Mapping[str, str] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    dtype: torch.dtype | None = None,
    weights_only: bool | None = True,
    safe_globals: Sequence[SafeGlobal] = (),
    host_budget_mib: int = 128,
    num_threads: int | None = None,
    verify: bool = True,
    check_fit: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> IncompatibleKeys:
    """Loads weights from a checkpoint of any known format directly onto a device.

    Only the bytes of the tensors that the module takes are read. A checkpoint of at least 1,000 tensors in at most
    64 MiB is read as a whole if the module is on the CPU: this is faster.

    Parameters stay the same objects, and tied parameters stay tied. A module that was built under ``meta_init`` gets
    its memory here. Modules with their own ``load_state_dict`` or hooks are loaded through them. Names that differ only
    by the ``_orig_mod.`` of ``torch.compile`` are treated as equal. A tensor that cannot be copied into a plain
    parameter, such as a quantised one, replaces it, as with torch's ``assign=True``.

    Args:
        module: The module. After the call, all of it is on ``device``.
        path: A checkpoint: a bare state dict, a Lightning ``.ckpt``, or any format that ``open_checkpoint`` knows, on a
            disk or at a URL.
        device: Device of the weights. ``None``: the device of the module's first parameter, or the CPU if that
            parameter is on meta.
        mode: ``"copy"`` streams every tensor into its own memory. ``"assign"`` maps CPU parameters onto the file's
            pages: a page is read at its first use, the first write to a page makes it ordinary memory, and checksums
            are not compared. If another program starts to change the file in place, the parameters become ordinary
            memory with their values first, and a warning is issued. Where Linux cannot report such changes (network
            file systems, files of other users, a directory of very many files), a warning says so, and the file must
            not be changed in place. Replacing it by a new file is always safe.
        strict: Refuse a checkpoint with missing or unexpected keys, before anything changes. If ``False``, missing
            parameters on meta get the values that their constructor made (``meta_init``), else the values from
            ``reset_parameters`` of their own modules.
        key: Key of the state dict in a nested checkpoint, for example ``"ema.params"``. ``None``: it is searched for.
        strip_prefix: Prefix that is removed from the keys that start with it, before ``rename``.
        rename: Regular expressions and their replacements, applied to every key in this order with ``re.sub``.
        include: One or several regular expressions. A key of the module is loaded, and required by ``strict``, only if
            one of them is found in it. Empty: all keys. On meta, a parameter that is not included gets its initial
            values, which take memory too.
        exclude: One or several regular expressions. A key of the module in which one is found is not loaded, and not
            required by ``strict``.
        dtype: Floating-point type of the module after the call. ``None``: its present type.
        weights_only: Passed to ``torch.load`` where the format holds pickled objects. Objects that it refuses outside
            of the weights, such as classes in hyperparameters, are skipped without an error.
        safe_globals: Classes and functions, or their dotted names, that ``weights_only`` allows for this load, as
            ``torch.serialization.safe_globals`` does.
        host_budget_mib: Upper limit of host memory for staging, in MiB.
        num_threads: Number of reading threads. ``None``: up to 12 for a GPU and 4 for the CPU.
        verify: Compare every tensor that is read with the CRC-32 that the file records for it. No effect on tensors
            that ``mode="assign"`` maps, and on formats without checksums.
        check_fit: Compare needed with free memory before the first byte is read, and refuse weights that cannot fit.
        storage_options: See ``open_checkpoint``.

    Returns:
        ``missing_keys`` and ``unexpected_keys`` as ``nn.Module.load_state_dict`` returns them: the keys of the module
        that got no value, and the keys of the file, after ``include`` and ``exclude``, that the module does not have.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        CheckpointFormatError: The checkpoint is damaged, or no state dict is found in it.
        UnsafeGlobalsError: ``weights_only`` refuses classes within the weights.
        TypeError: ``path`` is not a path, or ``safe_globals`` is not a list of classes or names.
        IncompatibleWeightsError: Shapes differ, or with ``strict`` keys are missing or unexpected. All are named.
        CheckpointReadError: Reading failed.
        ChecksumError: The file is damaged.
        InsufficientMemoryError: The weights cannot fit.
        MetaTensorError: A tensor stays on meta: neither the file, ``meta_init`` nor ``reset_parameters`` has values for
            it.
        ValueError: An argument is out of its range.

    Peak memory: the weights once on ``device``, plus ``host_budget_mib`` on the host if ``device`` is not the CPU, or
    if the checkpoint is read as a whole.

    Example:
        >>> with meta_init():
        ...     model = GPT(config)
        >>> load_weights(model, "gpt.safetensors", device="cuda")
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise ValueError(f"dtype must be a floating-point type of torch, or None, got {dtype!r}.")
    weights = WeightsSource(
        path_of(path), key, strip_prefix, rename, include, exclude, strict, weights_only, safe_globals, storage_options
    )
    target = _device_of(module) if device is None else torch.device(device)
    options = LoadOptions(target, mode, host_budget_mib, num_threads, verify, check_fit)
    state_dict, session = options.open(weights.open, is_remote=not is_local(os.fspath(weights.path)))
    with options.closing(session):
        keys, _ = weights.stream(state_dict, module, session, dtype=dtype, assign=options.assigns)
        del state_dict  # the end of the session copies every tensor that still has a reference
    if dtype is not None or any(t.device != session.device for t in (*module.parameters(), *module.buffers())):
        module.to(device=session.device, dtype=dtype)
    return keys


@dataclass(frozen=True)
class LoadOptions:
    """Options of a load outside a Trainer, see :func:`load_weights`.

    Raises:
        ValueError: An argument is out of its range.
    """

    device: torch.device
    mode: Literal["copy", "assign"] = "copy"
    host_budget_mib: int = 128
    num_threads: int | None = None
    verify: bool = True
    check_fit: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("copy", "assign"):
            raise ValueError(f"mode must be 'copy' or 'assign', got {self.mode!r}.")
        check_host_budget(self.host_budget_mib)
        check_num_threads(self.num_threads)
        if self.device.type == "meta":
            raise ValueError("device must be a place for values, got 'meta'.")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {str(self.device)!r}, but torch finds no CUDA device here.")
        if self.assigns and self.device.type != "cpu":
            raise ValueError(f"mode='assign' needs the CPU: parameters on {self.device} cannot be a file's pages.")

    @property
    def assigns(self) -> bool:
        """Whether parameters are mapped onto the file's pages."""
        return self.mode == "assign"

    def open(
        self, load: Callable[[], tuple[_T, MappedCheckpoint]], *, is_remote: bool = False
    ) -> tuple[_T, RestoreSession]:
        """Opens a checkpoint, while the staging ring is prepared in parallel.

        Args:
            load: Opens the checkpoint.
            is_remote: Whether the checkpoint is not on a local disk.

        Returns:
            The loaded checkpoint, and the session that restores it into modules.
        """
        device = self.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # Parameters report their device with an index.
        ring = start_ring(device, self.host_budget_mib * _MIB, self.num_threads, is_remote=is_remote)
        try:
            with paused_collector():
                loaded, mapped = load()
            session = RestoreSession(
                mapped, device=device, ring=ring, verify=self.verify, check_fit=self.check_fit, drop_behind=True
            )
            refusal = session.watch_pages() if self.assigns and not mapped.is_chunked else None
            if refusal is not None:
                warnings.warn(
                    f"Nothing tells when another program changes {mapped.index.path} in place: {refusal}. Such a "
                    "change also changes weights that are assigned from the file, or ends the process. Replace the "
                    "file by a new one instead, or load with mode='copy'.",
                    stacklevel=4,
                )
        except BaseException:
            ring.close()
            raise
        return loaded, session

    @contextlib.contextmanager
    def closing(self, session: RestoreSession) -> Iterator[None]:
        """Closes the session at the end of the block.

        After an error the mapping stays open for the tensors that the traceback refers to.
        """
        try:
            with paused_collector():
                yield
        except BaseException:
            session.close(detach=False)
            raise
        session.close()


def _device_of(module: nn.Module) -> torch.device:
    first = next((parameter.device for parameter in module.parameters()), None)
    return torch.device("cpu") if first is None or first.type == "meta" else first
