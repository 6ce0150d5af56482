"""Causal language models with a learned prompt, and plain passes with the prompt put before a text by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from causal_scenarios import causal_base, tokenizer_of
from datasets import Dataset
from peft import get_peft_model
from scenarios import awake
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from bayeslora.models import Gaussian
from bayeslora.observations import Completions, Encoder
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.recipes import LoraSettings
from bayeslora.tasks import Split, Task, TaskSpec

COUNT = 5
METHODS = ["prompt-tuning", "p-tuning", "prefix-tuning"]
NETWORKS = ["llama", "gpt2", "qwen2"]
PROMPT = "Review: {text}\nAnswer:"
FILMS = TaskSpec("films", labels=("negative", "positive", "neutral"), prompt=PROMPT)
QUIZ = TaskSpec("quiz", "multiple-choice", ("ask",), "label", ("A", "B", "C"), choices=("choices",))
SAID = TaskSpec("said", "completion", ("prompt",), completion="completion")
ROWS: dict[str, Dataset] = {
    "films": Dataset.from_dict(
        {
            "text": ["The film is great", "dull", "What a film, the sun and the moon of it", "not good"],
            "label": [1, 0, 1, 2],
        }
    ),
    "quiz": Dataset.from_dict(
        {
            "ask": ["Is the film good", "Which stone is it, of the sun or the moon", "What is the moon"],
            "choices": [["yes", "it is not good"], ["the dull one", "moon stone", "(sun)"], ["a stone", "A"]],
            "label": [0, 2, 1],
        }
    ),
    "said": Dataset.from_dict(
        {
            "prompt": ["Is the film good?", "What", "Which stone is it, of the sun or the moon?"],
            "completion": [" yes", " is this, a great film", " no"],
        }
    ),
}
SPECS = {"films": FILMS, "quiz": QUIZ, "said": SAID}
SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "initializer_range": 0.3}
OTHERS: dict[str, PreTrainedConfig] = {
    "window": MistralConfig(**LLAMA, sliding_window=4),
    "window in some layers": Gemma2Config(**LLAMA, head_dim=8, sliding_window=4),
    "alibi": BloomConfig(vocab_size=512, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
    "positions from the mask": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3),
    "convolution": Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
    "state": MambaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, initializer_range=0.3),
}


def rows(task: str) -> Split:
    return Split(ROWS[task], SPECS[task])


def program(method: str, task: str = "films", network: str = "llama", side: str = "right", **settings: Any) -> Program:
    """With a learned prompt that is far from where it began."""
    lora = settings.pop("lora", None) or LoraSettings(method=method, tokens=COUNT)
    base = causal_base(network, "bytes", None, side)
    given = {"model": Gaussian(), "max_length": 64} | settings
    return awake(Program.from_pretrained(base, Task(SPECS[task], train=rows(task)), lora=lora, **given))


def own(found: Program) -> dict[str, Tensor]:
    return {site.name: site.initial for site in found.sites}


def outputs(found: Program, task: str, batch_size: int = 4) -> Tensor:
    with torch.no_grad():
        return Rows.of(found, rows(task), batch_size).outputs(found, own(found))


def prompted_pass(network: Any, ids: list[int]) -> Tensor:
    """Logits (tokens, vocabulary) of one row of transformers' own network, with the prompt put before it by hand."""
    base, encoder = network.get_base_model(), network.prompt_encoder["default"]
    tokens, table = torch.tensor([ids]), encoder.embedding.weight
    if network.active_peft_config.peft_type != "PREFIX_TUNING":
        prompt = encoder.mlp_head(table) if hasattr(encoder, "mlp_head") else table
        embedded = torch.cat([prompt, base.get_input_embeddings()(tokens[0])]).unsqueeze(0)
        return base(inputs_embeds=embedded).logits[0, len(prompt) :]
    config = base.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    places = table.view(len(table), config.num_hidden_layers, 2, heads, -1)
    keys, values = places.permute(2, 1, 3, 0, 4).unsqueeze(2)
    return base(input_ids=tokens, past_key_values=DynamicCache(list(zip(keys, values, strict=True)))).logits[0]


def after(found: Program, ids: list[int], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Log probabilities of what comes after each token of a row."""
    found.weights.install(own(found) if weights is None else weights)
    with torch.no_grad():
        return prompted_pass(found.network, ids).double().log_softmax(-1)


def likelihood(found: Program, ids: list[int], count: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Of the last tokens of a row."""
    logs = after(found, ids, weights)[-count - 1 : -1]
    return logs.gather(-1, torch.tensor(ids[-count:]).unsqueeze(-1)).sum()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found), rtol=1e-4, atol=1e-4)


def read(found: Program, text: str) -> list[int]:
    tokenizer: Any = found.encoder.tokenizer
    return tokenizer(text)["input_ids"]


def network_of(kind: str, config: Any) -> Any:
    torch.manual_seed(0)
    config.task_type = "CAUSAL_LM"
    return get_peft_model(AutoModelForCausalLM.from_config(OTHERS[kind]), config).eval()


def own_program(kind: str, config: Any) -> Program:
    """With a tokenizer that would pad on the left."""
    encoder = Encoder(tokenizer_of(side="left"), SAID, 64)
    return awake(Program(network_of(kind, config), Completions(), Gaussian(), encoder=encoder))
