"""``LightningModule.load_from_checkpoint`` at the cost of the weights alone.

Builds the module with the hyperparameters of the file as Lightning does, but under ``meta_init``, and streams only the
weights, to one device, whatever device they were saved from.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.errors import CheckpointFormatError
from lightning_memload.plugins.compat import classes, package_of
from lightning_memload.restore import LoadOptions, WeightsSource, find_state_dict, meta_init, open_any

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["load_from_checkpoint"]

Module = TypeVar("Module", bound="pl.LightningModule")

# Before Lightning 1.0; load_from_checkpoint still reads them.
_PAST_HYPER_PARAMETERS_KEYS = ("hparams", "module_arguments")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# LightningCLI writes one of these into the hyperparameters. A file must not name any other code to run.
_CLI_INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def load_from_checkpoint(
    cls: type[Module],
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    mode: Literal["copy", "assign"] = "copy",
    strict: bool | None = None,
    weights_only: bool | None = None,
    host_budget_mib: int = 128,
    num_threads: int | None = None,
    verify: bool = True,
    check_fit: bool = True,
    **overrides: Any,
) -> Module:
    """Builds a LightningModule from a checkpoint, as ``LightningModule.load_from_checkpoint`` does.

    The module is built under :func:`meta_init`, so it takes no memory before its weights are there, and what needs
    values while it is built is built again in memory, with a warning; ``configure_model`` and ``on_load_checkpoint``
    are called as always; optimizer states are never read. Layers that the file lacks get the initial values of their
    own ``reset_parameters``, whatever the module's constructor does to them afterwards.

    Args:
        cls: The class to build.
        path: A checkpoint of any known format. Without hyperparameters in it all must be given as ``overrides``.
        device: Where the module shall be. Lightning revives every tensor on the device that it was saved from.
        mode: See :func:`load_weights`.
        strict: As in Lightning. ``None``: the module's ``strict_loading``.
        weights_only: Passed to ``torch.load`` exactly as given.
        host_budget_mib: See :func:`load_weights`.
        num_threads: See :func:`load_weights`.
        verify: See :func:`load_weights`.
        check_fit: See :func:`load_weights`.
        overrides: Arguments for ``cls``, which take the place of the hyperparameters in the file.

    Returns:
        The module, on ``device``, in training mode as any new module.

    Raises:
        CheckpointFormatError: The file is damaged, or holds no weights.
        IncompatibleWeightsError: The weights do not fit, see :func:`load_weights`.
        TypeError: An argument is neither one of these nor one of ``cls``, or ``cls`` is no LightningModule.
        ValueError: ``strict`` contradicts the module's ``strict_loading``, or the file names code to build the module
            with that is not LightningCLI's.

    Peak memory: the weights once on ``device``, and ``host_budget_mib`` on the host if that is not the CPU.

    Example:
        >>> model = load_from_checkpoint(LitGPT, "last.ckpt", device="cuda", dropout=0.0)
    """
    if not issubclass(cls, classes("lightning.pytorch.LightningModule")):
        raise TypeError(
            f"load_from_checkpoint() builds LightningModules, and {cls.__qualname__} is none. Build it yourself, and "
            "give it its weights with load_weights()."
        )
    options = LoadOptions(torch.device(device), mode, host_budget_mib, num_threads, verify, check_fit)
    package = package_of(cls)
    with package.reading_old_pickles():
        checkpoint, session = options.open(lambda: open_any(path, weights_only))
    with options.closing(session):
        if not isinstance(checkpoint, dict):
            raise CheckpointFormatError(
                f"{path} holds a {type(checkpoint).__name__}, not a dict.", path=os.fspath(path)
            )
        if "state_dict" not in checkpoint:
            checkpoint = {"state_dict": find_state_dict(checkpoint, path)}
        if "pytorch-lightning_version" in checkpoint:
            checkpoint = package.migrate(checkpoint, os.fspath(path))
        checkpoint.setdefault(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(overrides)
        module = _build_whole(cls, checkpoint, overrides)
        if strict is not None and module._strict_loading is not None and strict != module.strict_loading:
            raise ValueError(
                f"load_from_checkpoint(strict={strict}) contradicts {type(module).__name__}.strict_loading="
                f"{module.strict_loading}. Set the same value for both."
            )
        module.on_load_checkpoint(checkpoint)
        weights = WeightsSource(os.fspath(path), strict=module.strict_loading if strict is None else strict)
        keys = weights.stream(checkpoint["state_dict"], module, session, assign=options.assigns)
        del checkpoint  # what is referred to when the session ends is copied
    if keys.missing_keys:
        rank_zero_warn(
            f"{path} lacks keys of the module, which got the initial values of their layers: {keys.missing_keys}"
        )
    if keys.unexpected_keys:
        rank_zero_warn(f"{path} has keys that the module lacks: {keys.unexpected_keys}")
    return module.to(session.device)


@meta_init()
def _build_whole(cls: type[Module], checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Module:
    module = _build(cls, checkpoint, overrides)
    module.configure_model()
    return module


def _build(cls: type[Module], checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Module:
    """An instance of the class with the hyperparameters of a checkpoint, by the rules of Lightning 2.5 and 2.6."""
    saved: dict[str, Any] = {}
    for key in (*_PAST_HYPER_PARAMETERS_KEYS, cls.CHECKPOINT_HYPER_PARAMS_KEY):
        saved.update(checkpoint.get(key, {}))
    kind = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_TYPE)
    if kind:
        # A class, or in old files its name, which was always this one.
        named = package_of(cls).find("lightning.fabric.utilities.data.AttributeDict")
        saved = named(saved) if isinstance(kind, str) else kind(saved)
    signature = inspect.signature(cls.__init__).parameters
    names = [name for name, parameter in signature.items() if parameter.kind not in _VARIADIC][1:]
    whole = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
    arguments = {**({whole: saved} if whole in names else saved), **overrides}
    instantiator = arguments.pop("_instantiator", None)
    if instantiator not in (None, *_CLI_INSTANTIATORS):
        raise ValueError(f"The file asks to be built by {instantiator!r}, which is not LightningCLI's. It was not run.")
    class_path = arguments.get("_class_path")
    if instantiator is not None and class_path is not None:
        home, _, name = str(class_path).rpartition(".")
        found = getattr(sys.modules.get(home), name, None)
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise ValueError(
                f"The file asks for {class_path!r}, which is no subclass of {cls.__name__} that was imported. If you "
                "trust it, import the module that defines the class first."
            )
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values())
    unknown = sorted(set(overrides) - set(names))
    if takes_any or whole in names or class_path is not None:
        unknown = [name for name in unknown if name == "map_location"]  # Lightning's own; no hyperparameter of anybody
    if unknown:
        # Lightning drops them in silence, misspelt ones too.
        raise TypeError(
            f"load_from_checkpoint() and {cls.__name__}.__init__() take no {', '.join(unknown)}. The device is "
            "given as device=; load_weights() takes a part of the weights, or other names."
        )
    if not takes_any:
        arguments = {name: value for name, value in arguments.items() if name in names}
    if instantiator is None:
        return cls(**arguments)
    instantiate = package_of(cls).find("lightning.pytorch.cli.instantiate_module")
    return instantiate(cls, arguments)  # type: ignore[no-any-return]
