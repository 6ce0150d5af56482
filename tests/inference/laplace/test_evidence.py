"""The evidence of the linear model, against dense matrices and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from curvature_scenarios import given, tiny
from datasets import Dataset
from scenarios import dense_jacobian, linear_parts, lora_regression, tiny_batch, tiny_rows

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace import evidence
from bayeslora.inference.laplace.evidence import LinearEvidence
from bayeslora.inference.laplace.fisher import offsets
from bayeslora.inference.laplace.jacobians import Products, matrices_of
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.observations import Classes
from bayeslora.posterior import Posterior
from bayeslora.program import Program


def rows_like(program: Program, rows: Dataset) -> Dataset:
    """The same rows, each with the label that is thought likeliest."""
    batch = tiny_batch(program, rows)
    logits = program.outputs({site.name: site.initial for site in program.sites}, batch)
    labels = logits.argmax(-1)[batch["index"].argsort()]
    return rows.remove_columns("labels").add_column("labels", labels.tolist())


def expected_evidence(posterior: LaplacePosterior, rows: Dataset) -> float:
    """L + g^T d - d^T F d / 2 integrated over the prior, by dense matrices."""
    program, batch = posterior.program, tiny_batch(posterior.program, rows)
    jacobian = dense_jacobian(program, batch)
    names = list(posterior.prior.roots)
    flat = torch.cat([jacobian[name].flatten(2) for name in names], dim=2).double()
    logits = program.outputs({site.name: site.initial for site in program.sites}, batch).detach().double()
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
    matrices = matrices_of(posterior.sites, posterior.latents)
    mode = torch.cat([matrices[name].flatten() for name in names]).double()
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
    start = Mock(spec=Posterior, chains=("itself",), mean=lambda: shifted)
    found = given(known.program, known.rows, curvature="kron", start=start)
    # Laplace's formula, which takes them for the mode, is far off.
    assert found.log_evidence == pytest.approx(known.log_evidence, abs=1e-3)
    assert float(found.mode_evidence(found.prior)) < known.log_evidence - 1


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["kron", "diag", "full"])
def test_the_evidence_is_the_integral_of_the_expansion_whatever_the_curvature(kind: str, head: bool) -> None:
    program = tiny()
    rows = rows_like(program, tiny_rows(12))
    posterior = given(program, rows, curvature=kind, head=head)
    assert posterior.log_evidence == pytest.approx(expected_evidence(posterior, rows), abs=2e-3)


def test_all_widths_of_a_prior_at_once() -> None:
    posterior = given(tiny(), tiny_rows(12), curvature="full")
    linear = linear_evidence(posterior)
    for each in (linear, posterior.mode_evidence):
        along = each.along(posterior.prior)
        for log in (-2.0, 0.0, 1.0):
            width = torch.tensor([log], dtype=torch.float64)
            wider = posterior.prior.scaled(width)
            assert float(along(width)) == pytest.approx(float(each(wider)), rel=1e-6)


def linear_evidence(posterior: LaplacePosterior) -> LinearEvidence:
    """Of random gradients of two examples."""
    mode = {name: posterior.latents[name] for name in posterior.prior.roots}
    linear = LinearEvidence(mode, posterior.prior, rows=2, vectors=1)
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
    linear.add(products, 0, torch.arange(2), torch.ones(2).double())
    return linear


def test_random_directions_keep_inner_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 layers of 200 columns, each seen in 16 directions: an inner product of rows is off by about
    # sqrt(2 / (16 * 64)) = 4.4 % of their lengths, and 5 standard errors are allowed.
    monkeypatch.setattr(evidence, "DIRECTIONS", 16 * 64)
    generator = torch.Generator().manual_seed(1)
    mode = {"a": torch.zeros(64, 200, 2)}
    prior = NormalPrior({"a": torch.zeros(64, 200, 2)}, {"a": torch.eye(2).double().expand(64, 2, 2)})
    wide, narrow = torch.randn(64, 6, 1, 200, generator=generator), torch.randn(64, 6, 1, 2, generator=generator)
    seen = torch.ones(6, 1, dtype=torch.bool)
    products = {("a", place): Products(wide[place], narrow[place], seen, 200, True) for place in range(64)}
    linear = LinearEvidence(mode, prior, rows=6, vectors=1)
    linear.add(products, 0, torch.arange(6), torch.zeros(6).double())
    gradients = torch.einsum("lntc,lntr->nlcr", wide, narrow).flatten(1).double()
    exact = gradients @ gradients.mT
    lengths = exact.diagonal().sqrt()
    error = (linear._kernel(prior) - exact) / (lengths.unsqueeze(0) * lengths.unsqueeze(1))
    assert 1e-3 < error.abs().max() < 5 * math.sqrt(2 / (16 * 64))


def test_offsets_give_back_the_score_of_labels_that_are_possible() -> None:
    logits, labels = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    likelihood = Classes(4)
    roots, score = likelihood.curvature_root(logits), likelihood.score(logits, labels)
    found = offsets(roots, roots, score, torch.full((20,), torch.inf).double())
    torch.testing.assert_close(torch.einsum("vn,vnc->nc", found, roots), score.double())
    gain = likelihood.gain(logits, labels)
    cut = offsets(roots, roots, score, gain)
    lengths = found.square().sum(0) / 2
    torch.testing.assert_close(cut.square().sum(0) / 2, lengths.minimum(gain))
    assert (lengths > gain).any() and (lengths < gain).any()


def test_certain_labels_have_finite_offsets() -> None:
    logits = torch.tensor([[60.0, -60.0], [60.0, -60.0], [800.0, 0.0]], dtype=torch.float64)
    labels, likelihood = torch.tensor([0, 1, 0]), Classes(2)
    roots = likelihood.curvature_root(logits)
    found = offsets(roots, roots, likelihood.score(logits, labels), likelihood.gain(logits, labels))
    assert found.isfinite().all()
    assert float(found[0, 1].square() / 2) <= 120 + 1e-6


def test_drawn_vectors_give_the_score_on_average() -> None:
    count, likelihood = 40_000, Classes(3)
    logits = torch.tensor([[0.5, -0.2, 0.1]]).double().expand(count, 3)
    labels = torch.ones(count, dtype=torch.long)
    score, metric = likelihood.score(logits, labels), likelihood.curvature_root(logits)
    drawn = likelihood.score(logits, likelihood.distribution(logits).sample()).unsqueeze(0)
    found = torch.einsum("vn,vnc->nc", offsets(drawn, metric, score, torch.full((count,), torch.inf)), drawn)
    errors = found.std(0) / math.sqrt(count)
    assert ((found.mean(0) - score[0]).abs() < 4 * errors).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_many_rows_some_count(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "VECTORS", 8)
    program = tiny(classes=2)
    rows = rows_like(program, tiny_rows(24, classes=2))
    posterior = given(program, rows, temperature=temperature)
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8]
    some = given(program, rows.select(sorted(chosen.tolist())), temperature=temperature)
    assert posterior.log_evidence == pytest.approx(some.log_evidence, abs=1e-4)
    assert posterior.evidence_rows == some.evidence_rows == 8
    assert posterior.log_likelihood == pytest.approx(given(program, rows).log_likelihood / temperature, abs=1e-4)


def test_the_vectors_of_a_row_are_added_up_where_all_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "VECTORS", 3)
    generator = torch.Generator().manual_seed(2)
    mode = {"a": torch.randn(1, 5, 2, generator=generator)}
    prior = NormalPrior({"a": torch.zeros(1, 5, 2)}, {"a": torch.eye(2).double().unsqueeze(0)})
    wide, narrow = torch.randn(2, 3, 1, 5, generator=generator), torch.randn(2, 3, 1, 2, generator=generator)
    shifts = torch.randn(2, 3, generator=generator).double()
    seen = torch.ones(3, 1, dtype=torch.bool)
    batch = [{("a", 0): Products(wide[vector], narrow[vector], seen, 5, True)} for vector in range(2)]
    gradients = torch.einsum("vntc,vntr->vncr", wide, narrow).flatten(2).double()
    targets = gradients @ mode["a"].flatten().double() + shifts
    squares, crossed = 0.0, 0.0
    # With two vectors the two ways to add them up have the exact squares on average.
    for signs in ([1.0, 1.0], [1.0, -1.0]):
        linear = LinearEvidence(mode, prior, rows=3, vectors=2)
        assert linear.rows == 3 and linear._signs is not None and set(linear._signs.unique().tolist()) == {-1.0, 1.0}
        linear._signs = torch.tensor(signs).unsqueeze(1).expand(2, 3)
        for vector, products in enumerate(batch):
            linear.add(products, vector, torch.arange(3), shifts[vector])
        [features], [target] = linear._features, linear._targets
        squares += torch.einsum("np,nq->npq", features, features).double() / 2
        crossed += features.double() * target.unsqueeze(1) / 2
    # The features are sums in single precision, of terms of order one.
    single = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(squares, torch.einsum("vnp,vnq->npq", gradients, gradients), **single)
    torch.testing.assert_close(crossed, torch.einsum("vnp,vn->np", gradients, targets), **single)


def test_the_prior_may_have_any_centre() -> None:
    # Nor does it matter where the weights are: neither at the centre nor at a mode.
    known = lora_regression(noise=2.0)
    model = replace(known.program.model, centre="init")
    centred = Program(known.program.network, known.program.observation, model)
    start = Mock(
        spec=Posterior, chains=("itself",), mean=lambda: {site.name: site.initial + 0.7 for site in centred.sites}
    )
    posterior = given(centred, known.rows, start=start)
    (site,) = posterior.sites
    offset, design = linear_parts(centred, known.rows)
    covariance = design @ design.mT + 4 * torch.eye(len(offset)).double()
    marginal = torch.distributions.MultivariateNormal(offset + design @ site.initial.flatten().double(), covariance)
    exact = float(marginal.log_prob(torch.as_tensor(known.rows["labels"][:]).double()))
    assert posterior.log_evidence == pytest.approx(exact, abs=1e-3)
    assert abs(exact - known.log_evidence) > 0.1


def test_labels_that_are_thought_impossible_have_a_bounded_target() -> None:
    program, rows, temperature = tiny(), tiny_rows(12), 2.0
    program = program.around({site.name: (6 if site.role == "head" else 1) * site.initial for site in program.sites})
    posterior = given(program, rows, temperature=temperature)
    batch, likelihood = tiny_batch(program, rows), program.observation
    logits = program.outputs({site.name: site.initial for site in program.sites}, batch).detach().double()
    roots = likelihood.curvature_root(logits) / math.sqrt(temperature)
    score, gain = (part(logits, batch["labels"]) / temperature for part in (likelihood.score, likelihood.gain))
    c = offsets(roots, roots, score, gain)
    assert (c.square().sum(0) / 2 > gain * (1 - 1e-9)).any()  # some are cut
    jacobian = dense_jacobian(program, batch)
    names = list(posterior.prior.roots)
    rows_of = {
        name: torch.einsum("vnc,ncs->vns", roots, jacobian[name].double().flatten(2)).flatten(0, 1) for name in names
    }
    kernel = sum(
        torch.einsum(
            "nlcr,lrs,mlcs->nm",
            rows_of[name].unflatten(1, posterior.curvature.shapes[name]),
            root @ root.mT,
            rows_of[name].unflatten(1, posterior.curvature.shapes[name]),
        )
        for name, root in posterior.prior.roots.items()
    )
    target = sum(rows_of[name] @ posterior.latents[name].flatten().double() for name in names) + c.flatten()
    covariance = kernel + torch.eye(len(target)).double()
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(target), covariance).log_prob(target)
    expected = normal + len(target) * math.log(2 * math.pi) / 2 + c.square().sum() / 2 - gain.sum()
    assert posterior.log_evidence == pytest.approx(float(expected), abs=2e-3)


def test_a_prior_beyond_rounding_is_refused() -> None:
    posterior = given(tiny(), tiny_rows(12), curvature="full")
    linear = linear_evidence(posterior)
    wide = torch.tensor([400.0], dtype=torch.float64)
    with pytest.raises(TrainingError, match="cannot be computed under a prior that is so wide"):
        linear(posterior.prior.scaled(wide))


def test_the_temperature_divides_the_likelihood() -> None:
    known = lora_regression(noise=2.0)
    warm = given(known.program, known.rows, temperature=4.0)
    # Normal noise at the temperature 4 is twice as large; what is left is the constant of its density.
    other = lora_regression(noise=4.0)
    difference = warm.log_evidence - given(other.program, known.rows).log_evidence
    constant = {noise: -40 * (math.log(noise) + math.log(2 * math.pi) / 2) for noise in (2.0, 4.0)}
    assert difference == pytest.approx(constant[2.0] / 4 - constant[4.0], abs=1e-3)
