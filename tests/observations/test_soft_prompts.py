"""Learned prompts of causal language models: what is read behind one, against plain passes with the prompt by hand."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_scenarios import POSITIONS, causal_base, tokenizer_of
from datasets import Dataset
from peft import CPTConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
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

import bayeslora as bl
from bayeslora.errors import AdapterError, DataError, SettingError
from bayeslora.harness.scoring import scored
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.models import Gaussian
from bayeslora.observations import Completions, Encoder, TextChoices
from bayeslora.observations.decoder import hidden_states, logits_at
from bayeslora.passes import Rows
from bayeslora.posterior import Record
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


def network_of(kind: str, config: Any) -> Any:
    torch.manual_seed(0)
    config.task_type = "CAUSAL_LM"
    return get_peft_model(AutoModelForCausalLM.from_config(OTHERS[kind]), config).eval()


def own_program(kind: str, config: Any) -> Program:
    """With a tokenizer that would pad on the left."""
    encoder = Encoder(tokenizer_of(side="left"), SAID, 64)
    return awake(Program(network_of(kind, config), Completions(), Gaussian(), encoder=encoder))


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


ASKED = ["Question: is this good?", "Answer", "What is the moon made of, and is it not a stone?"]


def chain(found: Program) -> EmpiricalPosterior:
    """Of two draws."""
    draws = {site.name: torch.stack([site.initial, -site.initial]) for site in found.sites}
    return EmpiricalPosterior(found, Record("sgld", {}, n_data=4), draws)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_texts_are_written_behind_the_prompt(method: str, network: str) -> None:
    posterior = chain(program(method, network=network))
    settings: dict[str, Any] = {"draws": 2, "max_new_tokens": 5, "seed": 1, "temperature": 0, "progress": False}
    for way in ("mixture", "draw"):
        made = posterior.generate(ASKED, 2, way, **settings)
        for each in made:
            asked = read(posterior.program, each.prompt)
            for text, scores in zip(each.tokens, each.log_probs, strict=True):
                whole = [*asked, *text]
                exact = [likelihood(posterior.program, whole, len(text), draw) for draw in posterior.draws(2)]
                same(scores, torch.stack(exact))
        alone = [posterior.generate(ASKED, 2, way, batch_size=1, **settings)]
        assert [each.tokens for each in alone[0]] == [each.tokens for each in made]
    for each in made:  # a draw a text
        greedy = set()
        for draw in posterior.draws(2):
            said = read(posterior.program, each.prompt)
            for _ in range(5):
                said = [*said, int(after(posterior.program, said, draw)[-1].argmax())]
            greedy.add(tuple(said[-5:]))
        assert set(each.tokens) == greedy


@pytest.mark.parametrize("kind", ["window", "window in some layers", "alibi", "positions from the mask"])
@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_padding_parts_no_text_that_is_written_from_the_prompt(config: Any, kind: str) -> None:
    posterior = chain(own_program(kind, config(num_virtual_tokens=COUNT)))
    for each in posterior.generate(ASKED, 1, "mixture", draws=2, max_new_tokens=3, progress=False):
        (text,), whole = each.tokens, [*read(posterior.program, each.prompt), *each.tokens[0]]
        exact = [likelihood(posterior.program, whole, len(text), draw) for draw in posterior.draws(2)]
        same(each.log_probs[0], torch.stack(exact))


@pytest.mark.parametrize("method", METHODS)
def test_the_harness_scores_behind_the_prompt(method: str) -> None:
    found = program(method)
    pairs = [([5, 9, 30], [40, 41, 42]), ([7], [8]), ([3, 4, 5, 6, 7, 8, 9], [10, 11])]
    log_probs, _ = scored(found.eval(), [own(found)], pairs, 3)
    same(log_probs[:, 0], torch.stack([likelihood(found, before + more, len(more)) for before, more in pairs]))


def loss(found: Program, task: str, weights: Mapping[str, Tensor]) -> float:
    """Negative log-likelihood of a row."""
    over = Rows.of(found, rows(task))
    assert over.labels is not None
    with torch.no_grad():
        return -float(over.observation.log_prob(over.outputs(found, weights), over.labels).mean())


@pytest.mark.parametrize("task", SPECS)
@pytest.mark.parametrize("method", METHODS)
def test_fit_save_and_load(method: str, task: str, tmp_path: Path) -> None:
    made = Program.from_pretrained(
        causal_base(), Task(SPECS[task], train=rows(task)), lora=LoraSettings(method=method, tokens=COUNT),
        model=Gaussian(), max_length=64,
    )  # fmt: skip
    settings = {"epochs": 20, "batch_size": 4, "learning_rate": 0.05, "progress": False}
    posterior = bl.fit(made, rows(task), "mle", **settings)
    assert loss(made, task, posterior.mean()) < 0.9 * loss(made, task, own(made))
    found = posterior.predict(rows(task), progress=False)
    posterior.save(tmp_path)
    assert torch.equal(bl.load(tmp_path).predict(rows(task), progress=False).outputs, found.outputs)
    with pytest.raises(AdapterError, match="is a learned prompt .* load the posterior of its run"):
        Program.from_pretrained(causal_base(), Task(SPECS[task], train=rows(task)), adapter=tmp_path, max_length=64)


def test_the_prompt_of_another_adapter_is_not_read_unawares() -> None:
    found = program("prompt-tuning")
    before = outputs(found, "films")
    found.network.add_adapter("other", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    found.network.set_adapter("other")
    with pytest.raises(AdapterError, match=r"the prompt of 'other': call network.set_adapter\('default'\)"):
        outputs(found, "films")
    found.network.set_adapter("default")
    assert torch.equal(outputs(found, "films"), before)


@pytest.mark.parametrize(("backend", "settings"), [("temperature", {"of": "mle"}), ("checkpoint-ensemble", {})])
def test_other_backends_run(backend: str, settings: dict[str, Any], tmp_path: Path) -> None:
    posterior = bl.fit(program("prompt-tuning"), rows("films"), backend, progress=False, **settings)
    found = posterior.predict(rows("films"), progress=False).outputs
    assert found.isfinite().all()
    posterior.save(tmp_path)
    assert torch.equal(bl.load(tmp_path).predict(rows("films"), progress=False).outputs, found)


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

    def test_of_texts_that_are_written(self) -> None:
        posterior = chain(program("prefix-tuning", network="gpt2"))
        left = POSITIONS - COUNT - len(read(posterior.program, "Answer"))
        (text,) = posterior.generate("Answer", 1, "draw", draws=1, max_new_tokens=left, progress=False)
        assert len(text.tokens) == 1
        with pytest.raises(SettingError, match=f"has positions for {POSITIONS - COUNT}"):
            posterior.generate("Answer", 1, max_new_tokens=left + 1, progress=False)

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
