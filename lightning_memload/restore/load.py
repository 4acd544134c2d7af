"""Loading weights into any ``nn.Module``, from any format, through the same streaming as a restore under Lightning.

The state dict is renamed and narrowed down while all its tensors still lie in the file, compared with the module before
a byte is read, and then handed to the module's own ``load_state_dict``.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.collector import paused_collector
from lightning_memload.errors import CheckpointFormatError, MetaTensorError, UnmappableCheckpoint, listed
from lightning_memload.formats import load_mapped, local_path
from lightning_memload.pickles import SafeGlobal, allow_globals, check_safe_globals, holds_refused
from lightning_memload.restore.allocation import meta_names
from lightning_memload.restore.matching import (
    OTHERS_LOADED,
    WeightsMatch,
    incompatible,
    match_weights,
    module_keys,
    refused_by_torch,
    require_match,
)
from lightning_memload.restore.recipes import follow_recipes
from lightning_memload.restore.session import RestoreSession
from lightning_memload.restore.special import assign_special
from lightning_memload.restore.state_dict import (
    add_compiled_versions,
    find_state_dict,
    key_filter,
    match_compiled,
    rename_keys,
)
from lightning_memload.restore.weights import WeightsRestore
from lightning_memload.transfer import check_host_budget, check_num_threads, start_ring

__all__ = ["LoadOptions", "WeightsSource", "load_weights", "open_any"]

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
) -> _IncompatibleKeys:
    """Loads weights from a checkpoint of any known format straight onto a device.

    Only the bytes of the tensors that the module takes are read. Parameters stay the same objects and ties stay ties; a
    module that was built under ``meta_init`` gets its memory here. Modules with a ``load_state_dict`` or hooks of their
    own are loaded through them. Names that differ only by the ``_orig_mod.`` of ``torch.compile`` are the same.
    Quantised and other tensors that cannot be copied into a plain parameter take its place, as with torch's
    ``assign=True``.

    Args:
        module: The module. Afterwards all of it is on ``device``.
        path: A checkpoint: a bare state dict, a Lightning ``.ckpt``, any format that ``open_checkpoint`` knows.
        device: Where the weights go. ``None``: where the module's first parameter is, the CPU if that is on meta.
        mode: ``"copy"`` streams every tensor into memory of its own. ``"assign"`` makes CPU parameters the file's own
            pages: nothing is read until it is used, the first write to a page makes it ordinary memory, and checksums
            are not compared. Before another program changes the file in place they become ordinary memory too, with
            their values, and a warning says so. Where Linux cannot tell (network file systems, files of other users, a
            directory of very many files) a warning says that instead; the file must stay as it is there. Replacing
            it by a new file is always fine.
        strict: Refuse a checkpoint that lacks keys of the module or has others, before anything changes. If not,
            parameters on meta that it lacks get what their constructor made (``meta_init``), else what
            ``reset_parameters`` of their own modules makes.
        key: Where the state dict is in a nested checkpoint, for example ``"ema.params"``. ``None``: found by itself.
        strip_prefix: Taken off the keys that start with it, before ``rename``.
        rename: Regular expressions and what to put for them, applied to every key in their order with ``re.sub``.
        include: Regular expressions, one or several. Only keys of the module in which one is found are loaded, and
            asked for by ``strict``. Empty: all. What is left out of a module on meta gets its initial values, which
            take memory too.
        exclude: Regular expressions. Keys of the module in which one is found are left out, likewise.
        dtype: Floating-point type that the module shall have. ``None``: what it has.
        weights_only: Passed to ``torch.load`` where the format holds pickled objects. What it refuses outside of the
            weights, such as classes in hyperparameters, is not loaded and raises no error.
        safe_globals: Classes and functions, or their dotted names, that ``weights_only`` allows for this load, as
            ``torch.serialization.safe_globals`` does.
        host_budget_mib: The most host memory for staging, in MiB.
        num_threads: Threads that read. ``None``: up to 12 for a GPU and 4 for the CPU.
        verify: Compare the CRC-32 that the file records for every tensor, on the way.
        check_fit: Compare needed with free memory before the first byte, and refuse what cannot fit.

    Returns:
        ``missing_keys`` and ``unexpected_keys`` as ``nn.Module.load_state_dict`` returns them: all keys that the module
        has and did not get, and all that the file has, after ``include`` and ``exclude``, and the module does not.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        CheckpointFormatError: It is damaged, or no state dict is found in it.
        UnsafeGlobalsError: ``weights_only`` refuses classes within the weights.
        TypeError: ``path`` is no path, or ``safe_globals`` no list of classes or names.
        IncompatibleWeightsError: Shapes differ, or with ``strict`` keys are missing or unexpected. All are named.
        CheckpointReadError: Reading failed.
        ChecksumError: The file is damaged.
        InsufficientMemoryError: The weights cannot fit.
        MetaTensorError: Something stays on meta that neither the file, ``meta_init`` nor ``reset_parameters`` gives
            values.
        ValueError: An argument is out of its range.

    Peak memory: the weights once on ``device``, and ``host_budget_mib`` on the host if that is not the CPU.

    Example:
        >>> with meta_init():
        ...     model = GPT(config)
        >>> load_weights(model, "gpt.safetensors", device="cuda")
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise ValueError(f"dtype must be a floating-point type of torch, or None, got {dtype!r}.")
    weights = WeightsSource(
        local_path(path), key, strip_prefix, rename, include, exclude, strict, weights_only, safe_globals
    )
    target = _device_of(module) if device is None else torch.device(device)
    options = LoadOptions(target, mode, host_budget_mib, num_threads, verify, check_fit)
    state_dict, session = options.open(weights.open)
    with options.closing(session):
        keys, _ = weights.stream(state_dict, module, session, dtype=dtype, assign=options.assigns)
        del state_dict  # what is referred to when the session ends is copied
    if dtype is not None or any(t.device != session.device for t in (*module.parameters(), *module.buffers())):
        module.to(device=session.device, dtype=dtype)
    return keys


