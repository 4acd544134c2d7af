"""From a mapped checkpoint into modules and optimizers, through torch's own ``load_state_dict``."""

from lightning_memload.restore.allocation import meta_names
from lightning_memload.restore.load_weights import LoadOptions, load_weights
from lightning_memload.restore.matching import WeightsMatch, module_keys, short_errors
from lightning_memload.restore.meta import meta_init
from lightning_memload.restore.optimizer import OptimizerRestore
from lightning_memload.restore.overlap import Overlap
from lightning_memload.restore.recipes import follow_recipes, names_of_data
from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.restore.settling import mapped_bytes
from lightning_memload.restore.sharded_optimizer import ShardedOptimizer
from lightning_memload.restore.sharded_weights import plan_sharded_weights, run_load_hooks, show_shards
from lightning_memload.restore.shards import ShardReader, ShardTarget, Unshardable
from lightning_memload.restore.state_dict import add_compiled_versions, find_state_dict, rename_compiled
from lightning_memload.restore.state_stream import StateStream
from lightning_memload.restore.striping import Striping
from lightning_memload.restore.weights import WeightsRestore
from lightning_memload.restore.weights_source import WeightsSource, open_any

__all__ = [
    "LoadOptions",
    "Move",
    "OptimizerRestore",
    "Overlap",
    "RestoreSession",
    "ShardReader",
    "ShardTarget",
    "ShardedOptimizer",
    "StateStream",
    "Striping",
    "Unshardable",
    "WeightsMatch",
    "WeightsRestore",
    "WeightsSource",
    "add_compiled_versions",
    "find_state_dict",
    "follow_recipes",
    "load_weights",
    "mapped_bytes",
    "meta_init",
    "meta_names",
    "module_keys",
    "names_of_data",
    "open_any",
    "plan_sharded_weights",
    "rename_compiled",
    "run_load_hooks",
    "short_errors",
    "show_shards",
]
