"""Lightning under the name that the environment variable TEST_LIGHTNING gives: ``lightning.pytorch`` if it gives none.

Tests that enter Lightning import it from here, so that they run with either package:
``from tests.lightning.pytorch.callbacks import ModelCheckpoint``. The other package stays out of the process.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings

__all__ = ["PYTORCH", "Callback", "LightningDataModule", "LightningModule", "Trainer", "seed_everything"]

PYTORCH = os.environ.get("TEST_LIGHTNING", "lightning.pytorch")
_NAMES = {PYTORCH: "pytorch", {"lightning.pytorch": "lightning.fabric"}.get(PYTORCH, "lightning_fabric"): "fabric"}

pytorch = importlib.import_module(PYTORCH)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of jsonargparse, about the cli of Lightning 2.5
    importlib.import_module(f"{PYTORCH}.cli")
for _name, _alias in _NAMES.items():
    for _known in [known for known in sys.modules if f"{known}.".startswith(f"{_name}.")]:
        sys.modules[f"{__name__}.{_alias}{_known.removeprefix(_name)}"] = sys.modules[_known]

Callback = pytorch.Callback
LightningDataModule = pytorch.LightningDataModule
LightningModule = pytorch.LightningModule
Trainer = pytorch.Trainer
seed_everything = pytorch.seed_everything
