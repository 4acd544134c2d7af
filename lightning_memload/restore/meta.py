"""Builds a module without memory for its parameters.

Within ``meta_init`` tensors are ordinary, but their initialisation is recorded instead of run (:mod:`recording`), so a
constructor gets the same answers as always. When the construction ends, parameters with recorded contents move to meta,
each with the recipe of its contents (:mod:`recipes`). All other tensors get their contents in memory.

Not promised: the same random numbers as in an ordinary construction.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lightning_memload.errors import MetaTensorError, listed
from lightning_memload.frames import callers, owner
from lightning_memload.restore.recipes import let_wait
from lightning_memload.restore.recording import Recorder
from lightning_memload.restore.storages import PendingBlock, is_alone, strided_view
from lightning_memload.restore.tape import Recipe
from lightning_memload.restore.watching import OperationWatch

__all__ = ["meta_init"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class meta_init:
    """A context that builds modules without memory for their parameters, and without initialising them.

    After the context ``is_meta`` of the parameters is true: they have no memory. They get memory and values when a
    checkpoint is restored into the module. A parameter that the checkpoint lacks gets the values that its constructor
    made: data (an encoder that ``__init__`` loads, a computed table) bit for bit, random initialisation drawn at that
    time. Parameter objects, ties between them, ``requires_grad`` and attributes of parameters are kept. Buffers are
    built as always. The context affects the current thread only.

    Within the context, every call gives the same answer as in an ordinary construction. A parameter is built in memory
    if its *value* is needed (for a number, an array, an address, a compiled module), or if it shares its memory with
    another tensor. One warning at the end of the context names these parameters, the reasons, and their size. Data that
    is assigned to a parameter, and not copied into its memory, stays as it is.

    Recurrent layers (``torch.nn.RNNBase``), lazy parameters and subclasses of ``Parameter`` are built as always. The
    random number generator advances less than in an ordinary construction.

    Args:
        enabled: ``False`` disables the context, for scripts that decide at run time.
        exclude: One or several module classes to build as always, with everything that their ``__init__`` builds.
        device: Device of tensors that are made without a device, as with ``with torch.device(device)``. On the training
            device, buffers that a constructor computes take no host memory. Non-persistent buffers, which no checkpoint
            holds, are then computed on that device and may differ in the last bits from the host. The same holds for
            random values.

    Raises:
        TypeError: An entry of ``exclude`` is not a class.

    Peak memory: buffers, and the parameters that the warning names. Other parameters take addresses, but no memory.

    Example:
        >>> with meta_init():
        ...     model = LitGPT()
        >>> trainer.fit(model, ckpt_path="last.ckpt")
    """

    def __new__(cls, enabled: Any = True, **options: Any) -> Any:
        """Makes the context. For ``@meta_init`` without parentheses, returns the decorated function."""
        if isinstance(enabled, (type, nn.Module)):
            name = enabled.__name__ if isinstance(enabled, type) else f"a {type(enabled).__name__}"
            raise TypeError(
                f"meta_init takes functions that build modules, got {name}. Use 'with meta_init(): model = ...', or "
                "decorate a function that returns the module."
            )
        return cls(**options)(enabled) if callable(enabled) else super().__new__(cls)

    def __init__(
        self,
        enabled: bool = True,
        *,
        exclude: type[nn.Module] | Iterable[type[nn.Module]] = (),
        device: torch.device | str | None = None,
    ) -> None:
        self._enabled = enabled
        self._exclude = (exclude,) if isinstance(exclude, type) else tuple(exclude)
        for excluded in self._exclude:
            if not isinstance(excluded, type):
                raise TypeError(f"meta_init(exclude=...) takes module classes, got {excluded!r}.")
        self._device = None if device is None else torch.device(device)
        self._entered: list[tuple[contextlib.ExitStack, _Construction | None]] = []

    def __enter__(self) -> None:
        stack, own = contextlib.ExitStack(), None
        if self._enabled:
            outer = _ACTIVE.construction
            own = _Construction() if outer is None else None
            construction = outer or own
            assert construction is not None
            if own is not None:
                stack.enter_context(own)
            stack.enter_context(construction.excluding(self._exclude))
            if self._device is not None:
                stack.enter_context(self._device)
        self._entered.append((stack, own))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stack, own = self._entered.pop()
        stack.__exit__(kind, error, traceback)
        if own is not None and error is None and own.recorder.kept():
            warnings.warn(own.describe(), stacklevel=2)

    def __call__(self, build: Callable[_P, _T]) -> Callable[_P, _T]:
        """Decorates a function so that it runs within a ``meta_init`` with the options of this one.

        Args:
            build: The function. It runs once for each call. If that fails, it runs a second time without ``meta_init``.
        """

        @functools.wraps(build)
        def built(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            within = meta_init(self._enabled, exclude=self._exclude, device=self._device)
            within.__enter__()
            own = within._entered[-1][1]
            try:
                with within._entered.pop()[0]:
                    result = build(*args, **kwargs)
            except (RuntimeError, TypeError) as error:
                if own is None or not own.took_memory:
                    raise
                # An error of the user's code is raised again by the second run. Else meta_init caused the error.
                with contextlib.nullcontext() if self._device is None else self._device:
                    result = build(*args, **kwargs)
                warnings.warn(
                    "meta_init built everything in memory, since the construction without memory fails: "
                    f"{type(error).__name__}: {error}. A restore fills the parameters in place.",
                    stacklevel=2,
                )
                return result
            if own is not None and own.recorder.kept():
                warnings.warn(own.describe(), stacklevel=2)
            return result

        return built


class _ActiveConstruction(threading.local):
    """The active construction of this thread."""

    def __init__(self) -> None:
        self.construction: _Construction | None = None


_ACTIVE = _ActiveConstruction()
_HOOKS_LOCK = threading.Lock()


@functools.cache
def _install_hooks() -> None:
    """Registers the hooks once and for all: any thread that builds a module iterates torch's dict of them."""
    register_module_parameter_registration_hook(_on_parameter)
    register_module_buffer_registration_hook(_on_part)
    register_module_module_registration_hook(_on_part)


