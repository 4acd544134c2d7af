"""The pickle is torch's own, and each storage brings only what the saved tensors span."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memload.errors import UnstreamableError
from lightning_memload.pickles.pickling import pickle_object
from lightning_memload.save import save_torch
from tests.formats.files import ALL_DTYPES, as_bytes, layouts, nested, of_dtype

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes: quantized, nested, CSR


class Attributed(torch.Tensor):
    """A subclass, to which a user has given an attribute."""


def attributed() -> torch.Tensor:
    tensor = torch.arange(6.0).as_subclass(Attributed)
    tensor.note = "kept"
    return tensor


def with_attribute() -> torch.Tensor:
    tensor = torch.arange(6.0)
    tensor.note = [torch.ones(2)]
    return tensor


def ordered() -> OrderedDict[str, Any]:
    empty: Any = OrderedDict()
    noted: Any = OrderedDict()
    noted.note = "kept"
    return OrderedDict(empty=empty, again=empty, noted=noted, tensor=torch.ones(2))


OBJECTS: dict[str, Any] = {
    "nothing": lambda: None,
    "ordered": ordered,
    "nested": nested,
    "layouts": layouts,
    "dtypes": lambda: {str(dtype): of_dtype(dtype) for dtype in ALL_DTYPES},
    "tied": lambda: [weight := torch.ones(3), weight, weight.view(3, 1), torch.nn.Parameter(weight)],
    "module": lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested tensors": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": lambda: torch.empty(3, device="meta"),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "untyped storage": lambda: torch.arange(4.0).untyped_storage(),
    "typed storage": lambda: torch.FloatStorage(4).fill_(1.0),
    "subclass": attributed,
    "attribute": with_attribute,
}


def stock_pickle(obj: object) -> bytes:
    stream = io.BytesIO()
    torch.save(obj, stream)
    with zipfile.ZipFile(stream) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.parametrize("name", OBJECTS)
def test_pickle_is_torchs(name: str) -> None:
    obj = OBJECTS[name]()
    assert pickle_object(obj).data == stock_pickle(obj)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.uint8, torch.complex128, torch.uint16]))
def test_views_bring_what_they_span(
    data: st.DataObject, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = of_dtype(dtype, 400)
    views = []
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, 399))
        step = data.draw(st.integers(1, 9))
        views.append(base[start : data.draw(st.integers(start, 400)) : step])
    (stretch,) = pickle_object(views).saved_storages
    spans = [(v.storage_offset(), v.storage_offset() + (v.numel() - 1) * v.stride(0) + 1) for v in views if v.numel()]
    first, end = (min(s for s, _ in spans), max(e for _, e in spans)) if spans else (0, 0)
    used_bytes = (end - first) * dtype.itemsize
    assert used_bytes <= stretch.nbytes < used_bytes + 64
    assert stretch.start % 64 == 0
    path = tmp_path_factory.mktemp("views") / "views.pt"
    save_torch(views, path, durable=False)
    loaded = torch.load(path)
    assert [as_bytes(view) for view in loaded] == [as_bytes(view) for view in views]
    assert len({view.untyped_storage().data_ptr() for view in loaded if view.numel()}) <= 1
    assert all(view.untyped_storage().nbytes() == stretch.nbytes for view in loaded)


def test_a_slice_does_not_drag_its_buffer_along(tmp_path: Path) -> None:
    buffer = torch.arange(1 << 20)
    state = {"slice": buffer[1000:1100], "tied": buffer[1050:1060], "other": torch.ones(3)}
    save_torch(state, tmp_path / "slice.pt")
    assert (tmp_path / "slice.pt").stat().st_size < 8192
    loaded = torch.load(tmp_path / "slice.pt")
    assert torch.equal(loaded["slice"], buffer[1000:1100])
    loaded["slice"][50] = -1
    assert loaded["tied"][0] == -1


def test_a_storage_that_is_saved_itself_is_saved_whole() -> None:
    buffer = torch.arange(100.0)
    for obj in ([buffer[:3], buffer.untyped_storage()], [buffer.untyped_storage(), buffer[:3]]):
        with pytest.raises(RuntimeError, match="view the same data as different types"):
            pickle_object(obj)
    typed = torch.storage.TypedStorage(wrap_storage=buffer.untyped_storage(), dtype=torch.float32, _internal=True)
    (stretch,) = pickle_object([buffer[:3], typed]).saved_storages
    assert (stretch.start, stretch.nbytes) == (0, 400)


def test_one_storage_as_two_types_is_refused_as_torch_does() -> None:
    buffer = torch.arange(8, dtype=torch.int32)
    for save in (pickle_object, stock_pickle):
        with pytest.raises(RuntimeError, match="view the same data as different types"):
            save([buffer, buffer.view(torch.float32)])


def test_a_storage_freed_under_its_tensor_is_saved_as_torch_does() -> None:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    assert pickle_object(tensor).data == stock_pickle(tensor)


class Restless:
    """Holds another part of a buffer each time it is pickled."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.count = 0

    def __getstate__(self) -> dict[str, Any]:
        self.count += 1
        return {"view": self.buffer[10 * self.count : 10 * self.count + 10]}


def test_what_differs_from_pickling_to_pickling_is_saved_whole() -> None:
    buffer = torch.arange(1000.0)
    (stretch,) = pickle_object(Restless(buffer)).saved_storages
    assert (stretch.start, stretch.nbytes) == (0, 4000)


def test_a_storage_without_memory_is_not_streamable() -> None:
    with pytest.raises(UnstreamableError, match="12 bytes on meta"):
        pickle_object(torch.empty(3, device="meta").untyped_storage())


def test_nothing_is_copied() -> None:
    tensor = torch.ones(1000)
    (stretch,) = pickle_object({"a": tensor}).saved_storages
    assert stretch.storage.data_ptr() == tensor.data_ptr()
