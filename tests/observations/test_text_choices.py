"""Choices are scored by the likelihood of their texts, as if each alone came after its question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_scenarios import POSITIONS, causal_base
from choice_scenarios import ROWS, SPEC, program, rows, scores
from curvature_scenarios import dense_curvature, given, matrix_of, relative
from datasets import Dataset
from scenarios import dense_jacobian, tiny_batch
from torch import Tensor

import bayeslora as bl
from bayeslora.errors import AdapterError, PosteriorError
from bayeslora.inference.laplace.jacobians import jacobians
from bayeslora.models import Gaussian
from bayeslora.networks import NetworkSettings
from bayeslora.observations import TextChoices
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

PAIRS = [
    ("llama", "bytes"),
    ("llama", "unigram"),
    ("gpt2", "bytes-bos-eos"),
    ("qwen2", "bytes"),
    ("llama", "bytes-bos"),
]


def naive(found: Program, split: Split, likelihood: str = "sum") -> Tensor:
    """Scores by one pass for each choice, over the text as its tokenizer reads it."""
    scored = torch.full((len(split), 3), -torch.inf)
    tokenizer: Any = found.encoder.tokenizer
    found.weights.install({site.name: site.initial for site in found.sites})
    for number, row in enumerate(split.dataset):
        question = f"Question: {row['ask']}\nAnswer:"
        for place, choice in enumerate(row["choices"]):
            one, two = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
            if one[-1] == tokenizer.eos_token_id:
                one, two = one[:-1], two[:-1]
            assert two[: len(one)] == one
            with torch.no_grad():
                logits = found.network(input_ids=torch.tensor([two])).logits[0].log_softmax(-1)
            each = logits[torch.arange(len(one) - 1, len(two) - 1), torch.tensor(two[len(one) :])]
            size = {"sum": 1, "token": len(each), "byte": len(choice.encode())}[likelihood]
            scored[number, place] = each.sum() / size
    return scored


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("network", "tokenizer"), PAIRS)
def test_a_choice_has_the_likelihood_of_its_text_alone(network: str, tokenizer: str, side: str) -> None:
    found = program(network, tokenizer, side)
    assert isinstance(found.observation, TextChoices)
    torch.testing.assert_close(scores(found, rows()), naive(found, rows()), rtol=1e-4, atol=1e-4)
    for batch_size in (1, 3):
        torch.testing.assert_close(scores(found, rows(), batch_size), scores(found, rows()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_counts_for_nothing(side: str) -> None:
    found = program("gpt2", side=side)
    long = {"ask": "moon " * 20, "choices": ["yes", "no"], "label": 0}
    more = rows(**{name: [*values, long[name]] for name, values in ROWS.items()})
    lengths = [Rows.of(found, each).dataset["length"][:] for each in (rows(), more)]
    assert max(lengths[0]) < max(lengths[1])
    torch.testing.assert_close(scores(found, more, 5)[:4], scores(found, rows()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_choices_may_be_more_tokens_together_than_there_are_positions(side: str) -> None:
    found = program("gpt2", side=side)
    long = rows(choices=[["stone " * 45, "moon " * 45, "sun " * (45 - row)] for row in range(4)])
    lengths = Rows.of(found, long).dataset["length"][:]
    assert POSITIONS < min(lengths) < max(lengths)  # so that there is padding
    torch.testing.assert_close(scores(found, long), scores(found, long, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", ["llama", "qwen2"])
def test_with_lora_on_the_head(network: str) -> None:
    found = program(network, targets=["lm_head", "v_proj"])
    torch.testing.assert_close(scores(found, rows()), naive(found, rows()), rtol=1e-4, atol=1e-4)


def test_logits_are_held_of_some_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = program()
    weights = {site.name: site.initial.clone().requires_grad_() for site in found.sites}
    batch, size = tiny_batch(found, rows()), found.network.config.vocab_size
    held: list[int] = []
    head = found.network.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: held.append(output.numel()))

    def gradients() -> list[Tensor]:
        scored = found.outputs(weights, batch)
        return [scored, *torch.autograd.grad(scored[scored.isfinite()].square().sum(), list(weights.values()))]

    expected = gradients()
    monkeypatch.setattr("bayeslora.observations.completions.LOGITS", 5 * size)
    held.clear()
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    parts = -(-int((batch["segments"] > 0).sum()) // 5)
    assert max(held) == 5 * size and len(held) == 2 * parts  # all are computed again in the backward pass


@pytest.mark.parametrize("likelihood", ["token", "byte"])
def test_likelihoods_by_length(likelihood: str) -> None:
    found = program(observation_settings={"likelihood": likelihood})
    torch.testing.assert_close(scores(found, rows()), naive(found, rows(), likelihood), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", ["llama", "gpt2"])
def test_a_choice_depends_on_no_other(network: str) -> None:
    found, swapped = program(network), rows(choices=[list(reversed(each)) for each in ROWS["choices"]])
    forth, back = scores(found, rows()), scores(found, swapped)
    for one, other, choices in zip(forth, back, ROWS["choices"], strict=True):
        torch.testing.assert_close(one[: len(choices)], other[: len(choices)].flip(0), rtol=1e-5, atol=1e-5)
    fewer = rows(choices=[each[:2] for each in ROWS["choices"]], label=[0, 1, 1, 1])
    torch.testing.assert_close(scores(found, fewer)[:, :2], forth[:, :2], rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_one_pass_for_each_choice() -> None:
    found = program()
    weights = {site.name: site.initial.clone().requires_grad_() for site in found.sites}
    batch = tiny_batch(found, rows())
    at = torch.stack(
        [scored[label] for scored, label in zip(found.outputs(weights, batch), batch["labels"], strict=True)]
    )
    mine = torch.autograd.grad(at.sum(), list(weights.values()))
    tokenizer: Any = found.encoder.tokenizer
    total = torch.zeros(())
    for ask, choices, label in zip(ROWS["ask"], ROWS["choices"], ROWS["label"], strict=True):
        one, two = (tokenizer(f"Question: {ask}\nAnswer:{more}")["input_ids"] for more in ("", f" {choices[label]}"))
        logits = found.network(input_ids=torch.tensor([two])).logits[0].log_softmax(-1)
        total = total + logits[torch.arange(len(one) - 1, len(two) - 1), torch.tensor(two[len(one) :])].sum()
    for one, other in zip(mine, torch.autograd.grad(total, list(weights.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("network", "targets"),
    [
        ("llama", ["embed_tokens", "q_proj"]),
        ("llama", ["lm_head", "q_proj"]),
        ("qwen2", ["lm_head"]),
        ("gpt2", ["c_attn", "c_fc"]),
    ],
)
def test_products_of_packed_rows_are_the_jacobian(network: str, targets: list[str], side: str) -> None:
    found = program(network, side=side, targets=targets)
    over = Rows.of(found, rows(), 4)
    weights = {site.name: site.initial for site in found.sites}
    [(index, _, gradients)] = jacobians(found, found.sites, weights, over)
    expected = dense_jacobian(found, tiny_batch(found, rows()))  # one batch of the rows in the same order
    assert index.tolist() == tiny_batch(found, rows())["index"].tolist()
    for (name, place), gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name][:, :, place], rtol=1e-3, atol=1e-3)


APART = {"packed": False}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("network", "targets", "likelihood"),
    [
        ("llama", ["q_proj", "down_proj"], "sum"),
        ("qwen2", ["v_proj", "lm_head"], "token"),
        ("gpt2", ["c_attn", "c_fc"], "byte"),
    ],
)
def test_curvature_is_the_dense_one(network: str, targets: list[str], likelihood: str, apart: bool) -> None:
    settings = {"likelihood": likelihood} | (APART if apart else {})
    model = Gaussian(sites="both", centre="zero")
    found = program(network, side="left", targets=targets, model=model, observation_settings=settings)
    exact = dense_curvature(found, rows())
    assert relative(matrix_of(given(found, rows(), curvature="full", batch_size=3)), exact) < 1e-4
    diagonal = matrix_of(given(found, rows(), curvature="diag", batch_size=3)).diagonal()
    torch.testing.assert_close(diagonal, exact.diagonal(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("network", "side"), [("llama", "left"), ("gpt2", "right")])
@pytest.mark.parametrize("targets", [(), ("lm_head",)])
def test_choices_that_are_read_one_by_one_have_the_same_scores(network: str, side: str, targets: tuple[str]) -> None:
    targets = targets and (*targets, "c_attn" if network == "gpt2" else "q_proj")
    found = program(network, side=side, targets=targets)
    apart = program(network, side=side, targets=targets, observation_settings=APART)
    assert apart.observation == TextChoices(3, packed=False)
    expected = scores(found, rows())
    torch.testing.assert_close(scores(apart, rows()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(apart, rows(), 1), expected, rtol=1e-5, atol=1e-5)
    assert Rows.of(apart, rows()).dataset[:] == Rows.of(found, rows()).dataset[:]
    # What a row of three choices has entered is of its own choices and of no padding.
    over = [Rows.of(each, rows(), 4) for each in (found, apart)]
    weights = {site.name: site.initial for site in found.sites}
    (one,), (other,) = (
        list(jacobians(each, each.sites, weights, some)) for each, some in zip((found, apart), over, strict=True)
    )
    for key, gradient in one[2].items():
        torch.testing.assert_close(other[2][key], gradient, rtol=1e-4, atol=1e-4)


def test_draws_are_run_at_once_when_choices_are_read_one_by_one() -> None:
    apart = program(observation_settings=APART)
    batch = tiny_batch(apart, rows())
    draws = [{site.name: (1 + number) * site.initial for site in apart.sites} for number in range(2)]
    with torch.no_grad():
        expected = torch.stack([apart.outputs(each, batch) for each in draws])
        torch.testing.assert_close(apart.joint_outputs(draws, batch), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_another_task_have_choices_and_templates_of_their_own() -> None:
    other = TaskSpec(
        "other", "multiple-choice", ("ask",), "label", ("A", "B", "C", "D"), choices=("choices",), question="{ask}:"
    )
    columns = {"ask": ["Is it", "Which"], "choices": [["yes", "no", "A", "B"], ["1", "2"]], "label": [3, 0]}
    found, split = program(), Split(Dataset.from_dict(columns), other)
    over = Rows.of(found, split, 2)
    assert scores(found, split).isfinite().sum(-1).tolist() == [4, 2]
    tokenizer: Any = found.encoder.tokenizer
    assert tokenizer.decode(over.dataset[0]["input_ids"]) == "Is it: yes no A B"


@pytest.mark.parametrize("backend", ["svi", "laplace"])
def test_a_posterior_predicts_the_same_once_it_is_loaded(tmp_path: Path, backend: str) -> None:
    settings = {"epochs": 1, "warmup": 0.0, "batch_size": 2, "cpu": True, "progress": False}
    posterior = bl.fit(program(), rows(), backend, **settings)
    found = posterior.predict(rows(), 3, progress=False)
    assert found.outputs.isinf().sum(-1).unique().tolist() == [0, 1]  # rows of two choices and of three
    posterior.save(tmp_path / "saved")
    again = bl.load(tmp_path / "saved")
    assert again.program.observation == posterior.program.observation == TextChoices(3)
    assert torch.equal(again.predict(rows(), 3, progress=False).outputs, found.outputs)


def test_a_posterior_that_is_older_than_a_setting_has_its_default(tmp_path: Path) -> None:
    posterior = bl.fit(program(), rows(), "mle", epochs=1, cpu=True, progress=False)
    posterior.save(tmp_path)
    described = json.loads((tmp_path / "posterior.json").read_text("utf-8"))
    del described["program"]["observation"]["chat"], described["program"]["observation"]["packed"]
    (tmp_path / "posterior.json").write_text(json.dumps(described), "utf-8")
    assert bl.load(tmp_path).program.observation == TextChoices(3)
    described["program"]["observation"]["chat"] = True
    (tmp_path / "posterior.json").write_text(json.dumps(described), "utf-8")
    with pytest.raises(PosteriorError, match="observation.chat: True and False"):
        bl.load(tmp_path, program=posterior.program)


def test_a_window_has_to_reach_over_all_choices() -> None:
    found = program()
    found.network.config.sliding_window = 20
    with pytest.raises(AdapterError, match=r"\d\d tokens, and the attention of this llama .* of 20.*packed=false"):
        scores(found, rows())
    apart = program(observation_settings=APART)
    apart.network.config.sliding_window = 20
    assert scores(apart, rows()).isfinite().any()  # a network's own mask knows the window


def test_kernels_agree() -> None:
    base = str(causal_base())
    eager, sdpa = (
        Program.from_pretrained(NetworkSettings(base, attention=kernel), Task(SPEC, train=rows())).eval()
        for kernel in ("eager", "sdpa")
    )
    torch.testing.assert_close(scores(eager, rows()), scores(sdpa, rows()), rtol=1e-5, atol=1e-5)
