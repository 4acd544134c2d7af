"""Explains errors that Lightning raises because its two packages are mixed in one run.

A Trainer of one package often works with a callback, a logger or a data module of the other package, so mixing them is
not an error here. If it does not work, Lightning's message is only "Expected a parent".
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from lightning_memload.plugins.compat import classes, package_of
from lightning_memload.plugins.seams import data_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["name_mixed_imports"]

# Errors of type checks, and of attributes that a class does not have.
_ERRORS = (AssertionError, AttributeError, TypeError, ValueError)
_LIGHTNING = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning")
_KINDS = (
    "lightning.pytorch.LightningModule",
    "lightning.pytorch.LightningDataModule",
    "lightning.pytorch.Callback",
    "lightning.pytorch.loggers.Logger",
)


def name_mixed_imports(exception: BaseException, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Adds to an error of Lightning the objects that come from another package than the Trainer.

    Args:
        exception: Any error of a run. Other kinds of errors, and errors of other code, are not changed.
        trainer: The Trainer.
        module: Its module.
    """
    if not isinstance(exception, _ERRORS) or not _is_raised_by_lightning(exception.__traceback__):
        return
    home = package_of(trainer)
    kinds, own = classes(*_KINDS), tuple(home.find(kind) for kind in _KINDS)
    foreign = [
        f"{type(thing).__qualname__} from {package_of(thing).pytorch}"
        for thing in _objects(trainer, module)
        if isinstance(thing, kinds) and not isinstance(thing, own)
    ]
    if foreign:
        exception.args = (
            f"{str(exception).rstrip('.')}. The Trainer comes from {home.pytorch}, and these objects do not: "
            f"{', '.join(dict.fromkeys(foreign))}. The classes of one package are unknown to the other. Import all "
            "of them from one package.",
        )


def _is_raised_by_lightning(traceback: TracebackType | None) -> bool:
    name = ""
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return name.partition(".")[0] in _LIGHTNING


def _objects(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[object]:
    yield module
    yield trainer.datamodule  # type: ignore[attr-defined]
    yield from trainer.callbacks  # type: ignore[attr-defined]
    yield from trainer.loggers
    for loop in (trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        yield data_of(loop)  # Lightning takes a data module of the other package for a dataloader.
