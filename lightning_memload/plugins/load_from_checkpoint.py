"""``load_from_checkpoint``: as ``LightningModule.load_from_checkpoint``, but reads and keeps the weights only.

Builds the module with the hyperparameters of the file as Lightning does, but under ``meta_init``. Then streams the
weights to one device. The device that they were saved from does not matter.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import MappedCheckpoint
from lightning_memload.errors import CheckpointFormatError, UnsafeGlobalsError
from lightning_memload.pickles import SafeGlobal, holds_refused
from lightning_memload.plugins.arguments import LoadingOptions, find_fixed_option, split_arguments
from lightning_memload.plugins.compat import classes, package_of
from lightning_memload.plugins.seams import sets_strict_loading
from lightning_memload.restore import LoadOptions, WeightsSource, find_state_dict, meta_init, open_any

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["load_from_checkpoint"]

Module = TypeVar("Module", bound="pl.LightningModule")

# Keys of checkpoints before Lightning 1.0. Lightning's load_from_checkpoint still reads them.
_PAST_HYPER_PARAMETERS_KEYS = ("hparams", "module_arguments")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# LightningCLI writes one of these into the hyperparameters. A file must not make any other code run.
_CLI_INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def load_from_checkpoint(
    cls: type[Module],
    path: str | os.PathLike[str],
    options: LoadingOptions | None = None,
    /,
    **arguments: Any,
) -> Module:
    """Builds a LightningModule from a checkpoint, as ``LightningModule.load_from_checkpoint`` does.

    The module is built under :func:`meta_init`, so it takes no memory before its weights are loaded. The exceptions are
    parameters whose values are needed while it is built; a warning names them. ``configure_model`` and
    ``on_load_checkpoint`` are called as in Lightning. Optimizer states are never read. Layers that the file lacks keep
    the values of the constructor.

    Options are keywords, such as ``device="cuda"``. A keyword that the constructor of ``cls`` names is an argument of
    the module, even if an option has the same name. So is a keyword that is a hyperparameter of the file, if the
    constructor takes any keyword. ``strict``, ``weights_only``, ``hparams_file`` and ``safe_globals`` are always
    options. If a keyword could be either, a warning says how it was interpreted. To choose explicitly, pass the options
    as a dict after the path: then all keywords are arguments of the module.

    Args:
        cls: The class to build.
        path: A checkpoint of any known format. If it has no hyperparameters, all must be passed as keywords.
        options: The options. ``None``: the options are among the keywords.
        arguments: Options, and arguments of ``cls``, which override the hyperparameters in the file.

    The options are:
        device: The device of the module, ``"cpu"`` by default. Lightning loads each tensor to the device it comes from.
        mode: ``"copy"`` or ``"assign"``, see :func:`load_weights`.
        strict: As in Lightning. ``None``: the module's ``strict_loading``.
        weights_only: Passed to ``torch.load`` exactly as given, ``None`` by default. Refused objects outside weights
            and hyperparameters are not loaded, unless ``cls`` overrides ``on_load_checkpoint``.
        hparams_file: As in Lightning: a ``.yaml`` or ``.csv`` file that replaces the hyperparameters in the checkpoint.
        safe_globals, host_budget_mib, num_threads, verify, check_fit: See :func:`load_weights`.

    Returns:
        The module on ``device``, in training mode.

    Raises:
        CheckpointFormatError: The file is damaged, or holds no weights.
        UnsafeGlobalsError: ``weights_only`` refuses classes in the weights or hyperparameters.
        IncompatibleWeightsError: The weights do not fit, see :func:`load_weights`.
        TypeError: ``cls`` is not a LightningModule, or a keyword is neither an option nor an argument of ``cls``.
        ValueError: ``strict`` contradicts the module's ``strict_loading``, an option is out of its range, or the file
            names a function to build the module with that is not LightningCLI's.

    Peak memory: the weights once on ``device``, and ``host_budget_mib`` on the host if that is not the CPU.

    Example:
        >>> model = load_from_checkpoint(LitGPT, "last.ckpt", device="cuda", dropout=0.0)
        >>> model = load_from_checkpoint(LitClassifier, "classifier.ckpt", {"device": "cuda"}, mode="embed")
    """
    _require_lightning_module(cls)
    return _load(cls, path, options, arguments)


def _require_lightning_module(cls: Any) -> None:
    if not isinstance(cls, type):
        raise TypeError(
            f"load_from_checkpoint() needs the class of the module, got a {type(cls).__name__}. Pass the class."
        )
    if not issubclass(cls, classes("lightning.pytorch.LightningModule")):
        raise TypeError(
            f"load_from_checkpoint() needs a LightningModule, and {cls.__qualname__} is not one. Build the module "
            "yourself, and load its weights with load_weights()."
        )


def _load(
    cls: type[Module], path: str | os.PathLike[str], options: LoadingOptions | None, arguments: dict[str, Any]
) -> Module:
    checkpoint, mapped = _open_with_hyper_parameters(cls, path, options, arguments)
    saved = _saved_hyper_parameters(cls, checkpoint)
    takes_whole = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME) in inspect.signature(cls.__init__).parameters
    asked, overrides = split_arguments(
        _find_class(saved.get("_class_path")) or cls, options, arguments, saved, takes_hyper_parameters=takes_whole
    )
    strict = asked.get("strict")
    loading = _load_options(asked)
    _, session = loading.open(lambda: (None, mapped), is_remote=mapped.source.is_remote)
    with loading.closing(session):
        checkpoint.setdefault(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(overrides)
        module = _build_whole(cls, checkpoint, overrides)
        if strict is not None and sets_strict_loading(module) and strict != module.strict_loading:
            raise ValueError(
                f"load_from_checkpoint(strict={strict}) contradicts {type(module).__name__}.strict_loading="
                f"{module.strict_loading}. Set the same value for both."
            )
        module.on_load_checkpoint(checkpoint)
        weights = WeightsSource(os.fspath(path), strict=module.strict_loading if strict is None else strict)
        _, match = weights.stream(
            checkpoint["state_dict"], module, session, assign=loading.assigns, may_match_nothing=True
        )
        del checkpoint  # When the session ends, tensors that are still referred to are copied.
    if match is not None:
        addition = " New layers have their initial values." if match.new else ""
        rank_zero_warn(f"{path}: {match}.{addition}")
    return module.to(session.device)


def _open_with_hyper_parameters(
    cls: type[pl.LightningModule],
    path: str | os.PathLike[str],
    options: LoadingOptions | None,
    arguments: dict[str, Any],
) -> tuple[dict[str, Any], MappedCheckpoint]:
    """Opens the checkpoint, with the hyperparameters of ``hparams_file`` if that option is set."""
    weights_only, safe_globals = (
        find_fixed_option(name, options, arguments) for name in ("weights_only", "safe_globals")
    )
    checkpoint, mapped = _open(cls, path, weights_only, safe_globals or ())
    hparams_file = find_fixed_option("hparams_file", options, arguments)
    if hparams_file is not None:
        checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = _read_hyper_parameters(cls, hparams_file)
    return checkpoint, mapped


def _open(
    cls: type[pl.LightningModule],
    path: str | os.PathLike[str],
    weights_only: bool | None,
    safe_globals: Sequence[SafeGlobal],
) -> tuple[dict[str, Any], MappedCheckpoint]:
    """Opens a checkpoint and migrates it to the installed version of Lightning. Returns it with its mapping."""
    package = package_of(cls)
    # A user's hook receives the whole checkpoint, so no part of it may be missing.
    erases = cls.on_load_checkpoint is package.find("lightning.pytorch.LightningModule").on_load_checkpoint
    with package.reading_old_pickles():
        checkpoint, mapped = open_any(path, weights_only, safe_globals, erases=erases)
    _remove_refused(cls, checkpoint, mapped.refusal)
    if not isinstance(checkpoint, dict):
        raise CheckpointFormatError(f"{path} holds a {type(checkpoint).__name__}, not a dict.", path=os.fspath(path))
    if "state_dict" not in checkpoint:
        checkpoint = {"state_dict": find_state_dict(checkpoint, path)}
    if "pytorch-lightning_version" in checkpoint:
        checkpoint = package.migrate(checkpoint, os.fspath(path))
    return checkpoint, mapped


def _remove_refused(cls: type[pl.LightningModule], checkpoint: Any, refusal: UnsafeGlobalsError | None) -> None:
    """Removes from a checkpoint what ``weights_only`` refused, and raises if building the module needs it."""
    if refusal is None:
        return
    needed = {"state_dict", *_PAST_HYPER_PARAMETERS_KEYS, cls.CHECKPOINT_HYPER_PARAMS_KEY}
    needed |= {cls.CHECKPOINT_HYPER_PARAMS_NAME, cls.CHECKPOINT_HYPER_PARAMS_TYPE}
    items = checkpoint.items() if isinstance(checkpoint, dict) else ()
    refused = [key for key, value in items if holds_refused((key, value))]
    if not refused or needed & set(refused) or "state_dict" not in checkpoint:
        raise refusal
    for key in refused:
        del checkpoint[key]


def _load_options(asked: LoadingOptions) -> LoadOptions:
    return LoadOptions(
        torch.device(asked.get("device", "cpu")),
        asked.get("mode", "copy"),
        asked.get("host_budget_mib", 128),
        asked.get("num_threads"),
        asked.get("verify", True),
        asked.get("check_fit", True),
    )


def _read_hyper_parameters(cls: type[pl.LightningModule], path: str | os.PathLike[str]) -> Any:
    """Reads hyperparameters as ``LightningModule.load_from_checkpoint`` of Lightning 2.5 and 2.6 does."""
    package, extension = package_of(cls), str(path).rpartition(".")[2].lower()
    if extension == "csv":
        return package.find("lightning.pytorch.core.saving.load_hparams_from_tags_csv")(path)
    if extension in ("yml", "yaml"):
        return package.find("lightning.pytorch.core.saving.load_hparams_from_yaml")(path)
    raise ValueError(f"hparams_file must be a .csv, .yml or .yaml file, got {path}.")


def _saved_hyper_parameters(cls: type[pl.LightningModule], checkpoint: dict[str, Any]) -> dict[str, Any]:
    saved: dict[str, Any] = {}
    for key in (*_PAST_HYPER_PARAMETERS_KEYS, cls.CHECKPOINT_HYPER_PARAMS_KEY):
        saved.update(checkpoint.get(key, {}))
    return saved


def _find_class(path: Any) -> type | None:
    """Return the class of this dotted name, ``None`` if its module is not imported."""
    home, _, name = str(path).rpartition(".")
    found = getattr(sys.modules.get(home), name, None)
    return found if isinstance(found, type) else None


@meta_init()
def _build_whole(cls: type[Module], checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Module:
    module = _build(cls, checkpoint, overrides)
    module.configure_model()
    return module


def _build(cls: type[Module], checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Module:
    """Builds the class with the hyperparameters of a checkpoint, by the rules of Lightning 2.5 and 2.6."""
    saved = _saved_hyper_parameters(cls, checkpoint)
    kind = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_TYPE)
    if kind:
        # A class or, in old files, a name, which was always "AttributeDict".
        named = package_of(cls).find("lightning.fabric.utilities.data.AttributeDict")
        saved = named(saved) if isinstance(kind, str) else kind(saved)
    signature = inspect.signature(cls.__init__).parameters
    names = [name for name, parameter in signature.items() if parameter.kind not in _VARIADIC][1:]
    whole = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
    arguments = {**({whole: saved} if whole in names else saved), **overrides}
    instantiator = arguments.pop("_instantiator", None)
    if instantiator not in (None, *_CLI_INSTANTIATORS):
        raise ValueError(
            f"The file names {instantiator!r} to build the module, which is not LightningCLI's. It was not run."
        )
    class_path = arguments.get("_class_path")
    if instantiator is not None and class_path is not None:
        found = _find_class(class_path)
        if found is None or not issubclass(found, cls):
            raise ValueError(
                f"The file names the class {class_path!r}, which is not an imported subclass of {cls.__name__}. If you "
                "trust it, import the module that defines the class first."
            )
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values())
    unknown = sorted(set(overrides) - set(names))
    if takes_any or whole in names or class_path is not None:
        unknown = [
            name for name in unknown if name == "map_location"
        ]  # An argument of Lightning, never one of a module.
    if unknown:
        # Lightning ignores them silently, also if they are misspelt.
        raise TypeError(
            f"load_from_checkpoint() and {cls.__name__}.__init__() have no argument {', '.join(unknown)}. Pass the "
            "device as device=. To load a part of the weights, or to rename them, use load_weights()."
        )
    if not takes_any:
        arguments = {name: value for name, value in arguments.items() if name in names}
    if instantiator is None:
        return cls(**arguments)
    instantiate = package_of(cls).find("lightning.pytorch.cli.instantiate_module")
    return instantiate(cls, arguments)  # type: ignore[no-any-return]
