"""Writes a checkpoint again in another format, with other names or in another dtype, without reading it whole."""

from __future__ import annotations

from lightning_memload.convert.conversion import ConvertStats, convert_checkpoint

__all__ = ["ConvertStats", "convert_checkpoint"]
