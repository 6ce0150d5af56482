from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scenarios import tiny_program, tiny_rows, untrained_program
from torch.optim import Optimizer

from bayeslora.errors import SettingError
from bayeslora.inference import fit
from bayeslora.inference.training.objective import Objective, Outcome
from bayeslora.inference.training.trainer import train
from bayeslora.inference.variational import learning, svi
from bayeslora.inference.variational.rates import groups_of, rate_beside_noise, rate_beside_prior
from bayeslora.models.guides.base import Guide, MatrixGuide, PointGuide


def test_points_that_stand_for_means_have_the_rate_of_means() -> None:
    beside = PointGuide({"a": torch.zeros(2), "b": torch.zeros(3)}, located=["a"])
    groups = groups_of(beside, 1e-9, 2e-3)
    assert [(group["lr"], len(group["params"][0])) for group in groups] == [(1e-9, 2), (2e-3, 3)]


def test_points_beside_matrices_that_are_held_have_a_least_rate() -> None:
    assert rate_beside_prior(5e-4) == 2e-3
    assert rate_beside_prior(5e-3) == 5e-3


def test_the_default_rate_of_points_is_by_the_prior_and_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def noted(guide: Guide, learning_rate: float, points: float, *rest: float) -> list[dict[str, Any]]:
        seen.append(points)
        return groups_of(guide, learning_rate, points, *rest)

    monkeypatch.setattr(svi, "groups_of", noted)
    settings = {"epochs": 100, "batch_size": 3, "learning_rate": 1e-4, "progress": False}  # 200 steps
    for prior_mean in ("learned", "model"):
        fit(tiny_program(), tiny_rows(6), prior_mean=prior_mean, **settings)
    assert seen == [pytest.approx(0.24 / 200), 2e-3]


@pytest.mark.parametrize(("rate", "noise_warmup", "limited"), [(0.1, 0.5, 2), (1e-3, 0.5, 0), (0.1, 0.0, 0)])
def test_means_have_a_limited_rate_while_noise_rises_beside_a_b_that_starts_at_zero(
    rate: float, noise_warmup: float, limited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []

    def noted(objective: Objective, optimiser: Optimizer, *rest: Any) -> Outcome:
        optimiser.register_step_pre_hook(
            lambda optimiser, *_: seen.append({group["name"]: group["lr"] for group in optimiser.param_groups})
        )
        return train(objective, optimiser, *rest)

    monkeypatch.setattr(learning, "train", noted)
    settings = {
        "epochs": 4, "batch_size": 6, "learning_rate": rate, "schedule": "constant", "warmup": 0.0,
        "noise_warmup": noise_warmup, "log_every": 1, "progress": False,
    }  # fmt: skip
    program = untrained_program()
    history = fit(program, tiny_rows(6), **settings).record.history
    entries = torch.cat([site.initial.flatten() for site in program.sites if site.role == "A"])
    twelfth = float(entries.norm()) / math.sqrt(len(entries)) / 12
    expected = [twelfth] * limited + [rate] * (4 - limited)
    assert [step["location"] for step in seen] == pytest.approx(expected, rel=1e-5)
    assert [entry["learning_rate"] for entry in history if "loss" in entry] == pytest.approx(expected, rel=1e-5)
    assert {step["scale"] for step in seen} == {1e-2} and {step["point"] for step in seen} == {2e-3}
    seen.clear()
    fit(tiny_program(), tiny_rows(6), **settings)  # its B is not zero
    assert [step["location"] for step in seen] == [rate] * 4


def test_points_beside_noise_have_the_rate_within_bounds() -> None:
    assert rate_beside_noise(5e-4, 1000) == 5e-4
    assert rate_beside_noise(1.5e-3, 1000) == 1.5e-3
    assert rate_beside_noise(8e-3, 1000) == 2e-3
    assert rate_beside_noise(2e-4, 150) == pytest.approx(1.6e-3)
    assert rate_beside_noise(2e-4, 10) == 2e-3


def test_a_group_of_parameters_without_a_rate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MatrixGuide, "parameter_groups", lambda guide: {"locations": [guide.mu]})
    with pytest.raises(SettingError, match="GuideList 'locations'. Did you mean 'location'"):
        fit(tiny_program(), tiny_rows(4), epochs=1, progress=False)
