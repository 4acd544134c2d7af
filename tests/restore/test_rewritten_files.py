"""Assigned weights whose file another program changes in place: they keep their values, in ordinary memory."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_memload import load_weights, meta_init, save_directory
from lightning_memload.restore import given_pages
from lightning_memload.storage import lease
from tests.formats.files import as_bytes
from tests.fresh_process import run_fresh
from tests.storage.watching import REWRITES, join_watches, traces, watches_end

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leases need Linux")


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(60, 70), nn.BatchNorm1d(70), nn.Linear(70, 50))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pt"


@pytest.fixture
def expected(path: Path) -> dict[str, bytes]:
    torch.manual_seed(5)
    module = build()
    torch.save(module.state_dict(), path)
    return raw(module)


def raw(module: nn.Module) -> dict[str, bytes]:
    return {name: as_bytes(value) for name, value in module.state_dict().items()}


def assigned(path: Path) -> nn.Module:
    with meta_init():
        module = build()
    load_weights(module, path, mode="assign")
    return module


@pytest.mark.parametrize("way", REWRITES)
def test_values_stay(way: str, path: Path, expected: dict[str, bytes]) -> None:
    module = assigned(path)
    assert traces(path) == (True, True)
    with pytest.warns(UserWarning, match=r"weights\.pt is being rewritten in place"), watches_end():
        REWRITES[way](path)
    assert raw(module) == expected
    assert traces(path) == (False, False)
    assert raw(copy.deepcopy(module)) == expected
    assert raw(pickle.loads(pickle.dumps(module))) == expected
    torch.save(module.state_dict(), path)
    assert raw(assigned(path)) == expected
    module(torch.ones(3, 60)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert raw(module) != expected


@pytest.mark.parametrize("format", ["safetensors", "directory"])
def test_other_formats(format: str, tmp_path: Path, expected: dict[str, bytes], path: Path) -> None:
    state = torch.load(path)
    target = tmp_path / "other"
    if format == "safetensors":
        save_file(state, target)
        files = [target]
    else:
        save_directory(state, target)
        files = [file for file in target.rglob("*") if file.stat().st_size > 10_000]
    module = assigned(target)
    with pytest.warns(UserWarning, match="is being rewritten in place"), watches_end():
        os.truncate(files[0], 0)
    assert raw(module) == expected
    for file in files:
        assert traces(file) == (False, False)


def test_written_values_stay_too(path: Path, expected: dict[str, bytes]) -> None:
    module = assigned(path)
    with torch.no_grad():
        module[0].weight[3] = 7
    changed = raw(module)
    with pytest.warns(UserWarning, match="rewritten"), watches_end():
        path.write_bytes(b"x")
    assert raw(module) == changed


def test_replacing_the_file_changes_and_says_nothing(path: Path, expected: dict[str, bytes]) -> None:
    module = assigned(path)
    torch.save(build().state_dict(), path.with_name("new"))
    path.with_name("new").replace(path)
    assert raw(module) == expected
    del module
    join_watches()
    assert traces(path) == (False, False)


def test_nothing_watches_where_nothing_is_assigned(path: Path, expected: dict[str, bytes]) -> None:
    def watches() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "memload-lease"]

    module = build()
    load_weights(module, path)
    assert not watches()
    # Nothing of this file can be assigned: another dtype.
    torch.save(nn.Linear(3, 4).state_dict(), path.with_name("other"))
    load_weights(nn.Linear(3, 4).half(), path.with_name("other"), mode="assign")
    join_watches()
    module = assigned(path)
    assert watches()
    weight = module[0].weight
    del module
    assert watches()
    del weight
    join_watches()


def test_two_modules_on_one_file(path: Path, expected: dict[str, bytes]) -> None:
    modules = [assigned(path), assigned(path)]
    with pytest.warns(UserWarning, match="rewritten"), watches_end():
        path.write_bytes(b"x")
    assert [raw(module) for module in modules] == [expected, expected]


def test_a_writer_in_the_middle_of_the_load(
    path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that have their pages keep their values. All others are read from the file, as without assigning."""
    give = given_pages.GivenPages.give
    given: list[Any] = []

    def giving(self: Any, tensor: torch.Tensor, start: int) -> Any:
        if len(given) == 2:
            with open(path, "r+b"):
                pass
            join_watches()
        given.append(give(self, tensor, start))
        return given[-1]

    monkeypatch.setattr(given_pages.GivenPages, "give", giving)
    with pytest.warns(UserWarning, match="rewritten"):
        module = assigned(path)
    assert [pages is None for pages in given[:3]] == [False, False, True]
    assert all(pages is None for pages in given[2:])
    assert raw(module) == expected


def test_where_nothing_tells_of_a_change(
    path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_file_system_of", lambda descriptor: "nfs4")
    with pytest.warns(UserWarning, match=r"Nothing tells when .*weights\.pt in place: on nfs4, writes.*mode='copy'"):
        module = assigned(path)
    assert raw(module) == expected
    load_weights(build(), path)  # copying says nothing


def test_memory(tmp_path: Path) -> None:
    """File-backed until the file changes, then anonymous once; the naive way has both from the start."""
    program = """
import os, warnings, torch
from torch import nn
from lightning_memload import load_weights, meta_init
from lightning_memload.memory.host import read_status
from tests.storage.watching import join_watches
path, naive = ARGS["path"], ARGS["naive"]
def build():
    return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(16)])
if not os.path.exists(path):
    torch.save(build().state_dict(), path)
with meta_init():
    module = build()
start = read_status().anonymous_bytes
if naive:
    module.load_state_dict(torch.load(path), assign=True)
else:
    load_weights(module, path, mode="assign")
total = sum(parameter.sum().item() for parameter in module.parameters())
read = read_status().anonymous_bytes - start
warnings.simplefilter("ignore")
open(path, "r+b").close()
join_watches()
same = total == sum(parameter.sum().item() for parameter in module.parameters())
RESULT = [read, read_status().anonymous_bytes - start, same]
"""
    mib = 1 << 20
    path = tmp_path / "large.pt"
    read, kept, same = run_fresh(program, path=path, naive=False).result
    naive, _, _ = run_fresh(program, path=path, naive=True).result
    assert same
    assert read < 8 * mib
    # What was free in the process at the start is used first.
    assert 63 * mib <= kept < 64 * mib + 12 * mib
    assert naive > 63 * mib


def test_a_copy_of_the_same_size(tmp_path: Path, path: Path, expected: dict[str, bytes]) -> None:
    torch.save({name: value + 1 for name, value in torch.load(path).items()}, tmp_path / path.name.replace("w", "v"))
    other = tmp_path / path.name.replace("w", "v")
    module = assigned(path)
    with pytest.warns(UserWarning, match="rewritten"), watches_end():
        shutil.copyfile(other, path)
    assert path.stat().st_size == other.stat().st_size
    assert raw(module) == expected
