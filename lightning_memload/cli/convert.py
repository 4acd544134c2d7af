"""Write a checkpoint again: in another format, only its weights, with other names or in another dtype.

The suffix of DST decides the format: .ckpt, .pt, .pth and .bin are files of torch.save, .safetensors is one file of
weights. With --shard-size DST is a directory of safetensors files with an index for Hugging Face. --format directory
writes a directory as save_directory() does. SRC may be a distributed checkpoint (a directory of FSDP or ModelParallel).

The bytes are streamed and their checksums are compared, so the host memory does not depend on the size. DST appears in
one step when it is complete. Include, exclude and the new names are about weights only.

Exit status: 0 for success; 2 if SRC cannot be read or is damaged, or DST cannot be written or exists.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lightning_memload.cli.arguments import positive_number, regular_expression, renaming, size_in_bytes
from lightning_memload.cli.printing import lay_out_list, print_json, printable
from lightning_memload.cli.progress import Progress
from lightning_memload.errors import CheckpointFormatError, MemloadError, UnsafeGlobalsError
from lightning_memload.units import counted, format_bytes, format_speed

if TYPE_CHECKING:
    import torch

    from lightning_memload.convert import ConvertStats

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint: a file or a directory")
    parser.add_argument("target", metavar="DST", help="the new checkpoint")
    parser.add_argument("--format", choices=["torch", "safetensors", "directory"], help="format of DST")
    parser.add_argument("--weights-only", action="store_true", help="write the weights, and ignore everything else")
    parser.add_argument("--key", help="key of the state dict in SRC, if it holds several")
    parser.add_argument("--dtype", help="dtype of floating-point weights, such as bfloat16")
    parser.add_argument("--strip-prefix", default="", metavar="PREFIX", help="remove a prefix from the names")
    parser.add_argument(
        "--rename", action="append", default=[], type=renaming, metavar="REGEX=NEW", help="rename weights; repeatable"
    )
    for option, what in (("--include", "only weights"), ("--exclude", "no weights")):
        parser.add_argument(
            option,
            action="append",
            default=[],
            type=regular_expression,
            metavar="REGEX",
            help=f"write {what} whose new name has a match; repeatable",
        )
    parser.add_argument("--shard-size", type=size_in_bytes, metavar="SIZE", help="most bytes of a file, such as 5GB")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--trust", action="store_true", help="load objects of any class, which runs code of SRC (weights_only=False)"
    )
    parser.add_argument(
        "--threads", type=positive_number, help="number of threads (default: one for each CPU, at most 4)"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run(arguments: argparse.Namespace) -> int:
    """Converts the checkpoint and prints the figures.

    Raises:
        MemloadError: See ``convert_checkpoint``.
        OSError: See ``convert_checkpoint``.
        ValueError: See ``convert_checkpoint``.
    """
    stats = _convert(arguments)
    if arguments.json:
        print_json(_as_dict(stats))
    elif not arguments.quiet:
        files = f" in {counted(len(stats.files), 'file')}" if stats.files else ""
        weights = f"{counted(stats.num_weights, 'weight')}, " if stats.num_weights else ""
        speed = format_speed(stats.bytes_written, stats.seconds)
        size = f"{weights}{format_bytes(stats.bytes_written)}{files}"
        print(f"{printable(stats.path)} ({stats.format}): {size}; {stats.seconds:.2f} s, {speed}")
    if not arguments.quiet:
        _tell_losses(stats)
    return 0


def _convert(arguments: argparse.Namespace) -> ConvertStats:
    from lightning_memload.convert import convert_checkpoint

    try:
        with Progress("Converting", quiet=arguments.quiet) as progress:
            return convert_checkpoint(
                arguments.source,
                arguments.target,
                format=arguments.format,
                key=arguments.key,
                parts="weights" if arguments.weights_only else "all",
                dtype=_dtype_of(arguments.dtype),
                strip_prefix=arguments.strip_prefix,
                rename=dict(arguments.rename),
                include=[pattern.pattern for pattern in arguments.include],
                exclude=[pattern.pattern for pattern in arguments.exclude],
                shard_bytes=arguments.shard_size,
                overwrite=arguments.force,
                weights_only=not arguments.trust,
                num_threads=arguments.threads,
                progress=progress,
            )
    except UnsafeGlobalsError as error:
        found = "\n".join(f"  {name}, at {place}" for name, place in error.places.items())
        raise CheckpointFormatError(
            f"{error.path} holds objects of classes that torch refuses under weights_only=True:\n{found}\n"
            "If you trust the file, --trust loads it with weights_only=False, which runs any code that it names. A "
            ".safetensors or .pt file of the weights (--weights-only) needs none of these objects.",
            path=error.path,
        ) from error
    except ValueError as error:
        if isinstance(error, MemloadError):
            raise
        raise MemloadError(str(error)) from error  # about the arguments: its message is enough
    except FileExistsError as error:
        if not arguments.force and error.filename == arguments.target:
            raise FileExistsError(error.errno, "exists; --force replaces it", error.filename) from error
        raise


def _tell_losses(stats: ConvertStats) -> None:
    """Says on stderr what the new checkpoint does not hold."""
    lines = []
    if stats.dropped:
        lines += lay_out_list("not written:", map(printable, stats.dropped), width=None)
    if stats.left_out:
        lines += lay_out_list("weights that safetensors cannot hold:", map(printable, stats.left_out), width=None)
    if stats.ties:
        ties = (f"{printable(name)} (as {printable(first)})" for name, first in stats.ties.items())
        lines += lay_out_list("tied weights, stored under the first name only:", ties, width=None)
    for line in lines:
        print(line, file=sys.stderr)


def _dtype_of(word: str | None) -> torch.dtype | None:
    if word is None:
        return None
    import torch

    dtype = getattr(torch, word, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {word}: torch has no such dtype.")
    return dtype


def _as_dict(stats: ConvertStats) -> dict[str, object]:
    return {
        "path": stats.path,
        "format": stats.format,
        "files": list(stats.files),
        "weights": stats.num_weights,
        "bytes_written": stats.bytes_written,
        "seconds": stats.seconds,
        "dropped": list(stats.dropped),
        "left_out": list(stats.left_out),
        "ties": dict(stats.ties),
    }
