"""Conversions: every bit of every format, names and dtypes, damage and changes of the source, what is replaced."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.lightning as L
from lightning_memload import (
    CheckpointFormatError,
    CheckpointReadError,
    ChecksumError,
    UnsafeGlobalsError,
    convert_checkpoint,
    diff_checkpoints,
    open_checkpoint,
    save_directory,
    verify_checkpoint,
)
from lightning_memload.formats import load_mapped
from lightning_memload.storage import places
from tests.formats.dcp_shards import Shards, sharded, write_shards
from tests.formats.files import as_bytes, layouts, nested, save_dcp, tensors_of
from tests.storage.toy import SCHEME, ToyBucket

TIED = torch.randn(6, 4)
WEIGHTS = OrderedDict(
    {
        "net.weight": TIED,
        "net.bias": torch.randn(6, dtype=torch.float64),
        "head.weight": TIED,
        "turned": torch.randn(5, 7).t(),
        "row": torch.randn(4, 8)[1],
        "steps": torch.tensor(3),
        "empty": torch.empty(0, 3),
    }
)
STATE: dict[str, Any] = {
    "epoch": 3,
    "global_step": 12,
    "pytorch-lightning_version": "2.5.0",
    "state_dict": WEIGHTS,
    "loops": {"fit_loop": {"done": 3}},
    "callbacks": {"mine": {"best": torch.tensor(0.5)}},
    "optimizer_states": [
        {"state": {0: {"exp_avg": torch.randn(6, 4), "step": torch.tensor(2.0)}}, "param_groups": [{"params": [0]}]}
    ],
    "lr_schedulers": [{"last_epoch": 3}],
    "hyper_parameters": {"width": 6},
    "MixedPrecision": {"scale": 2.0},
}


def save(path: Path, state: Any = None) -> Path:
    torch.save(STATE if state is None else state, path)
    return path


def load(path: Path, *, weights_only: bool = True) -> Any:
    if path.is_file():
        return torch.load(path, weights_only=weights_only)
    return load_mapped(path, weights_only=weights_only)[0]


def assert_same(found: Any, expected: Any) -> None:
    """The same bits in the same containers, with the same strides and the same ties."""
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    for (path, tensor), (expected_path, other) in pairs:
        assert path == expected_path
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride())
        assert as_bytes(tensor) == as_bytes(other)
        assert type(tensor) is type(other)
        assert tensor.requires_grad == other.requires_grad
    shared = [[a.untyped_storage()._cdata == b.untyped_storage()._cdata for a in side for b in side] for side in (
        [tensor for (_, tensor), _ in pairs], [other for _, (_, other) in pairs]
    )]  # fmt: skip
    assert shared[0] == shared[1]
    without = [_without_tensors(side) for side in (found, expected)]
    assert without[0] == without[1]


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, Mapping):
        return {key: _without_tensors(item) for key, item in value.items()}
    return [_without_tensors(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("state", [STATE, nested(), layouts()], ids=["lightning", "nested", "layouts"])
@pytest.mark.parametrize("format", ["torch", "directory"])
def test_everything_bit_for_bit(state: Any, format: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "source.ckpt", state)
    stats = convert_checkpoint(source, tmp_path / "target.ckpt", format=format, weights_only=False)
    found, expected = (load(path, weights_only=False) for path in (tmp_path / "target.ckpt", source))
    assert_same(found, expected)
    assert verify_checkpoint(tmp_path / "target.ckpt").is_verified
    assert (stats.format, stats.dropped, stats.left_out, stats.ties) == (format, (), (), {})
    if format == "torch":
        assert stats.bytes_written == (tmp_path / "target.ckpt").stat().st_size


def contiguous(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def shards_of(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: sharded(tensor, *[2][: tensor.dim()]) if tensor.numel() else Shards(tensor.shape, [((0, 0), tensor)])
        for name, tensor in weights.items()
    }


SOURCES: dict[str, Callable[[Path], Any]] = {
    "torch": lambda path: save(path),
    "bare": lambda path: save(path, WEIGHTS),
    "directory": lambda path: save_directory(STATE, path),
    "safetensors": lambda path: save_file(contiguous(WEIGHTS), path),
    "dcp": lambda path: write_shards(path, shards_of(WEIGHTS)),
}


@pytest.mark.parametrize("target", ["torch", "directory", "safetensors", "shards"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_to_every_format(source: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "source"
    SOURCES[source](path)
    options: dict[str, Any] = {"shard_bytes": 200} if target == "shards" else {"format": target}
    stats = convert_checkpoint(path, tmp_path / "target", **options)
    report = diff_checkpoints(path, tmp_path / "target")
    assert report.only_in_first == tuple(stats.ties)
    assert (report.different, report.only_in_second, report.shapes, report.dtypes) == ((), (), {}, {})
    assert not verify_checkpoint(tmp_path / "target").is_damaged
    has_ties = source in ("torch", "bare", "directory")
    assert stats.ties == ({"head.weight": "net.weight"} if has_ties and target in ("safetensors", "shards") else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_dtype_is_that_of_torch(source: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "source"
    SOURCES[source](path)
    convert_checkpoint(path, tmp_path / "target.ckpt", dtype=dtype)
    convert_checkpoint(path, tmp_path / "target.safetensors", dtype=dtype)
    expected = {name: w.to(dtype) if w.is_floating_point() else w for name, w in WEIGHTS.items()}
    found = load(tmp_path / "target.ckpt")
    weights = found.get("state_dict", found)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype
        assert as_bytes(weights[name]) == as_bytes(tensor)
    of_file = load_file(tmp_path / "target.safetensors")
    for name, tensor in of_file.items():
        assert as_bytes(tensor) == as_bytes(expected[name])
    if source in ("torch", "bare", "directory"):
        assert weights["net.weight"].data_ptr() == weights["head.weight"].data_ptr()
        assert weights["turned"].stride() == WEIGHTS["turned"].stride()
        assert set(of_file) == set(expected) - {"head.weight"}
    if source in ("torch", "directory"):
        assert_same(found["optimizer_states"], STATE["optimizer_states"])
        assert_same(found["callbacks"], STATE["callbacks"])
    assert verify_checkpoint(tmp_path / "target.ckpt").is_verified


def test_distributed_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    save_dcp({"model": dict(WEIGHTS), "optimizer_0": STATE["optimizer_states"][0]}, tmp_path / "source")
    rest = {key: value for key, value in STATE.items() if key not in ("state_dict", "optimizer_states")}
    torch.save(rest, tmp_path / "source" / "meta.pt")
    convert_checkpoint(tmp_path / "source", tmp_path / "target.ckpt")
    found = load(tmp_path / "target.ckpt")
    assert {name: as_bytes(tensor) for name, tensor in found["state_dict"].items()} == {
        name: as_bytes(tensor) for name, tensor in WEIGHTS.items()
    }
    assert as_bytes(found["optimizer_states"][0]["state"][0]["exp_avg"]) == as_bytes(
        STATE["optimizer_states"][0]["state"][0]["exp_avg"]
    )
    assert found["hyper_parameters"] == {"width": 6}


def test_names(tmp_path: Path) -> None:
    weights = OrderedDict({f"model.{name}": tensor for name, tensor in WEIGHTS.items()})
    weights._metadata = {"": {"version": 1}, "model.net": {"version": 2}}
    source = save(tmp_path / "source.ckpt", {**STATE, "state_dict": weights})
    convert_checkpoint(
        source,
        tmp_path / "target.ckpt",
        strip_prefix="model.",
        rename={r"^net\.": "body.", "weight$": "w"},
        include=["w$", "bias", "row"],
        exclude="row",
    )
    found = load(tmp_path / "target.ckpt")
    assert list(found["state_dict"]) == ["body.w", "body.bias", "head.w"]
    assert found["state_dict"]._metadata == {"": {"version": 1}, "body": {"version": 2}}
    assert found["state_dict"]["body.w"].data_ptr() == found["state_dict"]["head.w"].data_ptr()
    assert_same(found["optimizer_states"], STATE["optimizer_states"])
    with pytest.raises(ValueError, match=r"Renaming gives .* the same name 'x'"):
        convert_checkpoint(source, tmp_path / "other.ckpt", rename={".+": "x"})
    with pytest.raises(CheckpointFormatError, match=r"has no weight that include=\['absent'\]"):
        convert_checkpoint(source, tmp_path / "other.ckpt", include=["absent"])
    assert not (tmp_path / "other.ckpt").exists()


class Net(L.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, width)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


@pytest.mark.filterwarnings("ignore")
def test_weights_only_is_that_of_lightning(tmp_path: Path) -> None:
    options: Any = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=2, default_root_dir=tmp_path, **options)
    trainer.fit(Net(4), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4))))
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    stats = convert_checkpoint(tmp_path / "full.ckpt", tmp_path / "target.ckpt", parts="weights")
    assert set(stats.dropped) == {"callbacks", "optimizer_states", "lr_schedulers"}
    assert_same(load(tmp_path / "target.ckpt"), load(tmp_path / "weights.ckpt"))
    module = Net.load_from_checkpoint(tmp_path / "target.ckpt")
    assert module.hparams.width == 4
    convert_checkpoint(tmp_path / "full.ckpt", tmp_path / "target.pt", parts="weights")
    assert_same(load(tmp_path / "target.pt"), load(tmp_path / "full.ckpt")["state_dict"])


def test_parts_that_are_dropped(tmp_path: Path) -> None:
    source = save(tmp_path / "source.ckpt")
    stats = convert_checkpoint(source, tmp_path / "target.ckpt", parts="weights")
    assert stats.dropped == ("callbacks", "optimizer_states", "lr_schedulers", "MixedPrecision")
    assert set(load(tmp_path / "target.ckpt")) == set(STATE) - set(stats.dropped)
    stats = convert_checkpoint(source, tmp_path / "target.safetensors")
    assert stats.dropped == tuple(key for key in STATE if key != "state_dict")


def test_shards(tmp_path: Path) -> None:
    weights = {f"layer{number}": torch.randn(10) for number in range(5)}
    weights["tied"] = weights["layer0"]
    weights["large"] = torch.randn(50)
    stats = convert_checkpoint(save(tmp_path / "source.pt", weights), tmp_path / "target", shard_bytes=80)
    assert stats.files == tuple(f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4))
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 400}
    assert index["weight_map"]["layer1"] == stats.files[0]
    assert index["weight_map"]["large"] == stats.files[3]
    assert "tied" not in index["weight_map"]
    for number, file in enumerate(stats.files):
        found = load_file(tmp_path / "target" / file)
        assert sum(tensor.nbytes for tensor in found.values()) <= 80 or number == 3
        assert {name: index["weight_map"][name] for name in found} == dict.fromkeys(found, file)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
    stats = convert_checkpoint(tmp_path / "source.pt", tmp_path / "one", shard_bytes=10**9)
    assert stats.files == ("model.safetensors",)
    assert os.listdir(tmp_path / "one") == ["model.safetensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_reads_the_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    source = save(tmp_path / "source.ckpt", {"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}})
    convert_checkpoint(source, tmp_path / "target", shard_bytes=5000, strip_prefix="model.")
    config.save_pretrained(tmp_path / "target")
    found, told = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert as_bytes(found.state_dict()[name]) == as_bytes(tensor)


def test_several_state_dicts(tmp_path: Path) -> None:
    state = {"generator": {"x": torch.ones(2)}, "critic": {"x": torch.zeros(2)}}
    source = save(tmp_path / "source.pt", state)
    assert convert_checkpoint(source, tmp_path / "all.pt").num_weights == 0
    assert_same(load(tmp_path / "all.pt"), state)
    with pytest.raises(CheckpointFormatError, match="holds 2 state dicts"):
        convert_checkpoint(source, tmp_path / "a.safetensors")
    convert_checkpoint(source, tmp_path / "a.safetensors", key="critic")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.zeros(2))
    convert_checkpoint(source, tmp_path / "b.pt", key="critic", dtype=torch.float16)
    found = load(tmp_path / "b.pt")
    assert (found["generator"]["x"].dtype, found["critic"]["x"].dtype) == (torch.float32, torch.float16)


def test_pickled_module(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    source = save(tmp_path / "source.pt", module)
    with pytest.raises(CheckpointFormatError, match="Convert the weights only"):
        convert_checkpoint(source, tmp_path / "a.pt", dtype=torch.float16, weights_only=False)
    convert_checkpoint(source, tmp_path / "a.pt", parts="weights", dtype=torch.float16, weights_only=False)
    found = load(tmp_path / "a.pt")
    assert {name: as_bytes(value) for name, value in found.items()} == {
        name: as_bytes(value.half()) for name, value in module.state_dict().items()
    }
    convert_checkpoint(source, tmp_path / "b.pt", weights_only=False)
    copied = torch.load(tmp_path / "b.pt", weights_only=False)
    assert_same(copied.state_dict(), module.state_dict())


def test_dtype_of_other_kinds_of_tensors(tmp_path: Path) -> None:
    weights = {"sparse": torch.eye(3).to_sparse(), "parameter": torch.nn.Parameter(torch.randn(3))}
    source = save(tmp_path / "source.pt", weights)
    convert_checkpoint(source, tmp_path / "target.pt", dtype=torch.float16, weights_only=False)
    found = load(tmp_path / "target.pt")
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3, dtype=torch.float16))
    assert isinstance(found["parameter"], torch.nn.Parameter)
    assert found["parameter"].dtype == torch.float16


def test_what_safetensors_cannot_hold(tmp_path: Path) -> None:
    weights = {"plain": torch.ones(2), "complex": torch.ones(2, dtype=torch.complex128), "extra_state": "text"}
    source = save(tmp_path / "source.pt", weights)
    assert convert_checkpoint(source, tmp_path / "a.safetensors").left_out == ("complex", "extra_state")
    assert list(load_file(tmp_path / "a.safetensors")) == ["plain"]
    with pytest.raises(CheckpointFormatError, match="has no weight that safetensors can hold"):
        convert_checkpoint(source, tmp_path / "b.safetensors", include="complex")


def flip(path: Path, name: str) -> None:
    """Changes one bit in the values of a tensor."""
    index = open_checkpoint(path)
    file, position = index.place(index[name].file_range[0])
    data = bytearray(Path(file).read_bytes())
    data[position] ^= 1
    Path(file).write_bytes(data)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"format": "safetensors"}], ids=str)
@pytest.mark.parametrize("name", ["net.weight", "turned", "row"])
def test_damaged_source(name: str, options: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "source.ckpt")
    flip(source, f"state_dict.{name}")
    target = tmp_path / "target.ckpt"
    target.write_text("before")
    with pytest.raises(ChecksumError, match=rf"state_dict\.{name}|state_dict\.head") as caught:
        convert_checkpoint(source, target, overwrite=True, **options)
    assert caught.value.path == str(source)
    assert target.read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["source.ckpt", "target.ckpt"]


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_source_that_cannot_be_mapped(dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = ToyBucket(tmp_path)
    monkeypatch.setitem(places.PLACES, SCHEME, bucket)
    source = save(tmp_path / "source.ckpt")
    convert_checkpoint(source, tmp_path / "expected.ckpt", dtype=dtype)
    convert_checkpoint(bucket.url(source), tmp_path / "target.ckpt", dtype=dtype)
    assert_same(load(tmp_path / "target.ckpt"), load(tmp_path / "expected.ckpt"))
    flip(source, "state_dict.net.bias")
    with pytest.raises(ChecksumError, match=r"state_dict\.net\.bias"):
        convert_checkpoint(bucket.url(source), tmp_path / "target.ckpt", dtype=dtype, overwrite=True)
    assert_same(load(tmp_path / "target.ckpt"), load(tmp_path / "expected.ckpt"))


def test_damaged_shard(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", shards_of(WEIGHTS))
    flip(source, "net.weight")
    with pytest.raises(ChecksumError, match=r"net\.weight"):
        convert_checkpoint(source, tmp_path / "target.ckpt")
    assert not (tmp_path / "target.ckpt").exists()


def test_source_that_changes_meanwhile(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    save_file({"x": torch.zeros(1 << 20)}, source)

    def rewrite(done: int, total: int) -> None:
        with source.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"changed!")

    with pytest.raises(CheckpointReadError, match="was changed while it was read"):
        convert_checkpoint(source, tmp_path / "target.ckpt", progress=rewrite)
    assert not (tmp_path / "target.ckpt").exists()


def test_source_that_is_cut_short(tmp_path: Path) -> None:
    source = save(tmp_path / "source.ckpt", {"x": torch.zeros(4 << 20)})

    def cut(done: int, total: int) -> None:
        os.truncate(source, 5 << 20)

    with pytest.raises(CheckpointReadError, match=r"needs .* bytes more"):
        convert_checkpoint(source, tmp_path / "target.ckpt", progress=cut, num_threads=1)
    assert not (tmp_path / "target.ckpt").exists()


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = save(tmp_path / "source.ckpt", {"x": torch.zeros(3 << 18), "y": torch.ones(2)})
    convert_checkpoint(source, tmp_path / "target.ckpt", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == ((3 << 20) + 8, (3 << 20) + 8)
    assert sorted(seen) == seen


def test_what_is_replaced(tmp_path: Path) -> None:
    source = save(tmp_path / "source.ckpt")
    target = tmp_path / "target.ckpt"
    target.write_text("before")
    with pytest.raises(FileExistsError, match="allow to overwrite it"):
        convert_checkpoint(source, target)
    assert target.read_text() == "before"
    convert_checkpoint(source, target, overwrite=True)
    assert_same(load(target), load(source))
    with pytest.raises(ValueError, match="is the source"):
        convert_checkpoint(source, source, overwrite=True)
    folder = tmp_path / "folder"
    for _ in range(2):
        convert_checkpoint(source, folder, shard_bytes=100, overwrite=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other files \(notes.txt\)"):
        convert_checkpoint(source, folder, shard_bytes=100, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("target", {}, "The format of .* is unknown"),
        ("target", {"format": "zip"}, "got 'zip'"),
        ("target.ckpt", {"shard_bytes": 100, "format": "torch"}, "shard_bytes is for safetensors"),
        ("target.safetensors", {"shard_bytes": 100}, "has the suffix of a file"),
        ("target", {"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
        ("target.ckpt", {"dtype": torch.int8}, "dtype must be a floating-point dtype"),
        ("target.ckpt", {"parts": "loops"}, "parts must be 'all' or 'weights'"),
        ("target.ckpt", {"num_threads": 0}, "num_threads must be at least 1"),
    ],
)
def test_wrong_arguments(target: str, options: Any, message: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source.ckpt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / target, **options)
    assert os.listdir(tmp_path) == ["source.ckpt"]


def test_classes_that_torch_refuses(tmp_path: Path) -> None:
    source = save(tmp_path / "source.ckpt", {**STATE, "hyper_parameters": Namespace(width=6)})
    target = tmp_path / "target.ckpt"
    for parts in ("all", "weights"):
        with pytest.raises(UnsafeGlobalsError, match=r"argparse.Namespace, at hyper_parameters"):
            convert_checkpoint(source, target, parts=parts)
    convert_checkpoint(source, tmp_path / "target.pt", parts="weights")
    assert_same(load(tmp_path / "target.pt"), load(save(tmp_path / "expected.pt", WEIGHTS)))
    convert_checkpoint(source, target, safe_globals=["argparse.Namespace"])
    assert torch.load(target, weights_only=False)["hyper_parameters"] == Namespace(width=6)
    convert_checkpoint(source, target, weights_only=False, overwrite=True)
    assert torch.load(target, weights_only=False)["hyper_parameters"] == Namespace(width=6)