@dataclass(frozen=True)
class LoadOptions:
    """How to load outside a Trainer, see :func:`load_weights`.

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
        """Whether parameters become the file's own pages."""
        return self.mode == "assign"

    def open(self, load: Callable[[], tuple[_T, MappedCheckpoint]]) -> tuple[_T, RestoreSession]:
        """Opens a checkpoint, while the staging ring is made ready beside.

        Args:
            load: Opens it.

        Returns:
            What was loaded, and the session to bring it into modules with.
        """
        device = self.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # as parameters say it
        ring = start_ring(device, self.host_budget_mib * _MIB, self.num_threads)
        try:
            with paused_collector():
                loaded, mapped = load()
            session = RestoreSession(
                mapped, device=device, ring=ring, verify=self.verify, check_fit=self.check_fit, drop_behind=True
            )
            refusal = session.watch_pages() if self.assigns and not mapped.is_chunked else None
            if refusal is not None:
                warnings.warn(
                    f"Nothing tells when another program changes {mapped.index.path} in place: {refusal}. Weights that "
                    "are assigned from it would change too, or end the process. Replace the file by a new one instead, "
                    "or load with mode='copy'.",
                    stacklevel=4,
                )
        except BaseException:
            ring.close()
            raise
        return loaded, session

    @contextlib.contextmanager
    def closing(self, session: RestoreSession) -> Iterator[None]:
        """Ends the session with the block. A failure leaves the mapping to the tensors that its traceback refers to."""
        try:
            with paused_collector():
                yield
        except BaseException:
            session.close(detach=False)
            raise
        session.close()


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from and which of them go where, see :func:`load_weights`.

    Attributes:
        path: The checkpoint.
        key: Where the state dict is in it. ``None``: found by itself.
        strip_prefix: Taken off the keys that start with it.
        rename: Regular expressions and what to put for them.
        include: Regular expressions for the keys of the module that are loaded. Empty: all.
        exclude: Regular expressions for the keys of the module that are left out.
        strict: Refuse missing and unexpected keys.
        weights_only: Passed to ``torch.load`` where the format holds pickled objects.
        safe_globals: Classes, functions or their dotted names that ``weights_only`` allows for this load.

    Raises:
        ValueError: A regular expression is none, or a name in ``safe_globals`` cannot be imported.
        TypeError: ``safe_globals`` is no list of classes or names.
    """

    path: str | Path
    key: str | None = None
    strip_prefix: str = ""
    rename: Mapping[str, str] | None = None
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    strict: bool = True
    weights_only: bool | None = True
    safe_globals: Sequence[SafeGlobal] = ()

    def __post_init__(self) -> None:
        # Both refuse what is no regular expression.
        key_filter(self.include, self.exclude)
        rename_keys({}, rename=self.rename)
        check_safe_globals(self.safe_globals)

    def open(self) -> tuple[dict[str, Any], MappedCheckpoint]:
        """The wanted part of the state dict under the module's names, its tensors in the file, and the mapping."""
        wants = key_filter(self.include, self.exclude)
        loaded, mapped = open_any(self.path, self.weights_only, self.safe_globals, erases=True)
        try:
            found = find_state_dict(loaded, self.path, self.key)
        except CheckpointFormatError:
            if mapped.refusal is not None:
                raise mapped.refusal from None
            raise
        if mapped.refusal is not None and holds_refused(found):
            raise mapped.refusal
        state_dict = rename_keys(found, self.strip_prefix, self.rename)
        for name in [name for name in state_dict if not wants(name)]:
            del state_dict[name]
        if not state_dict:
            raise CheckpointFormatError(
                f"{os.fspath(self.path)} has no key that include={self.include!r} and exclude={self.exclude!r} leave, "
                "after renaming. Both are searched for in the module's names.",
                path=os.fspath(self.path),
            )
        return state_dict, mapped

    def _with_compiled_names(self, state_dict: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
        keys = module_keys(module)
        renamed = match_compiled(state_dict, keys)
        if not renamed:
            return state_dict
        aligned: OrderedDict[str, Any] = OrderedDict((renamed.get(name, name), v) for name, v in state_dict.items())
        metadata = getattr(state_dict, "_metadata", None)
        if metadata is not None:
            aligned._metadata = dict(metadata)  # type: ignore[attr-defined]
            add_compiled_versions(aligned, [path for path, _ in module.named_modules(remove_duplicate=False)])
        return aligned

    def stream(
        self,
        state_dict: Mapping[str, Any],
        module: nn.Module,
        session: RestoreSession,
        *,
        dtype: torch.dtype | None = None,
        assign: bool = False,
        may_match_nothing: bool = False,
    ) -> tuple[_IncompatibleKeys, WeightsMatch | None]:
        """Brings an opened state dict into a module.

        Returns:
            What ``load_state_dict`` returned, and what the module got; ``None`` where every name has its counterpart.

        Raises:
            IncompatibleWeightsError: It does not fit, or unless ``may_match_nothing`` no name of it is one of the
                module's.
            MetaTensorError: Something stays on meta.
        """
        wants = key_filter(self.include, self.exclude)
        path = os.fspath(self.path)
        state_dict = self._with_compiled_names(state_dict, module)
        require_match(module, state_dict, wants, strict=self.strict, path=path)
        state_dict = copy.copy(state_dict)
        assert isinstance(state_dict, dict)
        assigned = assign_special(module, state_dict)
        restore = WeightsRestore(module, session, dtype=dtype, assign=assign, strict=False)
        try:
            keys: _IncompatibleKeys = module.load_state_dict(state_dict, strict=False)
        except RuntimeError as error:
            # Modules that load in their own way: what does not fit them is known only now.
            refused = refused_by_torch(module, error, None, path=path)
            if refused is None:
                raise
            raise refused from error
        finally:
            restore.remove()
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in assigned]
        match = match_weights(module, state_dict, keys, wants)
        if match is not None and (self.strict or (match.is_nothing and not may_match_nothing)):
            # Strict or not, so much is known of modules that load in their own way only now.
            done = OTHERS_LOADED if match.num_loaded else "Nothing of it was loaded."
            raise incompatible(module, path, match.new, match.unused, {}, done=done, strict=self.strict)
        follow_recipes(module, None, session.device, dtype)
        parameters, buffers = meta_names(module)
        if parameters or buffers:
            names = (*parameters, *buffers)
            raise MetaTensorError(
                f"{path} gives no values for {listed(names)}, which stay on the meta device. Build the module under "
                "meta_init(), which keeps buffers real, or give what is missing values first.",
                names=names,
            )
        return keys, match


