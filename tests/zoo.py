"""Compare models of installed libraries, built under ``meta_init`` and restored, with ordinary ones, bit for bit.

    python -m tests.zoo                 # timm, torchvision, diffusers, transformers, peft: what is installed
    python -m tests.zoo timm --most 50  # the first 50 models of one library

Nothing is downloaded. Each model is built with random weights three times: twice as always, which tells what is drawn
at random, and once under ``meta_init``. Then it is given a file of what is drawn, and everything is compared.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from lightning_memload import load_weights, meta_init
from tests.restore.building import raw

LIBRARIES = ("timm", "torchvision", "diffusers", "transformers", "peft")
# What makes a transformers model small, where its configuration has such a size.
SMALL = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4,
    "num_key_value_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "intermediate_size": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_ff": 64, "vocab_size": 99,
}  # fmt: skip


def differences(build: Callable[[], nn.Module], folder: Path) -> tuple[list[str], list[str]]:
    """Compare a model that is built under ``meta_init`` with an ordinary one.

    Returns:
        The names of what differs, and of what was compared without being in the file.
    """
    torch.manual_seed(1)
    expected = build()
    torch.manual_seed(2)
    other = values_of(build())
    torch.manual_seed(3)
    with meta_init():
        actual = build()
    ours, theirs = values_of(actual), values_of(expected)
    names = [name for name in theirs if list(ours) == list(theirs)]
    drawn = {name for name in names if raw(theirs[name]) != raw(other[name])}
    torch.save({name: value for name, value in expected.state_dict().items() if name in drawn}, folder / "drawn.pt")
    if drawn & expected.state_dict().keys():
        load_weights(actual, folder / "drawn.pt", strict=False)
    ours = values_of(actual)
    # A buffer that is drawn and in no file differs in two ordinary constructions too.
    compared = [name for name in names if name not in drawn or name in expected.state_dict()]
    wrong = [name for name in compared if ours[name].is_meta or raw(ours[name]) != raw(theirs[name])]
    return wrong if names else ["the names of parameters and buffers"], [n for n in compared if n not in drawn]


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def models_of(library: str) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    module = importlib.import_module(library)
    if library == "timm":
        for name in module.list_models():
            yield name, lambda name=name: module.create_model(name)  # type: ignore[misc]
    elif library == "torchvision":
        for name in module.models.list_models():
            yield name, lambda name=name: module.models.get_model(name, weights=None)  # type: ignore[misc]
    elif library == "diffusers":
        for name in dir(module.models):
            kind = getattr(module.models, name)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                yield name, kind
    elif library == "transformers":
        for config in list(module.MODEL_MAPPING.keys()):
            try:
                kind = module.MODEL_MAPPING[config]
            except (ValueError, ImportError):
                continue  # It names classes that are not there.
            kinds = kind if isinstance(kind, tuple) else (kind,)
            for one in kinds:
                yield one.__name__, lambda config=config, one=one: one(small(config()))  # type: ignore[misc]
    elif library == "peft":
        transformers = importlib.import_module("transformers")
        base = transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99
        )
        for kind, config in module.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
            yield (
                str(kind),
                lambda config=config: module.get_peft_model(  # type: ignore[misc]
                    transformers.LlamaForCausalLM(base), config(task_type="CAUSAL_LM")
                ),
            )


def small(config: object) -> object:
    for name, value in SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    return config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="*", default=LIBRARIES)
    parser.add_argument("--most", type=int, default=1 << 30, help="how many models of each library")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    failed = 0
    for library in options.libraries:
        try:
            found = list(models_of(library))[: options.most]
        except ImportError:
            print(f"{library}: not installed, skipped")
            continue
        counts = {"right": 0, "wrong": 0, "not built as always either": 0}
        for name, build in found:
            try:
                build()
            except Exception:
                counts["not built as always either"] += 1
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    wrong, _ = differences(build, Path(folder))
                except Exception:
                    wrong = [traceback.format_exc(limit=3)]
            counts["wrong" if wrong else "right"] += 1
            if wrong:
                print(f"{library} {name}: {', '.join(wrong[:5])}", flush=True)
            gc.collect()
        print(f"{library}: {', '.join(f'{count} {what}' for what, count in counts.items())}", flush=True)
        failed += counts["wrong"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
