"""Laws of one kind as one law, layer after layer."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Distribution, kl_divergence

from bayeslora.models.joining import joined, kind_of
from bayeslora.models.wishart import DiagonalWishartCholesky, WishartCholesky


def wishart(layers: int, df: float = 7.0) -> dist.TorchDistribution:
    return DiagonalWishartCholesky(df, torch.rand(layers, 3, dtype=torch.float64) + 0.5).to_event(1)


def dirichlet(layers: int, components: int = 4) -> dist.TorchDistribution:
    return dist.Dirichlet(torch.rand(layers, components, dtype=torch.float64) + 0.5).to_event(1)


@pytest.mark.parametrize("make", [wishart, dirichlet])
def test_divergences_of_joined_laws_are_those_of_each(make) -> None:
    q, p = [make(2), make(5)], [make(2), make(5)]
    assert kind_of(q[0]) == kind_of(q[1]) is not None
    found = kl_divergence(joined(q), joined(p))
    assert found.shape == (7,)
    parts = torch.stack([found[:2].sum(), found[2:].sum()])
    torch.testing.assert_close(parts, torch.stack([kl_divergence(*pair) for pair in zip(q, p, strict=True)]))


@pytest.mark.parametrize(
    ("one", "other"), [(wishart(2), wishart(2, 8.0)), (dirichlet(2), dirichlet(2, 3)), (wishart(2), dirichlet(2, 3))]
)
def test_laws_of_other_events_or_degrees_are_of_another_kind(one: Distribution, other: Distribution) -> None:
    assert kind_of(one) != kind_of(other)


class Own(dist.Dirichlet):
    """A law of a user's own, of which nothing is known."""


@pytest.mark.parametrize(
    "law",
    [
        dist.Dirichlet(torch.ones(2, 3)),
        Own(torch.ones(2, 3)).to_event(1),
        dist.Dirichlet(torch.ones(5, 2, 3)).to_event(1),
        dist.Dirichlet(torch.ones(5, 2, 3)).to_event(2),
        WishartCholesky(7.0, torch.eye(3).expand(2, 3, 3)).to_event(1),
        dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
    ],
    ids=str,
)
def test_all_other_laws_stay_apart(law: Distribution) -> None:
    assert kind_of(law) is None