def _on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if _ACTIVE.construction is not None:
        _ACTIVE.construction.on_parameter(module, name, parameter)


def _on_part(module: nn.Module, name: str, part: object) -> None:
    if _ACTIVE.construction is not None:
        _ACTIVE.construction.on_module(module)


class _Construction:
    """The modules that are being built, and the deferred contents of their parameters.

    A nested ``meta_init`` joins the outer construction, which ends with the outer context.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._watch = OperationWatch(self.recorder)
        self._excluded: list[type[nn.Module]] = []
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self.took_memory = False

    def __enter__(self) -> _Construction:
        with _HOOKS_LOCK:
            _install_hooks()
        _ACTIVE.construction = self
        self._watch.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._watch.__exit__(*exception)
        _ACTIVE.construction = None
        # Also after an exception: modules that were built may stay in use, and their memory has never been written.
        self._end()
        self._modules.clear()

    @contextlib.contextmanager
    def excluding(self, classes: tuple[type[nn.Module], ...]) -> Iterator[None]:
        """Builds these classes as always within the block."""
        before = len(self._excluded)
        self._excluded += classes
        try:
            yield
        finally:
            del self._excluded[before:]

    def on_module(self, module: nn.Module) -> None:
        """Remembers a module to which a parameter, a buffer or a submodule is added."""
        if id(module) not in self._modules:
            self._modules[id(module)] = weakref.ref(module)

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Notes the owner of the deferred contents of a parameter's memory."""
        self.on_module(module)
        if parameter is None or self.recorder.is_paused:
            return
        self.recorder.is_paused = True
        try:
            pending = self.recorder.find(parameter)
            if pending is None:
                return
            if self._excluded and self._is_excluded(module):
                self.recorder.expose(parameter)
                return
            pending.is_derived = self.took_memory = True
            if pending.owner is None:
                pending.owner = type(module), name
        finally:
            self.recorder.is_paused = False

    def describe(self) -> str:
        """The warning: which parameters were built in memory and still exist, and why."""
        realised = self.recorder.realised
        nbytes = sum(item.nbytes for item in realised)
        reasons = {f"{item.owner[0].__name__}.{item.owner[1]}": item.reason for item in realised}
        named = listed((f"{name}: {reason}" for name, reason in reasons.items()), separator="; ")
        return (
            f"meta_init built {nbytes / 2**20:.1f} MiB of parameters in memory, as an ordinary construction does: "
            f"{named}. A restore fills them in place."
        )

    # ------------------------------------------------------------------------------------------------------------------

    def _is_excluded(self, module: nn.Module) -> bool:
        classes = tuple(self._excluded)
        return isinstance(module, classes) or any(isinstance(other, classes) for other in _under_construction())

    def _end(self) -> None:
        """Moves parameters with deferred contents to meta, and writes all other deferred contents."""
        recorder = self.recorder
        modules = self._alive()
        waiting = {id(pending): pending for pending in recorder.alive()}
        if not waiting:
            return
        for module in modules:
            _drop_made_anew(module, recorder)
        owners = self._owners(modules)
        unknown = [pending for pending in recorder.alive() if pending.is_derived and id(pending) not in owners]
        if unknown:
            # Copies of modules that are not submodules: torch calls no hook for them.
            known = {id(module) for module in modules}
            found = [item for item in gc.get_objects() if issubclass(type(item), nn.Module) and id(item) not in known]
            owners = self._owners([*modules, *found])
        moved: list[Recipe] = []
        shared = [pair for pair in owners.values() if not self._move(*pair, moved)]
        if any(len(parameters) == 1 for _, parameters in shared):
            gc.collect()  # A view in the same memory may be alive only through a reference cycle.
            for pair in shared:
                self._move(*pair, moved)
        for pending in recorder.alive():
            parameters = owners[id(pending)][1] if id(pending) in owners else []
            recorder.realise(pending, _why_in_memory([parameter for parameter, _ in parameters]))
        recorder.keep_constants(recipe.contents for recipe in moved)

    def _alive(self) -> list[nn.Module]:
        roots = [module for reference in self._modules.values() if (module := reference()) is not None]
        return list({id(module): module for root in roots for module in root.modules()}.values())

    def _owners(self, modules: Iterable[nn.Module]) -> _Owners:
        owners: _Owners = {}
        for module in modules:
            for parameter in vars(module).get("_parameters", {}).values():
                pending = None if parameter is None else self.recorder.find(parameter)
                if pending is not None:
                    known = owners.setdefault(id(pending), (pending, []))[1]
                    same = next((holders for other, holders in known if other is parameter), None)
                    if same is None:
                        known.append((parameter, [module]))
                    else:
                        same.append(module)
        return owners

    def _move(
        self, pending: PendingBlock, parameters: list[tuple[nn.Parameter, list[nn.Module]]], moved: list[Recipe]
    ) -> bool:
        """Moves a parameter to meta, if no other tensor uses its memory and the parameter can get memory again later.

        Args:
            pending: The memory of the parameter.
            parameters: The parameters in this memory, each with its modules.
            moved: Gets the recipe of the parameter.

        Returns:
            ``False`` if another tensor uses the memory.
        """
        parameter, modules = parameters[0]
        if len(parameters) > 1 or not is_alone(parameter):
            return False
        if parameter.grad is not None:
            return True
        if type(parameter) is not nn.Parameter or parameter.is_inference():
            pending.owner = None
            return True
        recipe = Recipe(pending.contents, strided_view(parameter))
        try:
            let_wait(parameter, modules, recipe)
        except MetaTensorError:
            if any(isinstance(module, nn.RNNBase) for module in modules):
                pending.owner = None  # Recurrent layers always hold weak references to their parameters: no warning.
            return True
        self.recorder.forget(pending)
        moved.append(recipe)
        return True


