"""Calibration of tokens under the mixture of draws, against the law of whole texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from causal_scenarios import configuration
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import tiny_program, tiny_rows
from transformers import AutoModelForCausalLM

import bayeslora as bl
from bayeslora.diagnostics import TokenCalibration, token_calibration
from bayeslora.errors import PosteriorError
from bayeslora.inference.mixture import MixturePosterior
from bayeslora.models import Gaussian
from bayeslora.observations import Completions, completions

IDS, COUNT, VOCABULARY = [5, 6, 7, 8, 2], 3, 12


@pytest.fixture(scope="module")
def posterior() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(configuration("llama", VOCABULARY))
        network = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    program = bl.Program(network, Completions(), Gaussian(sites="both", centre="zero", deviation=1.0))
    rows = Dataset.from_dict({"input_ids": [IDS], "labels": [COUNT]})
    return bl.fit(program, rows, "svi", epochs=1, cpu=True, progress=False), rows


@pytest.mark.parametrize("logits", [2**24, 1])
def test_draws_count_by_what_they_have_said(posterior: Any, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    over, rows = posterior
    monkeypatch.setattr(completions, "LOGITS", logits)
    program, found = over.program, token_calibration(over, rows, 3, progress=False)
    each = []
    with torch.no_grad():
        for draw in over.draws(3, 0):
            program.weights.install(draw)
            each.append(program.network.eval()(input_ids=torch.tensor([IDS])).logits[0].double().softmax(-1))
    program.weights.restore()
    for number, place in enumerate(range(len(IDS) - COUNT, len(IDS))):
        so_far = [
            torch.stack([p[t - 1, IDS[t]] for t in range(len(IDS) - COUNT, place)]).prod() if number else torch.ones(())
            for p in each
        ]
        joint = sum(share * p[place - 1] for share, p in zip(so_far, each, strict=True)) / sum(so_far)
        assert found.confidence[number] == pytest.approx(float(joint.max()), abs=1e-5)
        assert found.correct[number] == float(joint.argmax() == IDS[place])
    assert 0 <= found.ece() <= 1 and found.accuracy == pytest.approx(found.correct.mean())


def test_tokens_come_row_after_row_and_know_theirs(posterior: Any) -> None:
    over, _ = posterior
    texts = [([5, 6, 7], 1), ([*IDS, 4, 9], 5), (IDS, 3)]
    rows = Dataset.from_dict({"input_ids": [ids for ids, _ in texts], "labels": [count for _, count in texts]})
    settings: dict[str, Any] = {"draws": 2, "progress": False}
    found = token_calibration(over, rows, batch_size=2, **settings)
    assert found.row.tolist() == [0] + [1] * 5 + [2] * 3
    alone = [token_calibration(over, rows.select([row]), **settings) for row in range(3)]
    assert found.confidence == pytest.approx(np.concatenate([each.confidence for each in alone]), abs=1e-6)
    assert found.correct.tolist() == np.concatenate([each.correct for each in alone]).tolist()


@pytest.mark.parametrize("seed", [0, 3])
def test_intervals_are_over_texts(seed: int) -> None:
    random = np.random.default_rng(1)
    right, sure = random.integers(0, 2, 30).astype(float), random.random(30)
    # Twenty tokens that are all the same say no more than one of them.
    each = TokenCalibration(sure, right, np.arange(30))
    many = TokenCalibration(sure.repeat(20), right.repeat(20), np.arange(30).repeat(20))
    one, twenty = each.measured(seed=seed), many.measured(seed=seed)
    assert list(one) == ["token_accuracy", "token_confidence", "token_ece_10", "token_ece_15", "token_ece_20"]
    for name, interval in one.items():
        assert (interval.value, interval.low, interval.high) == pytest.approx(tuple(vars(twenty[name]).values()))
        assert interval.low < interval.value < interval.high
    assert twenty["token_ece_15"].value == pytest.approx(many.ece(15))
    assert twenty["token_accuracy"].value == pytest.approx(many.accuracy)
    assert np.isnan(many.measured(intervals=False)["token_accuracy"].low)


def test_at_the_mean_there_is_one_set_of_weights(posterior: Any) -> None:
    over, rows = posterior
    found = token_calibration(over, rows, method="mean", progress=False)
    over.program.weights.install(over.mean())
    with torch.no_grad():
        logits = over.program.network.eval()(input_ids=torch.tensor([IDS])).logits[0, -COUNT - 1 : -1]
    over.program.weights.restore()
    assert found.confidence == pytest.approx(logits.softmax(-1).max(-1).values.double().numpy(), abs=1e-6)
    with pytest.raises(PosteriorError, match="method of prediction 'median'"):
        token_calibration(over, rows, method="median", progress=False)


def test_fits_of_a_mixture_weigh_the_same(posterior: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    over, rows = posterior
    both = MixturePosterior([over, over], over.record)
    asked: list[int] = []
    draws = MixturePosterior.draws
    monkeypatch.setattr(MixturePosterior, "draws", lambda self, n, seed: asked.append(n) or draws(self, n, seed))
    token_calibration(both, rows, 3, progress=False)
    assert asked == [both.predict(rows, 3, progress=False).draws] == [4]
    mean = token_calibration(both, rows, method="mean", progress=False)
    assert mean.confidence == pytest.approx(token_calibration(over, rows, method="mean", progress=False).confidence)


def test_at_the_means_of_several_fits_probabilities_are_averaged_and_not_weights(posterior: Any) -> None:
    over, rows = posterior
    elsewhere = over.program.around({site.name: torch.randn_like(site.initial) for site in over.program.sites})
    fits = [over, bl.fit(elsewhere, rows, "svi", epochs=1, cpu=True, progress=False)]
    found = token_calibration(MixturePosterior(fits, over.record), rows, method="mean", progress=False)
    each = []
    for fit in fits:
        over.program.weights.install(fit.mean())
        with torch.no_grad():
            each.append(over.program.network.eval()(input_ids=torch.tensor([IDS])).logits[0, -COUNT - 1].softmax(-1))
    over.program.weights.restore()
    assert not torch.allclose(each[0], each[1], atol=1e-2)
    # Before the first token all fits count alike.
    assert found.confidence[0] == pytest.approx(float(torch.stack(each).mean(0).max()), abs=1e-6)


def test_classes_have_no_tokens() -> None:
    posterior = bl.fit(tiny_program(Gaussian()), tiny_rows(4), "map", epochs=1, cpu=True, progress=False)
    with pytest.raises(PosteriorError, match="this posterior is of 'classes'"):
        token_calibration(posterior, tiny_rows(4))
