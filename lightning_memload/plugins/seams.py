"""All uses of Lightning that its public hooks do not cover: private names, and methods that are shadowed.

A method is shadowed on the one object of this run, in its ``__dict__``, and only as long as needed. Classes and other
objects are not changed. Each function names the reason, and the versions of Lightning that it was checked with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_memload.plugins.checkpoint_io import StreamingCheckpointIO
from lightning_memload.plugins.compat import classes, package_of
from lightning_memload.restore import meta_names

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

__all__ = [
    "after_optimizers_load",
    "all_ranks_load",
    "around_checkpoint",
    "around_load",
    "before_move",
    "begin_averages",
    "data_of",
    "forget_loaded_checkpoint",
    "install_io",
    "keep_strategy_on_device",
    "loads_by_itself",
    "loads_optimizers_as_stock",
    "reads_shards",
    "require_one",
    "restore_from",
    "sets_strict_loading",
    "skip_next_move_to_cpu",
    "when_set_up",
    "within_optimizers_load",
]

_SELF_LOADING = (
    "lightning.pytorch.strategies.FSDPStrategy",
    "lightning.pytorch.strategies.ModelParallelStrategy",
    "lightning.pytorch.strategies.DeepSpeedStrategy",
)
_SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
_WRAPPING = "lightning.pytorch.plugins.io.wrapper._WrappingCheckpointIO"
_STOCK = "lightning.fabric.plugins.io.torch_io.TorchCheckpointIO"


def loads_by_itself(strategy: Strategy) -> bool:
    """Whether a strategy loads checkpoints without the CheckpointIO, and allocates meta parameters itself."""
    return isinstance(strategy, classes(*_SELF_LOADING))


def reads_shards(strategy: Strategy) -> bool:
    """Whether the load of a strategy can be replaced by one in which each rank reads only its shards."""
    stock = package_of(strategy).find(_SHARDED)
    return isinstance(strategy, stock) and type(strategy).load_checkpoint is stock.load_checkpoint


def all_ranks_load(strategy: Strategy) -> bool:
    """Whether each rank loads its checkpoint with the CheckpointIO, before the module is moved to its device.

    Other strategies may load on one rank and send the result to the others. If that rank waited for the others, they
    would wait for each other.
    """
    stock = package_of(strategy).find("lightning.pytorch.strategies.Strategy")
    return type(strategy).load_checkpoint is stock.load_checkpoint and not strategy.restore_checkpoint_after_setup


def require_one(trainer: pl.Trainer, kind: type[pl.Callback]) -> None:
    """Raises if a Trainer has several callbacks that restore.

    Raises:
        ValueError: The Trainer has several.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    number = sum(isinstance(callback, kind) for callback in callbacks)
    if number > 1:
        raise ValueError(
            f"The Trainer has {number} {kind.__name__} callbacks, and each would restore the checkpoint. Keep one."
        )


def install_io(trainer: pl.Trainer, make: Callable[..., StreamingCheckpointIO]) -> StreamingCheckpointIO | None:
    """Makes the Trainer load with a ``StreamingCheckpointIO``, unless the user has passed another CheckpointIO.

    Args:
        trainer: The Trainer.
        make: Makes the IO. Its argument ``wrapped`` tells whether another IO wraps it.

    Returns:
        The IO that loads. ``None`` if another IO or the strategy loads, which a warning explains.
    """
    strategy = trainer.strategy
    if loads_by_itself(strategy):
        if reads_shards(strategy):
            return None
        rank_zero_warn(
            f"{type(strategy).__name__} loads checkpoints itself and ignores the CheckpointIO, so "
            "MemoryEfficientRestore cannot limit the memory of this restore. It only measures and reports it."
        )
        return None
    # Lightning 2.6 sets its own IO when the public property is read, also inside a wrapping IO that has none yet. After
    # that it is unknown whether the user passed that IO. The connector stores what the user passed.
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
        f"The Trainer was given {type(io).__name__} through plugins=, which loads checkpoints itself, so "
        "MemoryEfficientRestore cannot limit the memory of this restore. It only measures and reports it. Remove the "
        "plugin, derive it from StreamingCheckpointIO, or wrap a StreamingCheckpointIO."
    )
    return None