def open_any(
    path: str | os.PathLike[str],
    weights_only: bool | None,
    safe_globals: Sequence[SafeGlobal] = (),
    *,
    erases: bool = False,
) -> tuple[Any, MappedCheckpoint]:
    """Loads a checkpoint mapped where possible, else into host memory with a warning that says so.

    Args:
        path: The checkpoint.
        weights_only: Passed to ``torch.load`` exactly as given.
        safe_globals: What ``weights_only`` allows for this load.
        erases: Leave out what ``weights_only`` refuses, see :func:`load_mapped`.

    Raises:
        CheckpointFormatError: It cannot be loaded in either way.
    """
    name = local_path(path)
    with allow_globals(safe_globals):
        try:
            return load_mapped(name, weights_only=weights_only, erases=erases)
        except UnmappableCheckpoint as error:
            if os.path.isdir(name):
                raise  # torch.load knows files only
            reason = error
        try:
            loaded = torch.load(name, map_location="cpu", weights_only=weights_only)
        except (pickle.UnpicklingError, OSError, MemoryError):
            raise  # torch's own words on weights_only, and what is not about the file
        except Exception as error:  # a file that torch does not know may fail in any way
            raise CheckpointFormatError(f"{reason} torch.load cannot read it: {error}", path=name) from error
        warnings.warn(f"{reason} It is loaded the ordinary way: the whole checkpoint in host memory.", stacklevel=3)
        return loaded, MappedCheckpoint.unmapped(name)


def _device_of(module: nn.Module) -> torch.device:
    first = next((parameter.device for parameter in module.parameters()), None)
    return torch.device("cpu") if first is None or first.type == "meta" else first
