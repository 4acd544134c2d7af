"""Private names of torch do what the package expects of them. There is a test for each name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lightning_memload import torch_private as private

PACKAGE = Path(private.__file__).parent


class Noted(torch.Tensor):
    """A subclass that notes calls of its ``__torch_function__``."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Noted.calls += 1
        with private.without_overrides():
            return func(*args, **(kwargs or {}))


class Answered(torch.Tensor):
    """A subclass that answers each operation with the numbers 0, 1 and 2."""

    __torch_function__ = private.no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return torch.arange(3)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "a mode of functions"


class Operations(private.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with private.without_dispatch_modes():
            return torch.arange(3)


def answered() -> Any:
    return private.make_wrapper_subclass(
        Answered, (2, 3), strides=(1, 2), dtype=torch.float16, device=torch.device("cpu")
    )


class TestContexts:
    def test_functions_of_subclasses_are_switched_off(self) -> None:
        tensor, values = torch.ones(2).as_subclass(Noted), torch.ones(2)
        before = Noted.calls
        with private.without_overrides():
            tensor.add(1)
            with Functions():
                assert torch.add(values, 1) == "a mode of functions"
        assert Noted.calls == before

    def test_functions_of_modes_are_switched_off_too(self) -> None:
        with Functions(), private.without_overrides_and_modes():
            assert torch.add(torch.ones(2), 1).sum() == 4

    def test_modes_of_operations_are_seen_and_switched_off(self) -> None:
        values = torch.ones(2)
        assert private.current_dispatch_mode() is None
        assert not private.has_dispatch_modes()
        with Operations() as mode:  # type: ignore[no-untyped-call]
            assert private.has_dispatch_modes()
            assert private.current_dispatch_mode() is mode
            assert torch.add(values, 1).tolist() == [0, 1, 2]
            with private.without_dispatch_modes():
                assert torch.add(values, 1).tolist() == [2, 2]

    def test_function_transforms_are_switched_off(self) -> None:
        values = torch.arange(3.0)

        def total(item: torch.Tensor) -> torch.Tensor:
            with private.without_functorch():
                seen.append(values.sum().item())  # .item() fails within vmap.
            return item

        seen: list[float] = []
        torch.vmap(total)(values)
        assert seen == [3]

    def test_dispatch_to_python_is_switched_off(self) -> None:
        tensor = private.make_subclass(Answered, torch.ones(2))
        assert tensor.add(1).tolist() == [0, 1, 2]
        with private.without_torch_dispatch():
            assert tensor.add(1).tolist() == [2, 2]

    def test_autograd_is_left_out(self) -> None:
        parameter = nn.Parameter(torch.ones(2))
        with private.below_autograd():
            assert not (parameter * 2).requires_grad


class TestTracing:
    def test_of_operations(self) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        seen: list[bool] = []

        def function(item: torch.Tensor) -> torch.Tensor:
            seen.append(private.is_traced_by_dispatch())
            return item + 1

        make_fx(function)(torch.ones(2))
        with Operations():  # type: ignore[no-untyped-call]
            assert not private.is_traced_by_dispatch()
        assert seen == [True]

    @pytest.mark.filterwarnings("ignore")
    def test_by_jit(self) -> None:
        seen: list[bool] = []

        def function(item: torch.Tensor) -> torch.Tensor:
            seen.append(private.is_traced_by_jit())
            return item + 1

        torch.jit.trace(function, torch.ones(2), check_trace=False)
        assert not private.is_traced_by_jit()
        assert seen == [True]


class TestTensors:
    def test_a_subclass_in_the_memory_of_another_tensor(self) -> None:
        values = torch.ones(2)
        made = private.make_subclass(nn.Parameter, values, True)
        assert type(made) is nn.Parameter
        assert made.requires_grad
        assert made.data_ptr() == values.data_ptr()

    def test_a_subclass_without_memory(self) -> None:
        tensor = answered()
        assert (tensor.shape, tensor.stride(), tensor.dtype) == ((2, 3), (1, 2), torch.float16)
        assert isinstance(tensor, Answered)

    def test_the_storage_of_a_weak_reference(self) -> None:
        storage = torch.ones(2).untyped_storage()
        reference = StorageWeakRef(storage)
        found = private.storage_from_weak_reference(reference.cdata)
        assert found is not None
        assert found.data_ptr() == storage.data_ptr()
        del found, storage
        assert private.storage_from_weak_reference(reference.cdata) is None

    def test_the_number_of_tensors_in_a_storage(self) -> None:
        assert private.COUNT_USES is not None, (
            "meta_init builds everything in memory without torch._C._storage_Use_Count"
        )
        tensor = torch.ones(2)
        storage = tensor.untyped_storage()
        alone = private.COUNT_USES(storage._cdata)
        other = tensor.view(1, 2)
        assert private.COUNT_USES(storage._cdata) == alone + 1
        del other
        assert private.COUNT_USES(storage._cdata) == alone

    def test_the_question_about_memory_in_place(self) -> None:
        """torch asks it through these names, in to_empty() and in ``data =``."""
        asked: list[Any] = []

        class Questions(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                asked.append(func)
                return func(*args, **(kwargs or {}))

        with Questions():
            nn.Linear(1, 1, device="meta").to_empty(device="cpu")
        assert private.HAS_COMPATIBLE_TYPE in asked
        assert private.IS_COMPATIBLE(torch.ones(1), torch.ones(2))

    def test_nested_arguments(self) -> None:
        assert private.tree_map_only(int, lambda value: value + 1, ([1, "a"], {"b": 2})) == ([2, "a"], {"b": 3})


class TestPickles:
    def test_the_functions_that_rebuild_a_tensor(self) -> None:
        function, _ = torch.ones(2).__reduce_ex__(2)
        assert function in private.REBUILD_TENSOR

    def test_the_function_that_rebuilds_a_tensor_with_attributes(self) -> None:
        tensor = torch.ones(2)
        tensor.note = "kept"
        function, arguments = tensor.__reduce_ex__(2)
        assert function is private.REBUILD_FROM_TYPE
        assert arguments[0] in private.REBUILD_TENSOR


class TestModules:
    def test_the_result_of_load_state_dict(self) -> None:
        keys = nn.Linear(1, 1).load_state_dict({}, strict=False)
        assert isinstance(keys, private.IncompatibleKeys)
        assert keys.missing_keys == ["weight", "bias"]

    @pytest.mark.parametrize("module", [nn.Linear(1, 1), nn.LayerNorm(1), nn.BatchNorm1d(1), nn.BatchNorm3d(1)])
    def test_loading_code_whose_result_is_known(self, module: nn.Module) -> None:
        assert type(module)._load_from_state_dict in private.FORESEEN_LOADING


def test_there_is_no_store_without_a_process_group() -> None:
    """The store itself is tested by ranks (tests/distributed)."""
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        private.default_store()


# Attributes -----------------------------------------------------------------------------------------------------------

OPERATOR: Any = torch.ops.aten.add.Tensor
TENSOR: Any = torch.ones(1)
TYPED = torch.TypedStorage(wrap_storage=TENSOR.untyped_storage(), dtype=TENSOR.dtype, _internal=True)
# Attributes of objects of torch, with the objects. They are read where they are needed.
ATTRIBUTES: dict[str, Any] = {
    "_backward_hooks": TENSOR,
    "_buffers": nn.Linear(1, 1),
    "_cdata": TENSOR.untyped_storage(),
    "_flat_weight_refs": nn.LSTM(1, 1),
    "_init_flat_weights": nn.LSTM(1, 1),
    "_load_from_state_dict": nn.Linear(1, 1),
    "_load_state_dict_post_hooks": nn.Linear(1, 1),
    "_load_state_dict_pre_hooks": nn.Linear(1, 1),
    "_metadata": nn.Linear(1, 1).state_dict(),
    "_modules": nn.Linear(1, 1),
    "_non_persistent_buffers_set": nn.Linear(1, 1),
    "_optimizer_load_state_dict_post_hooks": torch.optim.SGD([TENSOR]),
    "_optimizer_load_state_dict_pre_hooks": torch.optim.SGD([TENSOR]),
    "_overloadname": OPERATOR,
    "_parameters": nn.Linear(1, 1),
    "_pickle_storage_type": TYPED,
    "_schema": OPERATOR,
    "_untyped_storage": TYPED,
    "_use_count": TENSOR,
    "_version": TENSOR,
}
# Attributes that are not torch's: of the standard library.
OTHERS = {"_Stop", "_Unpickler", "_current_frames", "_getframe", "_replace"}
# The rooms' own files for private names: of Lightning, and of torch.save.
ELSEWHERE = {"plugins/seams.py", "plugins/compat.py", "storage/torch_save.py", "torch_private.py"}


def private_names(source: str) -> Iterator[tuple[str, bool]]:
    """The names in a source with a leading underscore that it does not define itself, and whether they are torch's.

    A name is torch's if it is imported from a module of torch, or read off one. Otherwise it is an attribute of an
    object.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    modules = {"torch"} | {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch"
        for alias in node.names
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = (name for alias in node.names for name in f"{node.module}.{alias.name}".split("."))
            yield from ((name, True) for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            yield node.attr, isinstance(root, ast.Name) and root.id in modules


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_names(source: str) -> set[str]:
    """Names that a source gives to its own functions, classes, attributes and variables."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


class TestOnePlace:
    def test_no_other_file_takes_private_names_from_torch(self) -> None:
        found = {
            f"{file.relative_to(PACKAGE)}: {name}"
            for file in PACKAGE.rglob("*.py")
            if file.relative_to(PACKAGE).as_posix() not in ELSEWHERE
            for name, is_torchs in private_names(file.read_text())
            if is_torchs
        }
        assert found == set()

    def test_private_attributes_are_listed(self) -> None:
        sources = [
            file.read_text() for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).as_posix() not in ELSEWHERE
        ]
        own = set().union(*map(defined_names, sources))
        used = {name for source in sources for name, is_torchs in private_names(source) if not is_torchs}
        assert used - own - OTHERS <= set(ATTRIBUTES)
        assert set(ATTRIBUTES) <= used

    @pytest.mark.parametrize(
        ("source", "name"),
        [
            ("import torch\ntorch._C.x()", "_C"),
            ("import torch\nwith torch.utils._pytree.x(): pass", "_pytree"),
            ("from torch._utils import x", "_utils"),
            ("def f():\n    from torch.nn.modules.module import _IncompatibleKeys as Keys", "_IncompatibleKeys"),
            ("from torch import nn\nnn.Module._load_from_state_dict", "_load_from_state_dict"),
        ],
    )
    def test_a_private_name_is_caught(self, source: str, name: str) -> None:
        assert (name, True) in private_names(source)

    @pytest.mark.parametrize("source", ["self._C", "module._parameters", "import torch\ntorch.__version__"])
    def test_other_names_pass(self, source: str) -> None:
        assert not any(is_torchs for _, is_torchs in private_names(source))


def test_strided_shards_are_told_from_others() -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    assert private.is_strided_shard(_StridedShard(0, split_factor=2))
    assert not any(map(private.is_strided_shard, (Shard(0), Replicate())))


def test_indices_are_split_as_torch_distributes_a_tensor() -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    parts = private.split_indices(_StridedShard(1, split_factor=2), 8, 2)
    assert [part.tolist() for part in parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [part.tolist() for part in private.split_indices(Shard(0), 5, 4)] == [[0, 1], [2, 3], [4], []]


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_objects_of_torch_have_the_attribute(name: str) -> None:
    owner = ATTRIBUTES[name]
    assert hasattr(owner, name), f"{type(owner).__name__} of torch {torch.__version__} has no {name} any more"


@pytest.mark.parametrize("name", private.__all__)
def test_every_name_has_a_test(name: str) -> None:
    assert f"private.{name}" in Path(__file__).read_text()
