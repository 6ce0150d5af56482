"""Packed rows: whose network reads choices that share a question as it reads each alone, and whose does not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
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

from bayeslora.observations import TextChoices, build
from bayeslora.observations.packing import packed, refuses_packing
from bayeslora.passes import Rows
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
def test_networks_that_would_read_packed_choices_otherwise_are_known(kind: str) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(REFUSED[kind])
    assert f"A {REFUSED[kind].model_type} network does not read choices" in str(refuses_packing(network))


def test_a_network_is_as_before_when_it_was_asked() -> None:
    network = AutoModelForCausalLM.from_config(Qwen2Config(**LLAMA)).train()
    state = torch.get_rng_state()
    batch = {
        name: torch.ones(1, 1, dtype=torch.long) for name in ("input_ids", "segments", "position_ids", "attention_mask")
    }
    for dtype in (torch.float32, torch.bfloat16):
        assert refuses_packing(network.to(dtype)) is None
        assert packed(network, batch)["attention_mask"].dtype == dtype
    assert network.training and torch.equal(torch.get_rng_state(), state)


def test_attention_without_a_mask_of_its_own_is_known() -> None:
    network = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA))
    network.config._attn_implementation = "flash_attention_2"
    reason = str(refuses_packing(network))
    assert "'flash_attention_2' does not take" in reason and "network.attention=sdpa" in reason


def rows() -> Dataset:
    """Packed rows of two choices and of three."""
    parts = [[[5, 6, 7], [8, 9], [10]], [[11, 12], [13], [14, 15, 16], [17, 18]], [[19], [20, 21]]]
    return Dataset.from_dict(
        {
            "input_ids": [[token for part in row for token in part] for row in parts],
            "segments": [[number for number, part in enumerate(row) for _ in part] for row in parts],
            "sizes": [[number + 1 for number in range(len(row) - 1)] for row in parts],
            "labels": [0, 2, 0],
        }
    )


@pytest.mark.parametrize("kind", ["state", "convolution", "alibi", "local", "window"])
def test_a_network_that_reads_no_packed_choices_reads_one_by_one(kind: str) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(REFUSED[kind])
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if type(module) is nn.Linear}
    network = get_peft_model(
        base, LoraConfig(r=2, target_modules=sorted(names - {"lm_head", "out_proj"}), init_lora_weights=False)
    )
    with pytest.warns(UserWarning, match="does not read choices.*each choice is run with its question by itself"):
        program = Program(network, TextChoices(3)).eval()
    assert program.observation == TextChoices(3, packed=False) == build(program.observation.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        over = Rows.of(Program(network, program.observation).eval(), rows(), 2)
    with torch.no_grad():
        found = over.outputs(program, {site.name: site.initial for site in program.sites})
        for row, scores in zip(rows(), found, strict=True):
            pairs = list(zip(row["input_ids"], row["segments"], strict=True))
            question = [token for token, number in pairs if number == 0]
            for place, size in enumerate(row["sizes"]):
                choice = [token for token, number in pairs if number == place + 1]
                ids = torch.tensor([question + choice])
                logs = network(input_ids=ids).logits[0, len(question) - 1 : -1].log_softmax(-1)
                expected = logs.gather(1, torch.tensor(choice)[:, None]).sum() / size
                torch.testing.assert_close(scores[place], expected, rtol=1e-4, atol=1e-4)
            assert scores[len(row["sizes"]) :].isneginf().all()
