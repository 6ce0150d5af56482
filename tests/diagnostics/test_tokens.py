"""Calibration of tokens under the mixture of draws, against the law of whole texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_scenarios import configuration
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import tiny_program, tiny_rows
from transformers import AutoModelForCausalLM

import bayeslora as bl
from bayeslora.diagnostics import token_calibration
from bayeslora.errors import PosteriorError
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


def test_classes_have_no_tokens() -> None:
    posterior = bl.fit(tiny_program(Gaussian()), tiny_rows(4), "map", epochs=1, cpu=True, progress=False)
    with pytest.raises(PosteriorError, match="this posterior is of 'classes'"):
        token_calibration(posterior, tiny_rows(4))
