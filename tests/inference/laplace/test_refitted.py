"""The evidence of the linear network's own mode, against dense matrices and where another one gives way."""

from __future__ import annotations

import math
from typing import Literal, cast

import pytest
import torch
from curvature_scenarios import given, tiny
from datasets import Dataset
from scenarios import awake, dense_jacobian, lora_regression, tiny_batch, tiny_program, tiny_rows

from bayeslora.inference.laplace import refitted
from bayeslora.inference.laplace.likeliest import WIDTHS, matched_width
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.inference.laplace.refitted import Refitted, RefittedEvidence
from bayeslora.models import Gaussian
from bayeslora.passes import Rows


def evidence_of(posterior: LaplacePosterior, rows: Dataset, temperature: float = 1.0) -> RefittedEvidence:
    over = Rows.of(posterior.program, rows, 5)
    around = posterior.sites, posterior.mean(), posterior.modes, posterior.prior
    return RefittedEvidence(posterior.program, *around, over, temperature)


def linear_parts_of(posterior: LaplacePosterior, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs at weights of zero, their gradients (rows, outputs, weights), and labels."""
    program, batch = posterior.program, tiny_batch(posterior.program, rows)
    jacobian = dense_jacobian(program, batch)
    names = list(posterior.prior.roots)
    flat = torch.cat([jacobian[name].flatten(2) for name in names], dim=2).double()
    mode = torch.cat([posterior.latents[name].flatten() for name in names]).double()
    logits = program.outputs({site.name: site.initial for site in program.sites}, batch).detach().double()
    return logits - flat @ mode, flat, batch["labels"]


def test_of_normal_labels_it_is_exact() -> None:
    known = lora_regression(noise=2.0)
    posterior = given(known.program, known.rows)
    assert evidence_of(posterior, known.rows)(1.0).evidence == pytest.approx(known.log_evidence, abs=1e-3)
    wider = lora_regression(noise=2.0, prior=3.0)
    assert evidence_of(posterior, known.rows)(3.0).evidence == pytest.approx(wider.log_evidence, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_laplaces_evidence_at_the_mode_of_the_linear_network(temperature: float) -> None:
    rows = tiny_rows(12)
    posterior = given(awake(tiny_program(Gaussian(sites="both", centre="zero", deviation=0.4))), rows)
    offset, design, labels = linear_parts_of(posterior, rows)
    width = 3 * 0.4
    theta = torch.zeros(design.shape[-1], dtype=torch.float64, requires_grad=True)

    def height() -> torch.Tensor:
        likelihood = (offset + width * design @ theta).log_softmax(-1)[torch.arange(12), labels].sum() / temperature
        return likelihood - theta.square().sum() / 2

    optimiser = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        (-height()).backward()
        return -height()

    optimiser.step(closure)
    p = (offset + width * design @ theta).softmax(-1).detach()
    hessian = torch.einsum("ncp,ncd,ndq->pq", design, p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2), design)
    volume = torch.linalg.slogdet(torch.eye(len(hessian)) + width**2 * hessian / temperature)[1]
    expected = float(height().detach() - volume / 2)
    assert evidence_of(posterior, rows, temperature)(3.0).evidence == pytest.approx(expected, abs=2e-3)


def test_without_width_it_claims_what_is_true_there() -> None:
    rows = tiny_rows(12)
    posterior = given(tiny(), rows)
    offset, _, labels = linear_parts_of(posterior, rows)
    truth = float(offset.log_softmax(-1)[torch.arange(12), labels].sum())
    assert evidence_of(posterior, rows)(1e-6).evidence == pytest.approx(truth, abs=1e-3)


def certain(centre: Literal["zero", "init"]) -> tuple[LaplacePosterior, Dataset]:
    """Around weights under which labels are all but certain: the likeliest ones, by large logits."""
    program = awake(tiny_program(Gaussian(sites="both", centre=centre, deviation=0.1), classes=2))
    program = program.around({site.name: (4 if site.role == "head" else 3) * site.initial for site in program.sites})
    rows = tiny_rows(30, classes=2)
    batch = tiny_batch(program, rows)
    likeliest = program.outputs({site.name: site.initial for site in program.sites}, batch).argmax(-1)
    labels = likeliest[batch["index"].argsort()].tolist()
    rows = rows.remove_columns("labels").add_column("labels", labels)
    return given(program, rows), rows


def test_certain_labels_leave_a_width() -> None:
    posterior, rows = certain("zero")
    found = evidence_of(posterior, rows)
    # At the prior's centre the linear network does not know the labels, and without width this is known.
    assert found(1e-6).evidence < -15 < -2 < posterior.log_likelihood
    tuned = given(posterior.program, rows, tune="evidence")
    steps = [row for row in tuned.record.history if "tuning" in row]
    multiple = float(next(iter(tuned.prior.roots.values()))[0, 0, 0]) / 0.1
    assert math.exp(WIDTHS[0]) < multiple < math.exp(WIDTHS[-1])
    assert found(multiple).evidence == pytest.approx(max(row["log_evidence"] for row in steps), abs=1e-6)
    for factor in (0.9, 1.1):
        assert found(multiple * factor).evidence < found(multiple).evidence


def test_where_there_is_no_best_width_the_models_own_is_kept_and_that_is_said() -> None:
    # Around the very weights that make labels certain nothing asks for width.
    posterior, rows = certain("init")
    said = r"narrowest prior .*, 0\.01 times .*: the model's prior is kept .*heldout=.*centre=zero.*deviation"
    with pytest.warns(UserWarning, match=said):
        found = given(posterior.program, rows, tune="evidence")
    for name, root in found.prior.roots.items():
        assert torch.equal(root, posterior.prior.roots[name])


class Curve:
    """An evidence that is largest at a multiple, and a linear network whose own mode is at -10 / multiple."""

    def __init__(self, best: float, at_mode: float) -> None:
        self.best, self.at_mode = math.log(best), at_mode

    def __call__(self, multiple: float) -> Refitted:
        return Refitted(-((math.log(multiple) - self.best) ** 2), -10 / multiple)


@pytest.mark.parametrize(
    ("best", "at_mode", "expected"),
    [
        (5.0, -0.1, 5.0),  # the weights interpolate: the evidence decides
        (5.0, -5.0, 2.0),  # they were stopped early
        (1e9, -5.0, 2.0),  # and the evidence has no best width
        (5.0, -2000.0, 1.0),  # they are worse than the prior's centre: the model's width
        (0.5, -2000.0, 0.5),  # or the evidence's, where that is narrower
    ],
)
def test_the_width_is_the_narrower_of_the_evidences_and_the_one_that_fits_as_well(
    best: float, at_mode: float, expected: float
) -> None:
    prior = NormalPrior({"a": torch.zeros(1, 2, 1)}, {"a": torch.ones(1, 1, 1, dtype=torch.float64)})
    found, trace = matched_width(cast(RefittedEvidence, Curve(best, at_mode)), prior)
    assert float(found.roots["a"]) == pytest.approx(expected, rel=0.02)
    assert [row["tuning"] for row in trace] == list(range(len(trace)))
    assert trace[-1]["own_log_likelihood"] == pytest.approx(-10 / trace[-1]["scale"])


def test_weights_that_interpolate_do_not_bound_an_evidence_of_any_width() -> None:
    prior = NormalPrior({"a": torch.zeros(1, 2, 1)}, {"a": torch.ones(1, 1, 1, dtype=torch.float64)})
    with pytest.warns(UserWarning, match="largest at the widest prior that was tried, 1000 times as wide"):
        found, _ = matched_width(cast(RefittedEvidence, Curve(1e9, -1e-3)), prior)
    assert found is prior


def test_weights_that_were_stopped_early_have_a_prior_that_fits_them() -> None:
    posterior, rows = certain("zero")
    # The same outputs at a fifth: the labels are right, and the weights could be much surer of them.
    weights = posterior.mean()
    weak = {name: value / 5 if name.startswith("head") else value for name, value in weights.items()}
    stopped = given(posterior.program.around(weak), rows)
    before = next(iter(stopped.prior.roots.values()))[0, 0, 0]
    evidence, matched = (
        float(next(iter(given(stopped.program, rows, tune=tune).prior.roots.values()))[0, 0, 0] / before)
        for tune in ("evidence", "auto")
    )
    found = evidence_of(stopped, rows)
    assert found.at_mode == pytest.approx(stopped.log_likelihood, abs=1e-4)
    assert found(evidence).log_likelihood > found.at_mode + 1
    assert found(matched).log_likelihood == pytest.approx(found.at_mode, rel=0.05)
    assert matched < 0.9 * evidence


def test_of_many_rows_some_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitted, "OUTPUTS", 24)
    rows = tiny_rows(24)
    posterior = given(tiny(), rows)
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8]
    some = rows.select(sorted(chosen.tolist()))
    assert evidence_of(posterior, rows)(2.0).evidence == pytest.approx(
        evidence_of(posterior, some)(2.0).evidence, abs=1e-6
    )
