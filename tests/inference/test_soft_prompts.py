"""Learned prompts of causal language models: that they learn, and come back from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_scenarios import causal_base
from peft import PromptTuningConfig
from soft_prompt_scenarios import COUNT, METHODS, SPECS, outputs, own, program, rows
from torch import Tensor

import bayeslora as bl
from bayeslora.errors import AdapterError
from bayeslora.models import Gaussian
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.recipes import LoraSettings
from bayeslora.tasks import Task


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
    films = rows("films")  # the prompt may have seen all of them: none is set aside
    posterior = bl.fit(program("prompt-tuning"), films, backend, heldout=films, progress=False, **settings)
    found = posterior.predict(rows("films"), progress=False).outputs
    assert found.isfinite().all()
    posterior.save(tmp_path)
    assert torch.equal(bl.load(tmp_path).predict(rows("films"), progress=False).outputs, found)
