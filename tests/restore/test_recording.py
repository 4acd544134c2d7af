"""Within meta_init every question to a tensor whose contents wait is answered as an ordinary tensor answers it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_memload import meta_init
from tests.restore.building import raw

# They draw, end up elsewhere, or are asked for what only the object itself has.
SKIPPED = {
    "bernoulli",
    "bernoulli_",
    "cauchy_",
    "exponential_",
    "geometric_",
    "log_normal_",
    "multinomial",
    "normal_",
    "random_",
    "uniform_",
    "data_ptr",
    "const_data_ptr",
    "cuda",
    "xpu",
    "ipu",
    "hpu",
    "mtia",
    "to_mkldnn",
    "refine_names",
    "align_to",
    "rename",
    "rename_",
    "names",
    "storage",
    "untyped_storage",
    "module_load",
    "share_memory_",
    "new",
}
DUNDERS = [
    "__repr__",
    "__len__",
    "__bool__",
    "__float__",
    "__int__",
    "__array__",
    "__dlpack__",
    "__iter__",
    "__reversed__",
    "__deepcopy__",
    "__reduce_ex__",
    "__invert__",
    "__neg__",
    "__abs__",
    "__format__",
]
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "__deepcopy__": ({},),
    "__reduce_ex__": (2,),
    "__format__": ("",),
    "reshape": (-1,),
    "view": (-1,),
    "to": ("cpu",),
    "permute": (1, 0),
    "transpose": (0, 1),
    "sum": (),
    "index_select": (0, torch.tensor([1])),
    "gather": (0, torch.zeros(1, 3).long()),
    "topk": (1,),
    "chunk": (2,),
    "split": (1,),
    "unbind": (),
    "clamp": (0.0, 2.0),
    "pow": (2,),
    "new_full": ((2,), 3.0),
    "type": (),
    "unsqueeze": (0,),
    "squeeze": (),
    "expand": (2, 2, 3),
    "repeat": (2, 1),
    "norm": (),
    "triu": (),
    "where": (torch.ones(2, 3) > 0, torch.zeros(2, 3)),
    "add": (1,),
    "mul": (2,),
    "sub": (1,),
    "div": (2,),
    "add_": (1,),
    "mul_": (2,),
    "matmul": (torch.ones(3),),
    "fill_": (3,),
    "copy_": (torch.ones(2, 3),),
    "set_": (torch.ones(2, 3),),
    "resize_": (2, 2),
    "index_fill_": (0, torch.tensor([1]), 5.0),
    "masked_fill_": (torch.ones(2, 3) > 0, 4.0),
    "scatter_": (0, torch.zeros(1, 3).long(), 9.0),
    "view_as": (torch.ones(3, 2),),
    "quantile": (0.5,),
    "histc": (),
    "allclose": (torch.ones(2, 3),),
    "equal": (torch.ones(2, 3),),
    "map_": (torch.ones(2, 3), lambda a, b: a + b),
    "apply_": (lambda value: value + 1,),
    "as_strided": ((2,), (1,)),
    "is_set_to": (torch.ones(1),),
    "new_tensor": ([1.0],),
}


def questions() -> list[str]:
    public = [name for name in dir(torch.Tensor) if not name.startswith("_") and name not in SKIPPED]
    return [*public, *DUNDERS]


def ordinary() -> torch.Tensor:
    tensor = torch.full((2, 3), 2.5)
    tensor[1, 2] = -1
    return tensor


def registered() -> torch.Tensor:
    module = nn.Module()
    module.weight = nn.Parameter(ordinary(), requires_grad=False)
    return module.weight


def ask(make: Callable[[], torch.Tensor], name: str) -> Any:
    tensor = make()
    try:
        value = getattr(tensor, name)
        if callable(value):
            value = value(*ARGUMENTS.get(name, ()))
        return plain(value), plain(tensor)
    except Exception as error:
        return type(error)


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            return str(value)
        if value.is_meta:
            return str(value.shape)
        return value.dtype, value.shape, value.stride(), value.device, value.requires_grad, raw(value)
    if isinstance(value, np.ndarray):
        return value.tobytes(), value.shape
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "__next__"):
        return [plain(item) for item in value]
    if isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, type(None))):
        return value
    return type(value)


@pytest.mark.parametrize("make", [ordinary, registered])
def test_every_question_gets_its_answer(make: Callable[[], torch.Tensor]) -> None:
    """All that torch.Tensor can be asked without arguments, or with simple ones: the same value, or the same error."""
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in questions():
            expected = ask(make, name)
            with meta_init():
                actual = ask(make, name)
            if repr(actual) != repr(expected):
                wrong.append(name)
    assert not wrong
    assert len(questions()) > 400


@pytest.mark.parametrize("error", [AssertionError, IndexError, KeyError, NotImplementedError])
def test_an_operator_without_a_meta_kernel_that_works(error: type[Exception]) -> None:
    """Operations whose result a meta kernel cannot know run at once."""
    name = f"memload_tests::twice_{error.__name__.lower()}"
    schema = "(Tensor tensor) -> Tensor"
    twice = torch.library.custom_op(name, lambda tensor: 2 * tensor, mutates_args=(), schema=schema)

    @twice.register_fake
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise error("not here")

    expected = twice(registered())
    with meta_init():
        actual = twice(registered())
    assert plain(actual) == plain(expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
@pytest.mark.parametrize("name", ["add", "mul", "mm"])
def test_sparse_tensors_meet_waiting_ones(layout: torch.layout, name: str) -> None:
    """A mask or an adjacency matrix that a constructor combines with a parameter."""

    def answer() -> Any:
        sparse = torch.eye(2, 3).to_sparse(layout=layout)
        try:
            return plain(getattr(torch, name)(sparse, registered().T if name == "mm" else registered()))
        except RuntimeError as error:
            return type(error)

    expected = answer()
    with meta_init():
        actual = answer()
    assert actual == expected


def test_nothing_is_told_of_what_only_a_circle_of_references_keeps() -> None:
    gc.disable()
    try:
        with meta_init():
            layer = nn.Linear(2, 2)
            circle: list[Any] = [layer]
            circle.append(circle)
            layer.weight.tolist()
            del layer, circle
    finally:
        gc.enable()


class Probed(nn.Module):
    """Finds the size of its head with a forward, as constructors of vision models do."""

    def __init__(self, norm: nn.Module, is_training: bool) -> None:
        super().__init__()
        self.body = nn.Conv1d(2, 4, 3)
        nn.init.constant_(self.body.weight, 0.5)
        nn.init.constant_(self.body.bias, 0.25)  # type: ignore[arg-type]
        self.norm = norm.train(is_training)
        with torch.no_grad():
            self.head = nn.Linear(self.norm(self.body(torch.arange(64.0).view(4, 2, 8))).flatten(1).shape[1], 2)


@pytest.mark.filterwarnings("ignore:meta_init built")
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_a_forward_updates_running_statistics(norm: type[nn.Module], is_training: bool) -> None:
    def build() -> Probed:
        return Probed(norm(4, track_running_stats=True), is_training)

    expected = build()
    with meta_init():
        actual = build()
    for key, buffer in actual.named_buffers():
        assert plain(buffer) == plain(expected.get_buffer(key)), key
    assert bool(actual.norm.running_var.max() > 1) == is_training
    assert actual.body.weight.is_meta


def test_empties_are_not_written_before_they_are_needed() -> None:
    """The meta-test of the above: in a block, what is asked there is really waiting."""
    with meta_init():
        memory = torch.empty(4)
        address = memory.detach().numpy()
        address[:] = 7
        waiting = torch.full_like(memory, 3.0)
        view = waiting[1:]
        waiting.mul_(2)
        view[0] = 1
        waits = waiting._version  # counted, as always
        assert memory.tolist() == [7, 7, 7, 7]
        assert waiting.tolist() == [6, 1, 6, 6]
    assert waits == 2
