"""Where Lightning has no public hook: the names of it that are read, and the methods that are shadowed, all of them.

A method is shadowed on the one object of this run, in its ``__dict__``, and no longer than needed; the class and other
objects stay as they are. Each says why no hook would do, and with which versions of Lightning that was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim.swa_utils import AveragedModel

from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.compat import classes, package_of
from lightning_memload.restore import meta_names

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "all_ranks_load",
    "around_load",
    "before_move",
    "begin_averages",
    "install_io",
    "keep_strategy_on_device",
    "let_teardown_pass",
    "loads_by_itself",
    "require_one",
    "when_set_up",
]

_SELF_LOADING = (
    "lightning.pytorch.strategies.FSDPStrategy",
    "lightning.pytorch.strategies.ModelParallelStrategy",
    "lightning.pytorch.strategies.DeepSpeedStrategy",
)
_WRAPPING = "lightning.pytorch.plugins.io.wrapper._WrappingCheckpointIO"
_STOCK = "lightning.fabric.plugins.io.torch_io.TorchCheckpointIO"


def loads_by_itself(strategy: Strategy) -> bool:
    """Whether a strategy loads checkpoints without the CheckpointIO, and gives meta parameters memory when it likes."""
    return isinstance(strategy, classes(*_SELF_LOADING))


def all_ranks_load(strategy: Strategy) -> bool:
    """Whether each rank asks the CheckpointIO for its checkpoint, before the module is moved to its device.

    Another strategy may load on one rank and hand on what it got. If that rank waited for the others they would wait
    for it.
    """
    stock = package_of(strategy).find("lightning.pytorch.strategies.Strategy")
    return type(strategy).load_checkpoint is stock.load_checkpoint and not strategy.restore_checkpoint_after_setup


def require_one(trainer: pl.Trainer, kind: type[pl.Callback]) -> None:
    """Raises if a Trainer has several callbacks that restore.

    Raises:
        ValueError: It has.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    number = sum(isinstance(callback, kind) for callback in callbacks)
    if number > 1:
        raise ValueError(
            f"The Trainer has {number} {kind.__name__} callbacks, and each would restore the checkpoint. Keep one."
        )


def install_io(trainer: pl.Trainer, make: Callable[..., StreamingCheckpointIO]) -> StreamingCheckpointIO | None:
    """Makes the Trainer load through a ``StreamingCheckpointIO`` unless the user chose another way.

    Args:
        trainer: The Trainer.
        make: Makes the IO; ``wrapped`` tells whether it is for another one around it.

    Returns:
        The IO that loads, ``None`` if loading is not ours, which a warning explains.
    """
    strategy = trainer.strategy
    if loads_by_itself(strategy):
        rank_zero_warn(
            f"{type(strategy).__name__} loads checkpoints by itself and ignores the CheckpointIO, so "
            "MemoryEfficientRestore cannot bound the memory of this restore. It is measured and reported only."
        )
        return None
    # Lightning 2.6 fills in its own IO when the public property is read, also inside a wrapping IO that has none yet,
    # and does not tell afterwards whether the user gave it. The connector knows what the user gave.
    io = strategy._checkpoint_io
    if io is None or (type(io) in classes(_STOCK) and trainer._accelerator_connector.checkpoint_io is None):
        io = strategy.checkpoint_io = make(wrapped=False)
    while isinstance(io, classes(_WRAPPING)):
        if io.checkpoint_io is None:
            io.checkpoint_io = make(wrapped=True)
        io = io.checkpoint_io
    if isinstance(io, StreamingCheckpointIO):
        return io
    rank_zero_warn(
        f"The Trainer was given {type(io).__name__} through plugins=, which loads checkpoints in its own way, so "
        "MemoryEfficientRestore cannot bound the memory of this restore. It is measured and reported only. Leave the "
        "plugin out, derive it from StreamingCheckpointIO, or wrap a StreamingCheckpointIO."
    )
    return None


