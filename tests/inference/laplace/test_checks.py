"""What is said of a mode, and of the draws around it, that cannot be right."""

from __future__ import annotations

import pytest
import torch

from bayeslora.errors import SettingError
from bayeslora.inference.laplace.checks import check_distance, warn_of_mode
from bayeslora.inference.laplace.priors import NormalPrior


def test_a_prior_around_the_weights_themselves_has_no_scale() -> None:
    weights = {"a": torch.ones(1, 4, 2), "b": torch.ones(1, 3, 2)}
    roots = {name: torch.eye(2, dtype=torch.float64).expand(1, 2, 2) for name in weights}
    check_distance(NormalPrior({name: value + 1 for name, value in weights.items()}, roots), weights)
    with pytest.raises(SettingError, match="The prior of site 'b' is centred on the very weights"):
        check_distance(NormalPrior({"a": weights["a"] + 1, "b": weights["b"]}, roots), weights)


def test_a_mode_may_be_a_little_worse_than_chance(recwarn: pytest.WarningsRecorder) -> None:
    warn_of_mode(-1.5, -1.1)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="a log-likelihood of -1.70 a row, and -1.10 by guessing"):
        warn_of_mode(-1.7, -1.1)
