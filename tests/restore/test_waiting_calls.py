"""Calls on parameters that wait for their values: each gives what it gives for an ordinary module."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_memload import load_weights, meta_init
from lightning_memload.restore import follow_recipes
from tests.restore.building import raw

pytestmark = [
    pytest.mark.filterwarnings("ignore:A parameter that was built under meta_init is used:UserWarning"),
    pytest.mark.filterwarnings("ignore:meta_init built:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.(jit|ao.quantization).*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning"),
]
X = torch.tensor([[0, 1, 5]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_((torch.arange(parameter.numel()) * 0.37 + index).sin().view_as(parameter))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(self.embedding(indices))) * self.scale


class Marked(torch.Tensor):
    pass


class Special(nn.Parameter):
    pass


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return weight * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * ctx.saved_tensors[0]


def scripted(net: Any) -> Any:
    script = torch.jit.script(net)
    script(X).sum().backward()
    return script(X), script.linear.weight.grad, net.linear.weight.grad


def traced(net: Any) -> Any:
    return torch.jit.trace(net, (X,))(X)


def quantized(net: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(net.eval(), {nn.Linear})(X)


def set_to(net: Any) -> Any:
    with torch.no_grad():
        net.linear.weight.set_(torch.full((4, 4), 3.0))
    other = torch.zeros(4)
    other.set_(net.linear.bias.data)
    other.add_(1)
    return other


def subclasses(net: Any) -> Any:
    alias = net.linear.weight.data.as_subclass(Marked)
    alias.add_(1)
    net.norm.weight = Special(net.norm.weight.data)
    net.norm.bias = Special(net.norm.bias)
    result = net.linear.weight.as_subclass(Marked)
    return [type(each).__name__ for each in (alias, result, net.norm.weight, net.norm.bias)], result, result.is_leaf


def gradients(net: Any) -> Any:
    net.linear.weight.grad = torch.ones(4, 4)
    for parameter in net.norm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net(X).sum().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    return [parameter.grad for parameter in net.parameters()]


def transformed(net: Any) -> Any:
    weight = net.linear.weight
    rows = torch.vmap(lambda row: row.sum())(weight)
    tangent = torch.func.jvp(lambda value: value * net.scale, (torch.ones(4),), (torch.ones(4),))
    square = torch.func.grad(lambda value: (value**2).sum())(net.linear.bias)
    return rows, tangent, square, torch.func.functionalize(lambda value: value * 2)(net.norm.weight)


def functional(net: Any) -> Any:
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    return torch.func.grad(lambda values: torch.func.functional_call(net, values, (X,)).sum())(parameters)


def own_function(net: Any) -> Any:
    result = Twice.apply(net.linear.weight)  # type: ignore[no-untyped-call]
    result.sum().backward()
    return result, net.linear.weight.grad


def traced_operations(net: Any) -> Any:
    return make_fx(net)(X)(X)


def gradient_of_some(net: Any) -> Any:
    return torch.autograd.grad(net(X).sum(), [net.linear.weight])


def referred_to(net: Any) -> Any:
    references, names = [weakref.ref(parameter) for parameter in net.parameters()], WeakTensorKeyDictionary()
    names[net.linear.weight] = "weight"
    result = net(X)
    result.sum().backward()
    assert [reference() for reference in references] == list(net.parameters())
    weight = net.linear.weight
    return result, names[weight], weight.grad, weight.tolist(), copy.deepcopy(weight), nn.Parameter(weight)


def graph_held(net: Any) -> Any:
    script = torch.jit.script(net)
    result = script(X)
    follow_recipes(net)
    _ = net.linear.weight.sum()
    result.sum().backward()
    return net.linear.weight.grad


def copied(net: Any) -> Any:
    other = copy.copy(net.linear.weight)
    other.data.add_(1)
    return type(other), other


def on_its_device(net: Any) -> Any:
    place = next(net.parameters()).device
    net.register_buffer("ones", torch.ones(2, device=place))
    return net(X.to(place)), net.ones * 2, net.linear.weight.new_zeros(2), torch.zeros(2).type_as(net.linear.weight)


def initialised(net: Any) -> Any:
    torch.manual_seed(3)
    nn.init.sparse_(net.linear.weight, 0.5)
    nn.init.trunc_normal_(net.linear.bias)
    nn.init.constant_(net.norm.weight[:2], 7)
    return torch.rand(2)


def copied_in_vain(net: Any) -> Any:
    with pytest.raises(RuntimeError, match="size of tensor"):
        net.linear.weight.data.copy_(torch.ones(5))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        net.linear.weight.copy_(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict({"linear.bias": torch.ones(5)}, strict=False)


def changed_behind_a_graph(net: Any) -> Any:
    data, weight = net.linear.weight.data, net.linear.weight
    result = (weight**2).sum()
    data.add_(1)
    result.backward()
    return weight.grad


def numbers(net: Any) -> Any:
    scale, bias = net.scale, net.linear.bias.detach()
    listed = torch.tensor([scale[0], scale[1]]), torch.as_tensor([list(scale)]), scale.new_tensor((bias[0], bias[1]))
    index = [(scale[0] + 2).long(), (scale[1] + 2).long()]
    filled = torch.zeros(2)
    filled[:] = torch.ones(2).map_(bias[:2], lambda one, other: one * 2 + other)
    return listed, torch.arange(10)[(index,)], filled, torch.full((2,), scale[1].item()), bias.new_full((2,), 3)


def versions(net: Any) -> Any:
    weight, alias = net.linear.weight, net.linear.weight.detach()
    before = weight._version, alias._version
    _ = weight.sum()
    alias.add_(1)
    return weight._version - before[0], alias._version - before[1]


def threads(net: Any) -> Any:
    results: list[Any] = [None] * 4

    def run(index: int) -> None:
        results[index] = net(X).detach()

    running = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return results


def moved_to_meta(net: Any) -> Any:
    net.to("meta")
    return [parameter.is_meta for parameter in net.parameters()], str(net(X.to("meta")).device)


CALLS = [
    scripted, traced, quantized, set_to, subclasses, gradients, transformed, functional, own_function,
    traced_operations, gradient_of_some, referred_to, graph_held, copied, on_its_device, initialised, copied_in_vain,
    changed_behind_a_graph, numbers, versions, threads, moved_to_meta,
]  # fmt: skip
# Within the block random numbers are others, and other threads read memory without values.
IN_BLOCK = [call for call in CALLS if call not in (initialised, threads)]


def described(value: Any) -> Any:
    """A result in a form that can be compared."""
    if isinstance(value, torch.Tensor):
        if value.is_quantized or type(value) is Marked:
            value = value.as_subclass(torch.Tensor)
        values = "meta" if value.is_meta else raw(value)
        return value.dtype, tuple(value.shape), value.requires_grad, value.is_leaf, values
    if isinstance(value, dict):
        return {key: described(each) for key, each in value.items()}
    return [described(each) for each in value] if isinstance(value, (tuple, list)) else value


def state(net: nn.Module) -> Any:
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return [(name, described(tensor), described(tensor.grad)) for name, tensor in tensors]


@pytest.mark.parametrize("call", CALLS)
def test_between_building_and_the_restore(call: Callable[[Any], Any], tmp_path: Path) -> None:
    expected = Net()
    with meta_init():
        net = Net()
    assert all(parameter.is_meta for parameter in net.parameters())
    parameters = list(net.parameters())
    result = described(call(expected))
    assert described(call(net)) == result
    if call is moved_to_meta:
        return
    follow_recipes(net)
    assert state(net) == state(expected)
    if call not in (quantized, subclasses):
        assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    values = {name: torch.full_like(value, 3) for name, value in expected.state_dict().items()}
    torch.save(values, tmp_path / "weights.pt")
    load_weights(net, tmp_path / "weights.pt")
    expected.load_state_dict(values)
    assert state(net) == state(expected)
    assert described(net(X)) == described(expected(X))


@pytest.mark.parametrize("call", IN_BLOCK)
def test_while_it_is_built(call: Callable[[Any], Any]) -> None:
    expected = Net()
    with meta_init():
        net = Net()
        result = described(call(net))
    assert result == described(call(expected))
    if call is not moved_to_meta:
        follow_recipes(net)
        assert state(net) == state(expected)


@pytest.mark.parametrize("value", ["module", "parameters", "state_dict"])
@pytest.mark.parametrize("dump", ["pickle", "torch"])
def test_a_file_holds_values_and_needs_only_torch(value: str, dump: str) -> None:
    def build() -> nn.Module:
        layer = nn.Linear(2, 3)
        nn.init.constant_(layer.weight, 2)
        nn.init.constant_(layer.bias, 3)
        return nn.Sequential(layer)

    expected = build()
    with meta_init():
        module = build()

    def written(module: Any) -> bytes:
        what = {"module": module, "parameters": list(module.parameters()), "state_dict": module.state_dict()}[value]
        if dump == "pickle":
            return pickle.dumps(what)
        file = io.BytesIO()
        torch.save(what, file)
        return file.getvalue()

    # A module keeps the hook that fills its parameters when a state dict is loaded.
    if value != "module":
        assert b"lightning_memload" not in written(module)
    content = written(module)
    read = pickle.loads(content) if dump == "pickle" else torch.load(io.BytesIO(content), weights_only=False)
    values = read.state_dict() if value == "module" else read
    found = values.values() if isinstance(values, dict) else values
    assert [raw(each) for each in found] == [raw(each) for each in expected.parameters()]


def test_what_only_asks_for_shape_and_device_makes_no_values() -> None:
    with meta_init():
        net = Net()
    weight = net.linear.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.zeros_like(weight).tolist() == torch.zeros(4, 4).tolist()
        assert weight.new_ones(2).tolist() == [1, 1]
        assert torch.arange(2).to(weight).dtype == torch.float32
        weight.grad = torch.empty_like(weight)
        assert weight.device == torch.device("cpu")
    assert all(parameter.is_meta for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_a_compiled_module() -> None:
    expected = Net()
    with meta_init():
        net = Net()
    result = torch.compile(net, backend="eager")(X)
    assert described(result) == described(torch.compile(expected, backend="eager")(X))
    assert type(net.linear.weight) is nn.Parameter


def test_memory_is_not_shared_in_silence() -> None:
    """torch asks an ordinary tensor, and not the waiting one, whether it may take this memory."""
    with meta_init():
        net = Net()
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        layer.weight.data = net.linear.weight.data
    _ = net.linear.weight.sum()
    layer.weight.data = net.linear.weight.data
    assert layer.weight.data_ptr() == net.linear.weight.data_ptr()
