"""Pickles of torch, read without running anything from them, and written without the bytes of storages."""

from lightning_memload.pickles.erasing import holds_refused
from lightning_memload.pickles.globals import SafeGlobal, allow_globals, check_safe_globals, refused_globals

__all__ = ["SafeGlobal", "allow_globals", "check_safe_globals", "holds_refused", "refused_globals"]