def before_move(strategy: Strategy, action: Callable[[], object]) -> Callable[[], None]:
    """Calls a function between the restore of the weights and the move of the module to its device.

    Lightning (2.6) calls no hook there in every case, in particular none if there is no checkpoint. So
    ``model_to_device`` is shadowed. ``to`` of the module is not: callbacks like ``WeightAveraging`` copy the module
    before the move, and the copy would contain the shadow.

    Returns:
        A function that removes the shadow.
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
    """Replaces the method with which a strategy loads the weights of a checkpoint into the module.

    The hooks of a module (torch 2.13) do not know whether its ``load_state_dict`` is strict.

    Args:
        strategy: The strategy.
        load: Called instead, with the strategy's own method, the checkpoint, and whether names must match.

    Returns:
        A function that removes the replacement.
    """
    stock = strategy.load_model_state_dict

    def load_model_state_dict(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load(stock, checkpoint, strict)

    strategy.__dict__["load_model_state_dict"] = load_model_state_dict
    return lambda: strategy.__dict__.pop("load_model_state_dict", None) and None


def around_checkpoint(
    strategy: Strategy, load: Callable[[Callable[..., dict[str, Any]], str, bool | None], dict[str, Any]]
) -> Callable[[], None]:
    """Replaces the method with which a strategy loads a checkpoint into its sharded module and optimizers.

    Args:
        strategy: A strategy for which :func:`reads_shards` is true.
        load: Called instead, with a function of a path that calls the strategy's own method, with the path, and with
            ``weights_only``. Returns what that method returns: the checkpoint without the weights.

    Returns:
        A function that removes the replacement.
    """
    stock = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Lightning 2.5 does not pass this argument, and loads with False.
        weights_only = args[0] if args else kwargs.get("weights_only", False)
        return load(lambda path: stock(path, *args, **kwargs), checkpoint_path, weights_only)

    strategy.__dict__["load_checkpoint"] = load_checkpoint
    return lambda: strategy.__dict__.pop("load_checkpoint", None) and None


def loads_optimizers_as_stock(strategy: Strategy) -> bool:
    """Whether a strategy loads the states of the optimizers with Lightning's own method, which reads no values."""
    stock = package_of(strategy).find("lightning.pytorch.strategies.Strategy")
    own = "load_optimizer_state_dict" in vars(strategy)
    return type(strategy).load_optimizer_state_dict is stock.load_optimizer_state_dict and not own


def after_optimizers_load(strategy: Strategy, action: Callable[[], object]) -> Callable[[], None]:
    """Calls a function when a strategy has loaded the states of the optimizers, also after an error.

    Lightning (2.5, 2.6) calls no hook there. After ``load_state_dict`` it goes through all states, but changes none
    that is on its device, so a hook of the optimizer itself would come too early.

    Returns:
        A function that removes the shadow.
    """
    stock = strategy.load_optimizer_state_dict

    def load_then_action(checkpoint: Mapping[str, Any]) -> None:
        try:
            stock(checkpoint)
        finally:
            action()

    strategy.__dict__["load_optimizer_state_dict"] = load_then_action
    return lambda: strategy.__dict__.pop("load_optimizer_state_dict", None) and None


def within_optimizers_load(
    strategy: Strategy, context: Callable[[], contextlib.AbstractContextManager[object]]
) -> Callable[[], None]:
    """Makes a strategy load the states of the optimizers within a context. Lightning (2.5, 2.6) has no hook for it.

    Returns:
        A function that removes the shadow.
    """
    stock = strategy.load_optimizer_state_dict

    def load_within(checkpoint: Mapping[str, Any]) -> None:
        with context():
            stock(checkpoint)

    strategy.__dict__["load_optimizer_state_dict"] = load_within
    return lambda: strategy.__dict__.pop("load_optimizer_state_dict", None) and None


