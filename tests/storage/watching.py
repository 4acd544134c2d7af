"""Files that are rewritten while they are mapped, and what a process still holds of them."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lightning_memload.storage import FileWatch


def traces(path: Path) -> tuple[bool, bool]:
    """Whether the file is mapped, whether a descriptor of it is open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return str(path) in Path("/proc/self/maps").read_text(), any(link.startswith(str(path)) for link in links)


def join_watches() -> None:
    """Waits for the threads of all watches, which end with the last tensor or a writer."""
    gc.collect()  # Trainers and modules refer to one another: those of earlier tests may still be there.
    for thread in threading.enumerate():
        if thread.name == "memload-lease":
            thread.join(20)
            assert not thread.is_alive()


@contextlib.contextmanager
def watches_end() -> Iterator[None]:
    """Waits at the end of the block for the watches that give way to a writer, which tell only then what they did."""
    yield
    for thread in threading.enumerate():
        if isinstance(thread, FileWatch) and (thread._is_broken() or thread._is_over.is_set()):
            thread.join(20)
            assert not thread.is_alive()


def write_elsewhere(path: Path) -> None:
    subprocess.run([sys.executable, "-c", f"open({str(path)!r}, 'wb').write(bytes(30000))"], check=True)


def write_through_link(path: Path) -> None:
    link = path.with_name("link")
    os.link(path, link)
    link.write_bytes(b"other")


REWRITES: dict[str, Callable[[Path], object]] = {
    "written here": lambda path: path.write_bytes(bytes(30000)),
    "opened for both": lambda path: open(path, "r+b").close(),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "cut to a page": lambda path: os.truncate(path, 4096),
    "written elsewhere": write_elsewhere,
    "written through a hard link": write_through_link,
    "saved to by torch": lambda path: torch.save({"other": torch.zeros(30_000)}, path),
    "appended to": lambda path: open(path, "ab").close(),
}
