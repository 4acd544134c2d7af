"""``on_corrupt="previous"`` where each rank has a file of its own. Threads play the ranks; the store is torch's own."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from lightning_memload.distributed import Companions
from lightning_memload.errors import CheckpointFormatError, ChecksumError, MemloadError
from lightning_memload.plugins import damaged
from lightning_memload.plugins.damaged import choose_intact, name_intact_sibling
from lightning_memload.verify import Siblings
from tests.distributed.ranks import in_ranks
from tests.plugins.restored import flip_byte

NAMES = ("last.ckpt", "step=5.ckpt", "step=3.ckpt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for each of two ranks, with the same three checkpoints, ``last.ckpt`` the newest."""
    for rank in range(2):
        own = tmp_path / f"node{rank}"
        own.mkdir()
        for age, name in enumerate(NAMES):
            if rank == 0:
                torch.save(
                    {"state_dict": {"weight": torch.full((50,), float(age))}, "global_step": 6 - age}, own / name
                )
            else:
                shutil.copyfile(tmp_path / "node0" / name, own / name)
            os.utime(own / name, (1e9 - age, 1e9 - age))
    return tmp_path


def damage(path: Path) -> None:
    flip_byte(path, "state_dict.weight")


class Ranks:
    """Two ranks that look for their checkpoints at the same time.

    Attributes:
        warnings: What they warned of.
        trainers: Their Trainers.
    """

    def __init__(self, agreeing: tuple[bool | None, ...] = (True, True)) -> None:
        store = HashStore()
        self.companions = [
            None if agrees is None else Companions(store, rank, 2, agrees=agrees)
            for rank, agrees in enumerate(agreeing)
        ]
        for companion in self.companions:
            if companion is not None:
                companion.meet()
        self.trainers: list[Any] = [
            SimpleNamespace(world_size=2, global_rank=rank, _checkpoint_connector=SimpleNamespace(_ckpt_path=None))
            for rank in range(2)
        ]
        self.warnings: list[str] = []

    def choose(self, *paths: Path | None) -> list[Any]:
        """The checkpoint that each rank restores, or its error."""

        def work(rank: int) -> Any:
            path = paths[rank]
            return choose_intact(str(path) if path else None, self.trainers[rank], self.companions[rank])

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = in_ranks(work, [rank for rank in range(2) if self.companions[rank] is not None])
        self.warnings = [str(item.message) for item in caught]
        return chosen


def test_sound_ranks_keep_their_own_paths(folder: Path) -> None:
    ranks = Ranks()
    paths = [folder / "node0/last.ckpt", folder / "node1/step=5.ckpt"]
    assert ranks.choose(*paths) == [str(path) for path in paths]
    assert Ranks().choose(None, None) == [None, None]
    assert Ranks().choose(folder / "node0/last.ckpt", None) == [str(folder / "node0/last.ckpt"), None]
    # A path that exists nowhere is a mistake of the user, which loading tells of as always.
    assert Ranks().choose(folder / "node0/no.ckpt", folder / "node1/no.ckpt")[1] == str(folder / "node1/no.ckpt")
    assert ranks.warnings == []
    assert ranks.trainers[1]._checkpoint_connector._ckpt_path is None


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_all_take_the_newest_that_all_have(bad: int, missing: bool, folder: Path) -> None:
    """Damage on one rank alone changes the checkpoint of all, and rank 0 tells of it."""
    path = folder / f"node{bad}/last.ckpt"
    path.unlink() if missing else damage(path)
    (folder / f"node{1 - bad}/step=5.ckpt").unlink()
    ranks = Ranks()
    expected = [str(folder / f"node{rank}/step=3.ckpt") for rank in range(2)]
    assert ranks.choose(folder / "node0/last.ckpt", folder / "node1/last.ckpt") == expected
    assert [trainer._checkpoint_connector._ckpt_path for trainer in ranks.trainers] == expected
    (warning,) = ranks.warnings
    assert warning.startswith(f"{path} is {'missing' if missing else 'damaged'} on rank {bad} of 2")
    assert "Resuming from step=3.ckpt instead, beside each rank's own ckpt_path" in warning
    assert "intact on all ranks" in warning


def test_every_rank_s_damage_is_told(folder: Path) -> None:
    damage(folder / "node0/last.ckpt")
    (folder / "node1/last.ckpt").unlink()
    damage(folder / "node1/step=5.ckpt")
    ranks = Ranks()
    assert ranks.choose(folder / "node0/last.ckpt", folder / "node1/last.ckpt")[1] == str(folder / "node1/step=3.ckpt")
    (warning,) = ranks.warnings
    assert f"{folder}/node0/last.ckpt is damaged on rank 0 of 2" in warning
    assert f"{folder}/node1/last.ckpt is missing on rank 1 of 2" in warning
    assert "step=5.ckpt damaged as well" in warning


@pytest.mark.parametrize("why", ["missing", "damaged", "other contents", "no checkpoint asked for"])
def test_without_a_common_one_all_raise(why: str, folder: Path) -> None:
    """Two ranks never restore different states, and none waits for one that raises."""
    damage(folder / "node0/last.ckpt")
    for name in NAMES[1:]:
        if why == "missing":
            (folder / "node1" / name).unlink()
        elif why == "damaged":
            damage(folder / "node1" / name)
        elif why == "other contents":
            torch.save({"state_dict": {"weight": torch.full((50,), 7.0)}, "global_step": 9}, folder / "node1" / name)
    other = None if why == "no checkpoint asked for" else folder / "node1/last.ckpt"
    errors = Ranks().choose(folder / "node0/last.ckpt", other)
    assert [type(error) for error in errors] == [CheckpointFormatError] * 2
    assert len({str(error).partition(" (")[0] for error in errors}) == 1
    message = str(errors[1])
    assert message.startswith(f"{folder}/node0/last.ckpt is damaged on rank 0 of 2: ")
    assert message.endswith("Pass a ckpt_path that is intact on all 2 ranks.")
    words = {"missing": "Only rank 0 can restore step=5.ckpt.", "no checkpoint asked for": "Other ranks restore no"}
    assert words.get(why, "") in message


