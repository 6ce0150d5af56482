"""Whether fits have come to rest, and whether independent ones agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bayeslora.diagnostics.inference_data import MARKOV
from bayeslora.errors import PosteriorError

__all__ = ["Trend", "elbo_trend", "prediction_ess", "prediction_rhat", "shuffled"]

#: Entries of a training log that are needed to tell a trend from noise.
LEAST_ENTRIES = 20


def prediction_rhat(data: Any) -> xr.DataArray:
    """R-hat of the predicted probabilities, for each example and class; of predicted means, for real labels.

    Fits that agree have some above 1.01 by chance, the more the fewer draws: `shuffled` gives as many as chance does.

    A and B are known up to an invertible matrix between them, (A, B) -> (R A, B R^-1): chains that agree in every
    prediction have weights with no common mean, and R-hat of weights says nothing. Predictions are not touched by it.

    Args:
        data: of `to_inference_data`: several chains, or one Markov chain, which is split.

    Raises:
        PosteriorError: one chain of independent draws, which agree with themselves, or fewer than four draws of a
            chain or of a half.

    References:
        Vehtari, Gelman, Simpson, Carpenter and Buerkner, *Rank-normalization, folding, and localization: an improved
        R-hat*, Bayesian Analysis 2021.
    """
    return _rhat(_chains(data))


def shuffled(data: Any, seed: int = 0) -> xr.DataArray:
    """`prediction_rhat` with the draws of all chains shuffled among them: what chance gives fits that agree.

    For Markov chains it gives less than that, since neighbours in a chain are alike.

    Args:
        data: of `to_inference_data`.
        seed: of the shuffle, the same for all rows and classes.

    Raises:
        PosteriorError: as of `prediction_rhat`.
    """
    values = _chains(data).transpose("chain", "draw", ...)
    flat = values.values.reshape(-1, *values.shape[2:])
    return _rhat(values.copy(data=np.random.default_rng(seed).permutation(flat).reshape(values.shape)))


def prediction_ess(data: Any) -> xr.DataArray:
    """Effective number of draws of each predicted probability (or mean, for real labels) by Markov chains.

    Args:
        data: of `to_inference_data`, of a posterior that was sampled.

    Raises:
        PosteriorError: independent draws, of which each counts, or fewer than four draws of a chain or of a half.
    """
    import arviz as az

    if data.attrs["draws_are"] != MARKOV:
        raise PosteriorError("Draws of a guide are independent: as many are effective as there are.")
    found: xr.DataArray = az.ess(xr.Dataset({"values": _chains(data)}))["values"]
    return found


def _rhat(values: xr.DataArray) -> xr.DataArray:
    import arviz as az

    found: xr.DataArray = az.rhat(xr.Dataset({"values": values}))["values"]
    return found


def _chains(data: Any) -> xr.DataArray:
    """Predictions by at least two chains."""
    group = data["posterior_predictive"]
    values = group["probabilities" if "probabilities" in group else "mean"]
    sizes = values.sizes
    if data.attrs["draws_are"] != MARKOV and sizes["chain"] < 2:
        raise PosteriorError(
            "Draws of one guide are independent: R-hat and effective sample size say nothing of them. Fit several "
            "chains, fit(..., chains=4), to see whether fits agree."
        )
    least = 8 if sizes["chain"] == 1 else 4
    if sizes["draw"] < least:
        raise PosteriorError(f"R-hat needs at least {least} draws of each chain, found {sizes['draw']}.")
    if sizes["chain"] > 1:
        return values
    half = sizes["draw"] // 2  # of one chain the first and the second half are compared
    parts = [values.isel(draw=slice(start, start + half)) for start in (0, half)]
    return xr.concat([part.drop_vars("draw", errors="ignore") for part in parts], "chain")


@dataclass(frozen=True)
class Trend:
    """The loss over the last fifth of the training log, ten entries at least.

    A learning rate that falls to zero brings any loss to rest: that it rests says that this fit is over, not that a
    longer one would not be better.

    Attributes:
        change: by how much the second half of it is below the first, in nats an example.
        error: standard error of that.
    """

    change: float
    error: float

    @property
    def settled(self) -> bool:
        """Whether it falls or rises by no more than noise."""
        return abs(self.change) <= 2 * self.error


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
