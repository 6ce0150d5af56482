"""A network at several draws at once gives what it gives at one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_scenarios import causal_base
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import tiny_program, tiny_rows
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DebertaV2Config, PreTrainedConfig, XLNetConfig

from bayeslora.observations import Classes
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

SPEC = TaskSpec("quiz", "multiple-choice", ("ask",), "label", ("A", "B", "C"), choices=("choices",))
COLUMNS: dict[str, list[Any]] = {
    "ask": ["Is the film good", "Which stone is it", "What is the moon"],
    "choices": [["yes", "it is not good"], ["the dull one", "moon stone", "(sun)"], ["a stone", "A"]],
    "label": [0, 2, 1],
}


def causal(base: str, targets: list[str], **lora: Any) -> tuple[Program, Split]:
    split = Split(Dataset.from_dict(COLUMNS), SPEC)
    config = LoraConfig(r=3, target_modules=targets, **lora)
    return Program.from_pretrained(str(causal_base(base)), Task(SPEC, split), lora=config), split


def draws_of(program: Program, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {site.name: 0.3 * torch.randn(site.initial.shape, generator=generator) for site in program.sites}
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("base", "targets"), [("llama", ["q_proj", "down_proj"]), ("llama", ["v_proj"]), ("gpt2", ["c_attn"])]
)
def test_one_pass_is_as_many(base: str, targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, split = causal(base, targets)
    draws, passes = draws_of(program, 5), []
    run = type(program.observation).run

    def counted(self: Any, network: Any, batch: Any) -> Tensor:
        passes.append(len(batch["input_ids"]))
        return run(self, network, batch)

    monkeypatch.setattr(type(program.observation), "run", counted)
    rows = Rows.of(program, split, batch_size=7)
    with undisturbed(program), torch.no_grad():
        at_once = rows.outputs_of(program, draws)
        assert passes == [6, 6, 3]  # two draws of three rows each, and what is left
        each = torch.stack([rows.outputs(program, draw) for draw in draws])
    assert at_once.shape == (5, 3, 3)
    finite = each.isfinite()
    assert torch.equal(finite, at_once.isfinite()) and not torch.equal(each[0], each[1])
    torch.testing.assert_close(at_once[finite], each[finite])


def test_many_rows_pass_at_one_draw_after_another() -> None:
    program, split = causal("llama", ["q_proj"])
    rows, draws = Rows.of(program, split, batch_size=2), draws_of(program, 3)
    with undisturbed(program), torch.no_grad():
        found = rows.outputs_of(program, draws)
        assert all(torch.equal(found[number], rows.outputs(program, draw)) for number, draw in enumerate(draws))


def test_what_cannot_be_joined_runs_one_after_another() -> None:
    encoder = tiny_program().eval()  # its head is trained in full
    variant, split = causal("llama", ["q_proj"], use_dora=True)
    for program, data in ((encoder, tiny_rows(3)), (variant, split)):
        assert not program.weights.joinable
        rows, draws = Rows.of(program, data), draws_of(program, 2)
        with undisturbed(program), torch.no_grad():
            found = rows.outputs_of(program, draws)
            assert torch.equal(found[1], rows.outputs(program, draws[1])) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize(("observation", "passes"), [("prompted", 1), ("text-choices", 2), ("completions", 2)])
def test_a_head_is_joined_where_it_is_given_one_place_of_each_row(
    observation: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = COLUMNS if observation != "completions" else {"ask": COLUMNS["ask"], "answer": ["yes", "moon stone", "no"]}
    spec = SPEC if observation != "completions" else TaskSpec("quiz", "completion", ("ask",), completion=" {answer}")
    split = Split(Dataset.from_dict(rows), spec)
    config = LoraConfig(r=3, target_modules=["v_proj", "lm_head"])
    program = Program.from_pretrained(
        str(causal_base("llama")), Task(spec, split), lora=config, observation=observation
    )
    size = program.network.config.vocab_size
    monkeypatch.setattr("bayeslora.observations.completions.LOGITS", 4 * size)  # tokens of several draws, were they one
    made, run = [], type(program.observation).run

    def counted(self: Any, network: Any, batch: Any) -> Tensor:
        made.append(len(batch["input_ids"]))
        return run(self, network, batch)

    monkeypatch.setattr(type(program.observation), "run", counted)
    data, draws = Rows.of(program, split), draws_of(program, 2)
    with undisturbed(program), torch.no_grad():
        found = data.outputs_of(program, draws)
        assert len(made) == passes
        each = torch.stack([data.outputs(program, draw) for draw in draws])
    finite = each.isfinite()
    assert torch.equal(finite, found.isfinite()) and not torch.equal(each[0], each[1])
    torch.testing.assert_close(found[finite], each[finite])


ENCODERS: dict[str, tuple[PreTrainedConfig, str]] = {
    "relative positions that rows share": (
        DebertaV2Config(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            relative_attention=True,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            max_relative_positions=8,
        ),
        "query_proj",
    ),
    "tokens before rows": (XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16), "layer_1"),
}


@pytest.mark.parametrize("tokens", [6, 8])
@pytest.mark.parametrize("name", ENCODERS)
def test_layers_that_are_given_something_else_than_rows_run_one_after_another(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    config, target = ENCODERS[name]
    network = AutoModelForSequenceClassification.from_config(config)
    program = Program(get_peft_model(network, LoraConfig(r=2, target_modules=[target])).eval(), Classes(2))
    mask = torch.ones(3, tokens, dtype=torch.long)
    batch = {"input_ids": torch.randint(3, 20, mask.shape), "attention_mask": mask}
    draws = draws_of(program, 2)
    assert program.weights.joinable
    with torch.no_grad():
        found = program.joint_outputs(draws, batch)
        assert all(torch.equal(found[number], program.outputs(draw, batch)) for number, draw in enumerate(draws))
