"""The Fisher information of texts by tokens that are drawn, against the dense one of a tiny vocabulary."""

from __future__ import annotations

import math
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from causal_scenarios import configuration
from curvature_scenarios import given, matrix_of
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import bayeslora as bl
from bayeslora.errors import PosteriorError, SettingError, TrainingError
from bayeslora.inference.laplace import heldout
from bayeslora.inference.laplace.fisher import fisher_of
from bayeslora.models import Gaussian
from bayeslora.observations import Classes, Completions, Drawn, Sampled, completions
from bayeslora.passes import Rows
from bayeslora.program import Program

VOCABULARY, COPIES = 12, 600
ROWS = {"input_ids": [[5, 6, 7, 8, 2], [9, 10, 11, 3, 4, 2], [6, 7, 2]], "labels": [2, 4, 2]}


def program(targets: tuple[str, ...] = ("q_proj",)) -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(configuration("llama", VOCABULARY)).eval()
        network = get_peft_model(base, LoraConfig(r=1, target_modules=list(targets), init_lora_weights=False)).eval()
    return Program(network, Completions(), Gaussian(sites="both", centre="zero"))


def rows(copies: int = 1) -> Dataset:
    return Dataset.from_dict({name: values * copies for name, values in ROWS.items()})


def flat(gradients: Any) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def of_row(over: Program, number: int) -> tuple[Tensor, Tensor]:
    """The Fisher information of a row's tokens, summed, and the gradient of its log-likelihood: one row, no padding."""
    ids, count = ROWS["input_ids"][number], ROWS["labels"][number]
    weights = {site.name: site.initial.clone().requires_grad_() for site in over.sites}
    over.weights.install(weights)
    logits = over.network(input_ids=torch.tensor([ids])).logits[0]
    values = list(weights.values())
    fisher, score = torch.zeros(()), torch.zeros(())
    for place in range(len(ids) - count, len(ids)):
        before = logits[place - 1]
        jacobian = torch.stack([flat(torch.autograd.grad(each, values, retain_graph=True)) for each in before])
        p = before.detach().double().softmax(-1)
        fisher = fisher + jacobian.mT @ (p.diag() - torch.outer(p, p)) @ jacobian
        score = score + jacobian.mT @ (torch.eye(VOCABULARY)[ids[place]].double() - p)
    return fisher, score


def deviations(found: Tensor, expected: Tensor) -> Tensor:
    """By how many standard errors the mean over samples (samples, ...) is off."""
    return (found.mean(0) - expected) / (found.std(0) / len(found) ** 0.5).clamp(min=1e-12)


def test_drawn_tokens_have_the_fisher_information_of_all_tokens_on_average() -> None:
    over = program()
    posterior = given(over, rows(COPIES), curvature="exact", batch_size=300)
    vectors = posterior.curvature.tensors()["jacobian"].double().unflatten(0, (COPIES, 3))
    squares = torch.einsum("nra,nrb->nab", vectors, vectors)
    expected = torch.stack([of_row(over, number)[0] for number in range(3)]).sum(0)
    # What is left is Monte Carlo's error: its size is known from the samples themselves.
    off = deviations(squares, expected)[expected.diagonal().sqrt().outer(expected.diagonal().sqrt()) > 1e-6]
    assert off.square().mean() < 2 and off.abs().max() < 6
    assert len(off) > 100
    full = matrix_of(given(over, rows(COPIES), curvature="full", batch_size=300))
    torch.testing.assert_close(full, squares.sum(0), rtol=1e-3, atol=1e-3)


def test_the_score_of_one_token_comes_back_on_average() -> None:
    over, number, many = program(), 1, 60
    copies = Dataset.from_dict({name: [values[number]] * many for name, values in ROWS.items()})
    batch, _ = next(Rows.of(over, copies, many).batches(over.device))
    weights = {site.name: site.initial.clone().requires_grad_() for site in over.sites}
    over.weights.install(weights)
    observation = over.observation
    assert isinstance(observation, Sampled)
    torch.manual_seed(0)
    means, offsets = [], []
    for _ in range(30):
        found = observation.drawn(over.network, batch, True)
        assert (found.one <= 0).all() and (found.offset >= -1).all()
        offsets.append(found.offset)
        means.append(flat(torch.autograd.grad((found.offset * found.drawn[:, 1]).mean(), list(weights.values()))))
    _, score = of_row(over, number)
    assert deviations(torch.cat(offsets), torch.zeros(())).abs() < 5
    off = deviations(torch.stack(means), score / ROWS["labels"][number])
    assert off.square().mean() < 3 and off.abs().max() < 6


