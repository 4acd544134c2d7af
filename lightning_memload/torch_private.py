"""All functions and classes of torch that this package uses and that are not public, in one place.

Each stands here because torch (2.6 to 2.14) has no public name for it. The comment says what it is needed for.
``tests/test_torch_private.py`` has a test for each name: it fails in words when a version of torch changes it. The test
also lists the private attributes of modules, tensors and storages, which are read where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode
from torch.utils._pytree import tree_map_only

__all__ = [
    "COUNT_USES",
    "FORESEEN_LOADING",
    "HAS_COMPATIBLE_TYPE",
    "IS_COMPATIBLE",
    "REBUILD_FROM_TYPE",
    "REBUILD_TENSOR",
    "IncompatibleKeys",
    "TorchDispatchMode",
    "below_autograd",
    "current_dispatch_mode",
    "default_store",
    "has_dispatch_modes",
    "is_strided_shard",
    "is_traced_by_dispatch",
    "is_traced_by_jit",
    "make_subclass",
    "make_wrapper_subclass",
    "no_torch_function",
    "split_indices",
    "storage_from_weak_reference",
    "tree_map_only",
    "without_dispatch_modes",
    "without_functorch",
    "without_overrides",
    "without_overrides_and_modes",
    "without_torch_dispatch",
]

# Contexts that switch off what torch does around an operation: the __torch_function__ of subclasses, that of modes too,
# the dispatch to Python, function transforms (vmap, grad), and autograd.
without_overrides = torch._C.DisableTorchFunctionSubclass
without_overrides_and_modes = torch._C.DisableTorchFunction
without_torch_dispatch = torch._C._DisableTorchDispatch
without_functorch = torch._C._DisableFuncTorch
below_autograd = torch._C._AutoDispatchBelowAutograd

# Named in the documentation of __torch_dispatch__: as __torch_function__ of a class, it leaves all calls to torch.
no_torch_function = torch._C._disabled_torch_function_impl

# Tensors of a subclass: in the memory of another tensor, and without memory.
make_subclass = torch.Tensor._make_subclass
make_wrapper_subclass = torch.Tensor._make_wrapper_subclass

# Used by torch.multiprocessing: the storage of a weak reference, or None if no tensor refers to it any more.
storage_from_weak_reference = torch.UntypedStorage._new_with_weak_ptr
# The number of references to a storage, by its _cdata. None where torch has no such function.
COUNT_USES: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)

# torch asks with these whether a tensor may get the memory of another one in place, in to_empty() and ``data =``.
HAS_COMPATIBLE_TYPE = torch._has_compatible_shallow_copy_type
IS_COMPATIBLE = torch.ops.aten._has_compatible_shallow_copy_type.default

# The functions that pickles of tensors call. A pickler recognises them to see which bytes of a storage are used.
REBUILD_TENSOR = frozenset((torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3))
REBUILD_FROM_TYPE = torch._tensor._rebuild_from_type_v2

# Loading code whose result is known in advance: torch's default, and the batch norms', which add a missing counter.
FORESEEN_LOADING = (torch.nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)


def has_dispatch_modes() -> bool:
    """Whether a mode of the dispatcher is active in this thread."""
    return bool(torch._C._len_torch_dispatch_stack())


def is_traced_by_dispatch() -> bool:
    """Whether torch traces the operations of this thread with modes of its own (make_fx, fake tensors, export)."""
    if not has_dispatch_modes():
        return False
    kinds = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL))


def is_traced_by_jit() -> bool:
    """Whether ``torch.jit.trace`` records the operations of this thread."""
    return torch._C._get_tracing_state() is not None


def default_store() -> Any:
    """The store of the default process group. A separate one would need an address that all ranks know.

    Raises:
        ValueError: There is no process group.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def is_strided_shard(placement: Any) -> bool:
    """Whether a placement of a ``DTensor`` is the one that FSDP2 makes of parameters that are sharded already."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def split_indices(placement: Any, length: int, num_chunks: int) -> list[torch.Tensor]:
    """The indices that each rank of a mesh dimension gets from a dimension that a shard cuts.

    Where a strided shard cuts a length that it does not divide, versions of torch differ. So torch itself cuts.

    Args:
        placement: A ``Shard`` or ``_StridedShard``. Its ``dim`` may be any.
        length: Length of the dimension.
        num_chunks: Size of the mesh dimension.

    Returns:
        For each rank a tensor of int64, in the order in which its local tensor has the indices.
    """
    shape = [1] * placement.dim + [length]
    with torch.device("cpu"):
        indices = torch.arange(length).view(shape)
        parts, _ = placement._split_tensor(indices, num_chunks, with_padding=False, contiguous=False)
    return [part.flatten() for part in parts]
