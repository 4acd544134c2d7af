"""Checkpoints of plain things are built as torch.load builds them; all others are left to it."""

from __future__ import annotations

import argparse
import io
import pickle
import tempfile
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_memload.checkpoint.index import StorageInfo
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.formats.torch_zip import reader as torch_zip
from lightning_memload.pickles import structure
from lightning_memload.pickles.plain import NotPlain, build_plain, index_plain
from lightning_memload.pickles.plain_tensors import Tensors


def pickled(value: Any, folder: Path) -> bytes:
    """The pickle that torch.save writes."""
    torch.save(value, folder / "any.pt")
    with zipfile.ZipFile(folder / "any.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


def assert_same(ours: Any, theirs: Any) -> None:
    """The same types, values, attributes and order, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride(), ours.storage_offset()) == (
            theirs.dtype, theirs.shape, theirs.stride(), theirs.storage_offset(),
        )  # fmt: skip
        assert (ours.requires_grad, ours.is_leaf, ours.__dict__) == (
            theirs.requires_grad,
            theirs.is_leaf,
            theirs.__dict__,
        )
        assert ours._backward_hooks == theirs._backward_hooks
        assert type(ours._backward_hooks) is type(theirs._backward_hooks)
        assert (
            torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
            if ours.is_floating_point()
            else torch.equal(ours, theirs)
        )
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()))
        if isinstance(ours, OrderedDict):
            assert_same(ours.__dict__, theirs.__dict__)
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs or ours != ours


def optimizer_state() -> Any:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


BASE = torch.arange(12.0).reshape(3, 4)
SHARED: list[Any] = [1, 2]
PLAIN: dict[str, Callable[[], Any]] = {
    "numbers": lambda: [0, 255, 256, 65536, -1, 2**31, -(2**40), 2**100, 1.5, float("inf"), True, False, None],
    "strings": lambda: {"": "a", "\u00e4\u4e2d": "\ud800", "x" * 300: ()},
    "containers": lambda: {"a": [[], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 3: OrderedDict(b=1)},
    "shared containers": lambda: [SHARED, SHARED, {"s": SHARED}],
    "state dict": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(),
    "views and ties": lambda: [BASE, BASE.t(), BASE[1:, ::2], BASE, BASE.view(-1)[5]],
    "parameters": lambda: [nn.Parameter(BASE), nn.Parameter(BASE, requires_grad=False), BASE.clone().requires_grad_()],
    "types": lambda: [
        torch.zeros(3, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int64, torch.float64)
    ],
    "empty": lambda: [torch.empty(0), torch.empty(2, 0), torch.tensor(3.0)],
    "optimizer": optimizer_state,
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds small checkpoints as well as those of many tensors."""
    monkeypatch.setattr(torch_zip, "_MANY_STORAGES", 0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("weights_only", [True, False, None])
def test_plain_things_are_as_torch_gives_them(
    name: str, weights_only: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plain.pt"
    torch.save(PLAIN[name](), path)
    expected = torch.load(path, weights_only=weights_only)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # It is not asked.
        loaded, _ = load_mapped(path, weights_only=weights_only)
    assert_same(loaded, expected)


# Storages that tensors of a drawn object are views of.
BASES = [
    torch.arange(12, dtype=dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
]
BASES += [torch.arange(12) % 2 == 0, torch.empty(0)]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any view of any of the storages, a tensor of its own, or a parameter."""
    base = draw(st.sampled_from(BASES))
    if base.numel():
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        stride = draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))
        base = base.as_strided(shape, stride, draw(st.integers(0, 2 if 0 not in shape else 12)))
    if draw(st.booleans()):
        base = base.clone()
    if base.is_floating_point() and draw(st.booleans()):
        return nn.Parameter(base.detach(), requires_grad=draw(st.booleans()))
    return base.detach().requires_grad_(base.is_floating_point() and draw(st.booleans()))


def state_dict_of(items: dict[str, Any]) -> OrderedDict[str, Any]:
    """A dict with the attribute that a module's state dict has."""
    state = OrderedDict(items)
    state._metadata = OrderedDict(a={"version": 1})
    return state


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | tensors()
KEYS = st.text(max_size=3) | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text(max_size=2))
OBJECTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(state_dict_of)
        | inner.map(lambda value: [value, value, (value, [value])])
    ),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=OBJECTS)
def test_object_and_index_are_the_same_either_way(value: Any) -> None:
    """Object: as torch.load gives it. Index: as the inert walk gives it. What is one object stays one."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.pt"
        torch.save(value, path)
        patch.setattr(torch_zip, "_MANY_STORAGES", 0)
        expected = [torch.load(path, weights_only=weights_only) for weights_only in (True, False)]
        with pytest.MonkeyPatch.context() as walk:
            walk.setattr(structure, "index_plain", left_to_others)
            index = open_checkpoint(path)
        assert open_checkpoint(path) == index
        patch.setattr(torch, "load", None)
        loaded, mapped = load_mapped(path)
        for theirs in expected:
            assert_same(loaded, theirs)
            assert identities(loaded) == identities(theirs)
        assert mapped.index == index
        mapped.detach()


def identities(value: Any) -> list[int]:
    """For every container and tensor, in order, which of those before it is the same object or has the same storage."""
    seen: dict[Any, int] = {}
    found: list[int] = []
    kept: list[Any] = []  # or a storage's identity could be another one's later
    stack = [value]
    while stack:
        item = stack.pop()
        if not isinstance(item, (torch.Tensor, dict, list, tuple)) or item == ():
            continue
        is_new = id(item) not in seen
        found.append(seen.setdefault(id(item), len(seen)))
        if isinstance(item, torch.Tensor):
            kept.append(item.untyped_storage())
            if kept[-1].nbytes():
                found.append(seen.setdefault(("storage", kept[-1].data_ptr()), len(seen)))
        elif is_new:
            stack += item.values() if isinstance(item, dict) else item
    return found


@pytest.mark.usefixtures("always")
def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    path = tmp_path / "shared.pt"
    torch.save([SHARED, SHARED, BASE, BASE, BASE.t()], path)
    loaded, _ = load_mapped(path)
    assert loaded[0] is loaded[1]
    assert loaded[2] is loaded[3]
    assert loaded[4].data_ptr() == loaded[2].data_ptr()


class Hyperparameters:
    """A class of the user."""


OTHERS: dict[str, Callable[[], Any]] = {
    "class": lambda: {"a": Hyperparameters()},
    "namespace": lambda: argparse.Namespace(a=1),
    "class itself": lambda: {"kind": OrderedDict},
    "class in a tuple": lambda: {"kind": (1, (OrderedDict, 2))},
    "class as a key": lambda: {OrderedDict: 1},
    "class alone": lambda: OrderedDict,
    "storage": lambda: {"storage": torch.FloatStorage(3)},
    "defaultdict": lambda: defaultdict(dict, a=1),
    "set": lambda: {"a": {1, 2}},
    "bytes": lambda: {"a": b"123"},
    "complex": lambda: {"a": 1j},
    "dtype": lambda: {"a": torch.float32},
    "size": lambda: {"a": torch.Size([1])},
    "complex tensor": lambda: torch.zeros(2, dtype=torch.complex64),
    "conjugate": lambda: torch.zeros(2, dtype=torch.complex64).conj(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "buffer": lambda: nn.Buffer(torch.ones(2)) if hasattr(nn, "Buffer") else {1, 2},
}


def find(key: str, location: str, nbytes: int) -> StorageInfo:
    return StorageInfo(key, 0, nbytes, None, location)


class Zeros:
    """A memory of zeros."""

    def storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        return torch.UntypedStorage(nbytes)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)


def build(data: bytes) -> Any:
    """The object. The index is the same, or there is none either."""
    try:
        plain = build_plain(data, find, Zeros())
        tensors = plain.tensors()
    except NotPlain:
        with pytest.raises(NotPlain):
            index_plain(data, find)
        raise
    assert index_plain(data, find) == (tensors, plain.storages)
    return plain.root


def left_to_others(*_: Any) -> None:
    raise NotPlain


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_all_others_are_left_to_torch(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotPlain):
        build(pickled(OTHERS[name](), tmp_path))


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_left_to_torch(protocol: int) -> None:
    with pytest.raises(NotPlain):
        build(pickle.dumps({"a": 1}, protocol=protocol))


def test_no_prefix_and_no_flipped_byte_does_harm(tmp_path: Path) -> None:
    """Any bytes give an object of plain things, or NotPlain."""
    data = pickled(optimizer_state(), tmp_path)
    for end in range(len(data)):
        with pytest.raises(NotPlain):
            build(data[:end])
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x41
        try:
            built = build(bytes(changed))
        except NotPlain:
            continue
        torch.save(built, io.BytesIO())


def test_tuples_of_tuples_take_no_time() -> None:
    """A pickle of some hundred bytes holds a tuple 2**200 times. It is not searched once for each."""
    doubled = b"".join(b"q%bh%b\x86" % (bytes((number,)), bytes((number,))) for number in range(200))
    root = build(b"\x80\x02)" + doubled + b"\x85.")
    depth = 0
    while root:
        root, depth = root[0], depth + 1
    assert depth == 201


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02K\x01(\x85.",  # a tuple of what is below a mark
        b"\x80\x02}K\x01K\x02(\x73.",  # an item for a dict below a mark
        b"\x80\x02}(K\x01u.",  # half an item
    ],
)
def test_what_pickle_refuses_is_not_plain(data: bytes) -> None:
    with pytest.raises((IndexError, pickle.UnpicklingError)):
        pickle.loads(data)
    with pytest.raises(NotPlain):
        build(data)


@pytest.mark.usefixtures("always")
def test_what_torch_refuses_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "refused.pt"
    torch.save({"a": Hyperparameters()}, path)
    with pytest.raises(pickle.UnpicklingError, match="Hyperparameters"):
        load_mapped(path, weights_only=True)


def test_within_a_fake_mode_torch_decides(tmp_path: Path) -> None:
    """Tensors of another kind are torch's to make."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    data = pickled([torch.ones(3)], tmp_path)
    with FakeTensorMode(), pytest.raises(NotPlain):
        build_plain(data, find, Zeros())


def many_tensors() -> Any:
    """A state dict and the state of an optimizer, of so many tensors that their pickle has references of both kinds."""
    layers = [nn.Linear(3, 4), nn.Conv2d(2, 3, 3), nn.BatchNorm1d(5), nn.Conv3d(1, 2, 2)]
    model = nn.Sequential(*layers * 3, *(nn.Linear(300, 2, dtype=torch.bfloat16) for _ in range(20)))
    weights = [*model.parameters()]
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": p.data.clone(), "exp_avg_sq": p.data.clone()}
        for i, p in enumerate(weights)
    }
    return {
        "state_dict": model.state_dict(),
        "optimizer_states": [{"state": state}],
        "tied": [weights[0], weights[0].t()],
    }


