"""Models of installed libraries, built under ``meta_init`` and restored, compared with ordinary ones, bit for bit.

Each model is built with random weights: twice as always, which tells what is drawn at random, and twice under
``meta_init``. One of these gets a file of everything. The other one gets a file that lacks all that is not drawn, and
half of what is: what no file holds must be what the constructor makes, or be drawn alike. Compared are parameters,
buffers and tensors in plain attributes, with their types, strides and ties, and the order of their names.
"""

from __future__ import annotations

import gc
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_memload import load_weights, meta_init
from lightning_memload.restore.recipes import follow_recipes

__all__ = ["Comparison", "NotBuiltError", "TooLargeError", "compare", "differences"]

# Of a sample of this size, mean and deviation tell whether it was drawn alike: they vary by 3 %, and may by 20 %.
_SAMPLE = 1000
_TOLERANCE = 0.2
_IN_MEMORY = re.compile(r"meta_init built ([\d.]+) MiB of parameters in memory.*?: (.*)\. A restore", re.DOTALL)


class NotBuiltError(Exception):
    """A model cannot be built, or loaded, as always either."""


class TooLargeError(Exception):
    """A model is too large to be compared."""


@dataclass
class Comparison:
    """The result of the comparison of one model.

    Attributes:
        wrong: The names of what differs.
        computed: Names of what was compared and is in no file.
        nbytes: Size of all parameters.
        memory_mib: Size of the parameters that ``meta_init`` built in memory.
        why_in_memory: What its warning says of these.
        seconds: How long an ordinary construction took.
        meta_seconds: How long one under ``meta_init`` took.
    """

    wrong: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    nbytes: int = 0
    memory_mib: float = 0.0
    why_in_memory: str = ""
    seconds: float = 0.0
    meta_seconds: float = 0.0


def differences(build: Callable[[], nn.Module], folder: Path) -> tuple[list[str], list[str]]:
    """The differences of a model built under ``meta_init``, and the tensors that were compared without the file."""
    found = compare(build, folder)
    return found.wrong, found.computed


def compare(
    build: Callable[[], nn.Module],
    folder: Path,
    *,
    most_bytes: int | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compares a model that is built under ``meta_init`` with an ordinary one.

    Args:
        build: Makes the model.
        folder: For files.
        most_bytes: How large its parameters may be together.
        tell: Is told what begins.

    Raises:
        TooLargeError: They are larger.
        NotBuiltError: The ordinary construction fails.
        Exception: What construction under ``meta_init`` or the restore raise.

    Peak memory: three models, of which one lies in a file.
    """
    found = Comparison()
    tell("was built under meta_init")
    actual, failure = None, None
    try:
        actual = _built_on_meta(build, 3, found)
    except Exception as error:
        failure = error
    if actual is not None:
        found.nbytes = sum(parameter.nbytes for parameter in actual.parameters())
        if most_bytes is not None and found.nbytes > most_bytes:
            raise TooLargeError(f"its parameters take {found.nbytes / 2**30:.1f} GiB")
    tell("was built as always")
    try:
        expected, found.seconds = _built(build, 1)
        theirs, state = tensors_of(expected), expected.state_dict()
        other = tensors_of(_built(build, 2)[0])
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if actual is None:
        raise failure or AssertionError
    tell("was restored and compared, built under meta_init")
    drawn = {name for name, value in theirs.items() if name not in other or not same_values(value, other[name])}
    alike = {name for name in drawn if name in other and _drawn_alike(theirs[name], other[name])}
    # Their shapes are chance too, such as those of clusters of random values: there is nothing to compare.
    unsized = {name for name in drawn if name in other and theirs[name].shape != other[name].shape}
    theirs = _without(theirs, unsized)
    del other
    found.computed = [name for name in theirs if name not in drawn]

    path = folder / "state.pt"
    torch.save(state, path)
    try:
        load_weights(actual, path, weights_only=False)
    except Exception:
        if _is_loaded_as_always(build, path, strict=True):
            raise
        raise NotBuiltError("it cannot be loaded from its own state dict") from None
    found.wrong += _wrong(theirs, _without(tensors_of(actual), unsized), drawn - state.keys(), alike, "")
    del actual
    gc.collect()

    from_file = _half_of(theirs, drawn & state.keys())
    for name in [name for name in state if name not in from_file]:
        del state[name]
    torch.save(state, path)
    actual = _built_on_meta(build, 4, found)
    if from_file and _is_loaded_as_always(build, path, strict=False):
        load_weights(actual, path, strict=False, weights_only=False)
    else:
        follow_recipes(actual)  # A file that has nothing of a module is refused.
        from_file = set()
    ours, where = _without(tensors_of(actual), unsized), " (in no file)"
    wrong = _wrong(theirs, ours, drawn - from_file, alike, where)
    if wrong:  # What is drawn may have come out alike twice.
        third = tensors_of(_built(build, 5)[0])
        drawn |= {name for name, value in theirs.items() if name not in third or not same_values(value, third[name])}
        wrong = _wrong(theirs, ours, drawn - from_file, alike, where)
    found.wrong += wrong
    return found


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model: parameters, buffers, and what lies in plain attributes."""
    found = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    for path, module in model.named_modules(remove_duplicate=False):
        # What the old weight_norm and its like compute anew before every forward.
        hooks = module._forward_pre_hooks.values()
        anew = {getattr(hook, key, None) for hook in hooks for key in ("name", "_tensor_name")}
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and name not in anew:
                for key, tensor in _tensors_in(value, name):
                    found[f"{path}.{key}" if path else key] = tensor
    return found


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape, one.layout) != (other.dtype, other.shape, other.layout) or one.is_meta != other.is_meta:
        return False
    if one.is_meta or not one.numel():
        return True
    if type(one).__name__ != type(other).__name__:
        return False
    if hasattr(one, "__tensor_flatten__"):  # A wrapper around others.
        (names, how), (others, how_other) = one.__tensor_flatten__(), other.__tensor_flatten__()
        inner = all(same_values(getattr(one, name), getattr(other, name)) for name in names)
        return names == others and str(how) == str(how_other) and inner
    if one.is_quantized or one.layout is not torch.strided:
        return str(one) == str(other) and torch.equal(one, other)
    return torch.equal(_bytes_of(one), _bytes_of(other))


