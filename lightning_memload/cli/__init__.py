"""The command line: ``python -m lightning_memload VERB``, one file for each verb.

Needs no Lightning and no GPU. Runs no code from a checkpoint, and reads only the parts that the verb names.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from lightning_memload.cli import inspect, verify
from lightning_memload.errors import MemloadError

__all__ = ["main"]

_VERBS = {"inspect": inspect, "verify": verify}
_NOT_ANSWERED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: The command line after the program's name. ``None``: the command line of this process.

    Returns:
        The exit status: 0 for success, 2 if the verb cannot run (no such file, no checkpoint, wrong usage), others as
        documented by the verb.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-memload",
        description="Inspect and verify checkpoints of PyTorch Lightning without loading them.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        help_text, _, details = (verb.__doc__ or "").partition("\n\n")
        verb_parser = verbs.add_parser(
            name, help=help_text, description=f"{help_text}\n\n{details}", formatter_class=argparse.RawTextHelpFormatter
        )
        verb.add_arguments(verb_parser)
    parsed = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # The terminal may lack characters of a name.
    try:
        return int(_VERBS[parsed.verb].run(parsed))
    except (MemloadError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader has closed the pipe, for example `head`. Without this, the flush at exit would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"lightning-memload {parsed.verb}: {error}", file=sys.stderr)
        return _NOT_ANSWERED
