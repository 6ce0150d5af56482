"""The one place that knows what differs between arviz 0.23 (Python 3.10, 3.11) and arviz 1.x (3.12 and later).

Data of the former are an `InferenceData`, of the latter a `DataTree` of xarray; groups are read the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayeslora import files
from bayeslora.predict.resampling import Floats

__all__ = ["elpd", "join", "psis", "read", "total_elpd", "write"]

MODERN = int(version("arviz").partition(".")[0]) >= 1


def join(groups: Mapping[str, xr.Dataset], attributes: Mapping[str, Any]) -> Any:
    """Put data sets together, by name of their group."""
    if MODERN:
        found = xr.DataTree.from_dict({f"/{name}": data for name, data in groups.items()})
        found.attrs.update(attributes)
        return found
    import arviz as az

    return az.InferenceData(attrs=dict(attributes), **groups)


def write(data: Any, path: str | Path) -> None:
    """Write into a NetCDF file in one step."""
    target = Path(path)
    with files.replaced(target) as new:
        if MODERN:
            encoding = {
                group.path: {name: {"zlib": True} for name in group.data_vars if group[name].dtype.kind in "fiu"}
                for group in data.subtree
                if group.data_vars
            }
            data.to_netcdf(new, engine="h5netcdf", encoding=encoding)
        else:
            data.to_netcdf(str(new), engine="h5netcdf", compress=True)


def read(path: str | Path) -> Any:
    """Read what `write` wrote; lazily, where arviz does."""
    import arviz as az

    if MODERN:
        return xr.open_datatree(path, engine="h5netcdf")
    return az.from_netcdf(str(path), engine="h5netcdf")


def total_elpd(found: Any) -> float:
    """What all examples of `elpd` sum up to."""
    return float(found.elpd if MODERN else found.elpd_loo)


def psis(log_ratios: Floats) -> tuple[Floats, Floats]:
    """Pareto-smoothed importance sampling over the last dimension.

    Returns:
        Log weights (..., draws), which sum to one, and the shape k-hat (...) of the ratios' tail.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto smoothed importance sampling*, JMLR 2024.
    """
    if MODERN:
        flat = log_ratios.reshape(-1, log_ratios.shape[-1])
        rows, tails = zip(*map(_smoothed, flat), strict=True)
        weights, shapes = np.stack(rows).reshape(log_ratios.shape), np.reshape(tails, log_ratios.shape[:-1])
    else:
        import arviz as az

        weights, shapes = az.psislw(log_ratios)
    weights = weights - np.logaddexp.reduce(weights, axis=-1, keepdims=True)
    return np.asarray(weights), np.asarray(shapes)


def _smoothed(log_ratios: Floats) -> tuple[Floats, float]:
    """Log weights (draws,) and k-hat of one row; as they are, and infinity, where there is no tail to fit."""
    from arviz_stats.base import array_stats

    try:
        weights, shape = array_stats.psislw(-log_ratios)  # which it takes for log-likelihoods to leave out
    except ValueError:  # raised where the largest ratios are all alike, for which arviz 0.23 gives infinity
        return log_ratios, np.inf
    return weights, float(shape)


def elpd(pointwise: xr.DataArray, shapes: xr.DataArray, lppd: float, draws: int, good: float) -> Any:
    """Leave-one-out densities in arviz's own class, as `az.compare` and `az.plot_khat` take them.

    Args:
        pointwise: log predictive density of each example with that example left out (examples,).
        shapes: k-hat of each (examples,).
        lppd: sum of the log predictive densities with no example left out.
        draws: that they are from, of one fit.
        good: k-hat up to which an example's estimate holds.
    """
    total, error = float(pointwise.sum()), math.sqrt(len(pointwise) * float(pointwise.var(ddof=1)))
    warned = not bool((shapes <= good).all())
    if MODERN:
        from arviz_stats.utils import ELPDDataLOO

        return ELPDDataLOO(
            elpd=total, se=error, p=lppd - total, n_samples=draws, n_data_points=len(pointwise), scale="log",
            warning=warned, good_k=good, elpd_i=pointwise, pareto_k=shapes, approx_posterior=True,
        )  # fmt: skip
    from arviz.stats.stats_utils import ELPDData

    found = {
        "elpd_loo": total, "se": error, "p_loo": lppd - total, "n_samples": draws, "n_data_points": len(pointwise),
        "warning": warned, "loo_i": pointwise, "pareto_k": shapes, "scale": "log", "good_k": good,
    }  # fmt: skip
    return ELPDData(data=list(found.values()), index=list(found))
