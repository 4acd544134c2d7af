"""A file is replaced in one step: its mode, links, leftovers of the dead and temporary files of the living."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_memload.storage.replacement import Replacement, remove_leftovers

LEFTOVER = ".memload-{boot}-0123456789abcdef.tmp"


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def write(path: Path, content: bytes, *, durable: bool = True) -> None:
    with Replacement(str(path)) as replacement:
        os.write(replacement.descriptor, content)
        replacement.commit(durable=durable)


@pytest.mark.parametrize("durable", [True, False])
def test_the_new_file_is_seen_only_when_it_is_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with Replacement(str(path)) as replacement:
        os.write(replacement.descriptor, b"new")
        assert path.read_bytes() == b"old"
        replacement.commit(durable=durable)
        assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Replacement(str(tmp_path / "file")):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_interrupted_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked file looks like that of a live writer, so no writer would ever remove it."""

    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, Replacement(str(tmp_path / "file")) as left:
        patch.setattr("lightning_memload.storage.replacement._remove", interrupt)
    assert left.descriptor < 0
    assert len(os.listdir(tmp_path)) == 1
    write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_without_a_directory_is_in_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("file"), b"new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_is_that_of_a_file_that_open_creates(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "opened").touch()
        (tmp_path / "replaced").touch()
        (tmp_path / "replaced").chmod(0o600)
        write(tmp_path / "new", b"")
        write(tmp_path / "replaced", b"")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("opened", "new", "replaced")}
    assert set(modes.values()) == {0o666 & ~umask}


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "best").write_bytes(b"best")
    (tmp_path / "last").symlink_to("best")
    write(tmp_path / "last", b"last")
    assert not (tmp_path / "last").is_symlink()
    assert (tmp_path / "best").read_bytes() == b"best"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))])
def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path, make: Callable[[str], None]) -> None:
    path = str(tmp_path / "special")
    try:
        make(path)
    except OSError as error:
        pytest.skip(f"none can be made here: {error}")
    before = os.stat(path)
    with pytest.raises(FileExistsError):
        Replacement(path)
    assert os.stat(path) == before
    assert os.listdir(tmp_path) == ["special"]


def test_a_directory_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        Replacement(str(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["folder"]


def test_a_directory_that_cannot_be_listed_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "scandir", refuse)
    write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Replacement(str(tmp_path / "missing" / "file"))


def test_the_temporary_file_of_a_live_writer_stays(tmp_path: Path) -> None:
    with Replacement(str(tmp_path / "a")) as one:
        os.write(one.descriptor, b"one")
        write(tmp_path / "b", b"two")
        remove_leftovers(str(tmp_path))
        one.commit(durable=False)
    assert (tmp_path / "a").read_bytes() == b"one"


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from lightning_memload.storage.replacement import Replacement
Replacement(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_the_temporary_file_of_a_killed_writer_goes(tmp_path: Path) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "file"), repository]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        remove_leftovers(str(tmp_path))
        assert len(os.listdir(tmp_path)) == 1
        writer.kill()
    assert len(os.listdir(tmp_path)) == 1
    write(tmp_path / "other", b"new")
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize(
    ("name", "age_seconds", "goes"),
    [
        (LEFTOVER.format(boot=boot()), 0, True),
        (LEFTOVER.format(boot="00000000"), 0, False),  # of another machine, whose locks may not be seen from here
        (LEFTOVER.format(boot="00000000"), 7200, True),
        (".memload-notes.tmp", 7200, False),
        ("file.tmp", 7200, False),
    ],
)
def test_only_what_is_surely_left_goes(tmp_path: Path, name: str, age_seconds: float, goes: bool) -> None:
    (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / name, times=(time.time() - age_seconds,) * 2)
    remove_leftovers(str(tmp_path))
    assert (tmp_path / name).exists() is not goes


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / LEFTOVER.format(boot=boot())).symlink_to("precious")
    remove_leftovers(str(tmp_path))
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_file_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    flock = fcntl.flock
    taken: list[Any] = []

    def slow_flock(descriptor: int, operation: int) -> None:
        if not taken:  # another process comes between creating the file and locking it
            taken.append(True)
            remove_leftovers(str(tmp_path))
        flock(descriptor, operation)

    monkeypatch.setattr("lightning_memload.storage.replacement.fcntl.flock", slow_flock)
    with Replacement(str(tmp_path / "file")) as replacement:
        assert os.fstat(replacement.descriptor).st_nlink == 1
        replacement.commit(durable=True)
    assert os.listdir(tmp_path) == ["file"]
