"""From a mapped checkpoint into modules and optimizers, through torch's own ``load_state_dict``."""

from lightning_memload.restore.meta import materialize, meta_init, meta_names
from lightning_memload.restore.optimizer import OptimizerRestore, mapped_bytes
from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.restore.weights import WeightsRestore

__all__ = [
    "Move",
    "OptimizerRestore",
    "RestoreSession",
    "WeightsRestore",
    "mapped_bytes",
    "materialize",
    "meta_init",
    "meta_names",
]
