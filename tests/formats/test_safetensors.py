"""safetensors: what the package itself reads, and one kind of error for what is damaged, missing or hostile."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from lightning_memload.checkpoint import Checkpoint, SpecialTensor
from lightning_memload.errors import CheckpointFormatError, UnmappableCheckpointError
from lightning_memload.formats import load_mapped, open_checkpoint
from lightning_memload.formats.safetensors.reader import MAX_HEADER_BYTES, Safetensors
from lightning_memload.storage.file_mapping import FileMapping
from lightning_memload.verify import verify_checkpoint
from tests.formats.files import as_bytes, from_file, of_dtype
from tests.formats.growth import assert_indexed_in_linear_time
from tests.fresh_process import run_fresh

needs_mapping = pytest.mark.skipif(not FileMapping.supported, reason="mappings need Linux")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def described(index: Checkpoint) -> object:
    return [(t.name, t.dtype, t.shape, t.stride, t.file_range) for t in index]


def peer_reads(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors that the safetensors package reads from a file. ``None`` if it refuses the file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError):
        return None


def refusals(path: Path) -> str:
    """The one message with which both readings refuse a checkpoint."""
    with pytest.raises(CheckpointFormatError) as opened:
        open_checkpoint(path)
    if FileMapping.supported:
        with pytest.raises(CheckpointFormatError) as loaded:
            load_mapped(path)
        assert str(loaded.value) == str(opened.value)
    message = str(opened.value)
    assert len(message) < 3000
    message.encode()
    assert message.startswith(os.fspath(opened.value.path))
    return message


SMALL = {
    "weight": torch.arange(12.0).view(3, 4),
    "bias": torch.ones(3, dtype=torch.int16),
    "flag": torch.tensor(True),
    "none": torch.empty(0, 5),
}


@needs_mapping
class TestAsThePackageReads:
    def dtypes(self) -> dict[str, torch.dtype]:
        names = [
            "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
            "float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
            "float8_e8m0fnu", "float4_e2m1fn_x2",
        ]  # fmt: skip
        return {name: getattr(torch, name) for name in names if hasattr(torch, name)}

    def test_every_dtype(self, path: Path) -> None:
        save_file({name: of_dtype(dtype, 36).view(4, 9) for name, dtype in self.dtypes().items()}, path)
        self.assert_same(path)

    def test_every_dtype_and_every_alignment(self, path: Path) -> None:
        for shift in range(1, 9):
            tensors = {name: of_dtype(dtype, 10) for name, dtype in self.dtypes().items()}
            file = save(tensors)
            (length,) = struct.unpack("<Q", file[:8])
            # The padding decides where the data begins; writers pad to 8, the format allows anything.
            path.write_bytes(with_header(file[8 : 8 + length].rstrip() + b" " * shift, file[8 + length :]))
            assert {t.storage.offset % 8 for t in open_checkpoint(path) if t.dtype is torch.float64} != {0} or shift % 8
            self.assert_same(path)

    def test_tensors_that_lie_askew_can_be_used(self, path: Path) -> None:
        values = torch.arange(100.0, dtype=torch.float64)
        header = {"byte": entry("U8", [1], 0, 1), "values": entry("F64", [10, 10], 1, 801)}
        path.write_bytes(with_header(header, b"x" + bytes(values.view(torch.uint8).numpy())))
        loaded, _ = load_mapped(path)
        askew = loaded["values"]
        assert askew.data_ptr() % 8
        assert torch.equal(askew, values.view(10, 10))
        assert torch.equal(askew @ askew, values.view(10, 10) @ values.view(10, 10))
        assert askew.sum() == values.sum()
        assert (askew.numpy() == values.view(10, 10).numpy()).all()
        assert torch.equal(askew.t()[2:, 3].mul_(2), values.view(10, 10).t()[2:, 3] * 2)

    def test_shapes(self, path: Path) -> None:
        shapes = [(), (0,), (3, 0), (0, 3, 2), (1,), (1, 1, 1), (2, 1, 3), (1,) * 30]
        save_file({str(shape): torch.randn(shape) for shape in shapes}, path)
        self.assert_same(path)
        assert open_checkpoint(path)["(0, 3, 2)"].stride == torch.empty(0, 3, 2).stride()

    def test_names(self, path: Path) -> None:
        names = ["", ".", "a.b", "a", "[0]", "données", "重み", "\N{GRINNING FACE}", "a\nb", '"', "x" * 1000]
        save_file({name: torch.tensor(float(number)) for number, name in enumerate(names)}, path)
        self.assert_same(path)

    def test_two_element_dtypes(self, path: Path) -> None:
        if not hasattr(torch, "float4_e2m1fn_x2"):
            pytest.skip("torch < 2.8 has no float4")
        path.write_bytes(with_header({"a": entry("F4", [3, 4], 0, 6), "b": entry("F4", [0], 6, 6)}, bytes(range(6))))
        self.assert_same(path)
        assert open_checkpoint(path)["a"].shape == (3, 2)

    def test_an_empty_file_and_metadata(self, path: Path) -> None:
        path.write_bytes(with_header(b"{}"))
        self.assert_same(path)
        assert len(open_checkpoint(path)) == 0
        for metadata in ({}, None, {"format": "pt", "note": "ä"}):
            path.write_bytes(with_header({"__metadata__": metadata, "a": entry("U8", [1], 0, 1)}, b"x"))
            self.assert_same(path)
            assert open_checkpoint(path).metadata == (metadata or {})

    def test_a_header_as_long_as_a_brace_is_no_index(self, path: Path) -> None:
        # Its length begins with the byte of "{", and it holds the word that an index holds.
        text = json.dumps({"weight_map": entry("U8", [1], 0, 1)}).encode().ljust(ord("{"))
        path.write_bytes(with_header(text, b"x"))
        assert path.read_bytes().startswith(b"{")
        self.assert_same(path)

    def test_bools_of_any_byte_stay_what_they_are(self, path: Path) -> None:
        path.write_bytes(with_header({"a": entry("BOOL", [3], 0, 3)}, b"\x00\x01\x05"))
        loaded, _ = load_mapped(path)
        assert as_bytes(loaded["a"].view(torch.uint8)) == b"\x00\x01\x05"

    def test_what_a_later_version_may_add_is_passed_over(self, path: Path) -> None:
        path.write_bytes(with_header({"a": entry("U8", [1], 0, 1) | {"note": [1.5, {}]}}, b"x"))
        self.assert_same(path)

    def test_weights_only_forbids_nothing(self, path: Path) -> None:
        save_file(SMALL, path)
        for weights_only in (None, True, False):
            assert set(load_mapped(path, weights_only=weights_only)[0]) == set(SMALL)

    def assert_same(self, path: Path) -> None:
        expected = peer_reads(path)
        assert expected is not None
        index = open_checkpoint(path)
        loaded, mapped = load_mapped(path)
        assert set(loaded) == set(expected) == {info.name for info in index}
        for name, tensor in loaded.items():
            other, info = expected[name], index[name]
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride())
            assert (info.dtype, info.shape, info.stride) == (other.dtype, tuple(other.shape), other.stride())
            raw = bytes(other.reshape(-1).view(torch.uint8).numpy()) if other.numel() else b""
            assert from_file(path, info.file_range) == raw, name
            assert (bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b"") == raw, name
            assert (mapped.locate(tensor) is None) == (not tensor.numel())


class TestDtypes:
    @pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2", "C128", "X"])
    def test_without_a_dtype_in_torch(self, path: Path, name: str) -> None:
        """One such tensor does not refuse the others."""
        header = {"other": entry("U8", [2], 0, 2), "layer.weight": entry(name, [4], 2, 5)}
        path.write_bytes(with_header(header, b"abxyz"))
        index = open_checkpoint(path)
        assert [info.name for info in index] == ["other"]
        assert index.special == (SpecialTensor(("layer.weight",), f"dtype {name}", None, (4,), 3),)
        if FileMapping.supported:
            with pytest.warns(UserWarning, match=rf"no dtype for\. They are ignored: 'layer.weight' \(dtype {name}\)"):
                loaded, _ = load_mapped(path)
            assert {key: as_bytes(tensor) for key, tensor in loaded.items()} == {"other": b"ab"}

    @pytest.mark.parametrize("name", ["", "f32", "U" * 1000, "a\nb"])
    def test_what_is_no_name_of_a_dtype(self, path: Path, name: str) -> None:
        path.write_bytes(with_header({"layer.weight": entry(name, [4], 0, 3)}, b"xyz"))
        assert "which is not a dtype name" in refusals(path)

    @pytest.mark.parametrize(("begin", "end"), [(0, 4), (1, 3), (2, 1)])
    def test_unknown_dtypes_do_not_hide_wrong_places(self, path: Path, begin: int, end: int) -> None:
        path.write_bytes(with_header({"a": entry("X", [4], begin, end)}, b"xyz"))
        refusals(path)

    def test_an_older_torch(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_memload.formats.safetensors import header as safetensors_header

        monkeypatch.delitem(safetensors_header._DTYPES, "F8_E8M0", raising=False)
        path.write_bytes(with_header({"scale": entry("F8_E8M0", [3], 0, 3)}, b"xyz"))
        assert [tensor.kind for tensor in open_checkpoint(path).special] == ["dtype F8_E8M0"]

    @pytest.mark.parametrize(("shape", "nbytes"), [([], 1), ([3], 2), ([2, 1], 1), ([2, 3], 3)])
    def test_half_bytes(self, path: Path, shape: list[int], nbytes: int) -> None:
        if not hasattr(torch, "float4_e2m1fn_x2"):
            pytest.skip("torch < 2.8 has no float4")
        path.write_bytes(with_header({"a": entry("F4", shape, 0, nbytes)}, bytes(nbytes)))
        assert peer_reads(path) is None
        assert [tensor.kind for tensor in open_checkpoint(path).special] == ["dtype F4 of an odd last size"]


U8 = entry("U8", [4], 0, 4)


class TestLyingHeaders:
    """The data has 8 bytes in each of these."""

    CASES: Mapping[str, tuple[object, str]] = {
        "too short for its shape": ({"a": entry("F32", [3], 0, 8)}, r"takes 12 bytes .* are 8 bytes apart"),
        "too long for its shape": ({"a": entry("F32", [1], 0, 8)}, r"takes 4 bytes .* are 8 bytes apart"),
        "backwards": ({"a": entry("U8", [4], 4, 0)}, r"\[4, 0\] are -4 bytes apart"),
        "beyond the end": ({"a": entry("U8", [9], 0, 9)}, r"truncated: its header declares data of 'a' through byte"),
        "far beyond": ({"a": entry("U8", [1 << 62], 0, 1 << 62)}, r"through byte 46116860\d+, .* only \d+ bytes"),
        "far away": ({"a": U8, "b": entry("U8", [4], 1 << 62, (1 << 62) + 4)}, "truncated"),
        "empty beyond": ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [0], 9, 9)}, "truncated"),
        "overlap": ({"a": entry("U8", [5], 0, 5), "b": entry("U8", [5], 3, 8)}, r"'b' begins .* overlap by 2 bytes"),
        "same bytes": ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 0, 8)}, "overlap by 8 bytes"),
        "one within another": ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [2], 3, 5)}, "overlap by 5 bytes"),
        "empty within another": ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [0], 3, 3)}, "overlap by 5 bytes"),
        "hole": ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [4], 4, 8)}, "they leave 1 bytes between them"),
        "hole at the start": ({"a": entry("U8", [6], 2, 8)}, r"header ends at byte \d+: they leave 2 bytes between"),
        "rest": ({"a": U8}, "the last 4 belong to no tensor"),
        "nothing but rest": ({}, r"the header ends at byte 10, but the file has 18 bytes: the last 8"),
        "negative size": ({"a": entry("U8", [-8], 0, 8)}, r"shape \[-8\] .* integers from 0"),
        "negative sizes": ({"a": entry("U8", [-2, -4], 0, 8)}, "integers from 0"),
        "negative offset": ({"a": entry("U8", [8], -1, 7)}, "integers from 0"),
        "float size": ({"a": entry("U8", [8.0], 0, 8)}, r"shape \[8.0\]"),
        "float offset": ({"a": entry("U8", [8], 0.0, 8)}, r"data_offsets \[0.0, 8\]"),
        "true for one": ({"a": entry("U8", [True], 0, 1)}, r"shape \[True\]"),
        "false for zero": ({"a": entry("U8", [8], False, 8)}, "integers from 0"),
        "text size": ({"a": entry("U8", ["8"], 0, 8)}, "integers from 0"),
        "list size": ({"a": entry("U8", [[8]], 0, 8)}, "integers from 0"),
        "null size": ({"a": entry("U8", [None], 0, 8)}, "integers from 0"),
        "product overflows": ({"a": entry("U8", [1 << 32, 1 << 32], 0, 8)}, r"no tensor has 2\*\*63 bytes"),
        "bytes overflow": ({"a": entry("F64", [1 << 60], 0, 8)}, r"no tensor has 2\*\*63 bytes"),
        "product of an empty one": ({"a": entry("U8", [1 << 32, 0, 1 << 32], 0, 0)}, r"no tensor has 2\*\*63 bytes"),
        "wraps to the right size": ({"a": entry("U8", [(1 << 63) + 4, 2], 0, 8)}, "integers from 0"),
        "wraps in 64 bits": ({"a": entry("F32", [(1 << 62) + 2], 0, 8)}, r"no tensor has 2\*\*63 bytes"),
        "many digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 1000 + b'],"data_offsets":[0,8]}}', "of 1000 digits"),
        "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 8]}}, "must have a dtype, a shape and two data_offsets"),
        "no dtype": ({"a": {"shape": [8], "data_offsets": [0, 8]}}, "must have a dtype"),
        "no offsets": ({"a": {"dtype": "U8", "shape": [8]}}, "must have a dtype"),
        "one offset": ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8]}}, "must have a dtype"),
        "three offsets": ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4, 8]}}, "must have a dtype"),
        "number for a shape": ({"a": entry("U8", 8, 0, 8)}, "must have a dtype"),
        "text for a shape": ({"a": entry("U8", "8", 0, 8)}, "must have a dtype"),
        "number for a dtype": ({"a": entry(8, [8], 0, 8)}, "must have a dtype"),
        "null": ({"a": None}, "but is None"),
        "text": ({"a": "U8"}, "but is 'U8'"),
        "metadata of numbers": ({"__metadata__": {"n": 1}, "a": entry("U8", [8], 0, 8)}, "strings to strings"),
        "metadata of text": ({"__metadata__": "pt", "a": entry("U8", [8], 0, 8)}, "strings to strings"),
        "metadata for a list": ({"__metadata__": [], "a": entry("U8", [8], 0, 8)}, "strings to strings"),
        "metadata for a tensor": ({"__metadata__": entry("U8", [8], 0, 8)}, "strings to strings"),
        "twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry("U8", [8], 0, 8)).encode(),) * 2), "the key 'a' twice"),
        "shape twice": (b'{"a":{"dtype":"U8","shape":[9],"shape":[8],"data_offsets":[0,8]}}', "the key 'shape' twice"),
        "trailing words": (b"{} {}", "Extra data"),
        "trailing zeros": (b"{}\0\0", "Extra data"),
        "no end": (b'{"a"', "5 bytes of JSON|4 bytes of JSON"),
        "infinite": (b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,8]}}', "Infinity for a number"),
        "no number": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,8]}}', "NaN for a number"),
        "no unicode": (b'{"\xff\xfe":1}', "can't decode byte 0xff"),
        "half a pair": (b'{"\\ud800":' + json.dumps(entry("U8", [8], 0, 8)).encode() + b"}", "surrogates not allowed"),
        "deep lists": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion|overflow"),
        "deep dicts": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion|overflow"),
        "rather deep shape": ({"a": entry("U8", json.loads("[" * 500 + "]" * 500), 0, 8)}, "integers from 0"),
        "long name": ({"n" * 1_000_000: entry("U8", [9], 0, 8)}, r"'nnn.*\.\.\..*nnn'"),
        "long dtype": ({"a": entry("U" * 1_000_000, [9], 0, 8)}, "which is not a dtype name"),
        "long shape": ({"a": entry("U8", [1] * 100_000, 0, 8)}, r"takes 1 bytes with shape \(1, 1, .* \.\.\.\)"),
        "huge long shape": ({"a": entry("U8", [1 << 62] * 100_000, 0, 8)}, r"no tensor has 2\*\*63 bytes"),
    }  # fmt: skip

    @pytest.mark.parametrize("name", CASES)
    def test_is_refused(self, path: Path, name: str) -> None:
        header, message = self.CASES[name]
        path.write_bytes(with_header(header, bytes(8)))
        assert re.search(message, refusals(path)), refusals(path)
        # Nothing is refused here that the package would take, but for a name that stands there twice.
        assert name in ("twice", "shape twice") or peer_reads(path) is None

    def test_a_long_shape_of_ones_is_a_shape(self, path: Path) -> None:
        path.write_bytes(with_header({"a": entry("U8", [1] * 10_000, 0, 1)}, b"x"))
        assert open_checkpoint(path)["a"].numel == 1


class TestLyingLengths:
    @pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 32, 1 << 60, (1 << 64) - 1])
    def test_beyond_the_formats_limit(self, path: Path, length: int) -> None:
        path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
        assert f"declare a header of {length} bytes, but the format allows {MAX_HEADER_BYTES}" in refusals(path)

    def test_beyond_the_file(self, path: Path) -> None:
        path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
        assert "truncated: its header ends at byte 100000008, but the file is only 10 bytes" in refusals(path)

    @pytest.mark.parametrize("length", [0, 1])
    def test_shorter_than_any_json(self, path: Path, length: int) -> None:
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        assert f"the header, {length} bytes of JSON, cannot be read" in refusals(path)

    @pytest.mark.slow
    def test_the_largest_header_that_is_allowed(self, path: Path) -> None:
        # Sparse files are no way out: the header is text. Mostly padding, but it must be read and parsed.
        text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", MAX_HEADER_BYTES) + text.ljust(MAX_HEADER_BYTES) + b"x")
        assert open_checkpoint(path)["a"].storage.offset == 8 + MAX_HEADER_BYTES
        path.unlink()

    def test_a_hostile_length_costs_nothing(self, path: Path) -> None:
        program = """
