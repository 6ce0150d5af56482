"""Seeds that are made of others."""

from __future__ import annotations

import torch

from bayeslora.rng import derived_seed, derived_short_seed


def test_derived_seeds_stay_what_they_are() -> None:
    """What was drawn by them, such as the passes of a saved posterior, can be drawn again."""
    assert derived_seed(3, 1, 4) == 1798932345466327501
    assert derived_short_seed(3, 1) == 457190280


def test_derived_seeds_differ_and_fit_where_they_are_used() -> None:
    numbers = [(0, 0), (0, 1), (1, 0), (2**32 - 1, 7)]
    assert len({derived_seed(*each) for each in numbers}) == len({derived_short_seed(*each) for each in numbers}) == 4
    assert all(derived_short_seed(*each) < 2**32 for each in numbers)
    for each in numbers:
        torch.Generator().manual_seed(derived_seed(*each))
