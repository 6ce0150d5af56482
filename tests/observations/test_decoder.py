"""Both halves of a causal language model give what its whole forward pass gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from bayeslora.observations.decoder import hidden_states, logits_at

LLAMA: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
CONFIGURATIONS = {
    "llama": LlamaConfig(**LLAMA),
    "tied": Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "soft cap": Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.5),
    "scaled": GraniteConfig(**LLAMA, logits_scaling=3.0),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0),
    "nested": OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    ),
    "another layer before the head": ModernBertDecoderConfig(**LLAMA, local_attention=4, pad_token_id=0),
    "another name": Llama4TextConfig(**LLAMA, head_dim=8, intermediate_size_mlp=32, num_local_experts=1),
    "mamba": MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1),
}
TOKENS = torch.tensor([7, 3, 41])


def network(config: PreTrainedConfig, lora: list[str] | None = None) -> nn.Module:
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(config).eval()
    if lora:
        found = get_peft_model(found, LoraConfig(target_modules=lora, init_lora_weights=False)).eval()
    return found


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_halves_are_the_whole(name: str) -> None:
    model, batch = network(CONFIGURATIONS[name]), inputs()
    with torch.no_grad():
        whole = model(**batch).logits
        hidden = hidden_states(model, batch)
        assert hidden.shape == (3, 6, 16)
        torch.testing.assert_close(logits_at(model, hidden), whole)
        torch.testing.assert_close(logits_at(model, hidden[:, -1], TOKENS), whole[:, -1, TOKENS])
        torch.testing.assert_close(model(**batch).logits, whole, rtol=0, atol=0)


@pytest.mark.parametrize("lora", [["q_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_with_lora_also_on_the_head(name: str, lora: list[str]) -> None:
    model, batch = network(CONFIGURATIONS[name], lora), inputs()
    whole = model(**batch).logits[:, -1, TOKENS]
    found = logits_at(model, hidden_states(model, batch)[:, -1], TOKENS)
    torch.testing.assert_close(found, whole)
    trained = [value for value in model.parameters() if value.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), trained), torch.autograd.grad(whole.sum(), trained), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("lora", "rank"), [(None, 0), (["lm_head"], 8)])
def test_only_the_rows_that_are_asked_for_are_multiplied(lora: list[str] | None, rank: int) -> None:
    model: Any = network(CONFIGURATIONS["llama"], lora)
    with torch.no_grad():
        hidden = hidden_states(model, inputs())
        with FlopCounterMode(display=False) as counted:
            found = logits_at(model, hidden[:, -1], TOKENS)
    # A product and a sum for each entry of the width or, in B, of the rank, of one position a row; and A's product.
    assert found.shape == (3, len(TOKENS))
    assert counted.get_total_flops() == 2 * (16 + rank) * found.numel() + 2 * 16 * rank * 3


@pytest.mark.parametrize("layer", ["base_layer", "lora_B.default"])
def test_hooks_on_the_head_are_called(layer: str) -> None:
    model: Any = network(CONFIGURATIONS["llama"], ["lm_head"])
    hidden = hidden_states(model, inputs())[:, -1]
    plain = logits_at(model, hidden)
    model.get_base_model().lm_head.get_submodule(layer).register_forward_pre_hook(lambda _, given: (2 * given[0],))
    hooked = logits_at(model, hidden)
    assert not torch.allclose(hooked, plain)
    torch.testing.assert_close(logits_at(model, hidden, TOKENS), hooked[:, TOKENS])


def test_dora_on_the_head() -> None:
    model, batch = network(CONFIGURATIONS["llama"]), inputs()
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False, use_dora=True)).eval()
    with torch.no_grad():
        whole = model(**batch).logits[:, -1, TOKENS]
        torch.testing.assert_close(logits_at(model, hidden_states(model, batch)[:, -1], TOKENS), whole)


def test_the_network_is_as_before_after_an_error() -> None:
    model: Any = network(CONFIGURATIONS["llama"])
    body, head = model.model, model.lm_head
    with pytest.raises(ValueError, match="input_ids"):
        hidden_states(model, {})
    with pytest.raises(RuntimeError):
        logits_at(model, torch.zeros(1, 1, 3))
    assert model.model is body and model.lm_head is head


def test_what_is_read_without_a_prompt_is_not_cut() -> None:
    """The gradient of a cut would be another tensor of its size."""
    found = hidden_states(network(CONFIGURATIONS["llama"]), inputs())
    assert found.grad_fn is not None and "Slice" not in found.grad_fn.name()
