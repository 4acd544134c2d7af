"""The options of a remote place for one load, such as credentials and endpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

__all__ = ["storage_options", "use_storage_options"]

_OPTIONS: ContextVar[Mapping[str, Any] | None] = ContextVar("lightning_memload_storage_options", default=None)


def storage_options() -> Mapping[str, Any]:
    """The options that apply in this context. Empty: the library of the place finds everything itself."""
    return _OPTIONS.get() or {}


@contextlib.contextmanager
def use_storage_options(options: Mapping[str, Any] | None) -> Iterator[None]:
    """A context in which remote places are opened with these options. ``None`` changes nothing.

    Args:
        options: The keyword arguments of ``obstore.store.from_url``, or of the fsspec file system of the scheme.
    """
    if options is None:
        yield
        return
    token = _OPTIONS.set(dict(options))
    try:
        yield
    finally:
        _OPTIONS.reset(token)
