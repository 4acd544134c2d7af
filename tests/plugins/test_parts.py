"""Part of a checkpoint, weights from elsewhere, and modules built from a file: each against what Lightning does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import tests.lightning as L
from lightning_memload import (
    CheckpointFormatError,
    IncompatibleWeightsError,
    IncompleteCheckpointError,
    MemoryEfficientRestore,
    WeightsSource,
    load_from_checkpoint,
    meta_init,
    open_checkpoint,
)
from tests.plugins.harness import (
    TRUSTED,
    Case,
    TinyModule,
    adamw,
    assert_same,
    make_trainer,
    write_checkpoint,
)


def with_schedule(parameters: Any) -> Any:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3)}


class Scheduled(TinyModule):
    def __init__(self) -> None:
        super().__init__(with_schedule)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint in the second epoch, with a callback's state in it."""
    return write_checkpoint(Case(Scheduled, callbacks=lambda: [Counter()], save_after=10), tmp_path)


class Counter(L.Callback):
    """Counts batches, and keeps the count in checkpoints."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def bytes_of(path: Path, part: str) -> int:
    return sum(tensor.nbytes for tensor in open_checkpoint(path) if tensor.path[0] == part)


class Restored(L.Callback):
    """Stops when training starts, with everything as it was restored."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = {
            "weights": {name: value.clone() for name, value in pl_module.state_dict().items()},
            "optimizer": [dict(optimizer.state) for optimizer in trainer.optimizers],
            "lr": [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs],
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
        }
        trainer.should_stop = True
        trainer.limit_train_batches = 0


def restored(folder: Path, path: Path | str, module: L.LightningModule, **options: Any) -> tuple[dict[str, Any], int]:
    """The state when training starts, and the count of the callback."""
    watch, counter = Restored(), Counter()
    callback = MemoryEfficientRestore(**options)
    trainer = make_trainer(folder, [callback, counter, watch], max_epochs=1000)
    trainer.fit(module, ckpt_path=str(path), **TRUSTED)
    watch.seen["report"] = callback.report
    return watch.seen, counter.count


def sorted_name(parts: Any) -> str:
    """The same in every process: processes that share the tests must agree on their names."""
    return f"{type(parts).__name__}-{'-'.join(sorted(parts))}"


