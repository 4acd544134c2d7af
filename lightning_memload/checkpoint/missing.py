"""What to say of a path at which there is nothing: people give names of the Hugging Face Hub where a path is needed."""

from __future__ import annotations

import errno
import os
import re

__all__ = ["hub_advice", "require_exists"]

# As the Hub has them: an owner and a name, no suffix of a file and no folder above.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".index")


def require_exists(path: str) -> None:
    """Raises unless there is something at a local path.

    Raises:
        FileNotFoundError: There is not. It says what to do if the path looks like a name of the Hub.
        OSError: The path cannot be looked at.
    """
    try:
        os.stat(path)
    except FileNotFoundError as error:
        advice = hub_advice(path)
        if advice is None:
            raise
        raise FileNotFoundError(errno.ENOENT, f"No such file or directory. {advice}", path) from error


def hub_advice(path: str) -> str | None:
    """A sentence for a path that looks like a name of the Hub, and ``None`` for any other."""
    if not _HUB_NAME.fullmatch(path) or path.endswith(_SUFFIXES) or os.path.isdir(os.path.dirname(path)):
        return None
    return (
        "If this is a name on the Hugging Face Hub, download it first and give the folder: "
        f"huggingface_hub.snapshot_download({path!r}) returns it."
    )
