"""Constructors that use their parameters under meta_init get the answers of an ordinary construction."""

from __future__ import annotations

import copy
import io
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_memload import load_weights, meta_init
from lightning_memload.restore import follow_recipes
from tests.restore.building import assert_same_build, raw, restore, same_on_meta

# Served ---------------------------------------------------------------------------------------------------------------


class Custom(nn.Module):
    """A module whose constructor is a function."""

    def __init__(self, construct: Callable[[Any], None]) -> None:
        super().__init__()
        construct(self)


def created(self: Any) -> None:
    self.drawn = nn.Parameter(torch.randn(3, 4))
    self.halved = nn.Parameter(torch.randn(2, dtype=torch.float16), requires_grad=False)
    self.indices = nn.Parameter(torch.arange(3), requires_grad=False)
    self.strided = nn.Parameter(torch.randn(4, 3).t())
    self.empty = nn.Parameter(torch.empty(0, 3))
    self.scalar = nn.Parameter(torch.tensor(0.07))
    self.complex = nn.Parameter(torch.randn(2, dtype=torch.complex64))
    self.register_parameter("registered", nn.Parameter(torch.zeros(3)))
    self.register_parameter("nothing", None)
    self.marked = nn.Parameter(torch.zeros(2))
    self.marked.no_decay = True


def initialised(self: Any) -> None:
    self.w = nn.Parameter(torch.empty(4, 4))
    self.wide = nn.Parameter(torch.empty(4, 6))
    self.kernel = nn.Parameter(torch.empty(4, 2, 3))
    nn.init.normal_(self.w, std=0.02)
    nn.init.trunc_normal_(self.w)
    nn.init.xavier_uniform_(self.w, gain=nn.init.calculate_gain("relu"))
    nn.init.kaiming_normal_(tensor=self.w)
    nn.init.orthogonal_(self.w)
    nn.init.orthogonal_(self.wide)
    nn.init.eye_(self.w)
    nn.init.sparse_(self.w, 0.5)
    nn.init.dirac_(self.kernel)
    nn.init.constant_(self.w.data[0], 3.0)


def written(self: Any) -> None:
    other = torch.ones(4, 3)
    self.w = nn.Parameter(torch.empty(4, 3))
    self.w.data.normal_().clamp_(-1, 1)
    self.w.data[1:] = 0
    self.w.data[0, :] = other[0]
    self.w.data *= 2
    self.w.data = other
    with torch.no_grad():
        self.w.copy_(other)
        self.w[0] = 0
        self.w[1].fill_(1)
        self.w += other
        self.w -= self.w.mean()
        self.w.t().mul_(2)
        torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector([self.w]), [self.w])


def replaced_by_other_shape(self: Any) -> None:
    self.w = nn.Parameter(torch.empty(4, 3))
    self.w.data = torch.ones(2, 5, dtype=torch.float64)


def derived(self: Any) -> None:
    self.a = nn.Parameter(torch.randn(2, 3))
    self.doubled = nn.Parameter(self.a * 2)
    self.stacked = nn.Parameter(torch.cat([self.a, self.doubled]).detach())
    self.cloned = nn.Parameter(self.a.detach().clone(), requires_grad=False)
    self.like = nn.Parameter(torch.zeros_like(self.a))
    self.mixed = nn.Parameter(self.a.data + torch.ones(3))


def tied(self: Any) -> None:
    self.embedding = nn.Embedding(4, 3)
    self.head = nn.Linear(3, 4, bias=False)
    self.head.weight = self.embedding.weight
    self.again = self.embedding
    self.kept = [self.head.weight]
    parameter = nn.Parameter(torch.randn(2))
    self.before = [parameter]
    self.first = parameter
    self.second = parameter
    nn.init.normal_(parameter)
    assert self.before[0] is self.first is self.second
    assert self.kept[0] is self.embedding.weight


def copied(self: Any) -> None:
    self.one = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    self.one[0].weight.requires_grad_(False)
    self.two = copy.deepcopy(self.one)
    self.three = copy.deepcopy(nn.ParameterList([torch.randn(2)]))


def applied(self: Any) -> None:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1, bias=False), nn.Embedding(4, 3)])
    self.apply(initialise)
    for parameter in self.layers[1].parameters():
        parameter.requires_grad = False