class TestRestore:
    @pytest.mark.parametrize("parts", [["weights"], {"weights", "loops"}, ("optimizer",), ["callbacks", "loops"],
                                       ["weights", "optimizer", "loops", "callbacks"]], ids=sorted_name)  # fmt: skip
    @pytest.mark.parametrize("meta", [False, True])
    def test_parts(self, path: Path, tmp_path: Path, parts: Any, meta: bool) -> None:
        if meta and "weights" not in parts:
            pytest.skip("nothing gives such a module values")
        saved = torch.load(path, weights_only=False)
        torch.manual_seed(4)
        module = Scheduled()
        initial = {name: value.clone() for name, value in module.state_dict().items()}
        with meta_init(meta):
            module = Scheduled() if meta else module
        seen, count = restored(tmp_path, path, module, restore=parts)
        assert_same(dict(saved["state_dict"]) if "weights" in parts else initial, seen["weights"], "weights")
        assert [len(state) for state in seen["optimizer"]] == [4 if "optimizer" in parts else 0]
        assert seen["lr"] == [saved["lr_schedulers"][0]["last_epoch"] if "optimizer" in parts else 0]
        assert (seen["step"], seen["epoch"]) == ((10, 1) if "loops" in parts else (0, 0))
        assert count == (10 if "callbacks" in parts else 0)
        wanted = sum(
            bytes_of(path, key)
            for part, key in (("weights", "state_dict"), ("optimizer", "optimizer_states"))
            if part in parts
        )
        assert wanted <= seen["report"].total.bytes_read <= wanted + 4096  # what lies between small tensors

    def test_an_optimizer_that_is_left_behind_is_not_read(self, tmp_path: Path) -> None:
        class Wide(Scheduled):
            def __init__(self) -> None:
                super().__init__()
                self.wide = nn.Linear(300, 300)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step(batch, batch_idx) + self.wide(torch.ones(300)).mean()

        path = write_checkpoint(Case(Wide), tmp_path)
        seen, _ = restored(tmp_path, path, Wide(), restore=["weights", "loops"])
        assert seen["report"].total.bytes_read < 1.2 * bytes_of(path, "state_dict")

    @pytest.mark.parametrize("kind", ["save_weights_only", "bare", "nested", "without-version"])
    def test_files_of_weights(self, path: Path, tmp_path: Path, kind: str) -> None:
        saved = torch.load(path, weights_only=False)
        weights = dict(saved["state_dict"])
        keys = ("state_dict", "pytorch-lightning_version", "loops", "epoch", "global_step")
        content: dict[str, Any] = {
            "save_weights_only": {key: saved[key] for key in keys},
            "bare": weights,
            "nested": {"model": weights, "step": 3},
            "without-version": {"state_dict": weights, "epoch": 3},
        }[kind]
        torch.save(content, path)
        module = Scheduled()
        seen, _ = restored(tmp_path, path, module, restore=["weights"])
        assert_same(weights, seen["weights"], "weights")
        assert seen["step"] == 0

        module = Scheduled()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(
            IncompleteCheckpointError, match=r"not: optimizer \(optimizer_states, lr_schedulers\)"
        ) as caught:
            restored(tmp_path, path, module)
        assert f"{path} holds weights" in str(caught.value)
        assert "restore=['weights" in str(caught.value)
        assert caught.value.missing == ("optimizer",)
        assert_same(before, dict(module.state_dict()), "nothing was changed")

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_evaluation_takes_a_bare_state_dict(self, path: Path, tmp_path: Path, stage: str) -> None:
        class Evaluated(TinyModule):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(*batch)

            test_step = validation_step

        weights = dict(torch.load(path, weights_only=False)["state_dict"])
        torch.save(weights, path)
        module = Evaluated()
        trainer = make_trainer(tmp_path, [MemoryEfficientRestore()])
        getattr(trainer, stage)(module, module.train_dataloader(), ckpt_path=str(path), **TRUSTED)
        assert_same(weights, dict(module.state_dict()), "weights")

    def test_a_hook_may_supply_what_is_missing(self, path: Path, tmp_path: Path) -> None:
        class Supplies(Scheduled):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []

        saved = torch.load(path, weights_only=False)
        torch.save({key: saved[key] for key in ("state_dict", "pytorch-lightning_version")}, path)
        seen, _ = restored(tmp_path, path, Supplies())
        assert_same(dict(saved["state_dict"]), seen["weights"], "weights")

    @pytest.mark.parametrize("kind", ["Dropping", "Renaming", "Editing"])
    def test_weights_that_stay_are_loaded_in_the_way_of_the_module(self, tmp_path: Path, kind: str) -> None:
        seen_by_hook: list[dict[str, Any]] = []

        class Hooked(Scheduled):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                seen_by_hook.append(dict(checkpoint["state_dict"]))

        class Dropping(Hooked):
            strict_loading = False

            def state_dict(self) -> Any:
                return {name: value for name, value in super().state_dict().items() if name.startswith("second")}

        class Renaming(Hooked):
            def state_dict(self) -> Any:
                return {f"net.{name}": value for name, value in super().state_dict().items()}

            def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
                return super().load_state_dict({name[4:]: value for name, value in state_dict.items()}, strict)

        class Editing(Hooked):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                super().on_load_checkpoint(checkpoint)
                checkpoint["state_dict"]["second.bias"][:2] = 7.0  # a parameter that is trained would refuse that
                checkpoint["state_dict"]["first.bias"] = checkpoint["state_dict"]["first.bias"] + 1

        build = {"Dropping": Dropping, "Renaming": Renaming, "Editing": Editing}[kind]
        path = write_checkpoint(Case(build), tmp_path)
        saved = torch.load(path, weights_only=False)
        torch.manual_seed(4)
        module = build()
        initial = {name: value.clone() for name, value in module.state_dict().items()}
        if kind == "Editing":
            initial["second.bias"][:2], initial["first.bias"] = 7.0, initial["first.bias"] + 1
        seen, _ = restored(tmp_path, path, module, restore=["optimizer", "loops"])
        assert_same(initial, seen["weights"], "weights")
        assert list(seen_by_hook[-1]) == list(saved["state_dict"])
        assert (seen["step"], len(seen["optimizer"][0])) == (5, 4)

    @pytest.mark.parametrize("key", ["weights", "adapter"])
    @pytest.mark.parametrize("stage", ["fit", "validate"])
    def test_a_hook_may_supply_the_weights(self, tmp_path: Path, key: str, stage: str) -> None:
        class Renamed(Scheduled):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint[key] = checkpoint.pop("state_dict")

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["state_dict"] = checkpoint[key]

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                pass

            def val_dataloader(self) -> Any:
                return self.train_dataloader()

        path = write_checkpoint(Case(Renamed, save_after=10), tmp_path)
        modules = []
        for callbacks in ([], [MemoryEfficientRestore()]):
            torch.manual_seed(len(callbacks))
            modules.append(Renamed())
            torch.manual_seed(7)
            trainer = make_trainer(tmp_path, callbacks, max_steps=12)
            getattr(trainer, stage)(modules[-1], ckpt_path=path, **TRUSTED)
            assert trainer.global_step == (12 if stage == "fit" else 0)
        stock, ours = (module.state_dict() for module in modules)
        assert all(torch.equal(value, ours[name]) for name, value in stock.items())

    def test_a_callback_may_supply_optimizer_states(self, path: Path, tmp_path: Path) -> None:
        class Supplies(L.Callback):
            def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
                checkpoint["optimizer_states"] = checkpoint["mine"]

        checkpoint = torch.load(path, weights_only=False)
        checkpoint["mine"] = checkpoint.pop("optimizer_states")
        torch.save(checkpoint, path)
        trainer = make_trainer(tmp_path, [Supplies(), Counter(), MemoryEfficientRestore()], max_steps=12)
        trainer.fit(Scheduled(), ckpt_path=path, **TRUSTED)
        assert trainer.global_step == 12

    @pytest.mark.parametrize(("parts", "position"), [(["weights"], 0), (["weights", "loops"], 3), (None, 3)])
    def test_data_goes_on_with_the_loops(self, tmp_path: Path, parts: Any, position: int) -> None:
        class Data(L.LightningDataModule):
            position = 0

            def train_dataloader(self) -> Any:
                return Scheduled().train_dataloader()

            def state_dict(self) -> dict[str, Any]:
                return {"position": 3}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                self.position = state_dict["position"]

        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(Scheduled(), datamodule=Data())
        trainer.save_checkpoint(tmp_path / "data.ckpt")
        data = Data()
        trainer = make_trainer(tmp_path, [MemoryEfficientRestore(restore=parts)], max_steps=4)
        trainer.fit(Scheduled(), datamodule=data, ckpt_path=tmp_path / "data.ckpt", **TRUSTED)
        assert data.position == position

    def test_no_weights_at_all(self, path: Path, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, path)
        with pytest.raises(CheckpointFormatError, match="No state dict is found"):
            restored(tmp_path, path, Scheduled())

    def test_named_parts_must_be_there(self, path: Path, tmp_path: Path) -> None:
        saved = torch.load(path, weights_only=False)
        del saved["loops"], saved["callbacks"]
        torch.save(saved, path)
        with pytest.raises(IncompleteCheckpointError, match=r"not: loops \(loops\); callbacks \(callbacks\)"):
            restored(tmp_path, path, Scheduled(), restore=["weights", "loops", "callbacks"])
        restored(tmp_path, path, Scheduled())  # as Lightning, which goes on without them

    @pytest.mark.parametrize("parts", ["weight", [], ["weight"], [1]])
    def test_unknown_parts(self, parts: Any) -> None:
        with pytest.raises(ValueError, match="restore must be some of 'weights', 'optimizer', 'loops', 'callbacks'"):
            MemoryEfficientRestore(restore=parts)

    def test_an_old_checkpoint_is_migrated_first(self, path: Path, tmp_path: Path) -> None:
        saved = torch.load(path, weights_only=False)
        saved["pytorch-lightning_version"] = "1.9.0"
        torch.save(saved, path)
        seen, count = restored(tmp_path, path, Scheduled(), restore=["weights", "callbacks"])
        assert_same(dict(saved["state_dict"]), seen["weights"], "weights")
        assert (seen["step"], count) == (0, 10)


