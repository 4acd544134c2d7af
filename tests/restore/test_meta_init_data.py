"""Data that a constructor puts into parameters is there afterwards, and what no checkpoint fills is what it made."""

from __future__ import annotations

import copy
import os
import pickle
import time
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_memload import MetaTensorError, load_weights, meta_init
from lightning_memload.restore import follow_recipes, names_of_data
from lightning_memload.restore.recipes import WaitingParameter
from tests.fresh_process import run_fresh
from tests.restore.building import raw

MIB = 1 << 20
# More than what is copied at once.
WIDTH = 200


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    torch.save(encoder().state_dict(), tmp_path / "encoder.pt")
    save_file(encoder().state_dict(), tmp_path / "encoder.safetensors")
    for path in tmp_path.iterdir():
        os.utime(path, (2, 2))  # not written at this very moment, which would be a case of its own
    return tmp_path


def loaded(self: Any, folder: Path) -> None:
    self.encoder = encoder()
    self.encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))


def loaded_mapped(self: Any, folder: Path) -> None:
    self.encoder = encoder()
    self.encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True, mmap=True))


def loaded_and_assigned(self: Any, folder: Path) -> None:
    self.encoder = encoder()
    self.encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True), assign=True)


def loaded_safetensors(self: Any, folder: Path) -> None:
    self.encoder = encoder()
    self.encoder.load_state_dict(load_file(folder / "encoder.safetensors"))


def loaded_by_us(self: Any, folder: Path) -> None:
    self.encoder = encoder()
    load_weights(self.encoder, folder / "encoder.pt")


def assigned_by_us(self: Any, folder: Path) -> None:
    self.encoder = encoder()
    load_weights(self.encoder, folder / "encoder.safetensors", mode="assign")


def copied_in(self: Any, folder: Path) -> None:
    values = torch.load(folder / "encoder.pt", weights_only=True)
    self.encoder = encoder()
    for name, parameter in self.encoder.named_parameters():
        parameter.data.copy_(values[name])
    with torch.no_grad():
        self.encoder[0].weight[3:5] = values["0.weight"][:2]
        self.encoder[0].weight *= 2


def converted(self: Any, folder: Path) -> None:
    loaded(self, folder)
    self.encoder.double()
    self.twin = copy.deepcopy(self.encoder).half()


def from_arrays(self: Any, folder: Path) -> None:
    table = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)
    self.embedding = nn.Embedding.from_pretrained(torch.from_numpy(table))
    self.parameter = nn.Parameter(torch.from_numpy(table.copy()))
    self.copied = nn.Linear(WIDTH, WIDTH, bias=False)
    self.copied.weight.data.copy_(torch.from_numpy(table))
    self.written = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    self.written.detach().numpy()[:] = table
    table[:] = -1  # the embedding's memory


