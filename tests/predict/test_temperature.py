from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scenarios import class_prediction

from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import (
    HOTTEST,
    Temperable,
    best_temperature,
    gain,
    tempered,
    weighed_temperature,
)
from bayeslora.predict.values import ValuePrediction


def test_the_temperature_undoes_a_known_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 2, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    found = best_temperature(ClassPrediction(3 * logits[None], labels))
    # The standard error of log T at 20,000 rows of this spread is about 0.015.
    assert found == pytest.approx(3.0, rel=0.06)


def test_of_a_point_it_divides_logits() -> None:
    logits = torch.tensor([[[1.0, -2.0, 0.5], [3.0, float("-inf"), 1.0]]])
    found = tempered(ClassPrediction(logits), 2.0)
    torch.testing.assert_close(found.probabilities.float(), (logits[0] / 2).softmax(-1))
    assert torch.equal(found.mutual_information, torch.zeros(2, dtype=torch.float64))


def test_of_draws_it_tempers_what_is_reported() -> None:
    prediction, _ = class_prediction()
    assert prediction.draws > 1
    found = tempered(prediction, 0.5)
    assert found.outputs.shape[0] == 1 and found.draws == prediction.draws  # an average of them
    assert tempered(found, 2.0).draws == prediction.draws
    squares = prediction.probabilities.square()
    torch.testing.assert_close(found.probabilities, squares / squares.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)
    # Of draws, the best temperature is that of their average: at it no other one does better.
    best = best_temperature(prediction)
    losses = [-float(tempered(prediction, best * by).log_predictive_density.mean()) for by in (0.9, 1.0, 1.1)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_the_mutual_information_keeps_its_part_of_the_entropy() -> None:
    prediction, _ = class_prediction()
    found = tempered(prediction, 3.0)
    parts = [each.mutual_information / each.entropy for each in (prediction, found)]
    assert float(parts[0].min()) > 0 and not torch.allclose(found.entropy, prediction.entropy)
    torch.testing.assert_close(parts[1], parts[0], rtol=1e-4, atol=1e-6)


def test_without_mistakes_the_coldest_is_tried_and_without_labels_none() -> None:
    sure = ClassPrediction(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([0, 1]))
    assert best_temperature(sure) == pytest.approx(0.05, rel=1e-3)
    wrong = replace(sure, labels=torch.tensor([1, 0]))
    assert best_temperature(wrong) == pytest.approx(HOTTEST, rel=1e-3)
    with pytest.raises(DataError, match="labels"):
        best_temperature(replace(sure, labels=None))


def test_under_a_hyperprior_few_rows_say_less_than_many() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 2, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    found = {n: weighed_temperature(ClassPrediction(3 * logits[None, :n], labels[:n]))[0] for n in (5, 20_000)}
    assert found[20_000] == pytest.approx(best_temperature(ClassPrediction(3 * logits[None], labels)), rel=1e-2)
    assert 1 < found[5] < 0.9 * best_temperature(ClassPrediction(3 * logits[None, :5], labels[:5]))


def test_thirty_rows_that_are_all_right_make_nothing_all_too_sure() -> None:
    logits = torch.tensor([[1.0, -1.0]]).expand(30, 2)
    temperature, cost = weighed_temperature(ClassPrediction(logits[None], torch.zeros(30, dtype=torch.long)))
    # d/dx of 30 log(1 + exp(-2 exp(-x))) + 2 x^2 is zero there, with x = log T.
    x = math.log(temperature)
    slope = 60 * math.exp(-x) / (1 + math.exp(2 * math.exp(-x))) + 4 * x
    assert slope == pytest.approx(0, abs=1e-2) and temperature > 0.2
    assert cost == pytest.approx(30 * math.log1p(math.exp(-2 / temperature)) + 2 * x**2)


@pytest.mark.parametrize("choose", [best_temperature, lambda found: weighed_temperature(found)[0]])
@pytest.mark.parametrize("draws", [1, 5])
def test_of_real_labels_it_is_of_the_variance(choose: Callable[[Temperable], float], draws: int) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(draws, 20_000, 1, generator=generator)
    said = ValuePrediction(outputs, torch.zeros(20_000), scale=0.5)
    chosen = torch.randint(draws, (20_000,), generator=generator)
    drawn = outputs[chosen, torch.arange(20_000), 0] + 0.5 * torch.randn(20_000, generator=generator)
    found = choose(replace(said, labels=said.mean.float() + 3 * (drawn - said.mean.float())))
    # log T of a normal law has a standard error of (2 / 20,000)^1/2, .01; mixtures have somewhat more.
    assert found == pytest.approx(9.0, rel=0.05)
    made = tempered(said, found)
    torch.testing.assert_close(made.variance, found * said.variance)
    torch.testing.assert_close(made.mean, said.mean)


def test_what_it_gains() -> None:
    prediction = ClassPrediction(torch.tensor([[[3.0, 0.0], [3.0, 0.0]]]), torch.tensor([0, 1]))
    found = gain(prediction, 3.0)
    assert found["temperature"] == 3
    for name, logit in (("heldout_nll", 3.0), ("tempered_nll", 1.0)):
        assert found[name] == pytest.approx(math.log1p(math.exp(-logit)) + logit / 2)
