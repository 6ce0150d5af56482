"""Learned prompts of causal language models: what is read behind one, against plain passes with the prompt by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from causal_scenarios import POSITIONS, causal_base
from datasets import Dataset
from peft import CPTConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from soft_prompt_scenarios import (
    COUNT,
    FILMS,
    METHODS,
    NETWORKS,
    OTHERS,
    PROMPT,
    ROWS,
    after,
    likelihood,
    network_of,
    outputs,
    own,
    own_program,
    program,
    read,
    rows,
    same,
)
from transformers import AutoModelForCausalLM, DynamicCache

from bayeslora.errors import AdapterError, DataError
from bayeslora.models import Gaussian
from bayeslora.observations import Completions, TextChoices
from bayeslora.observations.decoder import hidden_states, logits_at
from bayeslora.passes import Rows
from bayeslora.program import Program


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
class TestOfEachRowAlone:
    def test_labels(self, method: str, network: str, side: str) -> None:
        found = program(method, "films", network, side)
        expected = []
        for row in ROWS["films"]:
            text = PROMPT.replace("{text}", row["text"])
            labels = [read(found, f"{text} {word}")[-1] for word in FILMS.labels]
            expected.append(after(found, read(found, text))[-1, labels].log_softmax(-1))
        same(outputs(found, "films").log_softmax(-1), torch.stack(expected))
        same(outputs(found, "films", 1), outputs(found, "films"))

    @pytest.mark.parametrize("packed", [True, False])
    def test_choices(self, method: str, network: str, side: str, packed: bool) -> None:
        settings = {"packed": packed}
        found = program(method, "quiz", network, side, observation_settings=settings, observation="text-choices")
        assert found.observation == TextChoices(3, packed=packed)
        scores = outputs(found, "quiz")
        for number, row in enumerate(ROWS["quiz"]):
            question = f"Question: {row['ask']}\nAnswer:"
            for place, choice in enumerate(row["choices"]):
                whole = read(found, f"{question} {choice}")
                same(scores[number, place], likelihood(found, whole, len(whole) - len(read(found, question))))
        same(outputs(found, "quiz", 1), scores)

    def test_completions(self, method: str, network: str, side: str) -> None:
        found = program(method, "said", network, side)
        over = Rows.of(found, rows("said")).dataset
        expected = [likelihood(found, row["input_ids"], row["labels"]) for row in over]
        same(outputs(found, "said")[:, 0], torch.stack(expected))
        same(outputs(found, "said", 1), outputs(found, "said"))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_text_alone_is_read_as_peft_reads_it(method: str, network: str) -> None:
    found, ids = program(method, network=network), torch.tensor([[5, 6, 7, 8]])
    found.weights.install(own(found))
    with torch.no_grad():
        expected = found.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -4:]
        same(logits_at(found.network, hidden_states(found.network, {"input_ids": ids})), expected)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_ones_own_may_be_padded_on_the_left(method: str) -> None:
    found = program(method, side="left", observation="prompted")
    plain = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10, 11, 12]], "labels": [0, 1]})
    ids, mask = [[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]], [[0, 0, 1, 1, 1], [1] * 5]
    padded = Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "labels": [0, 1]})
    one, two = (Rows.of(found, each, 2) for each in (plain, padded))
    with torch.no_grad():
        same(two.outputs(found, own(found)), one.outputs(found, own(found)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [*NETWORKS, "bart"])
def test_tokens_may_be_read_some_at_a_time(method: str, network: str) -> None:
    if (method, network) == ("prefix-tuning", "bart"):
        lora = PrefixTuningConfig(num_virtual_tokens=COUNT, num_layers=2, num_attention_heads=2)
        found = program(method, network=network, lora=lora)
    else:
        found = program(method, network=network)
    ids, cache, states = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), DynamicCache(), []
    found.weights.install(own(found))
    with torch.no_grad():
        for start, end in ((0, 2), (2, 3), (3, 4)):
            mask = torch.ones_like(ids[:, :end])
            given = {"input_ids": ids[:, start:end], "attention_mask": mask}
            states.append(hidden_states(found.network, given, cache))
        whole = hidden_states(found.network, {"input_ids": ids})
    assert whole.shape == (2, 4, 16)
    torch.testing.assert_close(torch.cat(states, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(PromptTuningConfig, kind) for kind in OTHERS]
    + [(PrefixTuningConfig, kind) for kind in OTHERS if kind not in ("convolution", "state")],
)
def test_networks_of_other_sorts_pad_nothing_into_a_text(config: Any, kind: str) -> None:
    heads = {"num_attention_heads": 2} if kind == "state" else {}  # which a network without attention does not say
    found = own_program(kind, config(num_virtual_tokens=3, **heads))
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 2], [9, 10, 11, 12, 13, 14, 15, 2]], "labels": [2, 3]})
    with torch.no_grad():
        together, alone = (Rows.of(found, data, size).outputs(found, own(found)) for size in (2, 1))
    same(together, alone)
    expected = [likelihood(found, row["input_ids"], row["labels"]) for row in data]
    same(together[:, 0], torch.stack(expected))


@pytest.mark.parametrize("prompt", [PromptTuningConfig, PrefixTuningConfig])
def test_a_network_may_be_of_less_precision_than_its_prompt(prompt: Any) -> None:
    given = prompt(num_virtual_tokens=3, task_type="CAUSAL_LM")
    config = deepcopy(OTHERS["window"])  # which takes the precision over
    network = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), given)
    found = Program(network, Completions(), Gaussian())
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 2]], "labels": [2]})
    assert {site.initial.dtype for site in found.sites} == {torch.float32}
    assert Rows.of(found, data).outputs(found, own(found)).isfinite().all()


def test_a_network_is_asked_for_its_prompt_without_chance() -> None:
    network = network_of("positions from the mask", PromptTuningConfig(num_virtual_tokens=3)).train()
    before = torch.get_rng_state()
    Program(network, Completions())
    assert torch.equal(torch.get_rng_state(), before) and network.training


class TestRoom:
    def test_a_text_is_cut_to_what_the_prompt_leaves(self) -> None:
        for method in METHODS:
            found = program(method, max_length=1000)
            assert found.encoder is not None and found.encoder.max_length == POSITIONS - COUNT

    @pytest.mark.parametrize("count", [POSITIONS - COUNT, POSITIONS - COUNT + 1])
    def test_of_rows_of_ones_own(self, count: int) -> None:
        found = program("prompt-tuning", network="gpt2", observation="prompted")
        data = Dataset.from_dict({"input_ids": [[5] * count], "labels": [0]})
        if count + COUNT <= POSITIONS:
            assert Rows.of(found, data).outputs(found, own(found)).isfinite().all()
        else:
            with pytest.raises(DataError, match=f"has {count} tokens, and the network has positions for {count - 1}"):
                Rows.of(found, data)

    @pytest.mark.parametrize("count", [POSITIONS - 2, POSITIONS - 1, POSITIONS + 1])
    def test_of_a_prompt_of_ones_own(self, count: int) -> None:
        base = AutoModelForCausalLM.from_pretrained(causal_base("gpt2"))
        network = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count))
        if count + 2 <= POSITIONS:
            Program(network, Completions())
        else:
            why = f"prompt of {count} tokens leaves texts no room in a gpt2 network, .* for {POSITIONS}: learn fewer"
            with pytest.raises(AdapterError, match=why):
                Program(network, Completions())

    def test_of_a_window(self) -> None:
        for method in ("prompt-tuning", "prefix-tuning"):
            found = program(method, "quiz", observation="text-choices")
            longest = max(Rows.of(found, rows("quiz")).dataset["length"][:])
            found.network.config.sliding_window = longest + COUNT
            assert outputs(found, "quiz").isfinite().any()
            found.network.config.sliding_window -= 1
            with pytest.raises(AdapterError, match=f"before it. has {longest + COUNT} tokens"):
                outputs(found, "quiz")


class TestRefusals:
    def test_of_other_learned_prompts(self) -> None:
        base = AutoModelForCausalLM.from_pretrained(causal_base())
        network = get_peft_model(base, CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4]))
        with pytest.raises(AdapterError, match="CPT puts a learned prompt before .* PROMPT_TUNING, P_TUNING"):
            Program(network, Completions())

    @pytest.mark.parametrize(
        ("kind", "config", "why"),
        [
            ("state", PrefixTuningConfig(num_virtual_tokens=3, num_attention_heads=2), "same of a text without"),
            ("convolution", PrefixTuningConfig(num_virtual_tokens=3), "conv"),
            ("alibi", PrefixTuningConfig(num_virtual_tokens=3, num_attention_heads=8), "Sizes of tensors"),
        ],
    )
    def test_of_networks_that_do_not_read_the_prompt(self, kind: str, config: Any, why: str) -> None:
        network = network_of(kind, config).train()
        network.get_base_model().eval()
        with pytest.raises(AdapterError, match=f"does not read the prompt that PEFT makes .* PREFIX_TUNING .*{why}"):
            Program(network, Completions())
        assert network.training and not network.get_base_model().training

    def test_of_a_prefix_with_gradient_checkpointing(self) -> None:
        found = program("prefix-tuning").train()
        found.weights.base.gradient_checkpointing_enable()
        with pytest.raises(AdapterError, match="gradient checkpointing: switch it off"):
            Rows.of(found, rows("films")).outputs(found, own(found))
        assert outputs(found.eval(), "films").isfinite().all()