def test_a_shared_file_is_verified_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(folder / "node0/last.ckpt")
    verified: list[str] = []
    verify, judge = damaged.verify_checkpoint, damaged.judge_sibling

    def counting_verify(path: str, **kwargs: Any) -> Any:
        verified.append(os.path.basename(path))
        return verify(path, **kwargs)

    def counting_judge(path: str, **kwargs: Any) -> Any:
        verified.append(os.path.basename(path))
        return judge(path, **kwargs)

    monkeypatch.setattr(damaged, "verify_checkpoint", counting_verify)
    monkeypatch.setattr(damaged, "judge_sibling", counting_judge)
    ranks = Ranks()
    path = folder / "node0/last.ckpt"
    assert ranks.choose(path, path) == [str(folder / "node0/step=5.ckpt")] * 2
    assert verified == ["last.ckpt", "step=5.ckpt"]
    (warning,) = ranks.warnings
    assert warning.startswith(f"{path} is damaged: ")
    assert f"Resuming from {folder}/node0/step=5.ckpt instead" in warning


@pytest.mark.parametrize("agreeing", [(True, None), (None, True), (True, False)])
def test_ignored_where_not_every_rank_takes_part(agreeing: tuple[bool | None, ...], folder: Path) -> None:
    """Nothing is chosen, nothing is waited for, and each rank that cannot choose says so."""
    damage(folder / "node0/last.ckpt")
    damage(folder / "node1/last.ckpt")
    ranks = Ranks(agreeing)
    paths = [folder / "node0/last.ckpt", folder / "node1/last.ckpt"]
    taking_part = [str(path) for path, agrees in zip(paths, agreeing, strict=True) if agrees is not None]
    assert ranks.choose(*paths) == taking_part
    assert len(ranks.warnings) == len(taking_part)
    assert "is ignored on rank" in ranks.warnings[0]


def test_a_rank_that_fails_ends_the_choice_of_the_others(folder: Path) -> None:
    ranks = Ranks()
    ranks.companions[0].leave()
    with pytest.raises(MemloadError, match=r"cannot choose a checkpoint to restore .* since rank 0 failed"):
        choose_intact(str(folder / "node1/last.ckpt"), ranks.trainers[1], ranks.companions[1])


class TestTelling:
    """The rank that finds the damage reports it before the search, which is bounded."""

    @pytest.fixture
    def error(self, folder: Path) -> ChecksumError:
        return ChecksumError("it is damaged.", path="", key=None, offset=0, expected=1, actual=2)

    def tell(self, error: Exception, folder: Path, world_size: int = 2) -> None:
        trainer: Any = SimpleNamespace(world_size=world_size, global_rank=1)
        name_intact_sibling(error, str(folder / "node1/last.ckpt"), trainer, advise_option=False)

    def test_before_the_search(
        self, error: ChecksumError, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before: list[str] = []

        def search(path: str, *, timeout_seconds: float) -> Siblings:
            before.extend(caplog.messages)
            return Siblings("intact.ckpt", (), ())

        monkeypatch.setattr(damaged, "find_siblings", search)
        self.tell(error, folder)
        assert before == [
            "[rank 1 of 2] it is damaged.",
            f"[rank 1 of 2] The newest other checkpoint in {folder}/node1 is {folder}/node1/step=5.ckpt. It is being "
            "verified.",
        ]
        assert "[rank 1 of 2] The newest intact checkpoint in" in caplog.messages[2]
        assert str(error).startswith("it is damaged. The newest intact checkpoint in")
        assert error.intact_sibling == "intact.ckpt"

    def test_of_the_file_of_another_rank_says_nothing(self, error: ChecksumError, folder: Path) -> None:
        error.path, error.rank = str(folder / "node0/last.ckpt"), 0
        self.tell(error, folder)
        assert str(error) == "it is damaged."
        error.path = str(folder / "node1/last.ckpt")  # one file for both
        self.tell(error, folder)
        assert "The newest intact checkpoint in" in str(error)

    def test_a_disk_that_hangs_is_given_up(
        self, error: ChecksumError, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        going_on = threading.Event()
        monkeypatch.setattr(damaged, "list_siblings", lambda path: going_on.wait(60) and [])
        monkeypatch.setattr(damaged, "_SEARCH_SECONDS", 0.0)
        self.tell(error, folder)
        going_on.set()
        assert str(error) == "it is damaged."

    def test_a_search_that_hangs_is_given_up(
        self, error: ChecksumError, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        going_on = threading.Event()
        ended = threading.Event()

        def search(path: str, *, timeout_seconds: float) -> Siblings:
            going_on.wait(60)
            ended.set()
            raise OSError("the disk is back")

        monkeypatch.setattr(damaged, "find_siblings", search)
        monkeypatch.setattr(damaged, "_SEARCH_SECONDS", 0.0)
        self.tell(error, folder)
        newest = f"newest other checkpoint in {folder}/node1 is {folder}/node1/step=5.ckpt"
        assert f"{newest}. It could not be verified within 0 s." in str(error)
        going_on.set()
        assert ended.wait(60)

    def test_a_single_process_says_it_once(
        self, error: ChecksumError, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.tell(error, folder, world_size=1)
        assert caplog.messages == []
        assert f"is {folder}/node1/step=5.ckpt: resume with" in str(error)
