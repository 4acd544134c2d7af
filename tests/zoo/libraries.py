"""The models of installed libraries that can be built without a download, with arguments that make them small."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["LIBRARIES", "Ways", "models_of"]

LIBRARIES = ("timm", "torchvision", "diffusers", "transformers", "peft")

# Ways to build one model, the first of which that works is taken.
Ways = list[Callable[[], nn.Module]]

# What makes a transformers model small, where its configuration has such a size.
_SMALL = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32, "projection_dim": 16, "d_kv": 8,
    "head_dim": 8, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "intermediate_size": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "d_ff": 64, "ffn_dim": 64, "vocab_size": 320, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_intermediate_size": 32, "max_position_embeddings": 64, "image_size": 32,
}  # fmt: skip
_LAYERS = re.compile(r"^(n_layers?|depth|layers|.*layers|num_.*blocks|n_blocks|mixed_depth)$")
_NO_LAYERS = re.compile(r"per_block|_to_|start|skip|global|feature|fusion")
_EXPERTS = re.compile(r"^(num|n)_(local_|routed_)?experts$")


# What constructors of diffusers ask for, or need though its default is None.
_NEEDED: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "latent_channels": 4, "sample_size": 16, "patch_size": 2, "num_layers": 1,
    "block_out_channels": (32, 64), "layers_per_block": 1, "spatial_compression_ratio": 2, "cross_attention_dim": 32,
    "text_encoder_dim": 32, "text_encoder_1_dim": 32, "langauge_model_dim": 32, "conditioning_dim": 32,
    "min_value": 0, "max_value": 10, "prefix_length": 4, "prefix_inner_dim": 32, "text_embed_dim": 32,
    "caption_channels": [32, 32], "llama_layers": [0], "num_routed_experts": 2, "num_activated_experts": 1,
    "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4,
}  # fmt: skip
# Widths that may be made small together, where nothing else depends on them.
_WIDTHS = re.compile(
    r"^(hidden_size|intermediate_size|ffn_dim|ff_dim|mlp_dim|dim|base_dim|model_dim|channels|ch|.*_dim)$"
)


def models_of(library: str, *, heads: bool = False) -> Iterator[tuple[str, Ways]]:
    """The models of a library by name, each with ways to build it, the smallest first.

    Args:
        library: One of ``LIBRARIES``.
        heads: Whether to build every class of transformers with every configuration, not the plain models alone.

    Raises:
        ImportError: It is not installed.
    """
    module = importlib.import_module(library)
    if library == "transformers":
        yield from _transformers(module, heads)
    else:
        yield from {"timm": _timm, "torchvision": _torchvision, "diffusers": _diffusers, "peft": _peft}[library](module)


def _timm(module: Any) -> Iterator[tuple[str, Ways]]:
    """The model with the shortest name of each module first: it is most often the smallest, or the plainest."""
    names: dict[str, list[str]] = {}
    for name in module.list_models():
        names.setdefault(module.models.model_entrypoint(name).__module__, []).append(name)
    first = [min(group, key=_size_in_name) for group in names.values()]
    for name in (*first, *(name for group in names.values() for name in group if name not in first)):
        yield name, [functools.partial(module.create_model, name, pretrained=False)]


def _size_in_name(name: str) -> tuple[int, int, str]:
    words = ("atto", "femto", "pico", "nano", "xxs", "xs", "tiny", "mini", "lite", "small", "s0", "b0", "test")
    return 0 if any(word in name for word in words) else 1, len(name), name


def _torchvision(module: Any) -> Iterator[tuple[str, Ways]]:
    for name in module.models.list_models():
        takes = inspect.signature(module.models.get_model_builder(name)).parameters
        options = {key: None for key in ("weights", "weights_backbone") if key in takes}
        yield name, [functools.partial(module.models.get_model, name, **options)]
        if "quantize" in takes:
            yield f"{name} quantize=True", [functools.partial(module.models.get_model, name, quantize=True, **options)]


def _diffusers(module: Any) -> Iterator[tuple[str, Ways]]:
    base = module.ModelMixin
    for name in dir(module):
        kind = getattr(module, name, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not base and "MultiControl" not in name:
            yield name, [functools.partial(kind, **options) for options in _sizes(kind)]


def _sizes(kind: type) -> list[dict[str, Any]]:
    """Arguments of a constructor that make ever larger models."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()  # type: ignore[misc]
        if parameter.default is not inspect.Parameter.empty and not isinstance(parameter.default, bool)
    }
    layers: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, int) and value > 1 and _LAYERS.match(name) and not _NO_LAYERS.search(name):
            layers[name] = 1
    heads = {
        name: 2
        for name, value in defaults.items()
        if isinstance(value, int) and value > 2 and name in ("num_attention_heads", "num_heads", "n_heads")
    }
    channels: dict[str, Any] = {}
    for name, value in defaults.items():
        if "block_out_channels" in name and isinstance(value, (tuple, list)):
            channels[name] = type(value)(max(32, item // 8 // 32 * 32) for item in value)
    experts = {name: 2 for name, value in defaults.items() if isinstance(value, int) and _EXPERTS.match(name)}
    few = {**layers, **experts}
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    needed = {
        name: value
        for name, value in _NEEDED.items()
        if name in parameters and parameters[name].default in (None, inspect.Parameter.empty)
    }
    widths = {n: max(32, v // 8) for n, v in defaults.items() if isinstance(v, int) and v > 64 and _WIDTHS.match(n)}
    halves = {n: v // 2 for n, v in defaults.items() if isinstance(v, int) and v > 64 and _WIDTHS.match(n)}
    ways: list[dict[str, Any]] = [{**few, **heads, **channels}, {**few, **heads}, {**few, **channels}, few, {}]
    ways += [{**way, **needed} for way in ways]
    ways[3:3] = [{**few, **heads, **widths}, {**few, **widths}, {**few, **halves}]
    return [way for index, way in enumerate(ways) if way not in ways[:index]]


def _transformers(module: Any, heads: bool) -> Iterator[tuple[str, Ways]]:
    for config, kinds in _classes_of(module, heads).items():
        for kind in kinds:
            yield (
                kind.__name__,
                [functools.partial(_with_config, kind, config, shrink) for shrink in (_small, _flat, _same)],
            )


def _classes_of(module: Any, heads: bool) -> dict[type, list[type]]:
    found: dict[type, list[type]] = {}
    mappings = [name for name in dir(module) if re.fullmatch(r"MODEL_(FOR_.*|)MAPPING", name)] if heads else []
    for name in ("MODEL_MAPPING", *(name for name in mappings if name != "MODEL_MAPPING")):
        mapping = getattr(module, name)
        for config in list(mapping.keys()):
            try:
                value = mapping[config]
            except (ValueError, ImportError, AttributeError):
                continue  # It names classes that are not there.
            known = found.setdefault(config, [])
            known += [kind for kind in (value if isinstance(value, tuple) else (value,)) if kind not in known]
    return found


def _with_config(kind: type, config: type, shrink: Callable[[Any], Any]) -> nn.Module:
    made: nn.Module = kind(shrink(config()))
    return made


def _small(config: Any, sizes: dict[str, int] = _SMALL, depth: int = 3) -> Any:
    """Makes a configuration, and those within it, small."""
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and depth:
            setattr(config, name, _small(value, sizes, depth - 1))
        elif type(value) is int and value > 2 and _LAYERS.match(name) and not _NO_LAYERS.search(name):
            _set(config, name, 2)
    for name, value in sizes.items():
        if type(getattr(config, name, None)) is int:
            _set(config, name, min(value, getattr(config, name)))
    length = getattr(config, "num_hidden_layers", None)
    if isinstance(length, int):
        for name in ("layer_types", "mlp_layer_types", "block_types", "layers_block_type"):
            value = getattr(config, name, None)
            if isinstance(value, list) and len(value) > length:
                _set(config, name, value[:length])
    return config


def _flat(config: Any) -> Any:
    """Makes a configuration shallow, but no narrower."""
    return _small(config, {name: 4 for name in _SMALL if _EXPERTS.match(name)})


def _same(config: Any) -> Any:
    return config


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(Exception):  # Some are computed, others are checked.
        setattr(config, name, value)


def _peft(module: Any) -> Iterator[tuple[str, Ways]]:
    transformers = importlib.import_module("transformers")
    base = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    options: dict[str, list[dict[str, Any]]] = {
        "LORA": [
            {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "pissa"},
            {"init_lora_weights": "olora"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": False},
            {"trainable_token_indices": [1, 2]}, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"},
            {"bias": "all"}, {"layer_replication": [(0, 2), (1, 2)]}, {"target_modules": ["embed_tokens", "lm_head"]},
            {"target_parameters": ["self_attn.q_proj.weight"]}, {"init_lora_weights": "pissa_niter_4"},
        ],
    }  # fmt: skip
    prompts = {"num_virtual_tokens": 4, "token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
    more: list[dict[str, Any]] = [{}, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "r": 2}, prompts]
    more += [{**prompts, "num_transformer_submodules": 1}, {"adapter_len": 2, "adapter_layers": 1}]
    more += [{"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}]

    def build(config: Any, chosen: dict[str, Any]) -> nn.Module:
        model = transformers.LlamaForCausalLM(base)
        adapted: nn.Module = module.get_peft_model(model, config(task_type="CAUSAL_LM", **chosen))
        return adapted

    for kind, config in module.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = getattr(kind, "value", str(kind))
        yield name, [functools.partial(build, config, chosen) for chosen in more]
        for chosen in options.get(name, []):
            yield f"{name} {chosen}", [functools.partial(build, config, {"target_modules": ["q_proj"], **chosen})]