import resource
from lightning_memload.formats import open_checkpoint
from lightning_memload.errors import CheckpointFormatError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_checkpoint(ARGS["path"])
except CheckpointFormatError as error:
    RESULT = [str(error), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]
"""
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", 1 << 60) + b"{}")
            file.truncate(1 << 40)
        message, grown_mib = run_fresh(program, path=path).result
        assert "declare a header" in message
        assert grown_mib < 10


@pytest.fixture(scope="module")
def small() -> bytes:
    return save(SMALL, metadata={"format": "pt"})


class TestDamage:
    def test_every_truncation(self, path: Path, small: bytes) -> None:
        for length in range(len(small)):
            path.write_bytes(small[:length])
            message = refusals(path)
            assert ("is truncated" if length > 8 else "none of the known formats") in message
        path.write_bytes(small)
        assert len(open_checkpoint(path)) == len(SMALL)

    def test_every_truncation_of_a_shard(self, tmp_path: Path, small: bytes) -> None:
        folder = sharded(tmp_path, {"a.safetensors": SMALL, "b.safetensors": {"other": torch.ones(2)}})
        whole = (folder / "a.safetensors").read_bytes()
        for length in range(len(whole)):
            (folder / "a.safetensors").write_bytes(whole[:length])
            assert "a.safetensors" in refusals(folder)
            assert "truncated" in refusals(folder)

    def test_appended_and_missing_bytes(self, path: Path, small: bytes) -> None:
        path.write_bytes(small + b"\0")
        assert "the last 1 belong to no tensor" in refusals(path)
        path.write_bytes(small[:-3] + small[-2:])
        assert "is truncated" in refusals(path)

    @pytest.mark.slow
    def test_every_byte_of_the_header(self, path: Path, small: bytes) -> None:
        path.write_bytes(small)
        whole = described(open_checkpoint(path))
        (length,) = struct.unpack("<Q", small[:8])
        refused = same = 0
        for position in range(8 + length):
            for value in {small[position] ^ 1, 0, 0xFF, ord(" "), ord("9")}:
                damaged = bytearray(small)
                damaged[position] = value
                path.write_bytes(damaged)
                outcome = self.outcome(path)
                refused += outcome is None
                same += outcome == whole
        assert refused > 2 * length  # names, metadata and padding survive a change
        assert same

    @pytest.mark.slow
    def test_random_headers(self, path: Path, small: bytes) -> None:
        (length,) = struct.unpack("<Q", small[:8])
        generator = random.Random(0)
        pieces = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"1e9", b"-1", b"99999999", b"null", b"\\u0041", b"F64"]
        for _ in range(1000):
            header = bytearray(small[8 : 8 + length])
            for _ in range(generator.randint(1, 3)):
                start = generator.randrange(len(header))
                header[start : start + generator.randint(0, 4)] = generator.choice(pieces)
            path.write_bytes(with_header(bytes(header), small[8 + length :]))
            self.outcome(path)

    def outcome(self, path: Path) -> object:
        """The index, which must be as the package reads the file, or ``None`` for a refusal."""
        theirs = peer_reads(path)
        try:
            index = open_checkpoint(path)
        except CheckpointFormatError:
            # What was taken out of the text may leave a name twice, which the package does not notice.
            return None
        if index.special:  # of a dtype that torch lacks, for which the package refuses the whole file
            return described(index)
        assert theirs is not None
        assert {t.name: (t.dtype, t.shape) for t in index} == {k: (t.dtype, tuple(t.shape)) for k, t in theirs.items()}
        for info in index:
            tensor = theirs[info.name]
            raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
            assert from_file(path, info.file_range) == raw
        return described(index)

    sizes = st.integers(0, 4) | st.sampled_from([-1, 1 << 31, 1 << 63, 1.0, True, None, "1"])
    entries = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "BOOL", "F16", "F32", "F64", "F8_E4M3", "F4", "X", 3]),
            "shape": st.lists(sizes, max_size=3) | st.just(3),
            "data_offsets": st.lists(sizes, min_size=2, max_size=2) | st.lists(st.integers(0, 16), max_size=3),
        }
    )

    @pytest.mark.slow
    @settings(max_examples=300, deadline=None)
    @given(header=st.dictionaries(st.text(max_size=2), entries, max_size=3), size=st.integers(0, 16))
    def test_the_same_verdict_as_the_package(
        self, tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "generated.safetensors"
        path.write_bytes(with_header(header, bytes(size)))
        outcome = self.outcome(path)
        if outcome is None or not open_checkpoint(path).special:
            assert (outcome is None) == (peer_reads(path) is None)

    @pytest.mark.slow
    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_sound_layouts_are_taken(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        path = tmp_path_factory.getbasetemp() / "sound.safetensors"
        header, position = [], 0
        for number in range(data.draw(st.integers(0, 6))):
            dtype, itemsize = data.draw(st.sampled_from([("U8", 1), ("F16", 2), ("F64", 8), ("C64", 8)]))
            shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
            nbytes = torch.Size(shape).numel() * itemsize
            header.append((f"t{number}", entry(dtype, shape, position, position + nbytes)))
            position += nbytes
        padding = b" " * data.draw(st.integers(0, 9))
        text = json.dumps(dict(data.draw(st.permutations(header)))).encode() + padding
        path.write_bytes(with_header(text, bytes(range(position % 251)) + bytes(position - position % 251)))
        assert self.outcome(path) is not None


def sharded(
    folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], weight_map: object = None, **index: object
) -> Path:
    """A directory of shards with an index, which may say something else."""
    for name, tensors in shards.items():
        save_file(dict(tensors), folder / name)
    true = {key: name for name, tensors in shards.items() for key in tensors}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": true if weight_map is None else weight_map} | index)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


TWO = {"a.safetensors": {"a0": torch.ones(2), "a1": torch.zeros(3)}, "b.safetensors": {"b0": torch.ones(4)}}


class TestShards:
    def test_missing_ones_are_all_listed(self, tmp_path: Path) -> None:
        true = {key: name for name, tensors in TWO.items() for key in tensors}
        lost = {f"key{number}": f"lost-{number:02}.safetensors" for number in range(14)}
        folder = sharded(tmp_path, TWO, true | lost)
        (folder / "lost-03.safetensors").mkdir()
        (folder / "lost-04.safetensors").symlink_to(folder / "nowhere")
        os.mkfifo(folder / "lost-05.safetensors")
        for path in (folder, folder / "model.safetensors.index.json"):
            message = refusals(path)
            assert "of its 16 files 14 are missing or no regular files" in message
            assert all(f"'lost-{number:02}.safetensors'" in message for number in range(10))
            assert "lost-10" not in message
            assert "and 4 more" in message

    def test_dangling_links_without_an_index(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        (tmp_path / "b.safetensors").symlink_to(tmp_path / "blob")
        assert "of its 2 files 1 are missing or no regular files: 'b.safetensors'" in refusals(tmp_path)

    def test_the_shards_say_what_is_there(self, tmp_path: Path) -> None:
        """The index may name tensors that no shard has, leave some out, and put others into the wrong shard."""
        claims = {"new": "a.safetensors", "a0": "b.safetensors", "b0": "b.safetensors"}
        folder = sharded(tmp_path, TWO, claims)
        assert {info.name for info in open_checkpoint(folder)} == {"a0", "a1", "b0"}
        assert not verify_checkpoint(folder).is_damaged
        if FileMapping.supported:
            loaded, _ = load_mapped(folder)
            assert {key: as_bytes(tensor) for key, tensor in loaded.items()} == {
                key: as_bytes(tensor) for tensors in TWO.values() for key, tensor in tensors.items()
            }

    def test_what_the_index_does_not_name_is_no_shard(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO, {"a0": "a.safetensors"})
        assert {info.name for info in open_checkpoint(folder)} == set(TWO["a.safetensors"])

    def test_the_last_shard_counts_of_two_that_have_a_tensor(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO)
        save_file({"a0": torch.full((2,), 7.0), "b0": torch.ones(4)}, folder / "b.safetensors")
        with pytest.warns(UserWarning, match=r"1 tensor in two shards.*'a0' \(a.safetensors and b.safetensors\)"):
            index = open_checkpoint(folder)
        assert len(index) == 3
        if FileMapping.supported:
            with pytest.warns(UserWarning, match="from the last one"):
                loaded, _ = load_mapped(folder)
            assert loaded["a0"].tolist() == [7.0, 7.0]

    def test_shards_in_folders(self, tmp_path: Path) -> None:
        (tmp_path / "parts" / "b").mkdir(parents=True)
        shards = {f"parts/{name[0]}/{name}" if name[0] == "b" else f"parts/{name}": t for name, t in TWO.items()}
        folder = sharded(tmp_path, shards)
        assert {info.name for info in open_checkpoint(folder)} == {"a0", "a1", "b0"}

    def test_an_index_of_other_shards_names_those_that_are_there(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO, {"a0": "model-1-of-4.safetensors"})
        assert "The index does not name 'a.safetensors', 'b.safetensors', which are there too" in refusals(folder)

    @pytest.mark.parametrize(
        "name",
        ["/etc/passwd", "../a.safetensors", "sub/../../a", "a//b", "..", ".", "", "..\\a", "a\0b", 5, None, ["a"], {}],
    )
    def test_names_that_leave_the_directory(self, tmp_path: Path, name: object) -> None:
        folder = sharded(tmp_path, TWO, {"a0": "a.safetensors", "a1": name})
        message = refusals(folder)
        assert "names 1 shards that are not files in its own directory" in message
        assert f"{name!r} for 'a1'" in message

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b'{"weight_map": {', "cannot be read"),
            (b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' twice"),
            (b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion|overflow"),
            (b'{"weight_map": []}', r"but is \[\]"),
            (b'{"weight_map": null}', "but is None"),
            (b'{"other": {"weight_map": {}}}', "but is None"),
            (b'{"weight_map": {"\xff": "a"}}', "can't decode"),
            (b'{"weight_map": {"a": 1e999, "b": NaN}}', "NaN"),
            (b'{"weight_map": {"a": ' + b"9" * 5000 + b"}}", "5000 digits"),
        ],
    )
    def test_a_damaged_index(self, tmp_path: Path, text: bytes, message: str) -> None:
        folder = sharded(tmp_path, TWO)
        (folder / "model.safetensors.index.json").write_bytes(text)
        assert re.search(message, refusals(folder))
        assert re.search(message, refusals(folder / "model.safetensors.index.json"))

    def test_every_truncation_of_the_index(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO)
        index = folder / "model.safetensors.index.json"
        text = index.read_bytes()
        for length in range(len(text)):
            index.write_bytes(text[:length])
            assert "cannot be read" in refusals(folder)
            refusals(index)

    def test_an_index_too_long_to_be_one(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO)
        os.truncate(folder / "model.safetensors.index.json", MAX_HEADER_BYTES + 1)
        assert f"has {MAX_HEADER_BYTES + 1} bytes, but an index of shards has at most" in refusals(folder)

    def test_several_indexes(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO)
        (folder / "model.fp16.safetensors.index.json").write_text('{"weight_map": {"a0": "a.safetensors"}}')
        message = refusals(folder)
        assert "holds 2 indexes ('model.fp16.safetensors.index.json', 'model.safetensors.index.json')" in message
        assert len(open_checkpoint(folder / "model.safetensors.index.json")) == 3

    def test_the_same_key_twice_without_an_index(self, tmp_path: Path) -> None:
        state = {f"key{number:02}": torch.ones(1) for number in range(12)}
        save_file(state, tmp_path / "one.safetensors")
        save_file(state, tmp_path / "other.safetensors")
        message = refusals(tmp_path)
        assert "holds 12 tensors twice: 'key00' in one.safetensors and other.safetensors, 'key01'" in message
        assert "and 2 more" in message
        assert len(open_checkpoint(tmp_path / "one.safetensors")) == 12

    @pytest.mark.parametrize("other", ["model.fp16.safetensors", "adapter_model.safetensors", "zero.safetensors"])
    def test_the_file_of_the_usual_name_is_the_checkpoint(self, tmp_path: Path, other: str) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
        save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / other)
        assert [info.name for info in open_checkpoint(tmp_path)] == ["a"]

    @pytest.mark.parametrize(
        ("other", "found"), [("model.safetensors", "safetensors"), ("adapter_model.safetensors", "torch_shards")]
    )
    def test_beside_files_of_torch(self, tmp_path: Path, other: str, found: str) -> None:
        torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
        save_file({"b": torch.ones(1)}, tmp_path / other)
        assert open_checkpoint(tmp_path).format == found

    def test_a_shard_that_is_something_else(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO)
        torch.save({"a0": torch.ones(1)}, folder / "a.safetensors")
        message = refusals(folder)
        assert "a.safetensors (" in message
        assert "does not start like a safetensors file" in message

    def test_an_index_of_nothing(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, {}, {})
        assert len(open_checkpoint(folder)) == 0
        if FileMapping.supported:
            loaded, mapped = load_mapped(folder)
            assert loaded == {}
            assert mapped.detach() == 0

    @needs_mapping
    def test_a_cache_of_links(self, tmp_path: Path) -> None:
        """As in a Hugging Face cache: the snapshot is a folder of links to files that are named by their hashes."""
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
        for folder in (blobs, snapshot):
            folder.mkdir(parents=True)
        for number, file in enumerate(sharded(blobs, TWO).glob("*")):
            blob = file.rename(blobs / f"{number:040x}")
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        expected = {key: tensor for tensors in TWO.values() for key, tensor in tensors.items()}
        for path in (snapshot, snapshot / "model.safetensors.index.json"):
            loaded, _ = load_mapped(path)
            assert {key: as_bytes(tensor) for key, tensor in loaded.items()} == {
                key: as_bytes(tensor) for key, tensor in expected.items()
            }
        # A shard by itself is a checkpoint too.
        assert set(load_mapped(snapshot / "b.safetensors")[0]) == {"b0"}

    @needs_mapping
    def test_hidden_files_are_no_shards(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        (tmp_path / "._a.safetensors").write_bytes(b"\x00\x05\x16\x07")
        (tmp_path / "notes.txt").touch()
        assert set(load_mapped(tmp_path)[0]) == {"a"}

    @needs_mapping
    def test_in_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sharded(tmp_path, TWO)
        monkeypatch.chdir(tmp_path)
        for path in (".", "model.safetensors.index.json"):
            assert set(load_mapped(path)[0]) == {"a0", "a1", "b0"}

    @needs_mapping
    def test_more_shards_than_may_be_open(self, tmp_path: Path) -> None:
        shards = {f"s{n:03}.safetensors": {f"key{n}": torch.full((n % 3 + 1,), float(n))} for n in range(150)}
        sharded(tmp_path, shards)
        before = len(os.listdir("/proc/self/fd"))
        loaded, mapped = load_mapped(tmp_path)
        assert len(os.listdir("/proc/self/fd")) == before
        assert all((loaded[f"key{n}"] == n).all() for n in range(150))
        assert [os.path.basename(file.path) for file in mapped.index.files] == sorted(shards)
        mapped.detach()
        assert all((loaded[f"key{n}"] == n).all() for n in range(150))

    def test_metadata_of_several_files(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt", "only": "a"})
        save_file({"b": torch.ones(1)}, tmp_path / "b.safetensors", metadata={"format": "tf", "other": "b"})
        assert open_checkpoint(tmp_path).metadata == {"format": "pt", "only": "a", "other": "b"}

    def test_failures_leave_nothing_open(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path, TWO)
        torch.save({"a0": torch.ones(1)}, folder / "a.safetensors")
        before = len(os.listdir("/proc/self/fd")) if FileMapping.supported else 0
        for _ in range(3):
            refusals(folder)
        assert not FileMapping.supported or len(os.listdir("/proc/self/fd")) == before
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            refusals(folder)


def test_the_other_byte_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(SMALL, path)
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(UnmappableCheckpointError, match="little-endian, but this machine is big-endian"):
        Safetensors().read_index(str(path))


def test_many_tensors_are_indexed_in_linear_time(tmp_path: Path) -> None:
    write = """
import json, struct
from pathlib import Path
def write(path, count):
    header = {f"t{n}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n in range(count)}
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * count))
"""
    assert_indexed_in_linear_time(write, 30_000, tmp_path)
