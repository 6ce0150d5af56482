from __future__ import annotations

import math

import pytest
import torch
from scenarios import lora_regression
from torch import Tensor

from bayeslora.inference import fit
from bayeslora.inference.mcmc.sghmc import SGHMC
from bayeslora.inference.mcmc.sgld import SGLD
from bayeslora.inference.mcmc.steps import Meter, Stiffness
from bayeslora.rng import isolated

#: Independent chains, all entries of one tensor: the variance over them has an error of sqrt(2 / 10,000) = 1.4 %.
CHAINS = 10_000


@pytest.mark.parametrize("algorithm", [SGLD(), SGHMC(friction=0.2), SGHMC(friction=1.0)])
@pytest.mark.parametrize(("curvature", "noise"), [(4.0, 0.0), (4.0, 12.0), (0.5, 8.0)])
def test_the_variance_of_a_chain_is_too_large_by_the_bias(algorithm: SGLD, curvature: float, noise: float) -> None:
    spread, bias = 3.0, 0.3  # at a half the chain would be as wide by twice the gradient
    step = algorithm.longest(Stiffness(curvature, noise), bias)
    with isolated(0, torch.device("cpu")):
        place = {"w": spread * torch.randn(CHAINS) / curvature**0.5}
        move = algorithm.mover(place, {"w": spread})
        for _ in range(300):  # the slowest of these chains forgets 3 % of where it was in a step
            exact = -curvature * place["w"] / spread**2
            move([exact + noise**0.5 / spread * torch.randn(CHAINS)], step)
    found = float(place["w"].square().mean()) * curvature / spread**2
    assert found == pytest.approx(1 + bias, rel=4 * (2 / CHAINS) ** 0.5)


@pytest.mark.parametrize("algorithm", [SGLD(), SGHMC(friction=0.2), SGHMC(friction=1.0)])
def test_the_drift_is_how_fast_a_chain_forgets_where_the_data_say_nothing(algorithm: SGLD) -> None:
    size = 0.01 if type(algorithm) is SGLD else 0.005 * algorithm.friction
    steps = round(1 / algorithm.drift(size))
    assert steps == 200
    with isolated(0, torch.device("cpu")):
        place = {"w": torch.full((CHAINS,), 30.0)}
        move = algorithm.mover(place, {"w": 3.0})
        for _ in range(steps):
            move([-place["w"] / 9], size)
    # A momentum begins at zero, and lags 1 / friction steps behind.
    assert float(place["w"].mean()) / 30 == pytest.approx(math.exp(-1), rel=0.04)


def test_curvature_and_noise_are_the_largest_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
    hessian = vectors @ torch.diag(torch.linspace(1, 10, 30).square()) @ vectors.T
    noise = [{"noise": 5 * torch.randn(30, generator=generator)} for _ in range(6)]

    def gradient(away: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return vectors[0] - hessian @ away + batch["noise"]

    with isolated(0, torch.device("cpu")):
        meter = Meter(gradient, torch.zeros(30))
        first, *_, last = (meter(noise) for _ in range(4))
    covariance = torch.cov(torch.stack([batch["noise"] for batch in noise]).T)
    assert last.noise == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-1]), rel=1e-3)
    assert 80 < first.curvature < last.curvature == pytest.approx(100, rel=0.02)  # it goes on from the first


def test_steps_shorten_in_the_warmup_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def longest(algorithm: SGLD, stiffness: Stiffness, bias: float) -> float:
        asked.append(bias)
        return 0.01

    measured: list[int] = []

    def stiffness(meter: Meter, batches: object) -> Stiffness:
        measured.append(len(asked))
        return Stiffness(1.0, 0.0)

    monkeypatch.setattr(SGLD, "longest", longest)
    monkeypatch.setattr(Meter, "__call__", stiffness)
    known = lora_regression(columns=2, rank=1)
    fit(known.program, known.rows, "sgld", draws=3, warmup=4, thin=2, bias=0.1, progress=False)
    assert asked == pytest.approx([0.25 * 0.4 ** min(1, step / 8) for step in range(14)])
    assert measured == [0, 1, 2, 4, 8]


def test_a_step_that_is_given_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "__init__", None)
    known = lora_regression(columns=2, rank=1)
    with pytest.warns(UserWarning, match="ends 0.75 times as far"):
        posterior = fit(known.program, known.rows, "sgld", draws=3, warmup=1, step_size=0.25, thin=2, progress=False)
    assert posterior.record.history[0]["step_size"] == 0.25
    assert posterior.record.history[0]["relaxations"] == 3 * 2 * 0.25 / 2
