"""Keeping what was trained on its device when a run ends.

Lightning's ``Strategy.teardown`` (2.5, 2.6) moves module and optimizer states to host memory. A run that fitted all
along is then killed after its last batch, with the last checkpoint written but whatever follows ``fit`` lost.
"""

from __future__ import annotations

from lightning.pytorch.strategies import Strategy

__all__ = ["keep_strategy_on_device"]


def keep_strategy_on_device(strategy: Strategy) -> None:
    """Makes the next teardown of a strategy, and no later one, leave module and optimizers where they are.

    All else that a teardown does is done. Calling it twice before that teardown is fine.
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
