"""The weights of a checkpoint: opens it, selects and renames its keys, and loads them into a module.

Keys are renamed and filtered while all tensors are still in the file. The state dict is compared with the module before
the first byte of a tensor is read, and then passed to the module's own ``load_state_dict``.
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.errors import CheckpointFormatError, MetaTensorError, UnmappableCheckpointError, listed
from lightning_memload.formats import explain_torch_refusal, load_mapped
from lightning_memload.pickles import SafeGlobal, allow_globals, check_safe_globals, holds_refused
from lightning_memload.restore.allocation import meta_names
from lightning_memload.restore.matching import (
    OTHERS_LOADED,
    WeightsMatch,
    incompatible,
    match_weights,
    module_keys,
    short_errors,
)
from lightning_memload.restore.recipes import follow_recipes
from lightning_memload.restore.session import RestoreSession
from lightning_memload.restore.special import assign_special
from lightning_memload.restore.state_dict import (
    add_compiled_versions,
    choose_keys,
    find_state_dict,
    key_filter,
    match_compiled,
    rename_keys,
)
from lightning_memload.restore.weights import WeightsRestore
from lightning_memload.storage.options import use_storage_options
from lightning_memload.storage.places import is_folder, path_of
from lightning_memload.storage.stream import path_or_stream
from lightning_memload.torch_private import IncompatibleKeys

__all__ = ["WeightsSource", "open_any"]


@dataclass(frozen=True)
class WeightsSource:
    """A checkpoint, and the choice and the names of the weights to load from it, see :func:`load_weights`.

    Attributes:
        path: The checkpoint.
        key: Key of the state dict in the checkpoint. ``None``: it is searched for.
        strip_prefix: Prefix that is removed from the keys that start with it.
        rename: Regular expressions and their replacements.
        include: Regular expressions for the keys of the module that are loaded. Empty: all.
        exclude: Regular expressions for the keys of the module that are not loaded.
        strict: Refuse missing and unexpected keys.
        weights_only: Passed to ``torch.load`` where the format holds pickled objects.
        safe_globals: Classes, functions or their dotted names that ``weights_only`` allows for this load.
        storage_options: See ``open_checkpoint``.

    Raises:
        ValueError: A regular expression is invalid, or a name in ``safe_globals`` cannot be imported.
        TypeError: ``safe_globals`` is not a list of classes or names.
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
    storage_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # Both raise for an invalid regular expression.
        key_filter(self.include, self.exclude)
        rename_keys({}, rename=self.rename)
        check_safe_globals(self.safe_globals)

    def open(self) -> tuple[dict[str, Any], MappedCheckpoint]:
        """Loads the state dict with its tensors still in the file.

        Returns:
            The wanted part of the state dict under the module's names, and the mapping.

        Raises:
            CheckpointFormatError: No state dict is found, or no key is left after ``include`` and ``exclude``.
            UnsafeGlobalsError: ``weights_only`` refuses classes within the weights.
        """
        with use_storage_options(self.storage_options):
            loaded, mapped = open_any(self.path, self.weights_only, self.safe_globals, erases=True)
        try:
            found = find_state_dict(loaded, self.path, self.key)
        except CheckpointFormatError:
            if mapped.refusal is not None:
                raise mapped.refusal from None
            raise
        if mapped.refusal is not None and holds_refused(found):
            raise mapped.refusal
        state_dict = choose_keys(found, self.strip_prefix, self.rename, self.include, self.exclude)
        if not state_dict:
            raise CheckpointFormatError(
                f"{os.fspath(self.path)} has no key that include={self.include!r} and exclude={self.exclude!r} select "
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
    ) -> tuple[IncompatibleKeys, WeightsMatch | None]:
        """Loads a state dict, as :meth:`open` returns it, into a module.

        ``dtype`` is the floating-point type of the parameters (``None``: their present type). ``assign`` maps them onto
        the file's pages. Without ``strict``, ``may_match_nothing`` accepts a state dict without names of the module.

        Returns:
            The result of ``load_state_dict``, and the differences between checkpoint and module; ``None`` if no name is
            missing or unexpected.

        Raises:
            IncompatibleWeightsError: The state dict does not fit, or it has no name of the module and
                ``may_match_nothing`` is ``False``.
            MetaTensorError: A tensor stays on meta.
        """
        wants = key_filter(self.include, self.exclude)
        path = os.fspath(self.path)
        state_dict = self._with_compiled_names(state_dict, module)
        with short_errors(module, state_dict, wants, strict=self.strict, path=path):
            state_dict = copy.copy(state_dict)
            assert isinstance(state_dict, dict)
            assigned = assign_special(module, state_dict)
            restore = WeightsRestore(module, session, dtype=dtype, assign=assign, strict=False)
            try:
                keys: IncompatibleKeys = module.load_state_dict(state_dict, strict=False)
            finally:
                restore.remove()
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in assigned]
        match = match_weights(module, state_dict, keys, wants)
        if match is not None and (self.strict or (match.is_nothing and not may_match_nothing)):
            # With or without strict: for modules with their own loading code this is known only after loading.
            done = OTHERS_LOADED if match.num_loaded else "None of its weights were loaded."
            raise incompatible(module, path, match.new, match.unused, {}, done=done, strict=self.strict)
        follow_recipes(module, None, session.device, dtype)
        parameters, buffers = meta_names(module)
        if parameters or buffers:
            names = (*parameters, *buffers)
            raise MetaTensorError(
                f"{path} has no values for {listed(names)}, which stay on the meta device. Build the module under "
                "meta_init(), which keeps buffers real, or give these tensors values before loading.",
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
    """Loads a checkpoint mapped where possible, else into host memory with a warning.

    Args:
        path: The checkpoint.
        weights_only: Passed to ``torch.load`` unchanged.
        safe_globals: Classes and functions that ``weights_only`` allows for this load.
        erases: Skip objects that ``weights_only`` refuses, see :func:`load_mapped`.

    Returns:
        The loaded checkpoint, and the mapping of its tensors.

    Raises:
        CheckpointFormatError: Neither way can load the checkpoint.
    """
    name = path_of(path)
    with allow_globals(safe_globals):
        try:
            return load_mapped(name, weights_only=weights_only, erases=erases)
        except UnmappableCheckpointError as error:
            if is_folder(name):
                raise  # torch.load reads only files
            reason = error
        try:
            loaded = torch.load(path_or_stream(name), map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise explain_torch_refusal(name, error) from error
        except (OSError, MemoryError):
            raise  # They are not about the contents of the file.
        except Exception as error:  # a file of an unknown format can raise any exception
            raise CheckpointFormatError(f"{reason} torch.load cannot read it: {error}", path=name) from error
        warnings.warn(f"{reason} It is loaded the ordinary way: the whole checkpoint in host memory.", stacklevel=3)
        return loaded, MappedCheckpoint.unmapped(name)
