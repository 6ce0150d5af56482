"""LoRA+: the rate of B."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenarios import tiny_method, tiny_program, tiny_rows

from bayeslora.errors import SettingError
from bayeslora.inference import fit
from bayeslora.models import Gaussian

ROWS = tiny_rows(4)
#: One step: the first of AdamW is as long as the rate, for every weight with a gradient.
STEP: dict[str, Any] = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0.0, "progress": False}


def test_b_alone_moves_faster() -> None:
    program = tiny_program(Gaussian())
    posterior = fit(program, ROWS, "lora+", ratio=8.0, weight_decay=0.0, max_grad_norm=1e9, **STEP)
    mean = posterior.mean()
    steps = {role: [] for role in "AB"}
    for site in program.sites:
        if site.stacked:
            steps[site.role].append(float((mean[site.name] - site.initial).abs().max()))
    assert max(steps["A"]) == pytest.approx(1e-3, rel=1e-3) and max(steps["B"]) == pytest.approx(8e-3, rel=1e-3)


def test_at_one_rate_it_is_maximum_likelihood() -> None:
    one = fit(tiny_program(Gaussian()), ROWS, "lora+", ratio=1.0, **STEP)
    two = fit(tiny_program(Gaussian()), ROWS, "mle", **STEP)
    assert all(torch.equal(value, two.mean()[name]) for name, value in one.mean().items())


def test_without_matrices() -> None:
    with pytest.raises(SettingError, match="take 'mle'"):
        fit(tiny_method("ia3"), ROWS, "lora+", **STEP)