def when_set_up(
    strategy: Strategy, after_setup: Callable[[], object], before_stage: Callable[[], object]
) -> Callable[[], None]:
    """Calls one function when every rank has called ``setup``, and another one when everything is restored.

    The second call comes before a data loader forks its workers, which keep mapped files and unfreed memory as long as
    they live. Lightning (2.5, 2.6) calls no hook of a callback at either place, except in the sanity check, which a
    resume skips. So its barriers at these places are shadowed. Each function is called after the barrier, so every rank
    has reached it.

    Args:
        strategy: The strategy whose barriers are shadowed.
        after_setup: Called when all callbacks of all ranks have been set up, before anything is loaded.
        before_stage: Called when everything is restored.

    Returns:
        A function that removes the shadow.
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


def data_of(loop: Any) -> Any:
    """The argument ``dataloaders`` of a loop, or ``None``. Lightning (2.5, 2.6) has no public name for it."""
    return getattr(getattr(loop, "_data_source", None), "instance", None)


def forget_loaded_checkpoint(trainer: pl.Trainer) -> None:
    """Makes a Trainer drop the checkpoint that it has loaded.

    Lightning (2.6) keeps the checkpoint of a restore that failed, and so its mapping, until the next run. After a
    restore that succeeded it has dropped the checkpoint itself.
    """
    trainer._checkpoint_connector._loaded_checkpoint = {}


def restore_from(trainer: pl.Trainer, path: str | None) -> None:
    """Makes a Trainer restore another checkpoint in this run.

    Lightning (2.5, 2.6) has a public setter, but the path that it sets is used for all later runs too.
    """
    trainer._checkpoint_connector._ckpt_path = path


def sets_strict_loading(module: pl.LightningModule) -> bool:
    """Whether a module sets ``strict_loading``. The public property (Lightning 2.5, 2.6) is ``True`` if it does not."""
    return module._strict_loading is not None


def skip_next_move_to_cpu(module: pl.LightningModule) -> None:
    """Makes a module with meta tensors ignore the next call of ``cpu``.

    After an exception, Lightning's teardown (2.6) moves the module to the CPU. torch's error "Cannot copy out of meta
    tensor" would then hide the first error.
    """
    if not any(meta_names(module)):
        return

    def cpu() -> pl.LightningModule:
        del module.__dict__["cpu"]
        return module

    module.__dict__["cpu"] = cpu


def keep_strategy_on_device(strategy: Strategy) -> None:
    """Makes the next teardown of a strategy, and no later one, leave the module and the optimizers on their device.

    ``Strategy.teardown`` (2.5, 2.6) moves the module and the optimizer states to host memory. Without this, a run that
    had enough memory so far may be killed after its last batch. The rest of the teardown is not changed. A second call
    before that teardown does nothing.
    """
    if "teardown" in strategy.__dict__:
        return
    teardown = strategy.teardown

    def teardown_in_place() -> None:
        del strategy.__dict__["teardown"]
        module, optimizers = strategy.lightning_module, strategy.optimizers
        # The optimizers are removed for the call, so they are not moved, and no method of theirs must be changed.
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
    """Copies the present weights of a module into the averages of Lightning's averaging callbacks.

    Lightning's ``WeightAveraging`` copies the module in ``setup``, before weights are loaded. Its copy gets the
    loaded weights only if the checkpoint has the states of callbacks. The copy has no public name (2.6).
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            _copy_weights(module, average.module)


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    targets = dict((*target.named_parameters(), *target.named_buffers()))
    for name, value in (*source.named_parameters(), *source.named_buffers()):
        if name in targets:
            targets[name].copy_(value)
