"""Settings for the tests of the plugins."""

from __future__ import annotations

from pathlib import Path

import pytest

# Lightning's and torch's remarks about tiny models, one by one: anything else stays an error.
_BENIGN = (
    r"ignore:.*does not have many workers.*",
    r"ignore:The number of training batches .* is smaller than the logging interval.*",
    r"ignore:.*checkpoint directory .* exists and is not empty.*:UserWarning",
    r"ignore:You're resuming from a checkpoint that ended before the epoch ended.*",
    r"ignore:.*but have no logger configured.*",
    r"ignore:.*torch.nn.utils.weight_norm. is deprecated.*:FutureWarning",
    r"ignore:Lazy modules are a new feature.*:UserWarning",
    r"ignore:.*treespec, LeafSpec.*is deprecated.*",
    r"ignore:.*LeafSpec.*is deprecated.*",
    r"ignore:`training_step` returned `None`.*",
    r"ignore:You defined a `validation_step` but have no `val_dataloader`.*",
    r"ignore:You have overridden .* in `LightningModule` but have passed in a.*",
    r"ignore:Missing logger folder.*",
    r"ignore:Experiment logs directory .* exists and is not empty.*",
    r"ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint.*",
    r"ignore:Starting from v1.9.0, `tensorboardX` has been removed.*",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Lightning's benign warnings pass in this folder, and nowhere else."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for rule in _BENIGN:
                item.add_marker(pytest.mark.filterwarnings(rule))
