"""Jacobians from one backward pass an output against autograd, example by example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import VOCABULARY, awake, dense_jacobian, tiny_batch, tiny_bert, tiny_choices, tiny_program, tiny_rows
from transformers import GPT2Config, GPT2ForSequenceClassification

from bayeslora.errors import AdapterError
from bayeslora.inference.laplace.jacobians import Tape, as_matrices, as_value, jacobians
from bayeslora.models import Gaussian
from bayeslora.observations import Classes
from bayeslora.passes import Rows
from bayeslora.program import Program


def embedded() -> Program:
    """LoRA on an embedding and the linear layers behind it."""
    lora = LoraConfig(r=2, target_modules=["word_embeddings", "query", "dense"], task_type="SEQ_CLS")
    return awake(Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian()))


def convolved() -> Program:
    """LoRA on GPT-2's transposed layers."""
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
    network = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3, pad_token_id=0, initializer_range=0.3))
    lora = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="SEQ_CLS", fan_in_fan_out=True)
    return awake(Program(get_peft_model(network, lora), Classes(3), Gaussian()))


def scaled() -> Program:
    """The same where the network multiplies what it looks up, as Gemma's does."""
    program = embedded()
    program.weights.base.bert.embeddings.word_embeddings.base_layer.embed_scale = torch.tensor(3.0)
    return program


PROGRAMS = {"linear": lambda: tiny_program().eval(), "embedding": embedded, "scaled": scaled, "conv1d": convolved}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_products_are_the_jacobian(kind: str) -> None:
    program = PROGRAMS[kind]()
    batch = tiny_batch(program, tiny_rows(5))
    expected = dense_jacobian(program, batch)
    weights = {site.name: site.initial for site in program.sites}
    with Tape(program, program.sites) as tape:
        logits = program.outputs(weights, batch)
        directions = torch.eye(3).unsqueeze(1).expand(3, 5, 3)
        for output, products in enumerate(tape.products(logits, directions, batch)):
            for (name, place), product in products.items():
                torch.testing.assert_close(product.matrices(), expected[name][:, output, place], rtol=1e-4, atol=1e-5)
                assert not product.narrow[~product.counted].any()
    assert all(not module._forward_hooks for module in program.network.modules())
    assert all("_embed" not in module.__dict__ for module in program.network.modules())


def test_choices_of_a_row_are_its_tokens() -> None:
    program = tiny_choices(Gaussian())
    batch = {
        "input_ids": torch.randint(1, VOCABULARY, (4, 3, 6)),
        "attention_mask": (torch.arange(6) < torch.tensor([[6, 4, 3]]).mT).long().expand(4, 3, 6).clone(),
        "choice_mask": torch.tensor([[True, True, True], [True, True, False]] * 2),
    }
    expected = dense_jacobian(program, batch)
    weights = {site.name: site.initial for site in program.sites}
    with Tape(program, program.sites) as tape:
        logits = program.outputs(weights, batch)
        for output, products in enumerate(tape.products(logits, torch.eye(3).unsqueeze(1).expand(3, 4, 3), batch)):
            for (name, place), product in products.items():
                torch.testing.assert_close(product.matrices(), expected[name][:, output, place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_adds_nothing_and_does_not_count(side: str) -> None:
    program = tiny_program().eval()
    rows = tiny_rows(4)
    batch = tiny_batch(program, rows)
    if side == "left":
        batch |= {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    weights = {site.name: site.initial for site in program.sites}
    with Tape(program, program.sites) as tape:
        logits = program.outputs(weights, batch)
        (products,) = tape.products(logits, torch.ones(1, 4, 3), batch)
        for product in products.values():
            tokens = product.counted.sum()
            assert tokens in (int(batch["attention_mask"].sum()), 4)  # the pooler and the head see one a row
            assert not product.narrow[~product.counted].any()
            assert not product.projected(torch.eye(product.columns))[~product.counted].any()
            # Attention without a key may leave what is not finite where a sequence begins with padding.
            entered = product.wide if product.wide_is_input else product.narrow
            assert side == "right" or not entered[~product.counted].any()


def test_matrices_of_a_site_and_back() -> None:
    for site in tiny_program().sites:
        matrices = as_matrices(site, site.initial)
        assert matrices.dim() == 3
        assert torch.equal(as_value(site, matrices), site.initial)


def test_a_layer_that_mixes_examples_is_named() -> None:
    lora = LoraConfig(r=2, target_modules=["position_embeddings"], task_type="SEQ_CLS")
    program = awake(Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian()))
    batch = tiny_batch(program, tiny_rows(4))
    with Tape(program, program.sites) as tape:
        logits = program.outputs({site.name: site.initial for site in program.sites}, batch)
        with pytest.raises(AdapterError, match="1 layers see .*position_embeddings'. No layer is left"):
            list(tape.products(logits, torch.ones(1, 4, 3), batch))


@pytest.mark.parametrize("make", [lambda: (awake(tiny_program()), tiny_rows(7)), lambda: (tiny_choices(), None)])
def test_a_batch_of_many_tokens_is_split(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows = make()
    if rows is None:
        rows = Dataset.from_dict({"input_ids": [[[1, 2, 3], [4, 5]], [[6], [7, 8], [9, 10]]], "labels": [0, 1]})
    weights = {site.name: site.initial for site in program.sites}
    over = Rows.of(program, rows, 7)
    [(index, logits, gradients)] = jacobians(program, program.sites, weights, over)
    monkeypatch.setattr("bayeslora.inference.laplace.jacobians.BYTES", 1)
    pieces = list(jacobians(program, program.sites, weights, over))
    assert len(pieces) == len(rows)
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), index)
    torch.testing.assert_close(torch.cat([piece[1] for piece in pieces]), logits)
    for key, value in gradients.items():
        torch.testing.assert_close(torch.cat([piece[2][key] for piece in pieces]), value, rtol=1e-4, atol=1e-6)


def test_a_larger_network_passes_fewer_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows = awake(tiny_program()), tiny_rows(7)
    weights = {site.name: site.initial for site in program.sites}
    over = Rows.of(program, rows, 7)
    tokens = next(iter(over.batches(program.device)))[0]["input_ids"].shape[1]
    widths = sum(sum(value.shape) for value in program.network.parameters() if value.dim() == 2)
    # Numbers of four bytes that three rows keep, and hardly those of three rows of a network with one matrix more.
    monkeypatch.setattr("bayeslora.inference.laplace.jacobians.BYTES", 4 * widths * 3 * tokens)
    assert [len(index) for index, *_ in jacobians(program, program.sites, weights, over)] == [3, 3, 1]
    program.weights.install(weights)
    assert [len(index) for index, *_ in jacobians(program, program.sites, weights, over)] == [3, 3, 1]
    program.weights.restore()
    program.network.register_parameter("more", torch.nn.Parameter(torch.zeros(4, 4)))
    assert [len(index) for index, *_ in jacobians(program, program.sites, weights, over)] == [2, 2, 2, 1]
