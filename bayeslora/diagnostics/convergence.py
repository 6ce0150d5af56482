"""Whether fits have come to rest, and whether independent ones agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bayeslora.errors import PosteriorError

__all__ = ["Trend", "elbo_trend", "prediction_rhat"]

#: Entries of a training log that are needed to tell a trend from noise.
LEAST_ENTRIES = 20


def prediction_rhat(data: Any) -> xr.DataArray:
    """R-hat of the predicted probabilities, for each example and class: above 1.01 the fits predict differently.

    A and B are known up to an invertible matrix between them, (A, B) -> (R A, B R^-1): chains that agree in every
    prediction have weights with no common mean, and R-hat of weights says nothing. Predictions are not touched by it.

    Args:
        data: of `to_inference_data`: several chains, or one Markov chain, which is split.

    Raises:
        PosteriorError: one chain of independent draws, which agree with themselves, or fewer than four draws.

    References:
        Vehtari, Gelman, Simpson, Carpenter and Buerkner, *Rank-normalization, folding, and localization: an improved
        R-hat*, Bayesian Analysis 2021.
    """
    import arviz as az

    group = data["posterior_predictive"]
    sizes = group["y"].sizes
    if data.attrs["draws_are"] == "independent" and sizes["chain"] < 2:
        raise PosteriorError(
            "Draws of one guide are independent: R-hat and effective sample size say nothing of them. Fit several "
            "chains, fit(..., chains=4), to see whether fits agree."
        )
    if sizes["draw"] < 4:
        raise PosteriorError(f"R-hat needs at least 4 draws of each chain, found {sizes['draw']}.")
    name = "probabilities" if "probabilities" in group else "y"
    values = group[name]
    if sizes["chain"] == 1:  # of which the first and the second half are compared
        half = sizes["draw"] // 2
        parts = [values.isel(draw=slice(start, start + half)) for start in (0, half)]
        values = xr.concat([part.drop_vars("draw", errors="ignore") for part in parts], "chain")
    found: xr.DataArray = az.rhat(xr.Dataset({name: values}))[name]
    return found


@dataclass(frozen=True)
class Trend:
    """The loss over the last fifth of the training log.

    Attributes:
        change: by how much the second half of it is below the first, in nats an example.
        error: standard error of that.
    """

    change: float
    error: float

    @property
    def settled(self) -> bool:
        """Whether the fall is no more than noise."""
        return self.change < 2 * self.error


def elbo_trend(history: Sequence[Mapping[str, float]]) -> Trend:
    """Whether the negative ELBO still falls at the end of a fit.

    Args:
        history: of a posterior's record.

    Raises:
        PosteriorError: the log has too few entries with a loss.
    """
    losses = np.array([row["loss"] for row in history if "loss" in row])
    if len(losses) < LEAST_ENTRIES:
        raise PosteriorError(
            f"A trend needs at least {LEAST_ENTRIES} entries of the training log, found {len(losses)}: fit with a "
            "smaller log_every."
        )
    last = losses[-max(10, len(losses) // 5) :]
    before, after = last[: len(last) // 2], last[len(last) // 2 :]
    error = np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return Trend(float(before.mean() - after.mean()), float(error))
