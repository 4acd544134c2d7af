"""Lightning under both of its names: which package is used, that no other is imported, and what a mixture says."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.lightning as L
from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO, load_from_checkpoint
from lightning_memload.plugins.compat import Package, package_of
from tests.fresh_process import FreshProcessError, run_fresh
from tests.plugins.harness import TRUSTED

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
ROOM = Path(__file__).resolve().parents[2] / "lightning_memload" / "plugins"

# What a program starts with: packages that cannot be imported, or that fail while they are.
START = """
import copy, importlib, logging, os, pickle, sys, tempfile, warnings

warnings.simplefilter("ignore")
os.chdir(tempfile.mkdtemp())


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ARGS["hidden"]:
            raise ARGS["broken"] and RuntimeError(f"{name} is broken") or ModuleNotFoundError(f"No module {name}")


if ARGS["hidden"]:
    sys.meta_path.insert(0, Refuse())


def imported():
    return sorted({name.partition(".")[0] for name in sys.modules} & {"lightning", "pytorch_lightning"})


def net(pl):
    import torch

    class Net(pl.LightningModule):
        def __init__(self, size=8):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(size, size)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    return Net


def make_trainer(pl, steps=4, **kwargs):
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return pl.Trainer(max_steps=steps, enable_model_summary=False, **{**options, **kwargs})


def data():
    import torch

    return torch.utils.data.DataLoader(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), batch_size=8)


def write(pl):
    trainer = make_trainer(pl, 2)
    trainer.fit(net(pl)(), data())
    trainer.save_checkpoint("net.ckpt")


def resume(pl, **kwargs):
    import torch

    trainer = make_trainer(pl, **kwargs)
    module = net(pl)()
    options = {"weights_only": False} if tuple(map(int, pl.__version__.split(".")[:2])) >= (2, 6) else {}
    trainer.fit(module, data(), ckpt_path="net.ckpt", **options)
    assert trainer.global_step == 4
    state_dict = module.state_dict()
    if "plugins" not in kwargs:  # Lightning 2.5's AsyncCheckpointIO saves nothing after its teardown
        trainer.save_checkpoint("resumed.ckpt")
        state_dict = torch.load("resumed.ckpt", weights_only=False)["state_dict"]
    return [value.double().sum().item().hex() for value in state_dict.values()]


def ways(pl):
    from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO, load_from_checkpoint

    wrapped = importlib.import_module(pl.__name__ + ".plugins.io").AsyncCheckpointIO(StreamingCheckpointIO())
    stock = resume(pl)
    for given in (
        {"callbacks": MemoryEfficientRestore()},
        {"callbacks": [MemoryEfficientRestore(asynchronous_save=True)]},
        {"plugins": [StreamingCheckpointIO()]},
        {"plugins": [wrapped], "callbacks": [MemoryEfficientRestore()]},
    ):
        assert resume(pl, **given) == stock, given
    restore = MemoryEfficientRestore()
    make_trainer(pl, callbacks=[restore]).validate(net(pl)(), data(), ckpt_path="net.ckpt", verbose=False)
    assert restore.report.bytes_verified > 0
    module = load_from_checkpoint(net(pl), "net.ckpt", weights_only=False)
    assert type(module).__mro__[1] is pl.LightningModule
    assert module.hparams.size == 8
"""

ALONE = (
    START
    + """
logger = f"{ARGS['package']}.utilities.rank_zero"
if ARGS["first"]:
    importlib.import_module(ARGS["package"])
from lightning_memload import MemoryEfficientRestore

pl = importlib.import_module(ARGS["package"])
RESULT = {"imported": imported(), "watched": any("lightning_memload" in type(f).__module__ for f in sys.meta_path)}
assert issubclass(MemoryEfficientRestore, pl.Callback)
import lightning_utilities.core.rank_zero as rank_zero

assert rank_zero.log.name == logger, rank_zero.log
write(pl)
ways(pl)
RESULT["imported at the end"] = imported()
"""
)

BOTH = (
    START
    + """
from lightning_memload import MemoryEfficientRestore, StreamingCheckpointIO


class Subclass(MemoryEfficientRestore):
    pass


made = Subclass(), StreamingCheckpointIO()
for name in ARGS["packages"]:
    pl = importlib.import_module(name)
    fabric = importlib.import_module(ARGS["fabric"][name])
    copies = copy.deepcopy(made), pickle.loads(pickle.dumps(made)), (Subclass(), StreamingCheckpointIO())
    for callback, io in (made, *copies):
        assert isinstance(callback, pl.Callback)
        assert callback.state_key == "Subclass"
        assert isinstance(io, fabric.plugins.CheckpointIO)
    assert pl.callbacks.callback.__spec__.loader is pl.callbacks.callback.__loader__
    assert type(pl.callbacks.callback.__loader__).__module__.startswith("_frozen_importlib")
    write(pl)
    ways(pl)