class TestWeightsFrom:
    @pytest.fixture
    def pretrained(self, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
        torch.manual_seed(77)
        weights = TinyModule().state_dict()
        torch.save({"model": {f"net.{name}": value for name, value in weights.items()}}, tmp_path / "pretrained.pt")
        return tmp_path / "pretrained.pt", dict(weights)

    class Copies(L.Callback):
        """Copies the weights that training starts with."""

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.at_start = {name: value.clone() for name, value in pl_module.state_dict().items()}

    @pytest.mark.parametrize("way", ["init", "meta", "configure_model", "bf16"])
    def test_training_starts_from_them(self, pretrained: Any, tmp_path: Path, way: str) -> None:
        path, weights = pretrained

        class Late(TinyModule):
            def __init__(self) -> None:
                super().__init__(adamw)
                del self.first, self.second

            def configure_model(self) -> None:
                self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 6)

        with meta_init(way == "meta"):
            module: TinyModule = Late() if way == "configure_model" else TinyModule(adamw)
        copies = self.Copies()
        callback = MemoryEfficientRestore(weights_from=WeightsSource(path, strip_prefix="net."))
        options: dict[str, Any] = {"precision": "bf16-true"} if way == "bf16" else {}
        trainer = make_trainer(tmp_path, [callback, copies], max_steps=2, **options)
        trainer.fit(module)
        expected = {name: value.bfloat16() if way == "bf16" else value for name, value in weights.items()}
        assert_same(expected, copies.at_start, "weights")
        assert callback.report is not None
        assert [phase.name for phase in callback.report.phases] == ["open", "weights"]
        assert (callback.report.global_step, callback.report.path) == (0, str(path))
        assert callback.report.total.bytes_read >= sum(value.nbytes for value in weights.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_assigned_bytes_are_reported(self, pretrained: Any, tmp_path: Path, dtype: torch.dtype) -> None:
        path, weights = pretrained
        callback = MemoryEfficientRestore(mode="assign", weights_from=WeightsSource(path, strip_prefix="net."))
        with meta_init():
            module = TinyModule(adamw).to(dtype)
        make_trainer(tmp_path, [callback], max_steps=0).fit(module)
        report, nbytes = callback.report, sum(value.nbytes for value in weights.values())
        assert report is not None
        if dtype == torch.float32:
            assert report.bytes_assigned == report.bytes_verified == nbytes <= report.total.bytes_read
            assert (report.mode, report.mode_reason) == ("assign", "as configured")
        else:  # what must be converted cannot be the file's pages
            assert report.bytes_assigned == 0 < nbytes <= report.total.bytes_read
            assert (report.mode, report.mode_reason) == ("copy", "no parameter could be pages of the file")

    def test_only_once_for_a_module(self, pretrained: Any, tmp_path: Path) -> None:
        path, weights = pretrained
        module = TinyModule(adamw)
        callback = MemoryEfficientRestore(weights_from=WeightsSource(path, strip_prefix="net."))
        make_trainer(tmp_path, [callback], max_steps=2).fit(module)
        trained = {name: value.clone() for name, value in module.state_dict().items()}
        make_trainer(tmp_path, [callback]).predict(module, module.train_dataloader())
        assert_same(trained, dict(module.state_dict()), "after predict")
        copies = self.Copies()
        make_trainer(tmp_path, [callback, copies], max_steps=2).fit(module)
        assert_same(trained, dict(copies.at_start), "second fit")
        # Another module has not got them yet.
        copies = self.Copies()
        make_trainer(tmp_path, [callback, copies], max_steps=2).fit(TinyModule(adamw))
        assert_same(weights, dict(copies.at_start), "another module")

    def test_a_checkpoint_comes_first(self, pretrained: Any, path: Path, tmp_path: Path) -> None:
        source = WeightsSource(pretrained[0], strip_prefix="net.")
        seen, _ = restored(tmp_path, path, Scheduled(), weights_from=source)
        assert_same(dict(torch.load(path, weights_only=False)["state_dict"]), seen["weights"], "weights")
        assert seen["step"] == 10
        # The other file is not even opened, and may be gone; the report is that of the resume.
        pretrained[0].unlink()
        seen, _ = restored(tmp_path, path, Scheduled(), weights_from=source)
        assert seen["report"].path == str(path)
        assert [phase.name for phase in seen["report"].phases] == ["open", "weights", "optimizers"]

    def test_a_new_head(self, pretrained: Any, tmp_path: Path) -> None:
        path, weights = pretrained

        class NewHead(TinyModule):
            def __init__(self) -> None:
                super().__init__(adamw)
                self.second = nn.Linear(10, 6)
                self.extra = nn.Linear(6, 3)

            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                return super().forward(inputs) + self.extra(inputs).mean()

        trainer = make_trainer(
            tmp_path, [MemoryEfficientRestore(weights_from=WeightsSource(path, strip_prefix="net."))]
        )
        with pytest.raises(IncompatibleWeightsError, match=r"2 missing: extra\.weight, extra\.bias"):
            trainer.fit(NewHead())
        with meta_init():
            module = NewHead()
        copies = self.Copies()
        source = WeightsSource(path, strip_prefix="net.", exclude=[r"^extra\.", r"^second\."])
        make_trainer(tmp_path, [MemoryEfficientRestore(weights_from=source), copies], max_steps=1).fit(module)
        assert torch.equal(copies.at_start["first.weight"], weights["first.weight"])
        assert not torch.equal(copies.at_start["second.weight"], weights["second.weight"])
        assert copies.at_start["extra.weight"].std() > 0

    @pytest.mark.parametrize("source", [{"path": "w.pt"}, 3])
    def test_no_source(self, source: Any) -> None:
        with pytest.raises(ValueError, match="weights_from must be a path or a WeightsSource"):
            MemoryEfficientRestore(weights_from=source)
        with pytest.raises(ValueError, match=r"exclude: '\(' is no regular expression"):
            WeightsSource("w.pt", exclude="(")

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path) -> None:
        module = TinyModule(adamw)
        with pytest.raises(FileNotFoundError):
            make_trainer(tmp_path, [MemoryEfficientRestore(weights_from=tmp_path / "absent.pt")]).fit(module)
        assert not module._load_state_dict_pre_hooks
        make_trainer(tmp_path, [MemoryEfficientRestore()], max_steps=1).fit(module)


