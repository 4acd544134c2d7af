"""Turns the roles of docstrings (``:class:`Name```) into what Markdown knows: code, linked where the name is public."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Replaces roles in every docstring of the package that is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Visits each object of a package once."""
        public = set(pkg.exports or ())

        def replaced(match: re.Match[str]) -> str:
            name = match[1]
            return f"[`{name}`][{pkg.name}.{name}]" if name in public else f"`{name}`"

        waiting: list[griffe.Object] = [pkg]
        while waiting:
            found = waiting.pop()
            if found.docstring is not None:
                found.docstring.value = _ROLE.sub(replaced, found.docstring.value)
            waiting += [member for member in found.members.values() if isinstance(member, griffe.Object)]