RESULT = [finder for finder in sys.meta_path if "lightning_memload" in type(finder).__module__]
"""
)


@pytest.mark.first("first")
@pytest.mark.parametrize("first", [True, False], ids=["package first", "memload first"])
@pytest.mark.parametrize("package", PACKAGES)
def test_program_of_one_package(package: str, first: bool) -> None:
    """It resumes as stock, its messages go where stock sends them, and the other package stays out."""
    result = run_fresh(ALONE, package=package, first=first, hidden=[], broken=False).result
    # Only who imports us first and Lightning's other name then has both: what it was going to be is not known yet.
    own = package.partition(".")[0]
    expected = [own] if first or own == "lightning" else ["lightning", own]
    assert result == {"imported": expected, "watched": len(expected) == 1, "imported at the end": expected}


@pytest.mark.parametrize(("package", "broken"), [(PACKAGES[0], False), (PACKAGES[1], True)], ids=str)
@pytest.mark.first("package")
def test_other_package_cannot_be_imported(package: str, broken: bool) -> None:
    hidden = [name.partition(".")[0] for name in PACKAGES if name != package]
    result = run_fresh(ALONE, package=package, first=False, hidden=hidden, broken=broken).result
    assert result["imported at the end"] == [package.partition(".")[0]]


def test_no_package_can_be_imported() -> None:
    with pytest.raises(FreshProcessError, match=r"(?s)needs lightning>=2\.5.*No module lightning\).*pytorch_lightning"):
        run_fresh(
            START + "from lightning_memload import MemoryEfficientRestore",
            hidden=["lightning", "pytorch_lightning"],
            broken=False,
        )


@pytest.mark.first("packages")
@pytest.mark.parametrize("packages", [PACKAGES, PACKAGES[::-1]], ids=" then ".join)
def test_program_of_both_packages(packages: tuple[str, ...]) -> None:
    assert run_fresh(BOTH, packages=packages, fabric=FABRIC, hidden=[], broken=False).result == []


# What stock says to a run with an object of the other package, and that ours adds which one. What works, works.
MIXED = (
    START
    + """
from lightning_memload import MemoryEfficientRestore

home, other = map(importlib.import_module, ARGS["packages"])
write(home)
Module = net(home)


class Data(other.LightningDataModule):
    def train_dataloader(self):
        return data()


def run(ours, callbacks=(), **kwargs):
    try:
        trainer = make_trainer(home, callbacks=[*([MemoryEfficientRestore()] if ours else []), *callbacks])
        trainer.fit(Module(), **kwargs)
    except Exception as error:
        return str(error)


accumulation = other.callbacks.GradientAccumulationScheduler({0: 2})
RESULT = {
    "callback": [run(ours, [accumulation], train_dataloaders=data()) for ours in (False, True)],
    "datamodule": [run(ours, datamodule=Data()) for ours in (False, True)],
    "dataloader": [run(ours, train_dataloaders=Data()) for ours in (False, True)],
    "works": [run(ours, [other.callbacks.Timer()], train_dataloaders=data()) for ours in (False, True)],
    "another error": [run(True, [accumulation, other.callbacks.Timer()]), run(True, train_dataloaders=3)],
}
"""
)


def test_mixed_imports_are_told() -> None:
    home, other = packages = PACKAGES[::-1]
    result = run_fresh(MIXED, packages=packages, hidden=[], broken=False).result
    for case, name in (("callback", "GradientAccumulationScheduler"), ("datamodule", "Data"), ("dataloader", "Data")):
        stock, ours = result[case]
        if case == "callback" and not TRUSTED:
            assert ours == stock  # Lightning 2.5 refuses such callbacks, and says why, before ours can
            continue
        assert ours.startswith(f"{stock.rstrip('.')}. The Trainer comes from {home}, and these objects do not: {name} ")
        assert f"{name} from {other}. " in ours
        assert "Import all of them from one package." in ours
    assert result["works"] == ([None, None] if TRUSTED else [result["works"][0]] * 2)
    assert "comes from" not in result["another error"][1]


def test_names_of_lightning_are_there_under_both_names() -> None:
    """A name that only one package, or none, has would be found missing by the user who needs it."""
    names = {
        node.value
        for file in ROOM.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.startswith(("lightning.pytorch.", "lightning.fabric.")) and " " not in node.value
    }
    assert len(names) > 10
    for package, fabric in FABRIC.items():
        for name in names - {"lightning.pytorch.cli.instantiate_module"}:
            assert Package(package, fabric).find(name) is not None


def test_package_of_what_lightning_made() -> None:
    for thing in (L.Trainer, L.LightningModule(), type("Mine", (L.Callback,), {})()):
        assert package_of(thing).pytorch == L.PYTORCH
        assert package_of(thing).version == importlib.import_module(L.PYTORCH).__version__
    assert package_of(3).pytorch in sys.modules


def test_a_name_outside_lightning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'torch\.nn\.Linear' is in neither"):
        package_of(L.Trainer).find("torch.nn.Linear")


def test_load_from_checkpoint_names_what_is_no_lightning_module(tmp_path: Path) -> None:
    cls: Any = torch.nn.Linear
    with pytest.raises(TypeError, match=r"needs a LightningModule, and Linear is not one.*load_weights"):
        load_from_checkpoint(cls, tmp_path / "x.ckpt")
    with pytest.raises(TypeError, match=r"needs the class of the module, got a Linear\. Pass the class"):
        load_from_checkpoint(cls(2, 2), tmp_path / "x.ckpt")


def test_unsaid_weights_only_is_what_the_older_package_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_memload.plugins import checkpoint_io

    path = tmp_path / "any.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "any": Path("any")}, path)
    io = StreamingCheckpointIO()
    if "weights_only" in checkpoint_io.TorchCheckpointIO.load_checkpoint.__annotations__:
        with pytest.raises(Exception, match="weights_only"):
            io.load_checkpoint(path)
    stock = checkpoint_io._stock()
    monkeypatch.setattr(checkpoint_io, "_stock", lambda: (_Old, *stock))
    assert io.load_checkpoint(path)["any"] == Path("any")
    with pytest.raises(Exception, match="weights_only"):
        io.load_checkpoint(path, weights_only=True)


class _Old:
    def load_checkpoint(self, path: Any, map_location: Any = None) -> Any: ...


def test_callback_and_plugin_know_no_package_by_name() -> None:
    assert MemoryEfficientRestore().state_key == "MemoryEfficientRestore"
    assert issubclass(MemoryEfficientRestore, L.Callback)