def sinusoids(self: Any, folder: Path) -> None:
    self.table = nn.Parameter(torch.empty(WIDTH, 8), requires_grad=False)
    angles = np.array([[position / 10000 ** (2 * (i // 2) / 8) for i in range(8)] for position in range(WIDTH)])
    self.table.detach_()
    self.table[:, :4] = torch.FloatTensor(np.sin(angles[:, 0::2]))
    self.table[:, 4:] = torch.FloatTensor(np.cos(angles[:, 1::2]))


def changed_source(self: Any, folder: Path) -> None:
    """A copy has the values that the source had at that time."""
    values = torch.load(folder / "encoder.pt", weights_only=True)
    self.encoder = encoder()
    self.encoder.load_state_dict(values)
    values["0.weight"].mul_(3)
    values["0.bias"].numpy()[:] = 7
    self.again = nn.Linear(WIDTH, WIDTH)
    self.again.load_state_dict({name[2:]: value for name, value in values.items() if name.startswith("0.")})
    values["0.weight"].fill_(0)


def copied_onto_itself(self: Any, folder: Path) -> None:
    """A copy overwrites everything, and reads what it overwrites."""
    self.encoder = encoder()
    with torch.no_grad():
        for parameter in self.encoder.parameters():
            nn.init.constant_(parameter, 0.5)
            parameter.copy_(parameter)
            parameter.data.copy_(parameter.data)
        weight = self.encoder[0].weight
        weight[3:5] = torch.arange(WIDTH) / WIDTH
        weight.copy_(weight)
    self.encoder.load_state_dict(self.encoder.state_dict())


def constants(self: Any, folder: Path) -> None:
    """Initialisation, but none that draws."""
    self.layer = nn.Linear(WIDTH, WIDTH)
    nn.init.eye_(self.layer.weight)
    nn.init.zeros_(self.layer.bias)
    self.scale = nn.Parameter(torch.full((WIDTH, 3), 0.5) * 4 - 1)
    self.norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        self.norm.weight.add_(0.25).clamp_(max=1)
        self.layer.weight[7].fill_(3)
    self.copy = copy.deepcopy(self.layer)


CONSTRUCTORS = [
    loaded, loaded_mapped, loaded_and_assigned, loaded_safetensors, loaded_by_us, assigned_by_us, copied_in, converted,
    from_arrays, sinusoids, changed_source, copied_onto_itself, constants,
]  # fmt: skip


class Custom(nn.Module):
    def __init__(self, construct: Callable[[Any, Path], None], folder: Path) -> None:
        super().__init__()
        construct(self, folder)
        self.head = nn.Linear(4, 2)


def same_weights(one: nn.Module, other: nn.Module, *, but: str = "head.") -> None:
    values, expected = dict(one.state_dict()), dict(other.state_dict())
    assert list(values) == list(expected)
    for name, value in values.items():
        if not name.startswith(but):
            assert value.dtype == expected[name].dtype
            assert raw(value) == raw(expected[name]), name


# An array of a parameter's memory needs that memory.
ARRAYS = "ignore:meta_init built .* Custom.written. numpy:UserWarning"


@pytest.mark.filterwarnings(ARRAYS)
@pytest.mark.parametrize("construct", CONSTRUCTORS)
@pytest.mark.parametrize("way", ["block", "decorator"])
def test_what_no_file_holds_is_what_the_constructor_made(
    construct: Callable[[Any, Path], None], way: str, pretrained: Path
) -> None:
    expected = Custom(construct, pretrained)
    torch.save({"head.weight": torch.ones(2, 4), "head.bias": torch.zeros(2)}, pretrained / "head.pt")
    if way == "block":
        with meta_init():
            module = Custom(construct, pretrained)
    else:
        module = meta_init()(Custom)(construct, pretrained)
    copies = [copy.deepcopy(module), pickle.loads(ForkingPickler.dumps(module))]
    load_weights(module, pretrained / "head.pt", strict=False)
    assert module.head.weight.tolist() == torch.ones(2, 4).tolist()
    for each in (module, *copies):
        follow_recipes(each)
        same_weights(each, expected)
        assert not any(child._load_state_dict_pre_hooks for child in each.modules())


@pytest.mark.filterwarnings(ARRAYS)
@pytest.mark.parametrize("construct", CONSTRUCTORS)
def test_what_a_file_holds_takes_the_place_of_it(construct: Callable[[Any, Path], None], pretrained: Path) -> None:
    torch.manual_seed(9)
    expected = Custom(construct, pretrained)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    torch.save(expected.state_dict(), pretrained / "all.pt")
    with meta_init():
        module = Custom(construct, pretrained)
    load_weights(module, pretrained / "all.pt")
    same_weights(module, expected, but="nothing")
    assert not any(type(parameter) is WaitingParameter for parameter in module.parameters())


def test_data_is_told_from_initialisation(pretrained: Path) -> None:
    with meta_init():
        module = Custom(loaded, pretrained)
    assert names_of_data(module) == ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"]
    with meta_init():
        module = Custom(constants, pretrained)
    assert names_of_data(module) == []


class TestPagesOfAFile:
    """They are kept instead of copied, so what happens to the file matters."""

    @pytest.mark.parametrize("construct", [loaded_mapped, loaded_safetensors])
    @pytest.mark.parametrize("change", ["replaced", "deleted", "rewritten"])
    def test_a_file_that_changes(self, construct: Any, change: str, pretrained: Path) -> None:
        expected = Custom(construct, pretrained)
        with meta_init():
            module = Custom(construct, pretrained)
        path = pretrained / ("encoder.pt" if construct is loaded_mapped else "encoder.safetensors")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        if change != "rewritten":
            path.unlink()
        if change == "replaced":
            path.write_bytes(data)
        if change == "rewritten":
            with path.open("r+b") as file:
                file.write(data)
            os.utime(path, (1, 1))  # a clock that is too coarse to tell
            with pytest.raises(MetaTensorError, match=rf"{path.name} has been written to in place"):
                follow_recipes(module)
            with path.open("r+b") as file:
                file.truncate(100)
            with pytest.raises(MetaTensorError, match="Build the module again"):
                follow_recipes(module)
            return
        follow_recipes(module)
        same_weights(module, expected)

    def test_a_file_that_is_written_again_at_once(self, pretrained: Path) -> None:
        """The time of a file does not tell of it then, so its values are kept."""
        path = pretrained / "encoder.pt"
        expected = Custom(loaded, pretrained)
        written = time.time() + 100  # as young as can be, however slow this machine is
        os.utime(path, (written, written))
        with meta_init():
            module = Custom(loaded_mapped, pretrained)
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        os.utime(path, (written, written))
        follow_recipes(module)
        same_weights(module, expected)

    def test_a_file_that_is_rewritten_and_not_needed(self, pretrained: Path) -> None:
        expected = Custom(loaded, pretrained)
        torch.save(expected.state_dict(), pretrained / "all.pt")
        with meta_init():
            module = Custom(loaded_mapped, pretrained)
        with (pretrained / "encoder.pt").open("r+b") as file:
            file.write(b"something else")
        load_weights(module, pretrained / "all.pt")
        same_weights(module, expected, but="nothing")


def test_copies_begin_with_the_same_random_values() -> None:
    """As of an online network and its target."""
    with meta_init():
        online = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        target = copy.deepcopy(online)
    later = copy.deepcopy(target)
    for module in (later, online, target):
        follow_recipes(module)
    same_weights(online, target)
    same_weights(online, later)
    assert raw(online[0].weight) != raw(online[1].weight)  # type: ignore[arg-type]


def test_a_seed_decides() -> None:
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with meta_init():
            module = nn.Linear(8, 8)
        torch.randn(seed)  # what is drawn between does not matter
        follow_recipes(module)
        drawn.append(raw(module.weight))
    assert drawn[0] == drawn[1] != drawn[2]


def test_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch then fills what nothing initialises."""

    def build() -> nn.Module:
        module = nn.Module()
        module.empty = nn.Parameter(torch.empty(3, 4))
        module.full = nn.Parameter(torch.full((3, 4), 2.0))
        return module

    torch.use_deterministic_algorithms(True)
    try:
        expected = build()
        with meta_init():
            module = build()
        assert module.empty.is_meta
        follow_recipes(module)
    finally:
        torch.use_deterministic_algorithms(False)
    same_weights(module, expected)
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.filterwarnings("ignore:A parameter that was built under meta_init is used:UserWarning")
def test_values_do_not_depend_on_who_asks() -> None:
    def build() -> nn.Module:
        torch.manual_seed(4)
        with meta_init():
            module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            module.product = nn.Parameter(module[0].weight.detach() @ module[1].weight.detach())
        return module

    expected = build()
    follow_recipes(expected)
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), meta_init()):
        module = build()
        with context:
            _ = module.product.tolist()
        assert raw(module.product) == raw(expected.product)  # type: ignore[arg-type]
        assert not module.product.is_inference()


USED = "ignore:A parameter that was built under meta_init is used:UserWarning"


class TestBeforeTheRestore:
    """A module on meta answers what an ordinary one answers."""

    def build(self) -> nn.Module:
        torch.manual_seed(2)
        with meta_init():
            return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def values(self) -> nn.Module:
        module = self.build()
        follow_recipes(module)
        return module

    def test_loaded_by_hand(self) -> None:
        module, expected = self.build(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        module[2].weight = nn.Parameter(torch.zeros(2, 4))
        module.load_state_dict(expected.state_dict())
        same_weights(module, expected)
        module = self.build()
        partial = {name: value for name, value in expected.state_dict().items() if not name.startswith("2.")}
        assert module.load_state_dict(partial, strict=False).missing_keys == ["2.weight", "2.bias"]
        same_weights(module[2], self.values()[2])
        same_weights(module[0], expected[0])
        module = self.build()
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "2\.weight", "2\.bias"'):
            module.load_state_dict(partial)
        module = self.build()
        module.load_state_dict(expected.state_dict(), assign=True)
        same_weights(module, expected)

    @pytest.mark.filterwarnings(USED)
    def test_its_own_state_dict_is_loaded(self) -> None:
        for keep_vars in (False, True):
            module = self.build()
            module.load_state_dict(module.state_dict(keep_vars=keep_vars))
            same_weights(module, self.values())
        module = self.build()
        with torch.no_grad():
            module[0].weight.copy_(module[0].weight)
        same_weights(module, self.values())

    def test_ties_are_loaded_once(self) -> None:
        with meta_init():
            module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
            module["b"].weight = module["a"].weight
        expected = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        expected["b"].weight = expected["a"].weight
        module.load_state_dict(expected.state_dict())
        assert module["a"].weight is module["b"].weight
        same_weights(module, expected)

    def test_one_warning_says_so(self) -> None:
        module = self.build()
        with pytest.warns(UserWarning, match="used before a checkpoint is restored") as warned:
            _ = module[0].weight.sum()
        assert len(warned) == 1
        assert warned[0].filename == __file__
        assert type(module[0].weight) is nn.Parameter

    @pytest.mark.filterwarnings(USED)
    @pytest.mark.parametrize(
        "use",
        [
            lambda module: module(torch.ones(2, 3)),
            lambda module: module.to("cpu")(torch.ones(2, 3)),
            lambda module: copy.deepcopy(module).cpu()(torch.ones(2, 3)),
            lambda module: pickle.loads(pickle.dumps(module))(torch.ones(2, 3)),
            lambda module: torch.func.functional_call(module, dict(module.named_parameters()), torch.ones(2, 3)),
            lambda module: module.half().float()[0].weight.half(),
            lambda module: nn.functional.linear(torch.ones(2, 3), module[0].weight),
            lambda module: torch.cat([parameter.flatten() for parameter in module.parameters()]),
            lambda module: module.state_dict()["0.weight"][:2],
            lambda module: module[0].weight.data[:2].clone(),
            lambda module: torch.zeros(6, 3).index_copy(0, torch.arange(4), module[0].weight),
            lambda module: torch.from_numpy(module[0].weight.detach().numpy()),
            lambda module: torch.tensor(module[0].weight.tolist()),
            lambda module: torch.nn.utils.parameters_to_vector(module.parameters()),
            lambda module: torch.zeros_like(module[0].weight),
            lambda module: copy.deepcopy(module.state_dict())["0.weight"],
            lambda module: pickle.loads(pickle.dumps(module.state_dict()))["0.weight"],
        ],
    )
    def test_used(self, use: Callable[[nn.Module], torch.Tensor]) -> None:
        assert raw(use(self.build())) == raw(use(self.values()))

    @pytest.mark.filterwarnings(USED)
    def test_an_embedding_is_resized(self) -> None:
        with meta_init():
            old = nn.Embedding(6, 4)
        new = nn.Embedding(8, 4)
        new.weight.data[:6] = old.weight.data[:6]
        assert raw(new.weight[:6]) == raw(old.weight)

    def test_shapes_and_types_take_no_memory(self) -> None:
        module = self.build()
        for parameter in module.parameters():
            assert parameter.numel() * parameter.element_size() == parameter.nbytes
            assert parameter.requires_grad
            assert parameter.grad is None
            assert hash(parameter) == id(parameter)
        module.requires_grad_(False)
        module.to(torch.float64)
        state_dict = module.state_dict()
        assert state_dict["0.weight"].shape == (4, 3)
        torch.optim.SGD(module.parameters(), lr=0.1).add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        assert all(parameter.is_meta for parameter in module.parameters())
        # What was taken before shows what is loaded then, as always.
        expected = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        module.load_state_dict(expected.state_dict())
        assert raw(state_dict["2.bias"]) == raw(expected[2].bias)  # type: ignore[arg-type]

    def test_a_backward_and_a_step(self) -> None:
        module = self.build()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        expected = self.values()
        optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
        expected(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        same_weights(module, expected)


@pytest.mark.parametrize("device", ["cpu", None])
def test_buffers_are_made_on_the_device(device: str | None) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("mask", torch.ones(4, 4).tril())

    with meta_init(device=device):
        module = Masked()
        assert module.layer.weight.device == torch.device("cpu")
        assert not module.layer.weight.is_meta
    assert module.layer.weight.is_meta
    assert raw(module.mask) == raw(torch.ones(4, 4).tril())


@pytest.mark.memory
def test_peak(tmp_path: Path) -> None:
    """In fresh processes, W bytes of weights: building takes what torch.load takes, and an initialisation nothing."""
    program = """
import torch
from torch import nn
from lightning_memload import MemoryMonitor, load_weights, meta_init
def build():
    return nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(6)])
class Loaded(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = build()
        if ARGS["data"]:
            self.body.load_state_dict(torch.load(ARGS["path"], weights_only=True, mmap=ARGS["mapped"]))
if ARGS["way"] == "write":
    torch.save(build().state_dict(), ARGS["path"])
    torch.save({f"body.{name}": value for name, value in build().state_dict().items()}, ARGS["path"] + ".all")
    RESULT = None
else:
    with meta_init():
        small = nn.Linear(2, 2)
    with MemoryMonitor() as building:
        with meta_init(ARGS["way"] == "ours"):
            module = Loaded()
    with MemoryMonitor() as loading:
        load_weights(module, ARGS["path"] + ".all")
    RESULT = [building.peaks.anonymous_above_start_bytes, loading.peaks.anonymous_above_start_bytes]
"""
    path = str(tmp_path / "weights.pt")
    run_fresh(program, way="write", path=path, data=True, mapped=False)
    weights = 6 * 2048 * 2048 * 4
    plain = run_fresh(program, way="ours", path=path, data=False, mapped=False).result
    assert plain[0] <= 8 * MIB
    assert weights - 4 * MIB <= plain[1] <= weights + 16 * MIB
    # What lies in a file stays there.
    mapped = run_fresh(program, way="ours", path=path, data=True, mapped=True).result
    assert mapped[0] <= 8 * MIB
    assert mapped[1] <= weights + 16 * MIB
    # Else the source is kept, not copied.
    data = run_fresh(program, way="ours", path=path, data=True, mapped=False).result
    stock = run_fresh(program, way="stock", path=path, data=True, mapped=False).result
    assert data[0] <= weights + 16 * MIB
    assert stock[0] >= 2 * weights - 8 * MIB