def converted(self: Any) -> None:
    self.layer = nn.Linear(3, 3)
    self.norm = nn.BatchNorm1d(3)
    self.to("cpu")
    self.half()
    self.norm.float()
    self.layer.to(torch.device("cpu"), torch.bfloat16)
    self.double()
    self.cpu()
    self.eval()


def buffers(self: Any) -> None:
    self.w = nn.Parameter(torch.randn(3, 4))
    self.register_buffer("saved", torch.arange(4.0))
    self.register_buffer("unsaved", torch.arange(5.0) / 7, persistent=False)
    self.register_buffer("placed", torch.ones(3, device=self.w.device), persistent=False)
    self.register_buffer("like", torch.zeros_like(self.w), persistent=False)
    self.register_buffer("new", self.w.new_ones(2), persistent=False)
    self.register_buffer("none", None)
    self.attribute = torch.full((3,), 2.0, device=self.w.device)
    assert self.w.device == torch.device("cpu")
    assert nn.Parameter(self.w * 2).device == copy.deepcopy(self.w).device == torch.device("cpu")


def shaped(self: Any) -> None:
    """Learns a shape from a forward."""
    self.convolution = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        features = self.convolution(torch.zeros(1, 1, 9, 9)).shape[1]
    self.head = nn.Linear(features, self.convolution[0].weight.numel() % 7)
    self.bound = 1 / self.head.weight.size(1) ** 0.5


def deleted(self: Any) -> None:
    self.layer = nn.Linear(3, 3)
    self.replaced = nn.Linear(3, 3)
    del self.layer.bias
    self.layer.register_parameter("bias", None)
    self.replaced = nn.Linear(3, 2)
    self.replaced.weight = nn.Parameter(self.layer.weight[:2].clone())


WORKING = [
    created,
    initialised,
    written,
    replaced_by_other_shape,
    derived,
    tied,
    copied,
    applied,
    converted,
    buffers,
    shaped,
    deleted,
]
# Numbers that stand in the code, and are no initialisation: there is no memory to save.
DATA: dict[Any, tuple[str, ...]] = {created: ("indices", "scalar")}


@pytest.mark.parametrize("construct", WORKING)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_served(construct: Callable[[Any], None], tmp_path: Path) -> None:
    module = same_on_meta(lambda: Custom(construct), tmp_path, real=DATA.get(construct, ()))
    if construct is tied:
        assert module.before[0] is module.first
        assert not module.before[0].is_meta


def saved_buffer(self: Any) -> None:
    self.w = nn.Parameter(torch.randn(3, 4))
    self.register_buffer("total", self.w.detach().sum(1))


def test_buffer_that_the_checkpoint_holds(tmp_path: Path) -> None:
    same_on_meta(lambda: Custom(saved_buffer), tmp_path, computed=("total",))


def test_types_and_devices_are_converted(tmp_path: Path) -> None:
    def convert(self: Any) -> None:
        self.layer = nn.Linear(2, 2)
        self.weight = self.layer.weight
        self.layer.to("cpu", torch.float64)
        assert self.layer.weight is self.weight

    module = same_on_meta(lambda: Custom(convert), tmp_path)
    assert module.weight.dtype == torch.float64


def test_quantizable(tmp_path: Path) -> None:
    from torch.ao.nn import quantizable

    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            return nn.ModuleList([quantizable.MultiheadAttention(8, 2), quantizable.LSTM(3, 4)])

    same_on_meta(build, tmp_path)


# Kept in memory -------------------------------------------------------------------------------------------------------


class Special(nn.Parameter):
    """Not a plain parameter."""


def test_what_keeps_its_memory(tmp_path: Path) -> None:
    references = []

    def construct(self: Any) -> None:
        self.special = Special(torch.randn(3))
        watched = nn.Parameter(torch.randn(3))
        references.append(weakref.ref(watched))
        self.watched = watched
        self.plain = nn.Parameter(torch.randn(3))

    with pytest.warns(UserWarning, match=r"Custom\.watched: a weak reference") as warned, meta_init():
        module = Custom(construct)
    assert len(warned) == 1
    assert [name for name, parameter in module.named_parameters() if parameter.is_meta] == ["plain"]
    assert references[0]() is module.watched
    assert module.watched.abs().max() > 0


def test_weak_reference_to_a_parameter_on_meta(tmp_path: Path) -> None:
    with meta_init():
        module = nn.Linear(2, 2)
    reference = weakref.ref(module.weight)
    expected = nn.Linear(2, 2)
    restore(module, expected.state_dict(), tmp_path)
    assert reference() is module.weight
    assert raw(module(torch.ones(1, 2))) == raw(expected(torch.ones(1, 2)))
    del reference
    load_weights(module, tmp_path / "state.pt")
    assert_same_build(expected, module, restored=True)