# ----------------------------------------------------------------------------------------------------------------------


def _built(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        import numpy

        numpy.random.seed(seed)
    except ImportError:
        pass
    start = time.perf_counter()
    model = build()
    return model, time.perf_counter() - start


def _built_on_meta(build: Callable[[], nn.Module], seed: int, found: Comparison) -> nn.Module:
    def within() -> nn.Module:
        with meta_init():
            return build()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, found.meta_seconds = _built(within, seed)
    for warning in caught:
        match = _IN_MEMORY.search(str(warning.message))
        if match is not None:
            found.memory_mib, found.why_in_memory = float(match[1]), match[2]
    return model


def _is_loaded_as_always(build: Callable[[], nn.Module], path: Path, *, strict: bool) -> bool:
    try:
        build().load_state_dict(torch.load(path, weights_only=False), strict=strict)
    except Exception:
        return False
    return True


def _wrong(
    theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], by_chance: set[str], alike: set[str], where: str
) -> list[str]:
    if list(theirs) != list(ours):
        return [f"the names of tensors{where}: {sorted(theirs.keys() ^ ours.keys())[:4] or 'their order'}"]
    wrong = []
    for name, value in theirs.items():
        what = _difference(value, ours[name], name in by_chance, name in alike)
        if what:
            wrong.append(f"{name}{where}: {what}")
    if _ties(theirs) != _ties(ours):
        wrong.append(f"the ties{where}")
    return wrong


def _difference(theirs: torch.Tensor, ours: torch.Tensor, by_chance: bool, alike: bool) -> str:
    if ours.is_meta and not theirs.is_meta:
        return "is on meta"
    for what in ("dtype", "shape", "layout", "requires_grad", "device", "is_leaf"):
        if getattr(theirs, what) != getattr(ours, what):
            return f"{what} is {getattr(ours, what)}, not {getattr(theirs, what)}"
    if type(theirs).__name__ != type(ours).__name__:
        return f"is a {type(ours).__name__}, not a {type(theirs).__name__}"
    if theirs.layout is torch.strided and theirs.stride() != ours.stride() and theirs.numel() > 1:
        return f"strides are {ours.stride()}, not {theirs.stride()}"
    if by_chance:
        return "is drawn otherwise" if alike and not _drawn_alike(theirs, ours) else ""
    return "" if same_values(theirs, ours) else "other values"


def _drawn_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether mean and deviation are the same but for chance, and the sample large enough to tell."""
    if one.shape != other.shape or not one.is_floating_point() or one.numel() < _SAMPLE or one.is_meta:
        return False
    if hasattr(one, "__tensor_flatten__"):
        return False
    step = max(1, one.numel() // (50 * _SAMPLE))
    first, second = (tensor.detach().reshape(-1)[::step].double() for tensor in (one, other))
    deviation = float(first.std())
    return (
        abs(float(second.std()) - deviation) <= _TOLERANCE * deviation
        and abs(float(second.mean()) - float(first.mean())) <= _TOLERANCE * deviation
    )


def _without(tensors: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _half_of(tensors: dict[str, torch.Tensor], names: set[str]) -> set[str]:
    """Every other name; names of one tensor go together."""
    objects: dict[int, bool] = {}
    half = set()
    for name in tensors:
        if name in names and objects.setdefault(id(tensors[name]), len(objects) % 2 == 0):
            half.add(name)
    return half


def _ties(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tensors_in(value: Any, name: str, depth: int = 3) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_in(item, f"{name}[{index}]", depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(item, f"{name}[{key!r}]", depth - 1)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).view(torch.uint8)
