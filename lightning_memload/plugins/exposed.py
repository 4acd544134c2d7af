"""Parameters that are pages of a file which Linux does not watch: changes of the file are found by comparison."""

from __future__ import annotations

import weakref

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_memload.errors import listed
from lightning_memload.storage import FileSet

__all__ = ["ExposedParameters"]


class ExposedParameters:
    """The parameters of a module whose values change when their file is changed in place.

    Args:
        files: The files whose pages the parameters are.
        module: The module. It is not kept alive.
    """

    def __init__(self, files: FileSet, module: nn.Module) -> None:
        self._files = files
        self._module = weakref.ref(module)

    def warn_if_changed(self) -> bool:
        """Warns, once, if a file was changed in place.

        Returns:
            Whether to check again later: no file has changed, and the module still exists.
        """
        changed, is_alive = self._files.changed_files(), self._module() is not None
        if changed and is_alive:
            rank_zero_warn(
                f"{listed(changed)} was changed in place while parameters are pages of it (mode='assign'), so these "
                "parameters have other values now. Restore the module again. To avoid this, replace files instead of "
                "changing them, or use mode='copy'."
            )
        return is_alive and not changed
