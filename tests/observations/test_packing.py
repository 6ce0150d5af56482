"""Packed rows: whose network reads choices that share a question as it reads each alone, and whose does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from bayeslora.errors import AdapterError
from bayeslora.observations import TextChoices
from bayeslora.observations.packing import check_packing, packed
from bayeslora.program import Program

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
REFUSED: dict[str, PreTrainedConfig] = {
    "state": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1),
    "convolution": Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
    "alibi": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "alibi of a network that takes positions": FalconConfig(**SMALL, alibi=True),
    "window": MistralConfig(**LLAMA, sliding_window=6),
    "local": GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, window_size=6, attention_types=[[["local"], 2]],
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_networks_that_would_read_packed_choices_otherwise_are_refused(kind: str) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(REFUSED[kind])
    with pytest.raises(AdapterError, match=f"A {REFUSED[kind].model_type} network does not read choices"):
        check_packing(network, "text-choices")


def test_a_program_asks_its_network_at_once() -> None:
    network = get_peft_model(AutoModelForCausalLM.from_config(REFUSED["alibi"]), LoraConfig(r=2))
    with pytest.raises(AdapterError, match="A bloom network does not read choices"):
        Program(network, TextChoices(3))


def test_a_network_is_as_before_when_it_was_asked() -> None:
    network = AutoModelForCausalLM.from_config(Qwen2Config(**LLAMA)).train()
    state = torch.get_rng_state()
    batch = {
        name: torch.ones(1, 1, dtype=torch.long) for name in ("input_ids", "segments", "position_ids", "attention_mask")
    }
    for dtype in (torch.float32, torch.bfloat16):
        check_packing(network.to(dtype), "text-choices")
        assert packed(network, batch)["attention_mask"].dtype == dtype
    assert network.training and torch.equal(torch.get_rng_state(), state)


def test_attention_without_a_mask_of_its_own_is_refused() -> None:
    network = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA))
    network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AdapterError, match="'flash_attention_2' does not take.*network.attention=sdpa"):
        check_packing(network, "text-choices")
