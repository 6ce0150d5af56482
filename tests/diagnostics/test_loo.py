from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import pytest
import torch
from scenarios import Regression, linear_parts, lora_regression, tiny_program, tiny_rows

from bayeslora.diagnostics import khat, khat_by_block, layer_blocks, loo, versions
from bayeslora.errors import PosteriorError
from bayeslora.inference import fit
from bayeslora.posterior import Posterior

EXACT = {
    "mode": "train", "curvature": "full", "tune": "none", "epochs": 250, "batch_size": 40, "learning_rate": 0.1,
    "schedule": "cosine", "warmup": 0.0, "max_grad_norm": 1e9, "progress": False,
}  # fmt: skip
DRAWS = 1000


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(noise=2.0)


@pytest.fixture(scope="module")
def exact(known: Regression) -> Posterior:
    return fit(known.program, known.rows, "laplace", **EXACT)


def left_out(known: Regression) -> np.ndarray:
    """Exact log density of each label given all others, from the joint normal law of all labels (noise 2, prior 1)."""
    labels = torch.tensor(known.rows["labels"], dtype=torch.float64)
    offset, design = linear_parts(known.program, known.rows)
    precision = torch.linalg.inv(design @ design.T + 4.0 * torch.eye(len(labels), dtype=torch.float64))
    # Sundararajan and Keerthi, Neural Computation 2001: the variance is 1 / P_ii, the residual (P r)_i / P_ii.
    variance = 1 / precision.diagonal()
    residual = (precision @ (labels - offset)) * variance
    return torch.distributions.Normal(0.0, variance.sqrt()).log_prob(residual).numpy()


def test_leave_one_out_is_exact_where_the_posterior_is(known: Regression, exact: Posterior) -> None:
    found = loo(exact.to_inference_data(known.rows, draws=DRAWS, prior_draws=0, progress=False))
    pointwise = found.loo_i.values if hasattr(found, "loo_i") else found.elpd_i.values
    expected = left_out(known)
    # Each is -log of a mean over draws of 1 / p(y_i), of which the relative deviation is below 1: 4 / sqrt(draws).
    np.testing.assert_allclose(pointwise, expected, rtol=0, atol=4 / DRAWS**0.5)
    assert found.se > abs(pointwise.sum() - expected.sum())
    assert float(found.pareto_k.max()) < 0.5


def shrunk(known: Regression, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Log density of the exact posterior, and of one whose deviations are so many times its own, at draws of that."""
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(known.covariance)
    noise = torch.randn(DRAWS, len(known.mean), generator=generator, dtype=torch.float64)
    draws = known.mean + factor * noise @ root.T
    p, q = (torch.distributions.MultivariateNormal(known.mean, scale_tril=scale * root) for scale in (1.0, factor))
    return p.log_prob(draws).numpy(), q.log_prob(draws).numpy()


def test_khat_tells_a_narrow_guide_from_the_posterior(known: Regression, exact: Posterior) -> None:
    stats = exact.to_inference_data(known.rows, draws=DRAWS, prior_draws=0, progress=False)["sample_stats"]
    assert khat(stats["log_p"].values.ravel(), stats["log_q"].values.ravel()) < 0.5
    # p / q of normal laws has a Pareto tail of shape 1 - factor^2 in each of the six directions.
    assert khat(*shrunk(known, 1.2)) < 0.5
    assert khat(*shrunk(known, 0.4)) > 0.7


def test_ratios_without_a_tail_are_not_trusted() -> None:
    weights, shapes = versions.psis(np.zeros((2, 100)))
    np.testing.assert_allclose(weights, -np.log(100))
    assert shapes.shape == (2,) and np.isinf(shapes).all()


def test_leave_one_out_corrects_for_a_guide_that_is_off(known: Regression, exact: Posterior) -> None:
    data = exact.to_inference_data(known.rows, draws=DRAWS, prior_draws=0, progress=False)
    right = loo(data)
    stats = data["sample_stats"]
    # Draws of the same law, of which a tenth is said to be e^2 times as likely as it is.
    rare = np.arange(DRAWS) % 10 == 0
    stats["log_q"] = stats["log_q"] + 2.0 * rare
    weighted = loo(data)
    plain = az.loo(data)
    assert total(weighted) == pytest.approx(total(right), abs=1.0) and total(plain) != total(weighted)


def total(found: Any) -> float:
    return float(found.elpd if hasattr(found, "elpd") else found.elpd_loo)


def test_models_are_compared_by_arviz(known: Regression, exact: Posterior) -> None:
    narrow = fit(known.program, known.rows, "laplace", **EXACT | {"temperature": 0.05})
    data = {"exact": exact, "cold": narrow}
    table = az.compare(
        {
            name: loo(each.to_inference_data(known.rows, draws=400, prior_draws=0, progress=False))
            for name, each in data.items()
        }
    )
    assert set(table.index) == {"exact", "cold"}


def test_blocks_are_the_layers_of_the_network() -> None:
    program = tiny_program()
    blocks = layer_blocks(program)
    assert [name for name in blocks][:2] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert sum(map(len, blocks.values())) == 13


def test_khat_by_block_sees_the_block_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows = tiny_program(), tiny_rows(12)
    posterior = fit(program, rows, "svi", epochs=1, batch_size=4, progress=False)
    # Where the guide is the prior and says so, p / q is the likelihood: bounded. Here one layer's noise is cut.
    guide = posterior.guide.parts[0]
    with torch.no_grad():
        guide.log_eps[0] = -2.0
    layer = next(site for site in program.sites if site.role == "A").layers[0]
    other = next(site for site in program.sites if site.role == "A").layers[1]
    found = khat_by_block(posterior, rows, 200, blocks={"cut": {layer}, "whole": {other}}, progress=False)
    assert found["cut"] > 0.7 > found["whole"]


def test_mistakes_are_told() -> None:
    program, rows = tiny_program(), tiny_rows(12)
    points = fit(program, rows, "map", epochs=1, progress=False)
    with pytest.raises(PosteriorError, match="at least 25 draws, found 1"):
        loo(points.to_inference_data(rows, progress=False))
    with pytest.raises(PosteriorError, match="density under which layers are independent"):
        khat_by_block(points, rows)
    guide = fit(program, rows, "svi", epochs=1, progress=False)
    with pytest.raises(PosteriorError, match="rows that the posterior was fitted to"):
        loo(guide.to_inference_data(tiny_rows(5, seed=3), draws=30, progress=False))
