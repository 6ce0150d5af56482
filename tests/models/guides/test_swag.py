"""SWAG's law against the dense one, and its moments against those of the whole trajectory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayeslora.errors import PosteriorError
from bayeslora.models.guides.base import PointGuide
from bayeslora.models.guides.swag import Swag, Trajectory
from bayeslora.rng import isolated

SHAPES = {"g.A": (2, 3, 2), "head": (4,)}


def walked(steps: int, kept: int, scale: float = 0.5, size: float = 1.0, spread: float = 0.1) -> tuple[Swag, Tensor]:
    """The guide of a random walk, and the walk (steps, weights)."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    point = PointGuide({"fixed": torch.ones(2), **values}, fixed=["fixed"])
    guide = Swag(Trajectory(point, kept), scale)
    places = size + spread * torch.randn(steps, 16, generator=generator).cumsum(0)
    for place in places:
        for name, part in guide.trajectory.sites(place).items():
            if name != "fixed":
                point.points[name.replace(".", "/")].data = part
        guide.trajectory.collect()
    return guide, places.double()


def covariance(places: Tensor, kept: int, scale: float) -> Tensor:
    """As the paper writes it, with one law of both parts."""
    deviations = (places - places.mean(0))[-kept:]
    return scale * (places.var(0, correction=1).diag() + deviations.mT @ deviations / (kept - 1))


@pytest.mark.parametrize(("steps", "kept", "scale"), [(4, 4, 0.5), (9, 3, 0.5), (6, 2, 1.0)])
def test_moments_are_those_of_the_walk(steps: int, kept: int, scale: float) -> None:
    guide, places = walked(steps, kept, scale)
    mean, factor, variances = (each.double() for each in guide.moments())
    torch.testing.assert_close(mean, places.mean(0), rtol=1e-6, atol=1e-6)
    found = factor.mT @ factor + variances.diag()
    torch.testing.assert_close(found, covariance(places, kept, scale), rtol=1e-4, atol=1e-7)
    if steps == kept:  # each weight then has the variance that it had along the walk
        torch.testing.assert_close(found.diagonal(), 2 * scale * places.var(0), rtol=1e-4, atol=0)
    flat = torch.cat([guide.mean()[name].flatten() for name in SHAPES])
    torch.testing.assert_close(flat.double(), mean, rtol=0, atol=0)
    assert torch.equal(guide.mean()["fixed"], torch.ones(2))


def test_small_steps_of_large_weights_keep_their_digits() -> None:
    # A mean square less a squared mean, in single precision, is wrong by 2^-24 here, the size of the variance itself.
    guide, places = walked(5, 5, size=1.0, spread=1e-4)
    _, _, variances = guide.moments()
    torch.testing.assert_close(variances.double(), places.var(0) / 2, rtol=1e-2, atol=0)


def test_density_is_that_of_the_dense_normal_law() -> None:
    guide, places = walked(6, 4)
    law = MultivariateNormal(places.mean(0), covariance(places, 4, 0.5))
    values = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
    flat = torch.cat([value.flatten() for value in values.values()])
    found = guide.log_prob({"fixed": torch.ones(2), **values})
    # Moments are in single precision.
    torch.testing.assert_close(found, law.log_prob(flat.double()), rtol=1e-4, atol=0)
    with pytest.raises(PosteriorError, match="'head'"):
        guide.log_prob({"fixed": torch.ones(2), "g.A": values["g.A"]})


def test_draws_have_the_moments() -> None:
    guide, places = walked(6, 4)
    count = 4000
    with torch.no_grad(), isolated(0, torch.device("cpu")):
        draws = [guide() for _ in range(count)]
    assert all(torch.equal(draw["fixed"], torch.ones(2)) for draw in draws)
    flat = torch.stack([torch.cat([draw[name].flatten() for name in SHAPES]) for draw in draws]).double()
    expected = covariance(places, 4, 0.5)
    deviations = expected.diagonal().sqrt()
    # Standard errors: sd / sqrt(n) of a mean, sqrt(2 / n) at most of a correlation; the largest of 256 is within 4.5.
    shifts = (flat.mean(0) - places.mean(0)) / deviations
    assert shifts.abs().max() < 4.5 / math.sqrt(count)
    errors = (flat.T.cov() - expected) / deviations.outer(deviations)
    assert errors.abs().max() < 4.5 * math.sqrt(2 / count)


def test_a_weight_that_never_moved_is_a_point() -> None:
    guide, _ = walked(4, 3, spread=0.0)
    with torch.no_grad():
        assert torch.equal(guide()["head"], guide.mean()["head"])
    assert torch.isfinite(guide.log_prob({"fixed": torch.ones(2), **guide.mean()}))


@pytest.mark.parametrize("steps", [0, 1])
def test_one_place_has_no_spread(steps: int) -> None:
    guide, places = walked(steps, 3)
    with pytest.raises(PosteriorError, match=f"come to {steps}"):
        guide()
    expected = places[0] if steps else torch.zeros(16).double()
    torch.testing.assert_close(torch.cat([guide.mean()[name].flatten() for name in SHAPES]).double(), expected)