def before_move(strategy: Strategy, action: Callable[[], object]) -> Callable[[], None]:
    """Has something done between the restore of the weights and the move of the module to its device.

    Lightning (2.6) calls no hook there that runs in every case, in particular none if there is no checkpoint. So
    ``model_to_device`` is shadowed. Not ``to`` on the module: callbacks like ``WeightAveraging`` copy the module
    meanwhile, and the shadow with it.

    Returns:
        A function that ends this.
    """
    move = strategy.model_to_device

    def action_then_move() -> None:
        action()
        move()

    strategy.__dict__["model_to_device"] = action_then_move
    return lambda: strategy.__dict__.pop("model_to_device", None) and None


def around_load(
    strategy: Strategy, load: Callable[[Callable[..., None], Mapping[str, Any], bool], None]
) -> Callable[[], None]:
    """Has something else called where a strategy loads the module's weights out of a checkpoint.

    The hooks of a module (torch 2.13) are not told whether its ``load_state_dict`` is strict.

    Args:
        strategy: The strategy.
        load: Is called with the strategy's own method, the checkpoint, and whether names must match.

    Returns:
        A function that ends this.
    """
    stock = strategy.load_model_state_dict

    def load_model_state_dict(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load(stock, checkpoint, strict)

    strategy.__dict__["load_model_state_dict"] = load_model_state_dict
    return lambda: strategy.__dict__.pop("load_model_state_dict", None) and None


def when_set_up(
    strategy: Strategy, after_setup: Callable[[], object], before_stage: Callable[[], object]
) -> Callable[[], None]:
    """Has something done when every rank has called ``setup``, and again when all is restored.

    The latter is before a data loader forks its workers, which keep what is mapped and what is not yet freed for as
    long as they live. Lightning (2.5, 2.6) calls no hook of a callback at either place, but for the sanity check, which
    a resume leaves out. So its barriers there are shadowed. Both actions begin after the barrier: every rank is there.

    Args:
        strategy: Whose barriers.
        after_setup: Is done when all callbacks of all ranks have been set up, and nothing is loaded yet.
        before_stage: Is done when all is restored.

    Returns:
        A function that ends this.
    """
    barrier = strategy.barrier
    actions = {"post_setup": after_setup, "run-stage": before_stage}

    def barrier_then_action(*args: Any, **kwargs: Any) -> None:
        barrier(*args, **kwargs)
        for name in (*args, *kwargs.values()):
            if name in actions:
                actions[name]()

    strategy.__dict__["barrier"] = barrier_then_action
    return lambda: strategy.__dict__.pop("barrier", None) and None


def let_teardown_pass(module: pl.LightningModule) -> None:
    """Skips the next move of a module on meta to the CPU.

    After an exception Lightning's teardown (2.6) moves the module there, and torch's "Cannot copy out of meta tensor"
    would take the place of the error that tells what went wrong.
    """
    if not any(meta_names(module)):
        return

    def cpu() -> pl.LightningModule:
        del module.__dict__["cpu"]
        return module

    module.__dict__["cpu"] = cpu


def keep_strategy_on_device(strategy: Strategy) -> None:
    """Makes the next teardown of a strategy, and no later one, leave module and optimizers where they are.

    ``Strategy.teardown`` (2.5, 2.6) moves module and optimizer states to host memory. A run that fitted all along is
    then killed after its last batch. All else that a teardown does is done. Calling it twice before that teardown is
    fine.
    """
    if "teardown" in strategy.__dict__:
        return
    teardown = strategy.teardown

    def teardown_in_place() -> None:
        del strategy.__dict__["teardown"]
        module, optimizers = strategy.lightning_module, strategy.optimizers
        # Hidden, not replaced: what is not there is not moved, and nobody else's method has to be changed.
        strategy.optimizers = []
        if module is not None and "cpu" not in module.__dict__:
            module.__dict__["cpu"] = lambda: module
        try:
            teardown()
        finally:
            strategy.optimizers = optimizers
            if module is not None:
                module.__dict__.pop("cpu", None)

    strategy.__dict__["teardown"] = teardown_in_place


def begin_averages(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Lets Lightning's averages begin with the weights that a module has now.

    Lightning's ``WeightAveraging`` copies the module in ``setup``, before weights are loaded, and takes them over only
    where a checkpoint has the states of callbacks. Its average has no public name (2.6).
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            copied = dict((*average.module.named_parameters(), *average.module.named_buffers()))
            with torch.no_grad():
                for name, value in (*module.named_parameters(), *module.named_buffers()):
                    if name in copied:
                        copied[name].copy_(value)