def test_the_instructions_of_a_tensor_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but some dozens, whose references are short. Only the reader of single instructions calls ``tensor``."""
    singly: list[Any] = []
    single = Tensors.tensor
    monkeypatch.setattr(Tensors, "tensor", lambda self, arguments: singly.append(1) or single(self, arguments))
    path = tmp_path / "many.pt"
    torch.save(many_tensors(), path)
    assert len(open_checkpoint(path)) > 150
    assert 0 < len(singly) < 40
    singly.clear()
    loaded, _ = load_mapped(path)
    assert 0 < len(singly) < 40
    assert_same(loaded, torch.load(path))
    assert identities(loaded) == identities(torch.load(path))


@pytest.mark.slow
def test_read_at_once_or_singly_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with any byte of a tensor changed: the same object, or NotPlain both times."""
    data = pickled(many_tensors(), tmp_path)
    middle = data.index(b"exp_avg") + 2000
    outcomes: list[list[Any]] = [[], []]
    for outcome, at_once in zip(outcomes, (True, False), strict=True):
        if not at_once:
            monkeypatch.setattr(Tensors, "read", lambda *_: None)
        for position in range(middle, middle + 250):
            for flip in (0x01, 0x41, 0xFF):
                changed = bytearray(data)
                changed[position] ^= flip
                try:
                    tensors, storages = index_plain(bytes(changed), find)
                    outcome.append((tensors, storages))
                except NotPlain:
                    outcome.append(None)
    assert outcomes[0] == outcomes[1]
    assert None in outcomes[0]
    assert any(outcomes[0])


