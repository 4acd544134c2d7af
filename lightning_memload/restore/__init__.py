"""From a mapped checkpoint into modules and optimizers, through torch's own ``load_state_dict``."""

from lightning_memload.restore.allocation import materialize, meta_names
from lightning_memload.restore.load import LoadOptions, WeightsSource, load_weights, open_any
from lightning_memload.restore.matching import WeightsMatch, module_keys, refused_by_torch, require_match
from lightning_memload.restore.meta import meta_init
from lightning_memload.restore.optimizer import OptimizerRestore
from lightning_memload.restore.recipes import follow_recipes, names_of_data
from lightning_memload.restore.session import Move, RestoreSession
from lightning_memload.restore.settling import mapped_bytes
from lightning_memload.restore.siblings import (
    Siblings,
    Verdict,
    find_siblings,
    fingerprint,
    is_training_checkpoint,
    judge_sibling,
    list_siblings,
)
from lightning_memload.restore.state_dict import add_compiled_versions, find_state_dict, rename_compiled, rename_keys
from lightning_memload.restore.weights import WeightsRestore

__all__ = [
    "LoadOptions",
    "Move",
    "OptimizerRestore",
    "RestoreSession",
    "Siblings",
    "Verdict",
    "WeightsMatch",
    "WeightsRestore",
    "WeightsSource",
    "add_compiled_versions",
    "find_siblings",
    "find_state_dict",
    "fingerprint",
    "follow_recipes",
    "is_training_checkpoint",
    "judge_sibling",
    "list_siblings",
    "load_weights",
    "mapped_bytes",
    "materialize",
    "meta_init",
    "meta_names",
    "module_keys",
    "names_of_data",
    "open_any",
    "refused_by_torch",
    "rename_compiled",
    "rename_keys",
    "require_match",
]
