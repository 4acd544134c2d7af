"""Every module class of torch.nn, and what torch offers to wrap them, built under meta_init and restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_memload import meta_init
from lightning_memload.restore import follow_recipes
from tests.fresh_process import FreshResult
from tests.restore.building import assert_same_build, quietly, raw, restore, same_on_meta

# Built without arguments; none of them has parameters, but PReLU.
WITHOUT_ARGUMENTS = """
AlphaDropout BCELoss BCEWithLogitsLoss CELU CTCLoss CosineEmbeddingLoss CosineSimilarity CrossEntropyLoss Dropout
Dropout1d Dropout2d Dropout3d ELU FeatureAlphaDropout Flatten GELU GLU GaussianNLLLoss Hardshrink Hardsigmoid Hardswish
Hardtanh HingeEmbeddingLoss HuberLoss Identity KLDivLoss L1Loss LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d
LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d LeakyReLU LogSigmoid LogSoftmax MSELoss MarginRankingLoss Mish
Module ModuleDict ModuleList MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss PairwiseDistance
ParameterDict ParameterList PoissonNLLLoss RReLU ReLU ReLU6 SELU Sequential SiLU Sigmoid SmoothL1Loss SoftMarginLoss
Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink TripletMarginLoss TripletMarginWithDistanceLoss
Upsample UpsamplingBilinear2d UpsamplingNearest2d
""".split()  # noqa: SIM905

# One size for all arguments.
ONE_NUMBER = """
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d AvgPool1d
AvgPool2d AvgPool3d ChannelShuffle CircularPad1d CircularPad2d CircularPad3d CrossMapLRN2d LocalResponseNorm MaxPool1d
MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d PixelShuffle PixelUnshuffle ReflectionPad1d ReflectionPad2d
ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d Unfold ZeroPad1d ZeroPad2d ZeroPad3d
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Example:
    """One module.

    Attributes:
        build: Makes it.
        inputs: Shapes of random inputs of a forward; a tensor stands for itself.
        real: Whether its parameters keep their memory under ``meta_init``.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...] | None = None
    real: bool = False


INDICES = torch.tensor([[1, 2, 0], [3, 1, 4]])
NESTED = "enable_nested_tensor is True"

EXAMPLES = {
    "AdaptiveLogSoftmaxWithLoss": Example(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 6], div_value=2.0), ((5, 8), torch.arange(5))
    ),
    "BatchNorm1d": Example(lambda: nn.BatchNorm1d(3), ((4, 3),)),
    "BatchNorm2d": Example(lambda: nn.BatchNorm2d(3), ((2, 3, 4, 4),)),
    "BatchNorm3d": Example(lambda: nn.BatchNorm3d(3), ((2, 3, 2, 2, 2),)),
    "Bilinear": Example(lambda: nn.Bilinear(3, 4, 2), ((5, 3), (5, 4))),
    "ConstantPad1d": Example(lambda: nn.ConstantPad1d(1, 2.0)),
    "ConstantPad2d": Example(lambda: nn.ConstantPad2d(1, 2.0)),
    "ConstantPad3d": Example(lambda: nn.ConstantPad3d(1, 2.0)),
    "Container": Example(
        quietly(FutureWarning, "`nn.Container` is deprecated", lambda: nn.Container(a=nn.Linear(2, 3)))
    ),
    "Conv1d": Example(lambda: nn.Conv1d(2, 3, 3), ((1, 2, 8),)),
    "Conv2d": Example(lambda: nn.Conv2d(2, 4, 3, groups=2, padding_mode="circular", padding=1), ((1, 2, 6, 6),)),
    "Conv3d": Example(lambda: nn.Conv3d(2, 3, 2), ((1, 2, 4, 4, 4),)),
    "ConvTranspose1d": Example(lambda: nn.ConvTranspose1d(2, 3, 3), ((1, 2, 8),)),
    "ConvTranspose2d": Example(lambda: nn.ConvTranspose2d(2, 3, 3, bias=False), ((1, 2, 6, 6),)),
    "ConvTranspose3d": Example(lambda: nn.ConvTranspose3d(2, 3, 2), ((1, 2, 4, 4, 4),)),
    "DataParallel": Example(lambda: nn.DataParallel(nn.Linear(3, 2)), ((4, 3),)),
    # The padding row is zeroed through an index.
    "Embedding": Example(lambda: nn.Embedding(6, 4, padding_idx=1), (INDICES,)),
    "EmbeddingBag": Example(lambda: nn.EmbeddingBag(6, 4, padding_idx=0, mode="sum"), (INDICES,)),
    "Fold": Example(lambda: nn.Fold((4, 5), 2)),
    "FractionalMaxPool2d": Example(lambda: nn.FractionalMaxPool2d(2, output_size=3)),
    "FractionalMaxPool3d": Example(lambda: nn.FractionalMaxPool3d(2, output_size=3)),
    "GRU": Example(lambda: nn.GRU(3, 4, bidirectional=True), ((5, 2, 3),), real=True),
    "GRUCell": Example(lambda: nn.GRUCell(3, 4), ((2, 3),)),
    "GroupNorm": Example(lambda: nn.GroupNorm(2, 4), ((3, 4, 5),)),
    "InstanceNorm1d": Example(lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), ((2, 3, 5),)),
    "InstanceNorm2d": Example(lambda: nn.InstanceNorm2d(3, affine=True), ((2, 3, 4, 4),)),
    "InstanceNorm3d": Example(lambda: nn.InstanceNorm3d(3), ((2, 3, 2, 2, 2),)),
    "LPPool1d": Example(lambda: nn.LPPool1d(2, 2)),
    "LPPool2d": Example(lambda: nn.LPPool2d(2, 2)),
    "LPPool3d": Example(lambda: nn.LPPool3d(2, 2)),
    "LSTM": Example(lambda: nn.LSTM(3, 4, num_layers=2), ((5, 2, 3),), real=True),
    "LSTMCell": Example(lambda: nn.LSTMCell(3, 4), ((2, 3),)),
    "LayerNorm": Example(lambda: nn.LayerNorm([3, 4]), ((2, 3, 4),)),
    "LazyConv1d": Example(lambda: nn.LazyConv1d(3, 2)),
    "LazyConv2d": Example(lambda: nn.LazyConv2d(3, 2)),
    "LazyConv3d": Example(lambda: nn.LazyConv3d(3, 2)),
    "LazyConvTranspose1d": Example(lambda: nn.LazyConvTranspose1d(3, 2)),
    "LazyConvTranspose2d": Example(lambda: nn.LazyConvTranspose2d(3, 2)),
    "LazyConvTranspose3d": Example(lambda: nn.LazyConvTranspose3d(3, 2)),
    "LazyLinear": Example(lambda: nn.LazyLinear(3)),
    "Linear": Example(lambda: nn.Linear(3, 4, dtype=torch.float64)),
    "LinearCrossEntropyLoss": Example(lambda: nn.LinearCrossEntropyLoss(4, 3), ((5, 4), torch.arange(5) % 3)),
    "MultiheadAttention": Example(
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True), ((3, 2, 8), (5, 2, 4), (5, 2, 6))
    ),
    "NLLLoss2d": Example(quietly(FutureWarning, "`NLLLoss2d` has been deprecated", nn.NLLLoss2d)),
    "PReLU": Example(lambda: nn.PReLU(3), ((2, 3, 4),)),
    "ParameterDict": Example(lambda: nn.ParameterDict({"a": torch.randn(2, 3), "b": nn.Parameter(torch.zeros(4))})),
    "ParameterList": Example(lambda: nn.ParameterList([torch.randn(2, 3), nn.Parameter(torch.ones(1)), "text"])),
    "RMSNorm": Example(lambda: nn.RMSNorm(4), ((2, 4),)),
    "RNN": Example(lambda: nn.RNN(3, 4), ((5, 2, 3),), real=True),
    "RNNBase": Example(lambda: nn.RNNBase("GRU", 3, 4), real=True),
    "RNNCell": Example(lambda: nn.RNNCell(3, 4), ((2, 3),)),
    "RNNCellBase": Example(lambda: nn.RNNCellBase(3, 4, True, 2)),
    "SyncBatchNorm": Example(lambda: nn.SyncBatchNorm(3)),
    "Threshold": Example(lambda: nn.Threshold(0.1, 2.0)),
    "Transformer": Example(
        quietly(UserWarning, NESTED, lambda: nn.Transformer(8, 2, 2, 2, 16, dropout=0.0)), ((3, 2, 8), (4, 2, 8))
    ),
    "TransformerDecoder": Example(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), 2, nn.LayerNorm(8)),
        ((3, 2, 8), (4, 2, 8)),
    ),
    "TransformerDecoderLayer": Example(
        lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), ((3, 2, 8), (4, 2, 8))
    ),
    # The layers are deep copies of the one.
    "TransformerEncoder": Example(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 3),
        ((3, 2, 8),),
    ),
    "TransformerEncoderLayer": Example(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), ((3, 2, 8),)),
    "Unflatten": Example(lambda: nn.Unflatten(1, (2, 3))),
}


def torch_classes() -> list[str]:
    """Every module class that torch.nn exports."""
    return [
        name
        for name, value in vars(nn).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_")
    ]


def example(name: str) -> Example:
    if name in EXAMPLES:
        return EXAMPLES[name]
    arguments = (2,) if name in ONE_NUMBER else ()
    return Example(lambda: getattr(nn, name)(*arguments))


def test_every_class_has_an_example() -> None:
    missing = set(torch_classes()) - EXAMPLES.keys() - {*ONE_NUMBER, *WITHOUT_ARGUMENTS}
    assert not missing, f"torch.nn has classes that this file does not build: {sorted(missing)}"


@pytest.mark.parametrize("name", torch_classes())
def test_class(name: str, tmp_path: Path) -> None:
    case = example(name)
    torch.manual_seed(3)
    expected = case.build()
    uninitialized = [n for n, p in expected.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if uninitialized:
        with meta_init():
            module = case.build()
        # Nothing is allocated for them before their first forward, and nothing is changed.
        assert [n for n, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)] == uninitialized
        assert all(p.is_meta for n, p in module.named_parameters() if n not in uninitialized)
        return
    real = tuple(name for name, _ in expected.named_parameters()) if case.real else ()
    actual = same_on_meta(case.build, tmp_path, real=real)
    if case.inputs is not None:
        torch.manual_seed(1)
        expected = case.build()
        inputs = [shape if isinstance(shape, torch.Tensor) else torch.randn(shape) for shape in case.inputs]
        for one, other in zip(_flat(expected(*inputs)), _flat(actual(*inputs)), strict=True):
            assert raw(one) == raw(other)


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, tuple) else []


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


def parametrized() -> nn.Module:
    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "parametrization": parametrized,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "pruned": lambda: prune.custom_from_mask(nn.Linear(4, 3), "weight", torch.eye(3, 4)),
    "old weight_norm": quietly(FutureWarning, ".*weight_norm", lambda: nn.utils.weight_norm(nn.Conv1d(4, 3, 2))),
    "old spectral_norm": quietly(FutureWarning, ".*spectral_norm", lambda: nn.utils.spectral_norm(nn.Linear(4, 3))),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "channels last": lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "deepcopy": lambda: nn.ModuleList([copy.deepcopy(nn.Linear(2, 3)) for _ in range(2)]),
}
# Singular vectors that start from random values of the weight's own kind. They are in the checkpoint.
COMPUTED: dict[str, tuple[str, ...]] = {
    "old spectral_norm": ("weight_u", "weight_v"),
    "spectral_norm": ("parametrizations.weight.0._u", "parametrizations.weight.0._v"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped(name: str, tmp_path: Path) -> None:
    same_on_meta(WRAPPED[name], tmp_path, computed=COMPUTED.get(name, ()))


READING: dict[str, Callable[[], nn.Module]] = {
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "l1 pruning": lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 2),
}


@pytest.mark.parametrize("name", READING)
def test_wrapped_that_needs_values(name: str, tmp_path: Path) -> None:
    """What is computed of them on the way is made of them then, and they wait on."""
    with meta_init():
        module = READING[name]()
    assert any(parameter.is_meta for parameter in module.parameters())
    unfilled = copy.deepcopy(module)
    expected = READING[name]()
    restore(module, expected.state_dict(), tmp_path)
    assert_same_build(expected, module, restored=True)
    follow_recipes(unfilled)
    if name == "l1 pruning":
        kept = unfilled.weight_orig.abs()[unfilled.weight_mask.bool()].min()
        assert kept > unfilled.weight_orig.abs()[~unfilled.weight_mask.bool()].max()
    else:
        assert torch.allclose(unfilled.weight @ unfilled.weight.mT, torch.eye(3), atol=1e-5)
    with meta_init(exclude=(nn.Linear,)):
        READING[name]()


def test_light(fresh_process: Callable[..., FreshResult]) -> None:
    """The first use of many meta kernels imports half of torch; torch's own layers need none of them."""
    program = """
import sys
import torch
from torch import nn
from lightning_memload import meta_init
from lightning_memload.restore import follow_recipes
meta_init()  # imports what it needs
before = set(sys.modules)
with meta_init():
    block = lambda: nn.ModuleList([
        nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Conv2d(2, 3, 3),
        nn.TransformerEncoderLayer(8, 2), nn.BatchNorm1d(3), nn.Embedding(6, 4, padding_idx=1), nn.Bilinear(2, 3, 4),
    ])
    module = nn.ModuleList([block() for _ in range(2)])
    module.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear) else None)
    module.head = nn.Linear(4, 6, bias=False)
    module.head.weight = module[0][7].weight
assert all(p.is_meta for p in module.parameters())
RESULT = sorted(set(sys.modules) - before)
if ARGS["heavy"]:
    torch.empty(2, device="meta") > 0
    RESULT = [name for name in sys.modules if name == "sympy"]
"""
    assert fresh_process(program, heavy=False).result == []
    assert fresh_process(program, heavy=True).result == ["sympy"]