def test_a_number_of_the_memo_has_one_object(tmp_path: Path) -> None:
    """torch.save never gives another object a number. What does is left to torch."""
    for put in (b"q\x07", b"r\x07\0\0\0"):
        for again in (b"q\x07", b"r\x07\0\0\0"):
            data = b"\x80\x02]%b(K\x01%bh\x07e." % (put, again)
            assert pickle.loads(data) == [1, 1]
            with pytest.raises(NotPlain):
                build(data)


def test_no_thread_of_names_is_lost(tmp_path: Path) -> None:
    """The key None at the root, keys of other types, and a container that comes twice."""
    value = {None: torch.ones(1), 1: [torch.ones(2)], (1, 2): {"a": torch.ones(3)}, "twice": SHARED}
    path = tmp_path / "names.pt"
    torch.save(value, path)
    assert [tensor.path for tensor in open_checkpoint(path)] == [("None",), (1, 0), ("(1, 2)", "a")]


def test_attributes_of_a_dict_are_not_called(tmp_path: Path) -> None:
    """A pickle can give an OrderedDict any attribute."""
    value = OrderedDict(a=torch.ones(1))
    value.__dict__.update(itemz=5, updatf=5)
    data = pickled(value, tmp_path).replace(b"itemz", b"items").replace(b"updatf", b"update")
    assert vars(build(data)) == {"items": 5, "update": 5}
    assert [tensor.path for tensor in index_plain(data, find)[0]] == [("a",)]


@pytest.mark.parametrize("number", [99, 100])
def test_it_is_used_for_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    used: list[Any] = []
    build_it = torch_zip.build_plain
    monkeypatch.setattr(torch_zip, "build_plain", lambda *a: used.append(build_it(*a)) or used[-1])
    torch.save([torch.ones(1) for _ in range(number)], tmp_path / "w.pt")
    load_mapped(tmp_path / "w.pt")
    assert len(used) == (number == 100)
