"""Leave-one-out cross-validation without refitting, of posteriors that are approximate."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bayeslora.diagnostics import versions
from bayeslora.diagnostics.guide import LEAST_DRAWS, good_k
from bayeslora.diagnostics.inference_data import MARKOV
from bayeslora.errors import PosteriorError

__all__ = ["loo", "loo_parts"]


def loo(data: Any) -> Any:
    """Expected log predictive density of each training row with that row left out, by importance sampling.

    A draw has the weight p(y, draw) / q(draw) / p(y_i | draw)^(1 / temperature), Pareto smoothed: the first quotient
    corrects for the guide (Magnusson et al.), the second leaves row i out. Draws of a Markov chain have no first one.
    Where a density is known with auxiliary values alone (`Posterior.auxiliary`), p / q is that of both jointly: the
    estimate is of the same quantity, with a larger error, of which k tells.
    Independent fits are taken each by itself, and their densities averaged: the estimate is of their equal mixture.
    Point estimates, and prior means that were learned (`svi` by default, see `Posterior.learned_means`), stay where all
    rows have put them, with row i among them: the estimate is then of the posterior given those, and too good by as
    much as they have overfitted. It ranks no model that has some against one that has none.

    Args:
        data: of `to_inference_data`, on the rows that the posterior was fitted to.

    Returns:
        arviz's ``ELPDData`` with pointwise values, for `az.compare` and `az.plot_khat`; k-hat of a row is the largest
        of the fits'. Where it is above ``good_k`` the estimate cannot be trusted. ``p_loo`` compares with the density
        of unweighted draws, and can be negative where the guide is far off.

    Raises:
        PosteriorError: other rows, a point estimate, too few draws, or no density where one is needed.

    References:
        Vehtari, Gelman and Gabry, *Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC*,
        Statistics and Computing 2017; Magnusson, Andersen, Jonasson and Vehtari, *Bayesian leave-one-out
        cross-validation for large data*, ICML 2019, equation 5.
    """
    stats = data["sample_stats"]
    if data.attrs["rows"] != "training":
        raise PosteriorError("Leave-one-out is over the rows that the posterior was fitted to: convert it with those.")
    likelihood = data["log_likelihood"]["y"].transpose("chain", "example", "draw").values
    markov = data.attrs["draws_are"] == MARKOV
    if markov:  # draws of all chains are of the same law
        likelihood = np.concatenate(likelihood, axis=-1)[None]
    fits, _, draws = likelihood.shape
    if draws < LEAST_DRAWS:
        raise PosteriorError(
            f"Leave-one-out needs at least {LEAST_DRAWS} draws, found {draws}: a point estimate has one, "
            "others take to_inference_data(..., draws=100)."
        )
    log_ratios = np.zeros((fits, 1, draws))
    if not markov:
        if "log_q" not in stats:
            raise PosteriorError(
                "Leave-one-out needs the density of the posterior at its draws, and this one has none, or predicts "
                f"otherwise than by draws of its weights (method '{data.attrs['method']}')."
            )
        log_ratios = (stats["log_p"] - stats["log_q"]).values[:, None]
    weights, shapes = versions.psis(log_ratios - likelihood / data.attrs["temperature"])
    pointwise = np.logaddexp.reduce(weights + likelihood, axis=(0, 2)) - np.log(fits)
    lppd = float((np.logaddexp.reduce(likelihood, axis=(0, 2)) - np.log(fits * draws)).sum())
    rows = {"example": data["log_likelihood"]["example"].values}
    by_row, shape_by_row = (xr.DataArray(values, rows) for values in (pointwise, shapes.max(0)))
    return versions.elpd(by_row, shape_by_row, lppd, draws, good_k(draws))


def loo_parts(found: Any) -> tuple[float, float, Any, float]:
    """Total, standard error, pointwise Pareto k, and the k up to which a row can be trusted, of what `loo` gives."""
    return versions.total_elpd(found), float(found.se), found.pareto_k, float(found.good_k)
