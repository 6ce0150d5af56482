"""The Gaussian and its predictions where the exact posterior is known, and against dense algebra where it is not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from curvature_scenarios import EXACT, given, matrix_of, tiny
from scenarios import (
    Regression,
    dense_jacobian,
    lora_regression,
    saved_base,
    text_program,
    text_rows,
    tiny_batch,
    tiny_rows,
)
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.inference import fit, load
from bayeslora.inference.laplace import links
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised
from bayeslora.models import Gaussian
from bayeslora.passes import Rows

#: The prior as it is.
ONE = torch.ones(1)


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(noise=2.0)


@pytest.fixture(scope="module", params=["full", "exact", "kron"])
def conjugate(request: pytest.FixtureRequest, known: Regression) -> LaplacePosterior:
    # The gradient on the side of the rank is the same for every row, so that one Kronecker product is exact here.
    posterior = fit(known.program, known.rows, "laplace", mode="map", curvature=request.param, tune="none", **EXACT)
    assert isinstance(posterior, LaplacePosterior)
    return posterior


def covariance_of(posterior: LaplacePosterior) -> Tensor:
    """Covariance of the flattened matrices, by the gradients of each entry."""
    size = posterior.curvature.size
    basis, (key,) = posterior.basis, posterior.curvature.layers
    root = posterior.prior.roots[key[0]][key[1]]
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *posterior.curvature.shapes[key[0]][1:]) @ root
    coordinates = basis.project(key, eye)
    gains = basis.gains(key)
    return eye.flatten(1) @ eye.flatten(1).mT - (coordinates * gains / (1 + gains)) @ coordinates.mT


def test_conjugate_mean_covariance_and_evidence(conjugate: LaplacePosterior, known: Regression) -> None:
    deviation = known.covariance.diagonal().sqrt()
    error = (conjugate.mean()["linear_3x1.A"].flatten().double() - known.mean) / deviation
    assert error.abs().max() < 1e-3
    found = covariance_of(conjugate)
    scale = deviation * deviation[:, None]
    torch.testing.assert_close(found / scale, known.covariance / scale, rtol=0, atol=1e-5)
    # An error of 1e-3 standard deviations in the mode costs 1e-6 nats.
    assert conjugate.log_evidence == pytest.approx(known.log_evidence, abs=1e-3)


def test_conjugate_predictive(conjugate: LaplacePosterior, known: Regression) -> None:
    rows = Rows.of(known.program, known.rows, 7)
    mean, (covariance,) = linearised(conjugate, rows, ONE)
    network = known.program.network
    layer = network.base_model.model.linear
    features = network.base_model.model.table.weight.double()
    design = torch.einsum("ni,j->nij", features, layer.lora_B["default"].weight[0].double()).reshape(len(features), -1)
    offset = features @ layer.base_layer.weight[0].double()
    torch.testing.assert_close(mean[:, 0], (offset + design @ known.mean).detach(), rtol=0, atol=1e-3)
    variance = torch.einsum("ni,ij,nj->n", design, known.covariance, design).detach()
    torch.testing.assert_close(covariance[:, 0, 0], variance, rtol=1e-4, atol=0)


def test_draws_and_density_are_those_of_the_exact_posterior(conjugate: LaplacePosterior, known: Regression) -> None:
    draws = conjugate.sample(1000)["linear_3x1.A"].flatten(1).double()
    whitener = torch.linalg.inv(torch.linalg.cholesky(known.covariance))
    z = (draws - known.mean) @ whitener.T
    # 1,000 draws: standard error 0.032 of a mean, at most 0.045 of an entry of the covariance.
    assert z.mean(0).abs().max() < 4 * 0.032
    assert (z.T @ z / 1000 - torch.eye(6)).abs().max() < 4 * 0.045
    exact = torch.distributions.MultivariateNormal(known.mean, known.covariance)
    for draw in draws[:3]:
        value = {"linear_3x1.A": draw.float().reshape(1, 3, 2)}
        torch.testing.assert_close(conjugate.log_prob(value), exact.log_prob(draw), rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_predictive_draws_and_density_follow_from_the_curvature(kind: str) -> None:
    program, rows = tiny(), tiny_rows(12)
    posterior = given(program, rows, curvature=kind, curvature_rank=24)
    precision = matrix_of(posterior)
    prior = torch.cat(
        [
            (root @ root.mT)
            .inverse()
            .diagonal(dim1=-2, dim2=-1)
            .unsqueeze(1)
            .expand(posterior.curvature.shapes[name])
            .flatten()
            for name, root in posterior.prior.roots.items()
        ]
    )
    expected = torch.linalg.inv(precision + prior.diag())
    jacobian = dense_jacobian(program, tiny_batch(program, rows))
    flat = torch.cat([jacobian[name].flatten(2) for name in posterior.curvature.shapes], dim=2).double()
    order = tiny_batch(program, rows)["index"]
    _, (found,) = linearised(posterior, Rows.of(program, rows, 5), ONE)
    torch.testing.assert_close(found[order], flat @ expected @ flat.mT, rtol=1e-3, atol=1e-5)
    draws = posterior.sample(300)
    names = list(posterior.curvature.shapes)
    errors = torch.cat([(draws[name] - posterior.latents[name]).flatten(1) for name in names], dim=1).double()
    # |z|^2 of P weights has the mean P and, over 300 draws, a standard error of sqrt(2 P / 300).
    whitened = errors @ torch.linalg.cholesky(precision + prior.diag())
    size = posterior.curvature.size
    assert float(whitened.square().sum(1).mean()) == pytest.approx(size, abs=4 * math.sqrt(2 * size / 300))
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(size).double(), precision_matrix=precision + prior.diag()
    )
    value = {name: draws[name][0] for name in names}
    assert float(posterior.log_prob(value)) == pytest.approx(float(exact.log_prob(errors[0])), rel=1e-4)
    mode = torch.cat([posterior.latents[name].flatten() for name in names]).double()
    determinants = torch.linalg.slogdet(precision + prior.diag())[1] - prior.log().sum()
    evidence = posterior.log_likelihood - float((mode.square() * prior).sum() + determinants) / 2
    assert float(posterior.mode_evidence(posterior.prior)) == pytest.approx(evidence, rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_linear_draws_share_one_set_of_weights(kind: str) -> None:
    program, rows = tiny(), tiny_rows(12)
    posterior = given(program, rows, curvature=kind)
    batch = tiny_batch(program, rows)
    jacobian = dense_jacobian(program, batch)
    flat = torch.cat([jacobian[name].flatten(2) for name in posterior.curvature.shapes], dim=2)
    weights = posterior.sample(4, seed=3)
    shifts = torch.cat([(weights[name] - posterior.latents[name]).flatten(1) for name in posterior.curvature.shapes], 1)
    at_mode = posterior.predict(rows, method="mean", progress=False).logits[:, batch["index"]]
    found = posterior.predict(rows, draws=4, seed=3, method="linear", batch_size=5, progress=False)
    expected = at_mode + torch.einsum("ncp,sp->snc", flat, shifts)
    torch.testing.assert_close(found.logits[:, batch["index"]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_one_pass_gives_the_covariance_under_priors_of_several_widths(kind: str) -> None:
    program, rows = tiny(), tiny_rows(12)
    posterior = given(program, rows, curvature=kind)
    over = Rows.of(program, rows, 5)
    _, found = linearised(posterior, over, torch.tensor([0.1, 3.0]))
    for multiple, covariance in zip((0.1, 3.0), found, strict=True):
        other = posterior.under(posterior.prior.scaled(torch.tensor([math.log(multiple)], dtype=torch.float64)))
        torch.testing.assert_close(covariance, linearised(other, over, ONE)[1][0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_a_loaded_posterior_predicts_the_same(kind: str, tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"), Gaussian(sites="both"))
    posterior = fit(
        program, text_rows(), "laplace", epochs=4, batch_size=4, curvature=kind, head=True, progress=False, cpu=True
    )
    posterior.save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.record == posterior.record
    for method in posterior.predictors:
        one, two = (each.predict(text_rows(), draws=2, method=method, progress=False) for each in (posterior, loaded))
        assert torch.equal(one.logits, two.logits)
        assert one.method == method
        # What more data would not remove is no more than the whole, but for draws of the logits.
        assert (one.expected_entropy <= one.entropy + 0.02).all()


def test_links_to_probabilities_are_for_classes(known: Regression) -> None:
    posterior = fit(known.program, known.rows, "laplace", mode="given", tune="none", progress=False)
    for method in ("probit", "bridge"):
        with pytest.raises(PosteriorError, match=f"link '{method}' is one to class probabilities"):
            posterior.predict(known.rows, method=method, progress=False)
    joint = posterior.predict(known.rows, progress=False)
    exact, _ = linearised(posterior, Rows.of(known.program, known.rows, 8), ONE)
    # 1,000 draws: the mean has a standard error of a thirtieth of the spread of the outputs.
    assert ((joint.mean - exact[:, 0]).abs() < 5 * (joint.variance / 1000).sqrt()).all()


@pytest.mark.parametrize("link", ["mc-joint", "mc-indep", "probit", "bridge"])
def test_each_link_predicts_and_splits_the_gaussian_of_the_logits(link: str) -> None:
    program, rows = tiny(), tiny_rows(6)
    posterior = given(program, rows)
    over = Rows.of(program, rows, 6)
    means, (covariances,) = linearised(posterior, over, ONE)
    found = posterior.predict(rows, method=link, progress=False)
    generator = torch.Generator().manual_seed(5)
    variances = covariances if link != "mc-indep" else covariances.diagonal(dim1=-2, dim2=-1).diag_embed()
    law = torch.distributions.MultivariateNormal(means, variances + 1e-9 * torch.eye(3).double())
    noise = torch.randn(20_000, *means.shape, generator=generator, dtype=torch.float64)
    drawn = (means + (law.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)).softmax(-1)
    average, entropy = drawn.mean(0), torch.special.entr(drawn).sum(-1).mean(0)
    if link == "bridge":
        concentration = links.bridge(means, covariances)
        average = concentration / concentration.sum(-1, keepdim=True)
        entropy = links.dirichlet_entropy(concentration)
    if link == "probit":
        average = links.probit(means, covariances).softmax(-1)
    # The links' own 1,000 draws of a probability, or an entropy, have standard errors of 0.5 / sqrt(1000) at most.
    torch.testing.assert_close(found.probabilities, average, rtol=0, atol=4 * 0.5 / 1000**0.5)
    torch.testing.assert_close(found.expected_entropy, entropy, rtol=0, atol=4 * 0.5 / 1000**0.5)
    assert found.mutual_information.max() > 0.05 or link == "bridge"


def test_independent_draws_are_not_the_joint_ones() -> None:
    posterior, rows = given(tiny(), tiny_rows(6)), tiny_rows(6)
    joint, independent = (
        posterior.predict(rows, method=link, progress=False).probabilities for link in ("mc-joint", "mc-indep")
    )
    assert (joint - independent).abs().max() > 0.01
