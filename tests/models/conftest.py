"""Small sites of LoRA weights in float64, where densities are compared exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

from bayeslora.sites import Site

LAYERS, COLUMNS, OUTPUTS, RANK = 3, 5, 4, 2


def make_sites(rank: int = RANK, layers: int = LAYERS, columns: int = COLUMNS) -> tuple[Site, ...]:
    """One group of LoRA layers with a fresh adapter (B = 0), and a head."""
    generator = torch.Generator().manual_seed(7)
    names = tuple(f"encoder.layer.{index}.dense" for index in range(layers))

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5

    return (
        Site("linear_5x4.A", "A", "linear_5x4", uniform(layers, columns, rank), names),
        Site("linear_5x4.B", "B", "linear_5x4", torch.zeros(layers, OUTPUTS, rank, dtype=torch.float64), names),
        Site("head.classifier.weight", "head", "head", uniform(2, OUTPUTS), ("classifier.weight",)),
    )


@pytest.fixture
def sites() -> tuple[Site, ...]:
    return make_sites()


@pytest.fixture(name="make_sites")
def _make_sites():
    return make_sites


@pytest.fixture(autouse=True)
def seeded_and_no_global_parameters() -> Iterator[None]:
    """Fix the seed, and check after every test that Pyro's global parameter store was left alone."""
    torch.manual_seed(0)
    yield
    assert len(pyro.get_param_store()) == 0
