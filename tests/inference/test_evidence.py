"""The evidence of the linear model, against dense matrices and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from curvature_scenarios import given, tiny
from datasets import Dataset
from scenarios import dense_jacobian, lora_regression, tiny_batch, tiny_rows

from bayeslora.inference import evidence
from bayeslora.inference.curved import LaplacePosterior
from bayeslora.inference.evidence import LinearEvidence, counted, offsets
from bayeslora.inference.jacobians import Products
from bayeslora.inference.priors import NormalPrior
from bayeslora.likelihoods import Categorical
from bayeslora.program import Program


def rows_like(program: Program, rows: Dataset) -> Dataset:
    """The same rows, each with the label that is thought likeliest."""
    batch = tiny_batch(program, rows)
    logits = program.logits({site.name: site.initial for site in program.sites}, batch)
    labels = logits.argmax(-1)[batch["index"].argsort()]
    return rows.remove_columns("labels").add_column("labels", labels.tolist())


def expected_evidence(posterior: LaplacePosterior, rows: Dataset) -> float:
    """L + g^T d - d^T F d / 2 integrated over the prior, by dense matrices."""
    program, batch = posterior.program, tiny_batch(posterior.program, rows)
    jacobian = dense_jacobian(program, batch)
    names = list(posterior.prior.roots)
    flat = torch.cat([jacobian[name].flatten(2) for name in names], dim=2).double()
    logits = program.logits({site.name: site.initial for site in program.sites}, batch).detach().double()
    p = logits.softmax(-1)
    hessian = torch.einsum("ncp,ncd,ndq->pq", flat, p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2), flat)
    slope = torch.einsum("ncp,nc->p", flat, torch.nn.functional.one_hot(batch["labels"], 3) - p)
    covariance = torch.block_diag(
        *(
            torch.kron(torch.eye(posterior.curvature.shapes[name][1]).to(root), root @ root.mT)
            for name in names
            for root in posterior.prior.roots[name]
        )
    )
    mode = torch.cat([posterior.latents[name].flatten() for name in names]).double()
    precision = torch.linalg.inv(covariance)
    total = hessian + precision
    # The maximum of prior times expansion, and the volume around it.
    step = torch.linalg.solve(total, slope - precision @ mode)
    height = slope @ step - step @ hessian @ step / 2 - (mode + step) @ precision @ (mode + step) / 2
    volume = -(torch.linalg.slogdet(total)[1] + torch.linalg.slogdet(covariance)[1]) / 2
    return float(logits.log_softmax(-1)[torch.arange(len(p)), batch["labels"]].sum() + height + volume)


def test_weights_that_are_no_mode_give_the_evidence_of_a_regression() -> None:
    known = lora_regression(noise=2.0)
    shifted = {site.name: site.initial + 0.7 for site in known.program.sites}
    known.program.adapters.write(shifted)
    found = given(known.program, known.rows, curvature="kron")
    # Laplace's formula, which takes them for the mode, is far off.
    assert found.log_evidence == pytest.approx(known.log_evidence, abs=1e-3)
    assert float(found.mode_evidence(found.prior)) < known.log_evidence - 1


@pytest.mark.parametrize("kind", ["kron", "diag", "full"])
def test_the_evidence_is_the_integral_of_the_expansion_whatever_the_curvature(kind: str) -> None:
    program = tiny()
    rows = rows_like(program, tiny_rows(12))
    posterior = given(program, rows, curvature=kind)
    assert posterior.log_evidence == pytest.approx(expected_evidence(posterior, rows), abs=2e-3)


def test_all_widths_of_a_prior_at_once() -> None:
    posterior = given(tiny(), tiny_rows(12), curvature="full")
    linear = linear_evidence(posterior)
    for each in (linear, posterior.mode_evidence):
        along = each.along(posterior.prior)
        for log in (-2.0, 0.0, 1.0):
            width = torch.tensor([log], dtype=torch.float64)
            wider = posterior.prior.scaled(dict.fromkeys(posterior.prior.roots, width))
            assert float(along(width)) == pytest.approx(float(each(wider)), rel=1e-6)


def linear_evidence(posterior: LaplacePosterior) -> LinearEvidence:
    """Of random gradients of two examples."""
    mode = {name: posterior.latents[name] for name in posterior.prior.roots}
    linear = LinearEvidence(mode, posterior.prior)
    generator = torch.Generator().manual_seed(0)
    products = {
        (name, place): Products(
            torch.randn(2, 3, columns, generator=generator),
            torch.randn(2, 3, rank, generator=generator),
            torch.ones(2, 3, dtype=torch.bool),
            columns,
            wide_is_input=True,
        )
        for name, (layers, columns, rank) in posterior.curvature.shapes.items()
        for place in range(layers)
    }
    list(linear.watched([products], torch.ones(1, 2).double(), torch.zeros(2), torch.ones(2, dtype=torch.bool)))
    return linear


def test_random_directions_keep_inner_products() -> None:
    # 64 layers of 200 columns, each seen in 16 directions: an inner product of rows is off by about
    # sqrt(2 / (16 * 64)) = 4.4 % of their lengths, and 5 standard errors are allowed.
    generator = torch.Generator().manual_seed(1)
    mode = {"a": torch.zeros(64, 200, 2)}
    prior = NormalPrior({"a": torch.zeros(64, 200, 2)}, {"a": torch.eye(2).double().expand(64, 2, 2)})
    wide, narrow = torch.randn(64, 6, 1, 200, generator=generator), torch.randn(64, 6, 1, 2, generator=generator)
    seen = torch.ones(6, 1, dtype=torch.bool)
    products = {("a", place): Products(wide[place], narrow[place], seen, 200, True) for place in range(64)}
    linear = LinearEvidence(mode, prior, features=16 * 64 * 2)
    list(linear.watched([products], torch.zeros(1, 6).double(), torch.zeros(6), seen[:, 0]))
    gradients = torch.einsum("lntc,lntr->nlcr", wide, narrow).flatten(1).double()
    exact = gradients @ gradients.mT
    lengths = exact.diagonal().sqrt()
    error = (linear._kernel(prior) - exact) / (lengths.unsqueeze(0) * lengths.unsqueeze(1))
    assert 1e-3 < error.abs().max() < 5 * math.sqrt(2 / (16 * 64))


def test_offsets_give_back_the_score_of_labels_that_are_possible() -> None:
    logits, labels = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    likelihood = Categorical(4)
    roots, score = likelihood.curvature_root(logits), likelihood.score(logits, labels)
    found = offsets(roots, score, torch.full((20,), torch.inf).double())
    torch.testing.assert_close(torch.einsum("vn,vnc->nc", found, roots), score.double())
    gain = likelihood.gain(logits, labels)
    cut = offsets(roots, score, gain)
    lengths = found.square().sum(0) / 2
    torch.testing.assert_close(cut.square().sum(0) / 2, lengths.minimum(gain))
    assert (lengths > gain).any() and (lengths < gain).any()


def test_certain_labels_have_finite_offsets() -> None:
    logits = torch.tensor([[60.0, -60.0], [60.0, -60.0], [800.0, 0.0]], dtype=torch.float64)
    labels, likelihood = torch.tensor([0, 1, 0]), Categorical(2)
    found = offsets(
        likelihood.curvature_root(logits), likelihood.score(logits, labels), likelihood.gain(logits, labels)
    )
    assert found.isfinite().all()
    assert float(found[0, 1].square() / 2) <= 120 + 1e-6


def test_of_many_rows_some_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted(30, 3).all()
    some = counted(10_000, 3)
    assert int(some.sum()) == 2048 // 3
    assert torch.equal(some, counted(10_000, 3))
    monkeypatch.setattr(evidence, "VECTORS", 12)
    few = given(tiny(), tiny_rows(24), curvature="kron")
    monkeypatch.undo()
    everything = given(tiny(), tiny_rows(24), curvature="kron")
    # 12 vectors are four rows of three classes.
    assert few.log_evidence > everything.log_evidence / 2
    assert few.log_likelihood == everything.log_likelihood


def test_the_temperature_divides_the_likelihood() -> None:
    known = lora_regression(noise=2.0)
    warm = given(known.program, known.rows, temperature=4.0)
    # Normal noise at the temperature 4 is twice as large; what is left is the constant of its density.
    other = lora_regression(noise=4.0)
    difference = warm.log_evidence - given(other.program, known.rows).log_evidence
    constant = {noise: -40 * (math.log(noise) + math.log(2 * math.pi) / 2) for noise in (2.0, 4.0)}
    assert difference == pytest.approx(constant[2.0] / 4 - constant[4.0], abs=1e-3)
