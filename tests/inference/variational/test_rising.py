from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from scenarios import lora_regression, tiny_program, tiny_rows

from bayeslora.inference import fit
from bayeslora.inference.training.objective import State
from bayeslora.inference.variational.rising import Rising


def followed(losses: torch.Tensor, first: int = 1) -> Rising:
    """A fit with these losses, seen from a step on."""
    objective = SimpleNamespace()
    found = Rising(objective)
    for step in range(first, len(losses) + 1):
        objective.loss = losses[step - 1]
        found.on_step(State(step, len(losses), 0.0))
    return found


def noise(steps: int, size: float) -> torch.Tensor:
    return size * torch.randn(steps, generator=torch.Generator().manual_seed(0))


def test_the_rise_is_that_of_the_last_quarter_over_the_one_before() -> None:
    losses = torch.cat([torch.full((50,), 9.0), torch.full((25,), 1.0), torch.full((25,), 0.7)]) + noise(100, 0.1)
    rise, error = followed(losses).found() or (0.0, 0.0)
    assert error == pytest.approx(0.1 * math.sqrt(2 / 25), rel=0.3)
    assert rise == pytest.approx(0.3, abs=4 * error)
    with pytest.warns(UserWarning, match=r"last quarter of the 100 steps it was 0\.\d+ ± 0\.0\d nats a row"):
        followed(losses).warn()


@pytest.mark.parametrize(
    "losses",
    [
        torch.ones(100) + noise(100, 0.1),  # at rest
        torch.linspace(1.1, 1.0, 100) + noise(100, 0.01),  # by 0.025 nats
        torch.linspace(0, 1, 100),  # falls
        torch.linspace(2, 0, 36),  # of too few steps
    ],
)
def test_nothing_is_said_of_what_is_not_clear(losses: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        followed(losses).warn()


def test_nothing_is_said_of_a_part() -> None:
    assert followed(torch.linspace(2, 0, 100), first=60).found() is None
    assert followed(torch.linspace(2, 0, 100), first=51).found() is not None


@pytest.mark.parametrize("backend", ["svi", "map"])
def test_a_bound_is_told_from_the_loss_of_a_point(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(Rising, "found", lambda self: (1.0, 0.1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tiny_program(), tiny_rows(8), backend, epochs=1, progress=False)
    assert any("The bound still rises" in str(each.message) for each in said) == (backend == "svi")


@pytest.mark.parametrize(
    ("prior_mean", "rise", "told"), [("model", 0.004, True), ("model", 0.002, False), ("learned", 0.004, False)]
)
def test_where_all_weights_are_random_a_tenth_of_a_nat_in_all_is_clear(
    monkeypatch: pytest.MonkeyPatch, prior_mean: str, rise: float, told: bool
) -> None:
    known = lora_regression()  # of 40 rows, in whose program B is fixed
    monkeypatch.setattr(Rising, "found", lambda self: (rise, 1e-4))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(known.program, known.rows, epochs=1, batch_size=20, prior_mean=prior_mean, progress=False)
    assert any("it was 0.004 ± 0.0001 nats a row" in str(each.message) for each in said) == told


def test_point_estimates_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rising, "found", lambda self: (0.04, 1e-4))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tiny_program(), tiny_rows(8), epochs=1, prior_mean="model", progress=False)
    assert not any("The bound still rises" in str(each.message) for each in said)


def test_of_a_bound_with_a_maximum_chance_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = lora_regression()
    monkeypatch.setattr(Rising, "found", lambda self: (0.02, 0.008))  # 2.5 standard errors
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(known.program, known.rows, epochs=1, batch_size=20, prior_mean="model", progress=False)
    assert not any("The bound still rises" in str(each.message) for each in said)
