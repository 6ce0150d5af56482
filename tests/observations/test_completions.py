"""Completions: the log-likelihood of every token of an answer, in the memory of a part of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_scenarios import CHAT, POSITIONS, causal_base, configuration, tokenizer_of
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import bayeslora as bl
from bayeslora.errors import DataError, PosteriorError
from bayeslora.inference.variational.elbo import ELBOS
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.models import Gaussian
from bayeslora.observations import completions
from bayeslora.observations.batches import Batch, Padding
from bayeslora.observations.completions import Completions
from bayeslora.observations.encoding import Encoder
from bayeslora.passes import Rows
from bayeslora.tasks import Split, TaskSpec

VOCABULARY = 40
ROWS = {
    "input_ids": [[5, 6, 7, 8, 2], [9, 10, 11, 12, 13, 14, 15, 2], [16, 17, 2], [18, 19, 20, 21, 22, 23]],
    "labels": [2, 3, 2, 5],
}


def network(name: str = "llama", targets: Sequence[str] = ("q_proj", "v_proj"), vocabulary: int = VOCABULARY) -> Any:
    targets = ["c_attn"] if name == "gpt2" else list(targets)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(configuration(name, vocabulary)).eval()
        return get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()


def program(name: str = "llama", targets: Sequence[str] = ("q_proj", "v_proj"), **settings: Any) -> bl.Program:
    model = Gaussian(sites="both", centre="zero", deviation=0.1)
    return bl.Program(network(name, targets, **settings), Completions(), model)


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict(ROWS | columns)


def batch_of(program: bl.Program, data: Dataset) -> Batch:
    batch = program.observation.collator(program.padding)([dict(row) for row in data])
    return {key: value for key, value in batch.items() if key != "index"}


def brute(net: Callable[..., Any], ids: list[int], count: int) -> Tensor:
    logs = net(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return torch.stack([logs[place - 1, ids[place]] for place in range(len(ids) - count, len(ids))]).sum()


@pytest.fixture
def one_position_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "LOGITS", 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_log_likelihood_is_that_of_every_token(name: str, side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(name)
    observation = Completions()
    padding = Padding(side=side, positions=side == "left")
    batch = observation.collator(padding)([dict(row) for row in rows()])
    with torch.no_grad():
        expected = torch.stack([brute(net, *row) for row in zip(ROWS["input_ids"], ROWS["labels"], strict=True)])
        whole = observation.run(net, batch)
        torch.testing.assert_close(whole[:, 0], expected.float(), rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(completions, "LOGITS", 3 * VOCABULARY)
        torch.testing.assert_close(observation.run(net, batch), whole, rtol=1e-6, atol=1e-6)


def spoken(*words: int, chat: bool = False) -> bl.Task:
    """A task of completions of so many words each, the last of its rows to test on."""
    spec = TaskSpec("own", "completion", ("prompt",), completion="completion")
    each = [
        Split(Dataset.from_list([{"prompt": "what is", "completion": " moon" * count}]), spec, "rows")
        for count in words
    ]
    return bl.Task(spec, each[0], test=each[-1])


@pytest.mark.parametrize(("words", "expected"), [((9, 9), 256), ((9, 300), 512), ((600, 9), 1024)])
def test_the_longest_row_has_room(words: tuple[int, int], expected: int) -> None:
    assert Completions().length(tokenizer_of(), spoken(*words)) == expected


def test_room_for_a_row_is_for_all_of_it() -> None:
    tokenizer = tokenizer_of()
    most = 256 - len(tokenizer("what is")["input_ids"]) - 1  # what ends a text
    assert [Completions().length(tokenizer, spoken(most + more)) for more in (0, 1)] == [256, 512]


def test_what_a_chat_puts_around_a_text_is_counted() -> None:
    task, tokenizer = spoken(250, 9), tokenizer_of(chat=CHAT)
    assert Completions().length(tokenizer, task) == 256 < Completions(chat=True).length(tokenizer, task)


@pytest.mark.parametrize(("given", "expected"), [(None, 512), (400, 400)])
def test_completions_choose_how_long_a_text_may_be(given: int | None, expected: int, tmp_path: Path) -> None:
    shutil.copytree(causal_base(), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1000}))
    lora, task = LoraConfig(r=2, target_modules=["q_proj"]), spoken(9, 300)
    program = bl.Program.from_pretrained(tmp_path / "base", task, lora=lora, max_length=given)
    assert program.encoder is not None and program.encoder.max_length == expected
    assert len(Rows.of(program, task.test).dataset["input_ids"][0]) > 300
    few = bl.Program.from_pretrained(causal_base(), task, lora=lora)
    assert few.encoder is not None and few.encoder.max_length == POSITIONS


def test_padding_is_where_it_moves_no_token() -> None:
    encoder = Encoder(tokenizer_of(side="left"), TaskSpec("own", "completion", ("prompt",), completion="completion"))
    sides = {}
    for name in ("llama", "bart"):
        made = bl.Program(network(name), Completions(), encoder=encoder)
        sides[name] = made.padding.side, made.padding.positions
        together = Rows.of(made, rows(), 4).outputs(made, {site.name: site.initial for site in made.sites})
        alone = Rows.of(made, rows(), 1).outputs(made, {site.name: site.initial for site in made.sites})
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert sides == {"llama": ("left", True), "bart": ("right", False)}


def test_batch_size_does_not_matter() -> None:
    over = program()
    weights = {site.name: site.initial for site in over.sites}
    with torch.no_grad():
        found = [Rows.of(over, rows(), size).outputs(over, weights) for size in (1, 2, 4)]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "lm_head")])
def test_gradients_are_the_same_in_parts(targets: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    over = program(targets=targets)
    weights = {site.name: site.initial.clone().requires_grad_() for site in over.sites}
    batch = batch_of(over, rows())
    whole = torch.autograd.grad(over.outputs(weights, batch).sum(), list(weights.values()))
    monkeypatch.setattr(completions, "LOGITS", 1)
    parts = torch.autograd.grad(over.outputs(weights, batch).sum(), list(weights.values()))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_several_draws_before_one_backward_pass(one_position_at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    over = program(targets=["lm_head"])
    sets = [{site.name: (scale * site.initial).requires_grad_() for site in over.sites} for scale in (1.0, 2.0)]
    batch = batch_of(over, rows())

    def gradients() -> tuple[Tensor, ...]:
        loss = torch.stack([over.outputs(weights, batch).sum() for weights in sets]).sum()
        return torch.autograd.grad(loss, [value for weights in sets for value in weights.values()])

    parts = gradients()
    now = over.network.get_base_model().lm_head.lora_A["default"].weight
    monkeypatch.undo()
    for one, other in zip(parts, gradients(), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(over.network.get_base_model().lm_head.lora_A["default"].weight, now)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(each.numel() for each in [found] if isinstance(each, Tensor))])
        return found


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, tokens = 5000, 60
    over = program(vocabulary=vocabulary)
    data = Dataset.from_dict({"input_ids": [list(range(3, 3 + tokens))] * 4, "labels": [tokens - 1] * 4})
    weights = {site.name: site.initial.clone().requires_grad_() for site in over.sites}
    batch = batch_of(over, data)
    monkeypatch.setattr(completions, "LOGITS", 8 * vocabulary)
    held: list[int] = []

    def pack(value: Tensor) -> Tensor:
        held.append(value.numel())
        return value

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = over.outputs(weights, batch).sum()
        assert 8 * vocabulary not in held  # no logits wait for the backward pass
        loss.backward()
    assert largest.size <= max(8 * vocabulary, vocabulary * 16)  # the latter are the head's weights


def test_the_site_of_the_labels_has_the_sum_of_each_row() -> None:
    import pyro

    over = program()
    batch = batch_of(over, rows())
    trace = pyro.poutine.trace(over).get_trace(batch, 400)
    trace.compute_log_prob()
    site = trace.nodes["y"]
    assert site["is_observed"] and site["log_prob"].shape == (4,)
    outputs = over.observation.run(over.network, batch)
    torch.testing.assert_close(site["log_prob"], 100 * outputs[:, 0])
    guide = over.model.guide(over.sites)
    loss = NegativeELBO(over, guide, ELBOS["mean-field"](), 400)
    loss.keep_parts = True
    assert loss(batch).isfinite() and "log_likelihood" in loss.parts()


def test_rows_without_completions_are_refused() -> None:
    over = program()
    collate = over.observation.collator(over.padding)
    with pytest.raises(DataError, match="have no completions"):
        collate([{"input_ids": [5, 6, 7]}])
    with pytest.raises(DataError, match="has 3 tokens, of which 3"):
        collate([{"input_ids": [5, 6, 7], "labels": 3}])
    for label in (0, 1.5, "two", [1, 2]):
        with pytest.raises(DataError, match="Row 1 has label"):
            over.observation.check([1, label])


@pytest.mark.parametrize("backend", ["map", "svi", "mle"])
def test_fit_predict_save_and_load(backend: str, tmp_path: Any) -> None:
    over = program()
    posterior = bl.fit(over, rows(), backend, epochs=2, batch_size=2, progress=False, cpu=True)
    found = posterior.predict(rows(), 3, progress=False)
    assert isinstance(found, bl.SequencePrediction) and isinstance(over.network, nn.Module)
    again = posterior.predict(rows(), 3, progress=False, batch_size=1)
    torch.testing.assert_close(found.outputs, again.outputs, rtol=1e-5, atol=1e-5)
    mixture = found.outputs[..., 0].double().logsumexp(0) - torch.tensor(found.draws).log()
    torch.testing.assert_close(found.log_predictive_density, mixture, rtol=1e-6, atol=1e-6)
    measured = found.metrics()
    perplexity = (-mixture.sum() / sum(ROWS["labels"])).exp()
    assert measured["perplexity"].value == pytest.approx(float(perplexity), rel=1e-6)
    assert measured["perplexity"].low <= measured["perplexity"].value <= measured["perplexity"].high
    with pytest.raises(PosteriorError, match="write"):
        found.sample()


def test_arviz_is_told_of_likelihoods_and_of_no_other_texts() -> None:
    posterior = bl.fit(program(), rows(), "svi", epochs=1, batch_size=2, progress=False, cpu=True)
    data = posterior.to_inference_data(rows(), draws=30, prior_draws=2, progress=False)
    assert data["log_likelihood"]["y"].shape == (1, 30, 4) and set(data["posterior_predictive"]) == {"mean"}
    assert data["observed_data"]["y"].values.tolist() == ROWS["labels"]
    found = bl.diagnostics.loo(data)
    assert len(found.pareto_k) == 4


def test_tokens_that_are_as_good_as_impossible_have_finite_scores() -> None:
    found = program()
    head: Any = found.network.get_base_model().lm_head
    with torch.no_grad():
        head.weight[30:].mul_(1e4)  # the data's tokens have no probability that single precision can hold
        drawn = found.observation.drawn(found.network, batch_of(found, rows()), sample=True)
    assert drawn.one.min() < -200 and drawn.offset.isfinite().all()
