"""The rooms of the package and their floors, from which a room may import."""

from __future__ import annotations

# A room imports only from floors below its own, or from itself. The package's own __init__ is the roof: it may
# name every room, and nothing below may import from it.
FLOORS = {
    "errors": 0,
    "torch_private": 0,
    "units": 0,
    "collector": 0,
    "bytes": 0,
    "frames": 0,
    "memory": 1,
    "storage": 1,
    "distributed": 1,
    "checkpoint": 2,
    "pickles": 3,
    "transfer": 4,
    "formats": 5,
    "diff": 6,
    "forecast": 6,
    "verify": 6,
    "restore": 7,
    "save": 7,
    "report": 8,
    "convert": 8,
    "plugins": 9,
    "cli": 9,
    "__main__": 10,
}