@pytest.mark.skipif(not hasattr(L.pytorch.callbacks, "WeightAveraging"), reason="Lightning 2.5 has no such callback")
@pytest.mark.parametrize("way", ["weights_from", "restore"])
@pytest.mark.parametrize("first", [True, False])
def test_averages_begin_with_the_weights(path: Path, tmp_path: Path, way: str, first: bool) -> None:
    average = L.pytorch.callbacks.WeightAveraging(use_buffers=True)
    average.should_update = lambda *_, **__: False
    restore = MemoryEfficientRestore(**({"weights_from": path} if way == "weights_from" else {"restore": ["weights"]}))
    trainer = make_trainer(tmp_path, [restore, average] if first else [average, restore], max_steps=2)
    trainer.fit(Scheduled(), ckpt_path=path if way == "restore" else None, **(TRUSTED if way == "restore" else {}))
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    expected = torch.load(path, weights_only=False)["state_dict"]
    found = torch.load(tmp_path / "averaged.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Scripted(TinyModule):
    def __init__(self) -> None:
        super().__init__(adamw)
        self.layer = torch.jit.script(nn.Linear(2, 2))


class NeedsValues(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = next(self.parameters()).tolist()


class Configured(L.LightningModule):
    """Hyperparameters, a layer of configure_model, and a hook."""

    def __init__(self, width: int, depth: int = 2, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["activation"])
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.activation = activation
        self.last: nn.Module | None = None
        self.loaded_epoch: int | None = None

    def configure_model(self) -> None:
        if self.last is None:
            self.last = nn.Linear(self.hparams["width"], 1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_epoch = checkpoint["epoch"]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.last(self.layers(torch.ones(2, self.hparams["width"]))).mean()  # type: ignore[misc]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(4, 1))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class TestLoadFromCheckpoint:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(Configured(width=12, depth=3))
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        return tmp_path / "c.ckpt"

    @pytest.mark.parametrize("mode", ["copy", "assign"])
    def test_like_lightning(self, path: Path, mode: Any) -> None:
        stock = Configured.load_from_checkpoint(path, map_location="cpu")
        ours = load_from_checkpoint(Configured, path, mode=mode)
        assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "weights")
        assert ours.hparams == stock.hparams
        assert ours.loaded_epoch == stock.loaded_epoch is not None
        assert ours.training == stock.training
        assert torch.equal(ours.table, torch.arange(3.0))
        assert all(parameter.requires_grad for parameter in ours.parameters())

    def test_what_needs_values_is_built_in_memory(self, tmp_path: Path) -> None:
        path = write_checkpoint(Case(NeedsValues), tmp_path)
        expected = torch.load(path, weights_only=False)["state_dict"]
        with pytest.warns(UserWarning, match=r"meta_init built 0\.0 MiB .*Linear\.weight: tolist\(\)"):
            module = load_from_checkpoint(NeedsValues, path, weights_only=False)
        assert_same(dict(expected), dict(module.state_dict()), "weights")

    def test_overrides(self, path: Path) -> None:
        activation = nn.ReLU()
        ours = load_from_checkpoint(Configured, path, activation=activation)
        assert ours.activation is activation
        with pytest.raises(IncompatibleWeightsError, match=r"has shape \(5, 5\) in the module and \(12, 12\) on disk"):
            load_from_checkpoint(Configured, path, width=5)
        with (
            pytest.warns(
                UserWarning, match=r"6 of 6 tensors loaded; unused in the file: layers\.2\.weight, layers\.2\.bias\.$"
            ),
        ):
            assert len(load_from_checkpoint(Configured, path, depth=2, strict=False).layers) == 2
        with pytest.raises(
            TypeError, match=r"Configured\.__init__\(\) have no argument map_location, widht\. Pass the device"
        ):
            load_from_checkpoint(Configured, path, map_location="cpu", widht=3)
        with pytest.warns(
            UserWarning, match=r"8 of 10 tensors loaded; new: layers\.3\.weight, layers\.3\.bias\. New layers"
        ):
            deeper = load_from_checkpoint(Configured, path, depth=4, strict=False)
        assert deeper.layers[3].weight.std() > 0

    def test_a_class_that_takes_anything_takes_no_map_location(self, path: Path) -> None:
        class Anything(Configured):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)

        with pytest.raises(TypeError, match=r"have no argument map_location\. Pass the device as device="):
            load_from_checkpoint(Anything, path, map_location="cpu")

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_what_torch_jit_compiles_is_built_in_memory(self, tmp_path: Path) -> None:
        path = write_checkpoint(Case(Scripted), tmp_path)
        expected = torch.load(path, weights_only=False)["state_dict"]
        with pytest.warns(UserWarning, match=r"Linear\.weight: .*compiled module holds it"):
            module = load_from_checkpoint(Scripted, path, weights_only=False)
        assert_same(dict(expected), dict(module.state_dict()), "weights")

    def test_strictness_of_the_module(self, path: Path) -> None:
        class Loose(Configured):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.strict_loading = False

        with pytest.warns(UserWarning, match="8 of 10 tensors loaded; new:"):
            load_from_checkpoint(Loose, path, depth=4)
        with pytest.raises(ValueError, match=r"strict=True\) contradicts Loose\.strict_loading=False"):
            load_from_checkpoint(Loose, path, strict=True)

    def test_optimizer_states_are_not_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_memload.restore import RestoreSession

        read: list[int] = []
        close = RestoreSession.close
        monkeypatch.setattr(
            RestoreSession, "close", lambda self, **kwargs: read.append(self.stats.bytes_read) or close(self, **kwargs)
        )
        trainer = make_trainer(path.parent, max_steps=2)
        trainer.fit(Configured(width=100))  # farther from one another than what is read over
        trainer.save_checkpoint(path)
        load_from_checkpoint(Configured, path)
        assert read[0] <= bytes_of(path, "state_dict") + 4096

    def test_a_bare_state_dict(self, path: Path) -> None:
        class Bare(Configured):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                assert set(checkpoint) == {"state_dict", "hyper_parameters"}

        weights = torch.load(path, weights_only=True)["state_dict"]
        torch.save(weights, path)
        ours = load_from_checkpoint(Bare, path, width=12, depth=3)
        assert_same(dict(weights), dict(ours.state_dict()), "weights")

    @pytest.mark.parametrize("instantiator", ["os.system", "tests.plugins.test_parts.bytes_of", 3])
    def test_a_file_cannot_name_code(self, path: Path, instantiator: Any) -> None:
        saved = torch.load(path, weights_only=False)
        saved["hyper_parameters"]["_instantiator"] = instantiator
        torch.save(saved, path)
        with pytest.raises(ValueError, match=r"which is not LightningCLI's\. It was not run"):
            load_from_checkpoint(Configured, path)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, for what Lightning calls
    def test_what_the_command_line_saves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.lightning.pytorch.cli import LightningCLI

        monkeypatch.setattr("sys.argv", ["train.py"])
        cli = LightningCLI(
            Configured,
            args={
                "model": {"width": 7, "depth": 1},
                "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False,
                            "enable_model_summary": False, "default_root_dir": str(tmp_path)},
            },
            run=False,
            seed_everything_default=1,
            save_config_callback=None,
        )  # fmt: skip
        cli.trainer.fit(cli.model)
        cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
        assert "_instantiator" in torch.load(tmp_path / "cli.ckpt", weights_only=False)["hyper_parameters"]
        stock = Configured.load_from_checkpoint(tmp_path / "cli.ckpt", weights_only=False) if TRUSTED else None
        ours = load_from_checkpoint(Configured, tmp_path / "cli.ckpt", weights_only=False)
        assert ours.hparams["width"] == 7
        if stock is not None:
            assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "weights")


def test_a_finished_run_starts_again(path: Path, tmp_path: Path) -> None:
    """The reason people ask for parts: Lightning takes the old run's epochs and patience along, and stops at once."""
    saving = ModelCheckpoint(tmp_path / "saved")
    callback = MemoryEfficientRestore(restore=["weights"])
    trainer = make_trainer(tmp_path, [callback, saving], enable_checkpointing=True, max_steps=2)
    trainer.fit(Scheduled(), ckpt_path=str(path), **TRUSTED)
    assert trainer.global_step == 2