# Deferred contents, with each parameter in their memory and the modules that have it.
_Owners = dict[int, tuple[PendingBlock, list[tuple[nn.Parameter, list[nn.Module]]]]]


def _why_in_memory(parameters: list[nn.Parameter]) -> str | None:
    if not parameters:
        return None
    if any(parameter.grad is not None for parameter in parameters):
        return "it has a gradient"
    if len(parameters) == 1 and is_alone(parameters[0]):
        return "a weak reference, a graph or a compiled module holds it, so it could get no memory later"
    return "it shares its memory with another tensor"


def _drop_made_anew(module: nn.Module, recorder: Recorder) -> None:
    """Drops the attributes that a module computes again from its parameters before every forward, with their graphs.

    The old weight_norm, spectral_norm and prune have such attributes (torch 2.13, torch.nn.utils). torch has no public
    name for a module's hooks.
    """
    for hook in vars(module).get("_forward_pre_hooks", {}).values():
        for key in ("name", "_tensor_name"):
            name = getattr(hook, key, None)
            value = vars(module).get(name) if isinstance(name, str) else None
            if isinstance(name, str) and type(value) is torch.Tensor and recorder.find(value) is not None:
                vars(module)[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _under_construction() -> Iterator[nn.Module]:
    """The modules whose ``__init__`` is running in this thread, innermost first."""
    for frame in callers():
        if frame.f_code.co_name == "__init__" and isinstance(module := owner(frame), nn.Module):
            yield module