def test_other_threads_build_as_always() -> None:
    built: list[nn.Linear] = []
    with meta_init():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        ours = nn.Linear(2, 2)
    assert ours.weight.is_meta
    assert not built[0].weight.is_meta
    assert built[0].weight.abs().max() > 0


def test_nested_and_after() -> None:
    with meta_init():
        with meta_init():
            inner = nn.Linear(2, 2)
        outer = nn.Linear(2, 2)
        with meta_init(enabled=False):
            still = nn.Linear(2, 2)
    assert all(module.weight.is_meta for module in (inner, outer, still))
    assert not nn.Linear(2, 2).weight.is_meta
    with pytest.raises(ZeroDivisionError), meta_init():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta
    with meta_init(enabled=False):
        assert not nn.Linear(2, 2).weight.is_meta


# Values on demand -----------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Needs a value of a parameter of its child."""

    def __init__(self, read: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.value = read(self, self.layer.weight)


class Net(nn.Module):
    """Most of it can be on meta."""

    def __init__(self, read: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.reader = Reader(read)


def into_real(_: Any, weight: torch.Tensor) -> torch.Tensor:
    values = torch.zeros(3)
    values[0] = weight.detach()[0, 0]
    return values


def into_out(_: Any, weight: torch.Tensor) -> torch.Tensor:
    return torch.sum(weight.detach(), dim=1, out=torch.zeros(2))


def into_data(_: Any, weight: torch.Tensor) -> torch.Tensor:
    values = torch.zeros(2, 3)
    values.data = weight.data
    return values


def into_buffer(self: Any, weight: torch.Tensor) -> None:
    self.register_buffer("total", weight.detach().sum(), persistent=False)


def into_many(_: Any, weight: torch.Tensor) -> list[torch.Tensor]:
    values = [torch.zeros(2, 3)]
    torch._foreach_copy_(values, [weight.detach()])
    return values


READS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "item": lambda _, weight: weight.mean().item(),
    "float": lambda _, weight: float(weight.data[0, 0]),
    "tolist": lambda _, weight: weight.tolist(),
    "condition": lambda _, weight: 1 if weight.sum() > 0 else 2,
    "numpy": lambda _, weight: weight.detach().numpy().copy(),
    "equal": lambda _, weight: torch.equal(weight, weight + 1),
    "allclose": lambda _, weight: torch.allclose(weight.t(), weight.t()),
    "nonzero": lambda _, weight: weight.nonzero().shape[0],
    "copy": lambda _, weight: torch.zeros(2, 3).copy_(weight.detach()),
    "in place": lambda _, weight: torch.zeros(2, 3).add_(weight.detach()),
    "setitem": into_real,
    "out": into_out,
    "foreach": into_many,
    "data": into_data,
    "attribute": lambda _, weight: weight.detach().std(),
    "forward": lambda self, weight: self.layer(torch.ones(3)).detach(),
    "buffer": into_buffer,
}


# What can wait with the parameter: no value of it has to be there while it is built.
WAITING = {"item", "condition", "copy", "in place", "setitem", "attribute", "forward", "buffer"}


@pytest.mark.parametrize("name", READS)
def test_gets_the_values(name: str, tmp_path: Path) -> None:
    """A constructor reads the values that the parameter has if no checkpoint fills it."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with meta_init():
            module = Net(READS[name])
    on_meta = {name for name, parameter in module.named_parameters() if parameter.is_meta}
    if name in WAITING:
        assert not warned
        assert on_meta == {"body.weight", "body.bias", "reader.layer.weight", "reader.layer.bias"}
    else:
        assert len(warned) == 1
        assert re.match(r"meta_init built 0\.0 MiB of parameters in memory.*: Linear\.weight: ", str(warned[0].message))
        assert warned[0].filename == __file__
        assert on_meta == {"body.weight", "body.bias", "reader.layer.bias"}
    if name == "data":
        assert module.reader.value.data_ptr() == module.reader.layer.weight.data_ptr()
    value, total = module.reader.value, getattr(module.reader, "total", None)
    filled = copy.deepcopy(module)
    follow_recipes(module)
    again = READS[name](module.reader, module.reader.layer.weight)
    assert same(value, again)
    assert total is None or same(total, module.reader.total)
    # And the restore fills all of it.
    expected = Net(READS[name])
    if name == "buffer":
        expected.reader.total = filled.reader.total
    expected.reader.value = filled.reader.value
    restore(filled, expected.state_dict(), tmp_path)
    assert_same_build(expected, filled, restored=True)


@pytest.mark.parametrize("name", READS)
def test_an_excluded_class_is_built_as_always(name: str) -> None:
    with meta_init(exclude=Reader if name == "forward" else [Reader]):
        module = Net(READS[name])
    assert [name for name, parameter in module.named_parameters() if parameter.is_meta] == ["body.weight", "body.bias"]
    assert same(module.reader.value, READS[name](module.reader, module.reader.layer.weight))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and raw(one) == raw(other)
    return bool(np.array_equal(one, other))


def test_errors_are_the_user_s() -> None:
    with meta_init():
        layer = nn.Linear(3, 2)
        with pytest.raises(RuntimeError, match="7"):
            _ = torch.ones(2, 3) + torch.ones(7)
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            layer.weight.zero_()
    with pytest.raises(RuntimeError, match="meta"), meta_init():
        torch.empty(2, device="meta").sum().item()


def test_own_meta_tensors_are_left_alone() -> None:
    class Template(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.template = torch.empty(3, device="meta")
            self.register_buffer("scratch", torch.empty(3, device="meta"), persistent=False)

    with meta_init():
        module = Template()
    assert module.template.device.type == module.scratch.device.type == "meta"


def test_decorator() -> None:
    calls = []

    @meta_init()
    def build(size: int, *, bias: bool = True) -> nn.Module:
        """Says what it builds."""
        calls.append(size)
        return nn.Linear(size, size, bias=bias)

    module = build(3, bias=False)
    assert calls == [3]
    assert module.weight.is_meta
    assert build.__doc__ == "Says what it builds."
    assert not meta_init(enabled=False)(build.__wrapped__)(2).weight.is_meta
    with pytest.raises(ZeroDivisionError):
        meta_init()(lambda: 1 / 0)()


def test_decorator_warns_once() -> None:
    calls = []

    class Second(Reader):
        pass

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(512, 512))
            self.tied = self.w
            self.top = self.w.tolist()[0][0]

    @meta_init()
    def build() -> nn.Module:
        calls.append(1)
        return nn.ModuleList([Reader(READS["tolist"]), Second(READS["numpy"]), nn.Linear(512, 512), Own()])

    with pytest.warns(UserWarning, match=r"built 1\.0 MiB .*Linear\.weight: .*; Own\.w: tolist\(\)") as warned:
        module = build()
    assert len(warned) == len(calls) == 1
    assert warned[0].filename == __file__
    assert {n for n, p in module.named_parameters() if p.is_meta} == {
        "0.layer.bias", "1.layer.bias", "2.weight", "2.bias",
    }  # fmt: skip
    assert module[3].top == 0


class TestSharedMemory:
    """Two parameters over one memory are not one parameter: given memory one by one they would go separate ways."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.zeros(12)
            self.a, self.b = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
            self.a.weight = nn.Parameter(flat[:6].view(3, 2))
            self.b.weight = nn.Parameter(flat[6:].view(3, 2))

    class Data(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Embedding(3, 3)
            self.b.weight = nn.Parameter(self.a.weight.data)

    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.zeros(4)
            self.w = nn.Parameter(memory)
            self.register_buffer("view", memory[:2])

    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.zeros(4)
            self.w = nn.Parameter(memory)
            self.first = memory[:2]

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))
            self.rows = [self.w.detach()[:2]]

    @pytest.mark.parametrize("kind", [Flat, Data, Buffer, Attribute, Listed])
    def test_is_kept_in_memory(self, kind: type[nn.Module]) -> None:
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(4, 4)
                self.inner = kind()

        with pytest.warns(UserWarning, match="it shares its memory with another tensor") as warned, meta_init():
            module = Outer()
        assert len(warned) == 1
        assert module.body.weight.is_meta
        parts = [*module.inner.state_dict().values(), *getattr(module.inner, "rows", [])]
        parts += [module.inner.first] if hasattr(module.inner, "first") else []
        addresses = [tensor.untyped_storage().data_ptr() for tensor in parts if not tensor.is_meta]
        assert len(set(addresses)) < len(addresses)

    def test_what_is_gone_shares_nothing(self) -> None:
        with meta_init():
            module = nn.Linear(3, 3)
            module.weight = nn.Parameter(module.weight.data[:2])
            other = nn.Linear(3, 3)
            other.weight = nn.Parameter(torch.ones(3, 3))
        assert module.weight.is_meta
        assert other.weight.is_meta


