"""Noise in A that is isotropic in B A, against projectors and the dense normal law."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayeslora.errors import PosteriorError
from bayeslora.models.guides.product import ProductNoise, spectral_noise
from bayeslora.rng import isolated
from bayeslora.sites import Site

SIGMA, PRIOR = 0.3, torch.tensor([0.7, 1.1]).reshape(2, 1, 1)
RANK = 3


def matrices(kind: str) -> Tensor:
    """Of two layers; of the first, B reaches all directions, or not."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 5, RANK, generator=generator)
    if kind == "deficient":
        wide[0] = wide[0] @ torch.diag(torch.tensor([1.0, 1.0, 0.0])) @ torch.randn(RANK, RANK, generator=generator)
    if kind == "zero":
        wide[0] = 0
    return wide[:, :2] if kind == "few outputs" else wide


def guide_of(b: Tensor, sigma: float = SIGMA) -> ProductNoise:
    initial = torch.randn(2, 4, RANK, generator=torch.Generator().manual_seed(1))
    site = Site("g.A", "A", "g", initial, ("one", "two"))
    return ProductNoise(site, initial, *spectral_noise(b, sigma, PRIOR))


def covariance(guide: ProductNoise) -> Tensor:
    """Of a column of A, (layers, rank, rank)."""
    root = guide.deviations.double().unsqueeze(-1) * guide.frame.double()
    return root.mT @ root


@pytest.mark.parametrize("kind", ["full", "deficient", "zero", "few outputs"])
def test_the_product_has_one_deviation_in_the_column_space(kind: str) -> None:
    b = matrices(kind).double()
    found = covariance(guide_of(b.float()))
    projector = b @ torch.linalg.pinv(b, rtol=1e-5)
    torch.testing.assert_close(b @ found @ b.mT, SIGMA**2 * projector, rtol=0, atol=1e-6)
    # What B does not reach is as wide as the prior, each layer's own.
    rest = torch.eye(RANK).double() - torch.linalg.pinv(b, rtol=1e-5) @ b
    torch.testing.assert_close(found @ rest, PRIOR.double().square() * rest, rtol=0, atol=1e-5)
    reached = {"full": (3, 3), "deficient": (2, 3), "zero": (0, 3), "few outputs": (2, 2)}[kind]
    assert tuple(torch.linalg.matrix_rank(rest, atol=1e-6).tolist()) == tuple(RANK - count for count in reached)


def test_a_direction_that_b_hardly_reaches_gets_no_noise_without_end() -> None:
    b = torch.eye(3).expand(2, 3, 3) * torch.tensor([1.0, 0.1, 1e-6])
    assert guide_of(b).deviations[0].tolist() == pytest.approx([SIGMA, 10 * SIGMA, 0.7])


def test_of_many_outputs_none_is_paired_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed, kept = torch.linalg.svd, []

    def watched(*args: Tensor, **settings: bool) -> tuple[Tensor, ...]:
        found = decomposed(*args, **settings)
        kept.append(max(value.numel() for value in found))
        return found

    monkeypatch.setattr(torch.linalg, "svd", watched)
    guide_of(torch.randn(2, 100, RANK))
    assert kept == [2 * 100 * RANK]


def test_density_is_that_of_the_dense_normal_law() -> None:
    guide = guide_of(matrices("deficient"))
    value = torch.randn(2, 4, RANK, generator=torch.Generator().manual_seed(2))
    law = MultivariateNormal(guide.mu.double(), covariance(guide).unsqueeze(1))
    expected = law.log_prob(value.double()).sum()
    torch.testing.assert_close(guide.log_prob({"g.A": value}).double(), expected, rtol=1e-4, atol=0)
    with pytest.raises(PosteriorError, match=r"'g\.A'"):
        guide.log_prob({})


def test_draws_have_the_covariance() -> None:
    guide, count = guide_of(matrices("deficient")), 3000
    with isolated(0, torch.device("cpu")):
        draws = torch.stack([guide()["g.A"] for _ in range(count)]).double() - guide.mu
    expected = covariance(guide)
    deviations = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    found = torch.einsum("tlnr,tlns->lrs", draws, draws) / (4 * count)
    # Four columns a draw: a correlation has a standard error of sqrt(2 / 4n) at most.
    errors = (found - expected) / (deviations.unsqueeze(-1) * deviations.unsqueeze(-2))
    assert errors.abs().max() < 4 * (2 / (4 * count)) ** 0.5


def test_at_another_sigma_a_draw_is_as_much_longer() -> None:
    b, moved = matrices("deficient"), []
    for sigma in (0.1, 0.4):
        guide = guide_of(b, sigma)
        with isolated(3, torch.device("cpu")):
            moved.append(b @ (guide()["g.A"] - guide.mu).mT)
    torch.testing.assert_close(moved[1], 4 * moved[0], rtol=1e-3, atol=1e-4)
