"""Splits the keywords of ``load_from_checkpoint`` into its own options and arguments of the module.

A module may have arguments named ``mode`` or ``device``, and Lightning passes them on. So a keyword that the
constructor names is an argument of the module, as in Lightning. Options can also be passed as a dict, separate from all
keywords. If a keyword could be either, a warning says how it was interpreted.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_memload.pickles import SafeGlobal

__all__ = ["LoadingOptions", "find_fixed_option", "split_arguments"]


class LoadingOptions(TypedDict, total=False):
    """The options of ``load_from_checkpoint``. Its docstring describes them."""

    device: torch.device | str
    mode: Literal["copy", "assign"]
    strict: bool | None
    weights_only: bool | None
    safe_globals: Sequence[SafeGlobal]
    hparams_file: str | os.PathLike[str] | None
    host_budget_mib: int
    num_threads: int | None
    verify: bool
    check_fit: bool


def _is_device(value: Any) -> bool:
    try:
        torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


# Whether a value is possible for an option.
_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "device": _is_device,
    "mode": lambda value: value in ("copy", "assign"),
    "strict": _is_flag,
    "weights_only": _is_flag,
    "safe_globals": lambda value: isinstance(value, (list, tuple)),
    "hparams_file": lambda value: value is None or isinstance(value, (str, os.PathLike)),
    "host_budget_mib": _is_number,
    "num_threads": _is_number,
    "verify": _is_flag,
    "check_fit": _is_flag,
}
# Always options. Lightning's load_from_checkpoint (2.5, 2.6) has the first three too, and never passes them on.
# safe_globals is needed, like weights_only and hparams_file, before the hyperparameters of a file can be read.
_ALWAYS_OPTIONS = ("strict", "weights_only", "hparams_file", "safe_globals")


def find_fixed_option(
    name: Literal["weights_only", "hparams_file", "safe_globals"],
    options: LoadingOptions | None,
    keywords: Mapping[str, Any],
) -> Any:
    """Return an option that is never an argument of the module, ``None`` if it is absent.

    It is needed before the other keywords can be split.
    """
    value = (keywords if options is None else options).get(name)
    return value if options is not None or _OPTIONS[name](value) else None


def split_arguments(
    cls: type,
    options: LoadingOptions | None,
    keywords: Mapping[str, Any],
    saved: Collection[str],
    *,
    takes_hyper_parameters: bool,
) -> tuple[LoadingOptions, dict[str, Any]]:
    """Splits keywords into options and arguments of the module, with a warning for keywords that could be either.

    Args:
        cls: The class of the module.
        options: Options passed as a dict. All keywords are then arguments of the module. ``None``: no dict was passed.
        keywords: The keywords.
        saved: The names of the hyperparameters in the file.
        takes_hyper_parameters: Whether the constructor takes all hyperparameters as one argument.

    Raises:
        TypeError: There is no such option.
    """
    if options is not None:
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise TypeError(f"load_from_checkpoint() has no option {', '.join(unknown)}, only {', '.join(_OPTIONS)}.")
        return options, dict(keywords)
    names, takes_any = _arguments_of(cls)
    takes_any = takes_any or takes_hyper_parameters
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for name, value in keywords.items():
        could_be_ours = name in _OPTIONS and _OPTIONS[name](value)
        has_it = name in names or (takes_any and name in saved)
        if name not in _OPTIONS:
            theirs[name] = value
        elif name in _ALWAYS_OPTIONS and could_be_ours:
            ours[name] = value
            if has_it:
                _warn_how_taken(
                    cls, name, value, "the option of load_from_checkpoint(), as in Lightning, not as the argument of"
                )
        elif has_it:
            theirs[name] = value
            if could_be_ours:
                _warn_how_taken(cls, name, value, "the argument of")
        elif takes_any and not could_be_ours:
            theirs[name] = value
            _warn_how_taken(cls, name, value, "an argument of")
        else:
            ours[name] = value
            if takes_any:
                _warn_how_taken(cls, name, value, "the option of load_from_checkpoint(), not as an argument of")
    return LoadingOptions(**ours), theirs  # type: ignore[typeddict-item]


def _warn_how_taken(cls: type, name: str, value: Any, what: str) -> None:
    rank_zero_warn(
        f"{name}={value!r} is taken as {what} {cls.__name__}. To choose explicitly, pass the options of "
        f"load_from_checkpoint() as a dict after the path, {{{name!r}: ...}} or {{}}: then all keywords are arguments "
        f"of {cls.__name__}."
    )


def _arguments_of(cls: type) -> tuple[set[str], bool]:
    """The names of the constructor's arguments, and whether the constructor takes any other keyword."""
    names: set[str] = set()
    takes_any: bool | None = None
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in base.__dict__:
            continue
        kinds = inspect.Parameter
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        names.update(p.name for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD))
        goes_on = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        takes_any = goes_on if takes_any is None else takes_any
        if not goes_on:
            break  # Otherwise the other keywords are normally passed on to the next class.
    return names, bool(takes_any)
