"""Supports Lightning under both of its names: ``lightning.pytorch`` and ``pytorch_lightning``.

The two packages are independent copies of the same classes, and a Trainer knows only those of its own package. So the
base classes made here derive from the class of that name in every package that the program imports, including a
package that it imports later. The class of a Trainer or a module decides which package is used for it.

Only packages that the program itself imports are used: importing a second copy takes 0.3 s, and redirects the messages
of the first one to its own logger (lightning_utilities 0.15 has one logger, and the last imported copy sets it). If the
program has imported neither, ``lightning`` is imported, or ``pytorch_lightning`` if there is no ``lightning``. Names of
Lightning that are not public appear here and in ``seams`` only, with the versions in which they exist.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.overrides import is_overridden

__all__ = ["Callback", "Package", "TorchCheckpointIO", "classes", "package_of"]


@dataclass(frozen=True, slots=True)
class Package:
    """One of the two packages.

    Attributes:
        pytorch: Its name for ``lightning.pytorch``.
        fabric: Its name for ``lightning.fabric``.
    """

    pytorch: str
    fabric: str

    def find(self, name: str) -> Any:
        """Return the object of a name in this package, and import its module.

        Args:
            name: The name in the package ``lightning``: ``"lightning.pytorch.callbacks.Callback"``.

        Raises:
            ImportError: The package has no such module.
            AttributeError: The module has no such name.
        """
        module, _, attribute = self.rename(name).rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    def rename(self, name: str) -> str:
        """Return this package's name for a name of the package ``lightning``."""
        for theirs, ours in (("lightning.pytorch", self.pytorch), ("lightning.fabric", self.fabric)):
            if name.startswith(f"{theirs}."):
                return ours + name.removeprefix(theirs)
        raise ValueError(f"{name!r} is in neither lightning.pytorch nor lightning.fabric.")

    @property
    def version(self) -> str:
        """The version that its Trainer writes into checkpoints."""
        return self.find("lightning.pytorch.__version__")  # type: ignore[no-any-return]

    def migrate(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
        """Converts an old checkpoint to the current version, in place. Lightning's name is not public (2.5, 2.6)."""
        migrate = self.find("lightning.pytorch.utilities.migration.utils._pl_migrate_checkpoint")
        return migrate(checkpoint, path)  # type: ignore[no-any-return]

    def reading_old_pickles(self) -> contextlib.AbstractContextManager[Any]:
        """Allows to unpickle checkpoints that name removed modules of Lightning, for a ``with`` block."""
        patch = self.find("lightning.pytorch.utilities.migration.pl_legacy_patch")
        return patch()  # type: ignore[no-any-return]

    def overrides(self, method: str, instance: object, parent: str) -> bool:
        """Whether the class of an object overrides a method of a parent class.

        Args:
            method: The method.
            instance: The object.
            parent: The parent, as in :meth:`find`.
        """
        return is_overridden(method, instance, self.find(parent))


_PACKAGES = (Package("lightning.pytorch", "lightning.fabric"), Package("pytorch_lightning", "lightning_fabric"))


def _imported() -> list[Package]:
    return [package for package in _PACKAGES if sys.modules.get(package.pytorch) is not None]


def _import_one() -> None:
    """Imports one of the packages if the program has imported neither.

    Raises:
        ImportError: Neither can be imported.
    """
    if _imported():
        return
    reasons = []
    for package in _PACKAGES:
        try:
            importlib.import_module(package.pytorch)
            return
        except Exception as error:  # A package that is not compatible with the installed torch fails in many ways.
            reasons.append(f"{package.pytorch} ({type(error).__name__}: {error})")
    raise ImportError(f"lightning_memload needs lightning>=2.5, and could import neither {' nor '.join(reasons)}.")


def classes(*names: str) -> tuple[type[Any], ...]:
    """The classes of these names in every package that the program has imported, for ``isinstance``.

    Args:
        names: As in :meth:`Package.find`.
    """
    return tuple(package.find(name) for package in _imported() for name in names)


def package_of(thing: object) -> Package:
    """Return the package that a Trainer, a module, a callback, or a class of these comes from.

    Returns:
        The package of the first of its base classes that belongs to Lightning. If there is none: the imported package.
    """
    kind = thing if isinstance(thing, type) else type(thing)
    for base in kind.__mro__:
        for package in _PACKAGES:
            if f"{base.__module__}.".startswith((f"{package.pytorch}.", f"{package.fabric}.")):
                return package
    return (_imported() or _PACKAGES)[0]


class _ImportWatch(MetaPathFinder):
    """Calls a function with a module as soon as the program has imported it.

    It is the first entry of ``sys.meta_path``, delegates the search to the other finders, and removes itself when all
    watched modules are imported. Python has no public event for this.
    """

    def __init__(self) -> None:
        self._actions: dict[str, Callable[[ModuleType], None]] = {}
        self._searching: set[str] = set()

    def add(self, name: str, action: Callable[[ModuleType], None]) -> None:
        """Calls ``action`` once with the module ``name``: now if it is imported, otherwise after its import."""
        if sys.modules.get(name) is not None:
            action(importlib.import_module(name))  # This waits for a thread that is importing it.
            return
        self._actions[name] = action
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec that the other finders have for a watched module, and ``None`` for any other module."""
        if fullname not in self._actions or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _WatchedLoader(spec.loader, self._end)
        return spec

    def _end(self, module: ModuleType) -> None:
        action = self._actions.pop(module.__name__, None)
        if action is not None:
            action(module)
        if not self._actions and self in sys.meta_path:
            sys.meta_path.remove(self)


class _WatchedLoader(Loader):
    """Wraps another loader, replaces itself by it, and calls a function once the module is loaded."""

    def __init__(self, loader: Loader, on_loaded: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._on_loaded = on_loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._on_loaded(module)


def _derive(name: str, watch: _ImportWatch) -> type[Any]:
    """Makes a class that derives from the class ``name`` of every imported package, also of one imported later."""
    first, *_ = _imported()
    base = first.find(name)
    joint: type[Any] = type(base)(
        base.__name__, (base,), {"__module__": __name__, "__doc__": f"``{name}`` of every imported package."}
    )

    def add_base(module: ModuleType) -> None:
        another = getattr(module, base.__name__)
        if another not in joint.__mro__:
            joint.__bases__ = (*joint.__bases__, another)

    for package in _PACKAGES:
        if package != first:
            watch.add(package.rename(name).rpartition(".")[0], add_base)
    return joint


def _derive_bases() -> Iterator[type[Any]]:
    _import_one()
    watch = _ImportWatch()
    yield _derive("lightning.pytorch.callbacks.callback.Callback", watch)
    yield _derive("lightning.fabric.plugins.io.torch_io.TorchCheckpointIO", watch)


if TYPE_CHECKING:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
    from lightning.pytorch.callbacks import Callback
else:
    Callback, TorchCheckpointIO = _derive_bases()
