"""The command line: ``lightning-memload VERB``, or ``python -m lightning_memload VERB``, one file for each verb.

A verb prints its results to stdout, and messages and progress to stderr. No verb needs Lightning or a GPU. A verb
imports torch only when it runs, so help and version take some 0.1 s.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

__all__ = ["main"]

_VERBS = ("inspect", "verify", "diff", "convert", "prefetch", "plan")
_NOT_ANSWERED = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: The command line after the program's name. ``None``: the command line of this process.

    Returns:
        The exit status: 0 for success, 2 if the verb cannot run (no such file, no checkpoint, wrong usage), 130 if it
        was interrupted, others as documented by the verb.
    """
    verbs = {name: import_module(f"{__name__}.{name}") for name in _VERBS}
    parsed = _make_parser(verbs).parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # The terminal may lack characters of a name.
    prefix = f"lightning-memload {parsed.verb}: "
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{prefix}{message}", file=sys.stderr)
            status = int(verbs[parsed.verb].run(parsed))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, for example `head`. Without this, the flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        if parsed.debug:
            traceback.print_exc()
        print(f"{prefix}{_describe(error)}", file=sys.stderr)
        return _NOT_ANSWERED
    return status


def _make_parser(verbs: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-memload",
        description="Inspect, compare, convert and verify checkpoints of PyTorch Lightning without loading them.",
        epilog="lightning-memload VERB --help describes a verb and its exit status.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of the program")
    choices = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in verbs.items():
        help_text, _, details = (verb.__doc__ or "").partition("\n\n")
        of_verb = choices.add_parser(
            name, help=help_text, description=f"{help_text}\n\n{details}", formatter_class=argparse.RawTextHelpFormatter
        )
        verb.add_arguments(of_verb)
        of_verb.add_argument("--json", action="store_true", help="print the result as one JSON object")
        of_verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Version(argparse.Action):
    """Prints the version and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{parser.prog} {sys.modules[__name__.partition('.')[0]].__version__}")
        parser.exit()


def _describe(error: Exception) -> str:
    """The message of an error that this package or the system raises on purpose. Others get the name of their class."""
    errors: Any = import_module("lightning_memload.errors")
    if isinstance(error, (errors.MemloadError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"
