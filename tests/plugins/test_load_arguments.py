"""Arguments of a module with the names of options of ``load_from_checkpoint``: it gets them, as with Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_memload import load_from_checkpoint
from tests.plugins.harness import TinyModule, assert_same, make_trainer


class Named(TinyModule):
    """Its arguments have the names of options."""

    def __init__(
        self,
        mode: str = "train",
        path: str = "/data",
        device: str = "sensor-1",
        num_threads: int = 3,
        cls: str = "x",
        strict: Any = "very",
        options: int = 1,
        dtype: str = "f4",
        verify: Any = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.got = {**self.hparams}


class OnwardNamed(Named):
    """Passes on what it does not name."""

    def __init__(self, extra: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.got["extra"] = extra


class Anything(TinyModule):
    """Takes any keyword."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.got = kwargs


class Whole(TinyModule):
    """Takes its hyperparameters as one dict."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(config)
        self.got = dict(config)


KEYWORDS: list[dict[str, Any]] = [
    {"mode": "classify"},
    {"path": "/elsewhere"},
    {"device": "sensor-2"},
    {"verify": 2.5},
    {"options": 4, "dtype": "f2"},
    {"num_threads": "all"},
    {},
]


class TestArgumentsWithTheNamesOfOptions:
    @staticmethod
    def save(module: Any, folder: Path) -> Path:
        trainer = make_trainer(folder, max_steps=1)
        trainer.fit(module)
        trainer.save_checkpoint(folder / "named.ckpt")
        return folder / "named.ckpt"

    @pytest.mark.parametrize("build", [Named, OnwardNamed])
    @pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
    def test_a_module_gets_what_it_names(self, tmp_path: Path, build: Any, keywords: dict[str, Any]) -> None:
        path = self.save(build(mode="saved", strict="saved"), tmp_path)
        stock = build.load_from_checkpoint(path, **keywords)
        ours = load_from_checkpoint(build, path, **keywords)
        assert ours.got == stock.got
        assert ours.got["strict"] == "saved"
        assert_same(dict(stock.state_dict()), dict(ours.state_dict()), "weights")

    @pytest.mark.parametrize("keywords", [{"num_threads": 7}, {"device": "cpu"}, {"mode": "assign"}], ids=str)
    def test_what_could_be_an_option_as_well_is_told(self, tmp_path: Path, keywords: dict[str, Any]) -> None:
        path = self.save(Named(), tmp_path)
        (name,) = keywords
        with pytest.warns(UserWarning, match=rf"^{name}=.* is taken as the argument of Named\. To choose explicitly"):
            ours = load_from_checkpoint(Named, path, **keywords)
        assert ours.got[name] == keywords[name]
        assert ours.got == load_from_checkpoint(Named, path, {}, **keywords).got  # no warning
        assert load_from_checkpoint(Named, path, {"num_threads": 1}).got["num_threads"] == 3

    def test_a_name_that_lightning_keeps_for_itself(self, tmp_path: Path) -> None:
        path = self.save(Named(), tmp_path)
        stock = Named.load_from_checkpoint(path, strict=False)
        with pytest.warns(UserWarning, match=r"^strict=False is taken as the option .* as in Lightning"):
            ours = load_from_checkpoint(Named, path, strict=False)
        assert ours.got == stock.got
        assert load_from_checkpoint(Named, path, {}, strict=False, cls="y").got == {
            **stock.got,
            "strict": False,
            "cls": "y",
        }

    def test_a_module_that_takes_anything(self, tmp_path: Path) -> None:
        path = self.save(Anything(mode="saved", other=1), tmp_path)
        assert load_from_checkpoint(Anything, path, mode="classify").got == {"mode": "classify", "other": 1}
        with pytest.warns(
            UserWarning, match=r"^num_threads=2 is taken as the option .*, not as an argument of Anything"
        ):
            assert load_from_checkpoint(Anything, path, num_threads=2).got == {"mode": "saved", "other": 1}
        with pytest.warns(UserWarning, match=r"^device='sensor-2' is taken as an argument of Anything"):
            assert load_from_checkpoint(Anything, path, device="sensor-2").got["device"] == "sensor-2"
        both = load_from_checkpoint(Anything, path, {"device": "cpu", "mode": "assign"}, device="here", mode="there")
        assert both.got == {"mode": "there", "other": 1, "device": "here"}

    def test_a_module_that_takes_one_dict(self, tmp_path: Path) -> None:
        path = self.save(Whole({"mode": "saved", "width": 3}), tmp_path)
        stock = Whole.load_from_checkpoint(path, config={"mode": "new"})
        assert load_from_checkpoint(Whole, path, config={"mode": "new"}).got == stock.got
        assert load_from_checkpoint(Whole, path).got == {"mode": "saved", "width": 3}

    def test_hyperparameters_from_a_file(self, tmp_path: Path) -> None:
        path = self.save(Named(), tmp_path)
        (tmp_path / "hparams.yaml").write_text("mode: from-file\ncls: z\n")
        (tmp_path / "hparams.csv").write_text("key,value\nnum_threads,9\n")
        for name in ("hparams.yaml", "hparams.csv"):
            stock = Named.load_from_checkpoint(path, hparams_file=tmp_path / name, cls_=0)
            assert load_from_checkpoint(Named, path, hparams_file=tmp_path / name).got == stock.got
            assert load_from_checkpoint(Named, path, {"hparams_file": tmp_path / name}).got == stock.got
        with pytest.raises(ValueError, match=r"hparams_file must be a \.csv, \.yml or \.yaml file"):
            load_from_checkpoint(Named, path, hparams_file="h.json")

    def test_unknown_options(self, tmp_path: Path) -> None:
        path = self.save(Named(), tmp_path)
        with pytest.raises(TypeError, match=r"has no option devise, only device, mode"):
            load_from_checkpoint(Named, path, {"devise": "cpu"})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"Named\.__init__\(\) have no argument check_fit\."):
            load_from_checkpoint(Named, path, {}, check_fit=True)