def test_hooks_on_parameters_stay(tmp_path: Path) -> None:
    calls: list[str] = []
    with meta_init():
        module = nn.Linear(3, 3, bias=False)
        module.weight.register_hook(lambda gradient: calls.append("gradient") or gradient * 0)
        gone = module.weight.register_hook(lambda gradient: calls.append("gone"))
        module.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    torch.save(nn.Linear(3, 3, bias=False).state_dict(), tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")
    gone.remove()
    module(torch.ones(1, 3)).sum().backward()
    assert calls == ["gradient", "accumulated"]
    assert not module.weight.grad.any()


class _NeedsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.scale = self.layer.weight.tolist()


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _NeedsValues()
        self.outer = nn.Linear(2, 2)


@pytest.mark.parametrize("exclude", ["Linear", [nn.Linear, "Linear"], [None]])
def test_only_classes_can_be_excluded(exclude: Any) -> None:
    with pytest.raises(TypeError, match="takes module classes, got"):
        meta_init(exclude=exclude)


class TestWithinOneAnother:
    def check(self, module: _Around) -> None:
        assert not module.inner.layer.weight.is_meta
        assert module.outer.weight.is_meta

    def test_either_says_what_is_built_in_memory(self) -> None:
        with meta_init():
            with meta_init(exclude=(_NeedsValues,)):
                one = _Around()
            with pytest.raises(ZeroDivisionError), meta_init(exclude=(nn.Linear,)):
                raise ZeroDivisionError
            plain = nn.Linear(2, 2)
        with meta_init(exclude=(_NeedsValues,)), meta_init():
            other = _Around()
        self.check(one)
        self.check(other)
        assert plain.weight.is_meta

    def test_it_ends_with_the_outer_one(self) -> None:
        module = nn.Module()

        @meta_init()
        def build() -> None:
            with meta_init():
                module.inner = nn.Linear(2, 2)
            module.total = module.inner.weight.detach().sum()
            module.outer = meta_init()(nn.Linear)(2, 2)
            module.number = module.outer.weight.tolist()  # type: ignore[assignment]

        with pytest.warns(UserWarning, match=r"Linear\.weight: tolist\(\)") as warned:
            build()
        assert len(warned) == 1
        assert module.inner.weight.is_meta
        follow_recipes(module)
        assert module.total == module.inner.weight.sum()
        assert module.number == module.outer.weight.tolist()


@pytest.mark.slow
def test_threads_build_beside_one_another() -> None:
    """torch runs through its hooks at every registration, in every thread."""

    def build() -> None:
        for _ in range(50):
            with meta_init():
                on_meta = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(20)])
            assert all(parameter.is_meta for parameter in on_meta)
            assert not nn.Linear(2, 2).weight.is_meta

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(build) for _ in range(4)]:
            future.result()


