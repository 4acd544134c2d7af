"""Error messages for a path that does not exist: users often give a name of the Hugging Face Hub instead of a path."""

from __future__ import annotations

import errno
import os
import re

from lightning_memload.storage.places import identity_of

__all__ = ["hub_advice", "require_exists"]

# A name of the Hub: an owner and a name, without the suffix of a file and without a parent folder.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".index")


def require_exists(path: str) -> None:
    """Raises unless a path exists.

    Raises:
        FileNotFoundError: It does not exist. The message gives advice if the path looks like a name of the Hub.
        OSError: The path cannot be examined.
    """
    try:
        identity_of(path)
    except FileNotFoundError as error:
        advice = hub_advice(path)
        if advice is None:
            raise
        raise FileNotFoundError(errno.ENOENT, f"No such file or directory. {advice}", path) from error


def hub_advice(path: str) -> str | None:
    """Advice for a path that looks like a name of the Hub. ``None`` for any other path."""
    if not _HUB_NAME.fullmatch(path) or path.endswith(_SUFFIXES) or os.path.isdir(os.path.dirname(path)):
        return None
    return (
        "If this is a name on the Hugging Face Hub, download it first and give the folder: "
        f"huggingface_hub.snapshot_download({path!r}) returns it."
    )
