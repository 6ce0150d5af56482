"""A quiz whose choices are texts, and tiny causal networks that are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from causal_scenarios import causal_base
from datasets import Dataset
from peft import LoraConfig
from scenarios import awake
from torch import Tensor

from bayeslora.observations import TextChoices
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

SPEC = TaskSpec("quiz", "multiple-choice", ("ask",), "label", ("A", "B", "C"), choices=("choices",))
ROWS: dict[str, list[Any]] = {
    "ask": ["Is the film good", "Which stone is it", "What is the moon", "Is water of the sun"],
    "choices": [
        ["yes", "it is not good"],
        ["the dull one", "moon stone", "(sun)"],
        ["a stone", "A"],
        ["no", "true", "!"],
    ],
    "label": [0, 2, 1, 1],
}


def rows(**columns: Any) -> Split:
    return Split(Dataset.from_dict(ROWS | columns), SPEC)


def program(
    network: str = "llama",
    tokenizer: str = "bytes",
    side: str = "right",
    targets: Sequence[str] = (),
    chat: str | None = None,
    **settings: Any,
) -> Program:
    """With no LoRA matrix at its zero start, and with packed choices unless others are asked for."""
    names = list(targets) or (["c_attn"] if network == "gpt2" else ["q_proj", "v_proj"])
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=names)
    given = {"max_length": 64} | settings
    base = causal_base(network, tokenizer, chat, side)
    made = Program.from_pretrained(str(base), Task(SPEC, train=rows()), lora=lora, **given)
    # A network that read packed choices wrongly would be asked otherwise, and nothing here would tell.
    assert isinstance(made.observation, TextChoices)
    assert made.observation.packed == given.get("observation_settings", {}).get("packed", True)
    return awake(made)


def scores(found: Program, data: Any, batch_size: int = 4) -> Tensor:
    with torch.no_grad():
        return Rows.of(found, data, batch_size).outputs(found, {site.name: site.initial for site in found.sites})