class _SavesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.file = io.BytesIO()
        torch.save(self.layer.state_dict(), self.file)


class _RunsBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer(torch.ones(1, 2)).square().sum().backward()


@pytest.mark.parametrize("kind", [_SavesItself, _RunsBackward])
def test_saving_and_training_in_a_constructor(kind: type[Any]) -> None:
    with pytest.warns(UserWarning, match=r"Linear\.weight: ") as warned, meta_init():
        module = kind()
    assert len(warned) == 1
    assert not module.layer.weight.is_meta
    if kind is _SavesItself:
        module.file.seek(0)
        assert same(list(torch.load(module.file).values()), list(module.layer.state_dict().values()))
    else:
        expected = copy.deepcopy(module)
        expected.zero_grad()
        expected.layer(torch.ones(1, 2)).square().sum().backward()
        assert raw(expected.layer.weight.grad) == raw(module.layer.weight.grad)


def test_an_error_leaves_what_was_built_usable() -> None:
    built: list[nn.Module] = []

    def build() -> None:
        built.append(nn.Linear(2, 2))
        built.append(nn.BatchNorm1d(3))
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"), meta_init():
        build()
    assert not nn.Linear(2, 2).weight.is_meta
    assert built[0].weight.is_meta
    assert built[1].running_var.tolist() == [1, 1, 1]
    follow_recipes(built[0])
    assert built[0].weight.abs().max() > 0
