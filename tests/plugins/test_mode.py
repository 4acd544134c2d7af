"""The choice between copying and assigning the weights, and the reason that the report gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memload.plugins.mode import choose_mode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Session:
    """A session whose files can be watched, unless a reason is given."""

    def __init__(self, *, is_chunked: bool = False, refusal: str | None = None) -> None:
        self.checkpoint = SimpleNamespace(is_chunked=is_chunked, source="the files")
        self.refusal = refusal
        self.is_watched = False

    def watch_pages(self) -> str | None:
        self.is_watched = True
        return self.refusal


def choose(wanted: Any, session: Any, *, device: torch.device = CPU, stage: str = "test", on_meta: bool = True) -> Any:
    module = nn.Linear(1, 1, device="meta" if on_meta else "cpu")
    return choose_mode(wanted, session, path="last.ckpt", device=device, stage=stage, module=module)


@pytest.mark.parametrize(
    ("scene", "name", "reason"),
    [
        ({}, "assign", "evaluation on the CPU only reads the weights"),
        ({"stage": "fit"}, "copy", "training writes to the weights"),
        ({"on_meta": False}, "copy", "the parameters have memory"),
        ({"device": GPU}, "copy", "parameters live on cuda:0"),
    ],
)
def test_auto_assigns_in_one_case(scene: dict[str, Any], name: str, reason: str) -> None:
    chosen = choose("auto", Session(), **scene)
    assert (chosen.name, chosen.reason, chosen.exposed_files) == (name, reason, None)


def test_auto_copies_where_changes_of_the_file_are_not_seen() -> None:
    chosen = choose("auto", Session(refusal="the file system is nfs"))
    assert (chosen.name, chosen.exposed_files) == ("copy", None)
    assert chosen.reason.endswith("could not be detected: the file system is nfs")


def test_an_explicit_assign_is_kept_and_its_files_are_compared_later() -> None:
    chosen = choose("assign", Session(refusal="the file system is nfs"), stage="fit", on_meta=False)
    assert (chosen.name, chosen.exposed_files) == ("assign", "the files")
    assert choose("assign", Session()).exposed_files is None


@pytest.mark.parametrize(
    ("session", "device", "words"),
    [(Session(), GPU, "the parameters are on cuda:0"), (Session(is_chunked=True), CPU, "stores its tensors in parts")],
    ids=["gpu", "parts"],
)
def test_an_assign_that_is_not_possible_is_told(session: Session, device: torch.device, words: str) -> None:
    with pytest.warns(UserWarning, match=rf"MemoryEfficientRestore\(mode='assign'\) is ignored: .*{words}"):
        assert choose("assign", session, device=device).name == "copy"
    assert not session.is_watched


def test_a_copy_watches_nothing() -> None:
    session = Session()
    assert choose("copy", session).reason == "as configured"
    assert choose("auto", Session(is_chunked=True)).reason.startswith("the checkpoint stores its tensors in parts")
    assert not session.is_watched
