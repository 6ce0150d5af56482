from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from bayeslora.diagnostics import elbo_trend, prediction_ess, prediction_rhat, shuffled, versions
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
    with pytest.raises(PosteriorError, match="at least 8 draws of each chain, found 7"):
        prediction_rhat(data(1, 7, 0.0, "a Markov chain"))


def test_shuffled_draws_agree_as_far_as_chance_lets_them() -> None:
    apart, agreeing = data(2, 30, apart=0.1), data(2, 30, apart=0.0)
    # Ranks of two chains apart are a half and another: R-hat of 1.8.
    assert float(prediction_rhat(apart).max()) > 1.7 > 1.3 > float(shuffled(apart).max())
    # Of few draws a good part is above 1.01 by chance alone.
    assert float((shuffled(agreeing) > 1.01).mean()) > 0.1


def test_real_labels_are_compared_by_their_mean() -> None:
    values = 0.01 * np.random.default_rng(0).standard_normal((2, 50, 3)) + np.arange(2)[:, None, None]
    noisy = values + 10 * np.random.default_rng(1).standard_normal(values.shape)
    dims = ("chain", "draw", "example")
    group = xr.Dataset({"mean": (dims, values), "y": (dims, noisy)})
    found = prediction_rhat(versions.join({"posterior_predictive": group}, {"draws_are": "independent"}))
    assert found.dims == ("example",) and float(found.min()) > 1.7


def test_effective_draws_of_a_markov_chain() -> None:
    independent = data(2, 200, 0.0, "a Markov chain")
    # By theory 400; the estimate has an error of about a fifth for 200 draws a chain.
    assert 250 < float(prediction_ess(independent).mean()) < 550
    repeated = data(2, 20, 0.0, "a Markov chain")
    group = {
        name: (values.dims, np.repeat(values.values, 10, axis=1))
        for name, values in repeated["posterior_predictive"].data_vars.items()
    }
    sticky = versions.join({"posterior_predictive": xr.Dataset(group)}, {"draws_are": "a Markov chain"})
    assert float(prediction_ess(sticky).mean()) < 100
    with pytest.raises(PosteriorError, match="Draws of a guide are independent"):
        prediction_ess(data(2, 200, 0.0))


def history(losses: np.ndarray) -> list[dict[str, float]]:
    return [{"loss": float(loss), "epoch": float(epoch)} for epoch, loss in enumerate(losses)]


def test_a_loss_that_falls_has_not_come_to_rest() -> None:
    noise = 0.01 * np.random.default_rng(1).standard_normal(200)
    assert elbo_trend(history(1 + noise)).settled
    assert elbo_trend(history(np.ones(200))).settled
    assert not elbo_trend(history(np.linspace(1, 2, 200) + noise)).settled
    falling = elbo_trend(history(np.linspace(2, 1, 200) + noise))
    assert not falling.settled
    # Over the last 40 entries it falls by 0.2: by a tenth of the whole from one half to the other.
    assert falling.change == pytest.approx(0.1, abs=4 * falling.error)
    assert falling.error == pytest.approx(np.hypot(0.029, 0.01) * (2 / 20) ** 0.5, rel=0.3)


def test_a_short_log_tells_nothing() -> None:
    with pytest.raises(PosteriorError, match="at least 20 entries of the training log, found 3"):
        elbo_trend([*history(np.ones(3)), {"epoch": 3.0}])
