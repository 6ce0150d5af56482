"""The prior that an evidence is largest for."""

from __future__ import annotations

import pytest
import torch
from curvature_scenarios import EXACT, given, tiny
from scenarios import awake, lora_regression, tiny_program, tiny_rows

from bayeslora.inference import fit
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.priors import normal_prior
from bayeslora.models import MonteCLoRA


def test_the_tuned_scale_has_the_largest_exact_evidence() -> None:
    known = lora_regression(noise=2.0)
    posterior = fit(known.program, known.rows, "laplace", mode="train", curvature="full", **EXACT)
    assert isinstance(posterior, LaplacePosterior)
    steps = [row for row in posterior.record.history if "tuning" in row]
    assert max(row["log_evidence"] for row in steps) == pytest.approx(posterior.log_evidence, abs=1e-6)
    assert posterior.log_evidence > steps[0]["log_evidence"]
    tuned = float(posterior.prior.roots["linear_3x1.A"][0, 0, 0])
    # Around the tuned scale the evidence falls to both sides: weights that are given need not be the mode.
    for factor in (0.9, 1.1):
        other = lora_regression(noise=2.0, prior=tuned * factor)
        assert other.log_evidence < posterior.log_evidence
    assert 0.1 < tuned < 10


@pytest.mark.parametrize("scales", ["all", "site", "layer"])
@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_tuning_raises_the_evidence(kind: str, scales: str) -> None:
    program, rows = tiny(), tiny_rows(12)
    fixed = given(program, rows, curvature=kind)
    tuned = given(program, rows, curvature=kind, tune="evidence", scales=scales)
    assert tuned.log_evidence > fixed.log_evidence + 1
    ratios = {name: tuned.prior.roots[name][:, 0, 0] / fixed.prior.roots[name][:, 0, 0] for name in tuned.prior.roots}
    spread = [float(value.max() / value.min()) for value in ratios.values()]
    assert all(abs(value - 1) < 1e-6 for value in spread) == (scales != "layer")
    assert (len({round(float(value[0]), 6) for value in ratios.values()}) == 1) == (scales == "all")


@pytest.mark.parametrize("wishart_on", ["covariance", "precision"])
def test_hyper_sites_are_tuned_under_their_own_priors(wishart_on: str) -> None:
    program, rows = awake(tiny_program(MonteCLoRA(centre="zero", wishart_on=wishart_on, components=3))), tiny_rows(12)
    fixed = given(program, rows)
    tuned = given(program, rows, tune="evidence", scales="hyper")
    steps = [row for row in tuned.record.history if "tuning" in row]
    best = max(steps, key=lambda row: row["log_evidence"] + row["log_hyperprior"])
    assert best["log_evidence"] + best["log_hyperprior"] > steps[0]["log_evidence"] + steps[0]["log_hyperprior"] + 1
    assert tuned.log_evidence == pytest.approx(best["log_evidence"], abs=1e-2)
    moved = [name for name in tuned.latents if not torch.equal(tuned.latents[name], fixed.latents[name])]
    assert moved and all(name.endswith(("scale_tril", "mixture")) for name in moved)
    again = normal_prior(program, tuned.sites, tuned.latents)
    for name, root in tuned.prior.roots.items():
        torch.testing.assert_close(root, again.roots[name])
