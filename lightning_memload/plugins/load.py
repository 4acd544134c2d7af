"""``LightningModule.load_from_checkpoint`` at the cost of the weights alone.

Builds the module with the hyperparameters of the file as Lightning does, but under ``meta_init``, and streams only the
weights, to one device, whatever device they were saved from.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_memload.checkpoint import MappedCheckpoint, SafeGlobal, holds_refused
from lightning_memload.errors import CheckpointFormatError, UnsafeGlobalsError
from lightning_memload.plugins.arguments import LoadingOptions, lightnings_option, split_arguments
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
    options: LoadingOptions | None = None,
    /,
    **arguments: Any,
) -> Module:
    """Builds a LightningModule from a checkpoint, as ``LightningModule.load_from_checkpoint`` does.

    The module is built under :func:`meta_init`, so it takes no memory before its weights are there, but for parameters
    whose values are needed while it is built, which a warning names; ``configure_model`` and ``on_load_checkpoint`` are
    called as always; optimizer states are never read. Layers that the file lacks get what the constructor made of them.

    Options are keywords, ``device="cuda"``, like the module's own arguments. A keyword that the constructor of ``cls``
    names is the module's, as in Lightning, even if there is an option of the same name; so is one that the file has as
    a hyperparameter, if the constructor takes any keyword. ``strict``, ``weights_only`` and ``hparams_file`` are always
    options, as in Lightning, and so is ``safe_globals``. A warning tells what a keyword was taken as where it could be
    either one. To say which is meant, pass the options as a dict after the path: then all keywords are the module's.

    Args:
        cls: The class to build.
        path: A checkpoint of any known format. Without hyperparameters in it all must be given as keywords.
        options: The options. ``None``: those among the keywords.
        arguments: Options, and arguments for ``cls``, which take the place of the hyperparameters in the file.

    The options are:
        device: Where the module shall be, ``"cpu"`` by default. Lightning revives every tensor on the device that it
            was saved from.
        mode: ``"copy"`` or ``"assign"``, see :func:`load_weights`.
        strict: As in Lightning. ``None``: the module's ``strict_loading``.
        weights_only: Passed to ``torch.load`` exactly as given, ``None`` by default. What it refuses outside of weights
            and hyperparameters is not loaded, unless ``cls`` overrides ``on_load_checkpoint``.
        safe_globals: See :func:`load_weights`.
        hparams_file: As in Lightning: a ``.yaml`` or ``.csv`` file that takes the place of the hyperparameters.
        host_budget_mib, num_threads, verify, check_fit: See :func:`load_weights`.

    Returns:
        The module, on ``device``, in training mode as any new module.

    Raises:
        CheckpointFormatError: The file is damaged, or holds no weights.
        UnsafeGlobalsError: ``weights_only`` refuses classes in what is needed.
        IncompatibleWeightsError: The weights do not fit, see :func:`load_weights`.
        TypeError: An argument is neither an option nor one of ``cls`` (Lightning drops such an argument in silence), or
            ``cls`` is no LightningModule.
        ValueError: ``strict`` contradicts the module's ``strict_loading``, an option is out of its range, or the file
            names code to build the module with that is not LightningCLI's.

    Peak memory: the weights once on ``device``, and ``host_budget_mib`` on the host if that is not the CPU.

    Example:
        >>> model = load_from_checkpoint(LitGPT, "last.ckpt", device="cuda", dropout=0.0)
        >>> model = load_from_checkpoint(LitGPT, "last.ckpt", {"device": "cuda"}, mode="an argument of LitGPT")
    """
    if not isinstance(cls, type):
        raise TypeError(
            f"load_from_checkpoint() builds a module of a class, got a {type(cls).__name__}. Give the class."
        )
    if not issubclass(cls, classes("lightning.pytorch.LightningModule")):
        raise TypeError(
            f"load_from_checkpoint() builds LightningModules, and {cls.__qualname__} is none. Build it yourself, and "
            "give it its weights with load_weights()."
        )
    weights_only, safe_globals = (
        lightnings_option(name, options, arguments) for name in ("weights_only", "safe_globals")
    )
    checkpoint, mapped = _open(cls, path, weights_only, safe_globals or ())
    hparams_file = lightnings_option("hparams_file", options, arguments)
    if hparams_file is not None:
        checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = _read_hyper_parameters(cls, hparams_file)
    saved = _saved_hyper_parameters(cls, checkpoint)
    takes_whole = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME) in inspect.signature(cls.__init__).parameters
    asked, overrides = split_arguments(
        _find_class(saved.get("_class_path")) or cls, options, arguments, saved, takes_hyper_parameters=takes_whole
    )
    strict = asked.get("strict")
    loading = _load_options(asked)
    _, session = loading.open(lambda: (None, mapped))
    with loading.closing(session):
        checkpoint.setdefault(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(overrides)
        module = _build_whole(cls, checkpoint, overrides)
        if strict is not None and module._strict_loading is not None and strict != module.strict_loading:
            raise ValueError(
                f"load_from_checkpoint(strict={strict}) contradicts {type(module).__name__}.strict_loading="
                f"{module.strict_loading}. Set the same value for both."
            )
        module.on_load_checkpoint(checkpoint)
        weights = WeightsSource(os.fspath(path), strict=module.strict_loading if strict is None else strict)
        _, match = weights.stream(
            checkpoint["state_dict"], module, session, assign=loading.assigns, may_match_nothing=True
        )
        del checkpoint  # what is referred to when the session ends is copied
    if match is not None:
        fate = " What is new has the initial values of its layers." if match.new else ""
        rank_zero_warn(f"{path}: {match}.{fate}")
    return module.to(session.device)


def _open(
    cls: type[pl.LightningModule],
    path: str | os.PathLike[str],
    weights_only: bool | None,
    safe_globals: Sequence[SafeGlobal],
) -> tuple[dict[str, Any], MappedCheckpoint]:
    """The checkpoint, as it would be if a Lightning of today had saved it, and its mapping."""
    package = package_of(cls)
    # A hook of the user gets the whole checkpoint, so all of it must be there.
    erases = cls.on_load_checkpoint is package.find("lightning.pytorch.LightningModule").on_load_checkpoint
    with package.reading_old_pickles():
        checkpoint, mapped = open_any(path, weights_only, safe_globals, erases=erases)
    _leave_out_refused(cls, checkpoint, mapped.refusal)
    if not isinstance(checkpoint, dict):
        raise CheckpointFormatError(f"{path} holds a {type(checkpoint).__name__}, not a dict.", path=os.fspath(path))
    if "state_dict" not in checkpoint:
        checkpoint = {"state_dict": find_state_dict(checkpoint, path)}
    if "pytorch-lightning_version" in checkpoint:
        checkpoint = package.migrate(checkpoint, os.fspath(path))
    return checkpoint, mapped


def _leave_out_refused(cls: type[pl.LightningModule], checkpoint: Any, refusal: UnsafeGlobalsError | None) -> None:
    """Takes out of a checkpoint what ``weights_only`` refused, if building the module does not need it."""
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
    """As ``LightningModule.load_from_checkpoint`` of Lightning 2.5 and 2.6 does."""
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
    """The class of this name, if its module is imported."""
    home, _, name = str(path).rpartition(".")
    found = getattr(sys.modules.get(home), name, None)
    return found if isinstance(found, type) else None


@meta_init()
def _build_whole(cls: type[Module], checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Module:
    module = _build(cls, checkpoint, overrides)
    module.configure_model()
    return module


def _build(cls: type[Module], checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Module:
    """An instance of the class with the hyperparameters of a checkpoint, by the rules of Lightning 2.5 and 2.6."""
    saved = _saved_hyper_parameters(cls, checkpoint)
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
        found = _find_class(class_path)
        if found is None or not issubclass(found, cls):
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
