from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from bayeslora.diagnostics import elbo_trend, prediction_rhat, versions
from bayeslora.errors import PosteriorError


def data(chains: int, draws: int, apart: float, draws_are: str = "independent") -> Any:
    """Probabilities of 3 rows and 2 classes; chains are ``apart`` from each other in the first row."""
    generator = np.random.default_rng(0)
    values = 0.5 + 0.01 * generator.standard_normal((chains, draws, 3, 2))
    values[:, :, 0] += apart * np.arange(chains)[:, None, None]
    dims = ("chain", "draw", "example", "class")
    group = xr.Dataset({"probabilities": (dims, values), "y": (dims[:3], np.zeros(values.shape[:3]))})
    return versions.join({"posterior_predictive": group}, {"draws_are": draws_are})


def test_rhat_sees_the_row_in_which_fits_differ() -> None:
    found = prediction_rhat(data(4, 100, apart=0.1))
    assert found.dims == ("example", "class")
    # The ratio of the deviations, between chains 0.13 and within 0.01, is far beyond any noise.
    assert float(found[0].min()) > 2 and float(found[1:].max()) < 1.05


def test_rhat_of_one_markov_chain_is_of_its_halves() -> None:
    assert float(prediction_rhat(data(1, 200, 0.0, "a Markov chain")).max()) < 1.05


def test_rhat_of_independent_draws_is_refused() -> None:
    with pytest.raises(PosteriorError, match=r"independent.*chains=4"):
        prediction_rhat(data(1, 100, 0.0))
    with pytest.raises(PosteriorError, match="at least 4 draws of each chain, found 2"):
        prediction_rhat(data(2, 2, 0.0))


def history(losses: np.ndarray) -> list[dict[str, float]]:
    return [{"loss": float(loss), "epoch": float(epoch)} for epoch, loss in enumerate(losses)]


def test_a_loss_that_falls_has_not_come_to_rest() -> None:
    noise = 0.01 * np.random.default_rng(1).standard_normal(200)
    assert elbo_trend(history(1 + noise)).settled
    falling = elbo_trend(history(np.linspace(2, 1, 200) + noise))
    assert not falling.settled
    # Over the last 40 entries it falls by 0.2: by a tenth of the whole from one half to the other.
    assert falling.change == pytest.approx(0.1, abs=4 * falling.error)
    assert falling.error == pytest.approx(np.hypot(0.029, 0.01) * (2 / 20) ** 0.5, rel=0.3)


def test_a_short_log_tells_nothing() -> None:
    with pytest.raises(PosteriorError, match="at least 20 entries of the training log, found 3"):
        elbo_trend([*history(np.ones(3)), {"epoch": 3.0}])
