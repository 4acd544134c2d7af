"""Models that people use, built from configs under meta_init: nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.restore.building import raw, same_on_meta
from tests.zoo import differences

# Neither is installed but for development.
transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 7, 30]])


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    )


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    return transformers.BertForMaskedLM(config)


def lora() -> nn.Module:
    """Adapters whose one half is drawn, the other zero; the model around them is frozen."""
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a name that it has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def marian() -> nn.Module:
    """Its tables of sinusoids are frozen parameters that no file holds."""
    config = transformers.MarianConfig(
        vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def adapted(config: Callable[[], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # of peft, for LlamaRMSNorm
            return peft.get_peft_model(llama(), config())

    return build


ZOO: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "bert": bert,
    "marian": marian,
    "lora": lora,
    "trainable tokens": adapted(lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])),
    "layer norms": adapted(lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "dora": adapted(lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True)),
    "ia3": adapted(lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}


@pytest.mark.filterwarnings("ignore:meta_init built:UserWarning")
@pytest.mark.parametrize("name", ZOO)
def test_a_file_that_lacks_what_can_be_computed(name: str, tmp_path: Path) -> None:
    """Every parameter and buffer, bit for bit, after a file that holds only what is drawn at random."""
    wrong, computed = differences(ZOO[name], tmp_path)
    assert wrong == []
    assert computed, "each of these models has values that are not drawn"


@pytest.mark.parametrize(
    ("build", "ties"),
    [
        (gpt2, {("transformer.wte.weight", "lm_head.weight")}),
        (llama, set()),
        (t5, {("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}),
        (
            bert,
            {
                ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
                ("cls.predictions.bias", "cls.predictions.decoder.bias"),
            },
        ),
        (lora, {("base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight")}),
    ],
)
def test_model(build: Callable[[], nn.Module], ties: set[tuple[str, ...]], tmp_path: Path) -> None:
    module = same_on_meta(build, tmp_path)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    assert {tuple(group) for group in names.values() if len(group) > 1} == ties
    torch.manual_seed(1)
    expected = build()
    inputs = {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS} if build is t5 else {})}
    with torch.no_grad():
        logits = [model.eval()(**inputs).logits for model in (expected, module)]
    assert raw(logits[0]) == raw(logits[1])
    if build is lora:
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        assert len(trained) == 4
        assert all("lora_" in name for name in trained)
