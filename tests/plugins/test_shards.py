"""Under ModelParallelStrategy each rank restores its shards from a single file, as stock does, and reads only them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import open_checkpoint, save_directory
from tests.plugins.sharded_ranks import Net, described, run_ranks, write_single

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot train with FSDP2 on CPUs"
    ),
]

MIB = 1 << 20
BUFFERS = ("scale", "count")
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("plain", "tied", "groups", "two", "unused", "large"):
        write_single(folder / f"{kind}.ckpt", kind)
    checkpoint = torch.load(folder / "plain.ckpt", weights_only=False)
    save_directory(checkpoint, folder / "folder.ckpt")
    (folder / "lacking.ckpt").mkdir()  # of another node, without its shards
    (folder / "lacking.ckpt" / ".metadata").write_bytes(b"")
    return folder


# Stock puts the states of these under the wrong parameters, or refuses them. Single devices do not.
TRUTH = ["groups", "two", "unused"]
DCP = ["dcp", "columns"]
# In the rows of rank 1 (the last byte), in those of rank 0, and in a value that every rank reads.
DAMAGE = {"state_dict.first.weight": -1, "optimizer_states[0].state[2].exp_avg": 1, "state_dict.scale": 1}


def damaged(folder: Path) -> list[Path]:
    """A file for each of DAMAGE, with one byte changed."""
    paths = []
    for number, (name, position) in enumerate(DAMAGE.items()):
        data = bytearray((folder / "plain.ckpt").read_bytes())
        (tensor,) = [tensor for tensor in open_checkpoint(folder / "plain.ckpt") if tensor.name == name]
        data[tensor.storage.offset + position % tensor.storage.nbytes] ^= 0x10
        paths.append(folder / f"damaged{number}.ckpt")
        paths[-1].write_bytes(data)
    return paths


@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    plain, full = folder / "plain.ckpt", folder / "full.ckpt"
    large = {"dp": 2, "path": folder / "large.ckpt", "kind": "large", "memory": True}
    runs: list[dict[str, Any]] = [
        {"name": "memory", "ours": {"host_budget_mib": 16}, **large},  # first, in fresh processes
        {"name": "memory stock", **large},
        {"name": "fsdp stock", "dp": 2, "path": plain, "save": full},
        {"name": "fsdp", "dp": 2, "path": plain, "ours": {}},
        {"name": "full stock", "dp": 2, "path": full, "max_epochs": 3},
        {"name": "full", "dp": 2, "path": full, "ours": {}, "max_epochs": 3},
        {"name": "tp stock", "tp": 2, "path": plain},
        {"name": "tp", "tp": 2, "path": plain, "ours": {}},
        {"name": "folder", "dp": 2, "path": folder / "folder.ckpt", "ours": {}},
        {"name": "tied stock", "dp": 2, "path": folder / "tied.ckpt", "kind": "tied"},
        {"name": "tied", "dp": 2, "path": folder / "tied.ckpt", "kind": "tied", "ours": {}},
        {"name": "hooks stock", "dp": 2, "path": plain, "kind": "hooks"},
        {"name": "hooks", "dp": 2, "path": plain, "kind": "hooks", "ours": {}},
        {"name": "lax stock", "dp": 2, "path": plain, "kind": "lax"},
        {"name": "lax", "dp": 2, "path": plain, "kind": "lax", "ours": {}},
        {"name": "validate stock", "dp": 2, "path": plain, "stage": "validate"},
        {"name": "validate", "dp": 2, "path": plain, "stage": "validate", "ours": {}},
        {"name": "saving", "dp": 2, "path": plain, "shards": True, "save": folder / "dcp.ckpt"},
        {"name": "dcp stock", "dp": 2, "path": folder / "dcp.ckpt", "max_epochs": 3},
        {"name": "dcp", "dp": 2, "path": folder / "dcp.ckpt", "max_epochs": 3, "ours": {}},
        {"name": "columns stock", "tp": 2, "path": folder / "dcp.ckpt", "max_epochs": 3},
        {"name": "columns", "tp": 2, "path": folder / "dcp.ckpt", "max_epochs": 3, "ours": {}},
        {"name": "weights", "dp": 2, "path": plain, "ours": {"restore": ["weights"], "verify": False}},
        {"name": "one rank", "dp": 2, "path": plain, "ours": {}, "only": 0},
        *({"name": kind, "dp": 2, "path": folder / f"{kind}.ckpt", "kind": kind, "ours": {}} for kind in TRUTH),
        {"name": "new stock", "dp": 2, "path": plain, "kind": "new"},
        {"name": "new", "dp": 2, "path": plain, "kind": "new", "ours": {}},
        {"name": "bf16 stock", "dp": 2, "path": plain, "precision": "bf16-true"},
        {"name": "bf16", "dp": 2, "path": plain, "precision": "bf16-true", "ours": {}},
        {"name": "wrapped stock", "dp": 2, "path": plain, "kind": "wrapped"},
        {"name": "wrapped", "dp": 2, "path": plain, "kind": "wrapped", "ours": {}},
        {
            "name": "partial",
            "dp": 2,
            "path": folder / "dcp.ckpt",
            "other": folder / "lacking.ckpt",
            "max_epochs": 3,
            "ours": {},
        },
        {"name": "unlike", "dp": 2, "path": plain, "other": folder / "tied.ckpt", "ours": {"mode": "assign"}},
        {"name": "bad disk", "dp": 2, "path": plain, "ours": {}, "failing": 1},
        {"name": "bad hooks", "dp": 2, "path": plain, "kind": "bad hooks", "ours": {}},
        *({"name": f"bad {number}", "dp": 2, "path": bad, "ours": {}} for number, bad in enumerate(damaged(folder))),
    ]
    return run_ranks(folder / "two", [{"max_epochs": 2, **arguments} for arguments in runs], 2)


def assert_same(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert stock["error"] is None
    assert ours["error"] is None
    assert ours["warnings"] == []
    for part in ("weights", "states", "groups", "losses"):
        assert ours[part] == stock[part], part
    assert ours["losses"]
    assert ours["held"] == []
    assert not ours["own"]


@pytest.mark.parametrize(
    "name", ["fsdp", "full", "tp", "folder", "tied", "hooks", "lax", "validate", "bf16", "wrapped", *DCP]
)
def test_ranks_train_as_stock(name: str, two: Results) -> None:
    stock = {"folder": "fsdp"}.get(name, name)
    for ours, theirs in zip(two[name], two[f"{stock} stock"], strict=True):
        assert_same(ours, theirs)


def test_each_byte_is_read_once_and_verified(two: Results, folder: Path) -> None:
    nbytes = sum(storage.nbytes for storage in open_checkpoint(folder / "plain.ckpt").storages)
    reports = [result["report"] for result in two["fsdp"]]
    assert sum(report["total"]["bytes_read"] for report in reports) <= 1.02 * nbytes
    assert sum(report["bytes_verified"] for report in reports) >= nbytes
    for rank, report in enumerate(reports):
        assert (report["mode"], report["mode_reason"]) == ("copy", "each rank reads its own shards")
        assert (report["rank"], report["world_size"]) == (rank, 2)
        assert [phase["name"] for phase in report["phases"]] == ["open", "weights", "optimizers"]
    tensor_parallel = [result["report"] for result in two["tp"]]
    assert sum(report["bytes_verified"] for report in tensor_parallel) >= nbytes


def test_hooks_of_modules_run_as_in_stock(two: Results) -> None:
    assert [result["seen"] for result in (*two["hooks"], *two["hooks stock"])] == [["first"]] * 4


@pytest.mark.parametrize("kind", TRUTH)
def test_states_are_those_of_a_single_device(kind: str, two: Results, folder: Path) -> None:
    checkpoint = torch.load(folder / f"{kind}.ckpt", weights_only=False)
    module = Net(kind)
    made = module.configure_optimizers()
    optimizers = made if isinstance(made, list) else [made]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for rank, result in enumerate(two[kind]):
        assert result["error"] is None
        assert result["warnings"] == []
        for optimizer, saved, found in zip(optimizers, checkpoint["optimizer_states"], result["states"], strict=True):
            optimizer.load_state_dict(saved)
            expected = {
                f"{names[id(parameter)]}.{key}": described(shard(value, rank))
                for parameter, state in optimizer.state.items()
                for key, value in state.items()
            }
            assert {name: value[1:4] + value[5:] for name, value in found.items()} == {
                name: value[1:4] + value[5:] for name, value in expected.items()
            }
        weights = {name: described(shard(value, rank)) for name, value in checkpoint["state_dict"].items()}
        assert all(result["weights"][name][-1] == value[-1] for name, value in weights.items() if name not in BUFFERS)
        groups = [[group["weight_decay"] for group in optimizer.param_groups] for optimizer in optimizers]
        assert [[group["weight_decay"] for group in of] for of in result["groups"]] == groups


def shard(value: torch.Tensor, rank: int) -> torch.Tensor:
    parts = torch.chunk(value, 2) if value.dim() else (value, value)
    return parts[rank] if rank < len(parts) else value[:0]


def test_a_missing_weight_ends_all_ranks_with_the_message_of_stock(two: Results) -> None:
    for ours, stock in zip(two["new"], two["new stock"], strict=True):
        assert ours["error"][:2] == stock["error"][:2]
        assert "The model contains a key 'new.weight'" in ours["error"][1]


def test_distributed_checkpoints_are_read_once_too(two: Results, folder: Path) -> None:
    nbytes = sum(storage.nbytes for storage in open_checkpoint(folder / "dcp.ckpt").storages)
    reports = [result["report"] for result in two["dcp"]]
    assert sum(report["total"]["bytes_read"] for report in reports) <= 1.05 * nbytes  # with gaps between small ones
    assert sum(report["bytes_verified"] for report in reports) >= nbytes


def test_parts_are_restored(two: Results) -> None:
    for ours, stock in zip(two["weights"], two["fsdp stock"], strict=True):
        assert ours["error"] is None
        assert ours["weights"] == stock["weights"]
        assert ours["states"] == [{}]
        assert ours["report"]["bytes_verified"] == 0
        assert len(ours["losses"]) == 2 * len(stock["losses"])


def test_without_the_callback_on_a_rank_stock_loads(two: Results) -> None:
    for ours, stock in zip(two["one rank"], two["fsdp stock"], strict=True):
        assert (ours["weights"], ours["states"]) == (stock["weights"], stock["states"])
    first, second = two["one rank"]
    assert ["not every rank has a MemoryEfficientRestore callback" in words for words in first["warnings"]] == [True]
    assert first["report"]["mode"] == "default"
    assert second["report"] is None


def test_ranks_with_different_files_are_left_to_stock(two: Results) -> None:
    for ours, stock in zip(two["unlike"], two["fsdp stock"], strict=True):
        assert (ours["weights"], ours["states"]) == (stock["weights"], stock["states"])
        assert ours["report"]["mode"] == "default"
    for ours, stock in zip(two["partial"], two["dcp stock"], strict=True):
        assert (ours["weights"], ours["states"]) == (stock["weights"], stock["states"])
    assert "lacking.ckpt" in two["partial"][0]["warnings"][0]
    assert "the ranks have different files, modules or optimizers" in two["unlike"][0]["warnings"][0]


def test_the_failure_of_one_rank_ends_all(two: Results) -> None:
    (first, second) = (result["error"] for result in two["bad disk"])
    assert first[:2] == ["MemloadError", "CheckpointReadError: The disk is gone. Found by rank 1 of 2."]
    assert second[0] == "CheckpointReadError"
    assert second[1].startswith("The disk is gone. Found by rank 1 of 2. ")
    (first, second) = (result["error"] for result in two["bad hooks"])
    assert first[:2] == ["RuntimeError", "the hook of rank 0"]
    assert second[:2] == ["MemloadError", "RuntimeError: the hook of rank 0 Found by rank 0 of 2."]
    assert all(result["error"][2] < 30 for result in (*two["bad disk"], *two["bad hooks"]))


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damage_ends_every_rank_with_the_name(number: int, two: Results, folder: Path) -> None:
    name = [*DAMAGE][number]
    for result in two[f"bad {number}"]:
        kind, words, seconds = result["error"]
        assert kind == "ChecksumError"
        assert f"damaged{number}.ckpt is damaged" in words
        assert name in words
        assert ("Read in parts by rank 0, 1." in words) or ("Found by rank" in words)
        assert f"The newest intact checkpoint in {folder}" in words
        assert seconds < 30
        assert result["states"] == []


@pytest.mark.long
def test_four_ranks_train_as_stock(folder: Path) -> None:
    """FSDP2 of tensor parallel weights, replicas of shards, and tensor parallel weights with replicas."""
    kinds = ("plain", "hybrid", "columns")
    ways: dict[str, dict[str, Any]] = {"stock": {}, "ours": {"ours": {}}}
    runs = [
        {
            "name": f"{kind} {way}",
            "dp": 2,
            "tp": 2,
            "path": folder / "plain.ckpt",
            "kind": kind,
            "max_epochs": 2,
            **ours,
        }
        for kind in kinds
        for way, ours in ways.items()
    ]
    four = run_ranks(folder / "four", runs, 4)
    nbytes = sum(storage.nbytes for storage in open_checkpoint(folder / "plain.ckpt").storages)
    for kind in kinds:
        for ours, stock in zip(four[f"{kind} ours"], four[f"{kind} stock"], strict=True):
            assert_same(ours, stock)
        assert sum(result["report"]["bytes_verified"] for result in four[f"{kind} ours"]) >= nbytes


@pytest.mark.memory
def test_host_memory_is_that_of_the_shards(two: Results) -> None:
    states = 2 * 32 * MIB
    bound = states + (16 + 64) * MIB
    found = [result["above_start"] for result in two["memory"]]
    assert all(states <= above <= bound for above in found), found
    assert max(result["above_start"] for result in two["memory stock"]) > bound
