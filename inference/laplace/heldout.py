"""The width of a prior by data that were held out: one pass for all widths that are compared."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.predictors import linearised, linked
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.passes import Rows

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["MULTIPLES", "best_width"]

#: Multiples of the prior's standard deviations that are compared: ten a decade.
MULTIPLES = torch.logspace(-2, 2, 41, dtype=torch.float64)


def best_width(
    posterior: LaplacePosterior, data: Dataset, batch_size: int, progress: bool
) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The prior, so many times as wide that the default prediction of held-out rows has the lowest NLL.

    Args:
        posterior: under the prior as it is; only the prior's width changes, not the mode.
        data: tokenised rows with labels, which the mode has not seen.
        batch_size: rows a pass.
        progress: show a bar.

    Returns:
        The prior, and for each width ``multiple`` and ``heldout_nll``, in nats an example.
    """
    rows = Rows.of(posterior.program, data, batch_size, progress)
    means, covariances = linearised(posterior, rows, MULTIPLES)
    method, _ = posterior.predictor()
    trace = []
    for multiple, covariance in zip(MULTIPLES, covariances, strict=True):
        outputs, _ = linked(rows.observation, means, covariance, method, 0)
        density = rows.observation.predicted(outputs, rows.labels).log_predictive_density
        trace.append({"multiple": float(multiple), "heldout_nll": -float(density.mean())})
    best = min(trace, key=lambda row: row["heldout_nll"])["multiple"]
    if best in (trace[0]["multiple"], trace[-1]["multiple"]):
        warnings.warn(
            f"The best prior is {best:g} times as wide, the last one that was tried: set another.", stacklevel=2
        )
    log = torch.tensor([best], dtype=torch.float64).log()
    return posterior.prior.scaled({name: log.to(root.device) for name, root in posterior.prior.roots.items()}), trace