@pytest.mark.parametrize(
    ("temperature", "targets", "at_once"),
    [(1.0, ("q_proj",), 2**24), (3.0, ("q_proj",), 1), (1.0, ("q_proj", "lm_head"), 2**24), (1.0, ("lm_head",), 24)],
)
def test_empirical_curvature_is_of_the_tokens_that_are_given(
    temperature: float, targets: tuple[str, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "LOGITS", at_once)  # 24 logits: two tokens
    over = program(targets)
    posterior = given(over, rows(), curvature="full", fisher="empirical", temperature=temperature)
    scores = torch.stack([of_row(over, number)[1] for number in range(3)])
    torch.testing.assert_close(matrix_of(posterior), scores.mT @ scores / temperature, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("curvature", "tune"),
    [("kron", "evidence"), ("kron", "mode-evidence"), ("diag", "none"), ("full", "none"), ("exact", "evidence")],
)
@pytest.mark.parametrize("targets", [("q_proj",), ("lm_head",)])
@pytest.mark.filterwarnings("ignore:By the evidence")
def test_a_posterior_of_completions(curvature: str, tune: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    over = program(targets)
    posterior = bl.fit(over, rows(3), "laplace", mode="given", curvature=curvature, tune=tune, progress=False)
    assert posterior.record.settings["fisher"] == "auto" and list(posterior.predictors) == ["sample", "mean"]
    found = posterior.predict(rows(), 4, progress=False)
    assert found.outputs.shape == (4, 3, 1) and found.metrics()["perplexity"].value > 1
    posterior.save(tmp_path / "saved")
    loaded = bl.load(tmp_path / "saved", program=program(targets))
    assert torch.equal(loaded.predict(rows(), 4, progress=False).outputs, found.outputs)
    mean = loaded.predict(rows(), method="mean", progress=False)
    torch.testing.assert_close(mean.outputs[0], Rows.of(over, rows()).outputs(over, posterior.mean()))


def under(deviation: float) -> Program:
    """The prior of all matrices."""
    over = program(("down_proj", "q_proj")).network
    return bl.Program(over, Completions(), Gaussian(deviation=deviation, sites="both", centre="zero"))


@cache
def fine_tuned() -> bl.Posterior:
    """Plain LoRA on four copies of the rows."""
    settings = {"epochs": 30, "learning_rate": 0.05, "batch_size": 12, "progress": False, "cpu": True}
    return bl.fit(under(1.0), rows(4), "mle", **settings)


def loss(posterior: bl.Posterior, **settings: Any) -> float:
    """Nats a row, on average over the rows and draws, each by itself."""
    return -float(posterior.predict(rows(), progress=False, **settings).outputs.mean())


def test_a_width_that_breaks_the_network_is_said_and_held_out_rows_find_a_better_one() -> None:
    over = under(30.0)
    settings = {"start": fine_tuned(), "curvature": "diag", "progress": False, "cpu": True}
    with pytest.warns(UserWarning, match="Draws of the weights break the network: .* by draws, and .* at the mode"):
        wide = bl.fit(over, rows(), "laplace", tune="none", **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Draws of the weights break")
        tuned = bl.fit(over, rows(), "laplace", tune="heldout", heldout=rows(2), **settings)
    tried = {row["multiple"]: row["heldout_nll"] for row in tuned.record.history}
    best = min(tried, key=lambda multiple: tried[multiple])
    assert len(tried) == 9 and best < 0.1 and tried[best] < tried[1.0] / 2
    for site, root in tuned.prior.roots.items():
        torch.testing.assert_close(root, wide.prior.roots[site] * best)
    again = tuned.predict(rows(2), 3, progress=False)
    assert -float(again.log_predictive_density.mean()) == pytest.approx(tried[best])


def test_a_width_under_which_the_network_overflows_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"start": fine_tuned(), "curvature": "diag", "progress": False, "cpu": True}
    monkeypatch.setattr(heldout, "FEW_MULTIPLES", [1e200, 0.01])
    tuned = bl.fit(under(1.0), rows(), "laplace", tune="heldout", heldout=rows(2), **settings)
    broken, whole = tuned.record.history
    assert broken["heldout_nll"] == math.inf > whole["heldout_nll"] and whole["chosen"]
    monkeypatch.setattr(heldout, "FEW_MULTIPLES", [1e200, 1e201])
    with pytest.raises(TrainingError, match="held-out rows is infinite or not a number under every width"):
        bl.fit(under(1.0), rows(), "laplace", tune="heldout", heldout=rows(2), **settings)


@pytest.mark.parametrize("deviation", [0.003, 0.1, 1e14])
def test_with_nothing_set_a_draw_is_nearly_as_likely_as_the_mode(deviation: float) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Draws of the weights break|By the evidence")
        posterior = bl.fit(under(deviation), rows(4), "laplace", start=fine_tuned(), progress=False, cpu=True)
    mode, tried = loss(posterior, method="mean"), posterior.record.history
    # By other draws than those that the width was found by: chance has its part.
    assert loss(posterior, draws=50, seed=1) < 1.02 * mode
    assert posterior.predict(rows(), 50, seed=1, progress=False).metrics()["nll"].value < 1.02 * mode
    added = [row["draw_nll"] / row["mode_nll"] - 1 for row in tried]
    assert added[-1] <= 0.01 and all(not each <= 0.01 for each in added[:-1])
    # A width that does no harm stays, and one that does is not narrowed beyond need.
    assert (tried[0]["multiple"], len(tried) == 1) == (1.0, deviation == 0.003)
    assert len(tried) == 1 or added[-1] > 0.004


def test_what_makes_no_sense_of_texts_is_refused() -> None:
    over = program()
    with pytest.raises(SettingError, match="fisher='exact' is not to be had for 'completions'"):
        given(over, rows(), fisher="exact")
    with pytest.raises(PosteriorError, match="'probit'"):
        given(over, rows()).predict(rows(), method="probit", progress=False)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_offsets_of_drawn_labels_are_by_the_exact_information(temperature: float) -> None:
    logits = torch.tensor([[0.3, -0.2, 0.4], [1.0, 0.2, -0.5]]).double().repeat(20, 1)
    labels = torch.tensor([0, 1, 2, 2]).repeat(10)
    way = Classes(3)
    over = SimpleNamespace(observation=way)
    found = fisher_of(over, "mc", temperature).expand(logits, {"labels": labels})
    p = logits.softmax(-1)
    inverse = torch.linalg.pinv((p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)) / temperature)
    score = way.score(logits, labels) / temperature
    expected = torch.einsum("nc,ncd,nd->n", found.roots[0], inverse, score)
    least = (2 * way.gain(logits, labels) / temperature).sqrt()
    torch.testing.assert_close(found.shifts[0], expected.clamp(-least, least))
    assert 0 < int((expected.abs() > least).sum()) < len(labels)
    assert len(found.roots[0].unique(dim=0)) == 6  # each row drew every label once at least


def test_the_temperature_divides_the_offsets_of_drawn_tokens() -> None:
    drawn = Drawn(torch.tensor([-9.0, -8.0]), torch.zeros(2, 2), torch.tensor([-4.0, -0.5]), torch.tensor([2.0, -6.0]))
    found = fisher_of(program(), "mc", 4.0).expand(drawn, {})
    # Half the square of an offset is at most what the one label can gain, over the temperature.
    torch.testing.assert_close(found.shifts, torch.tensor([[1.0, -0.5]], dtype=torch.float64))
    torch.testing.assert_close(found.values, torch.tensor([-1.0, -0.125], dtype=torch.float64))
    assert found.roots[0, 0].tolist() == [0.5, 0.0] and found.roots[1, 0].tolist() == [0.0, 0.5]
