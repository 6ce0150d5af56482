"""The width of the prior that an evidence is largest for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from bayeslora.inference.laplace.evidence import Evidence
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.inference.laplace.refitted import Refitted, RefittedEvidence

__all__ = ["WIDTHS", "matched_width", "refitted_width", "tuned_width"]

STEPS = 50
#: Logs of multiples where the search for a width begins; two a decade where each takes steps of Newton's.
GRID = [number / 2 for number in range(-30, 31)]
WIDTHS = [number * math.log(10) / 2 for number in range(-4, 7)]


def tuned_width(evidence: Evidence, prior: NormalPrior) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The prior of largest evidence among its multiples.

    Returns:
        The prior, and the log evidence and the multiple at each step.
    """
    along = evidence.along(prior)
    like = next(iter(prior.roots.values()))
    # Far from the best width the evidence is flat on one side: the search begins at the best of a grid.
    grid = [like.new_full((1,), log) for log in GRID]
    log = max(grid, key=lambda each: float(along(each)))
    if float(log) in (GRID[0], GRID[-1]):
        _warn_of_limit(float(log))
        return prior, [{"tuning": 0.0, "log_evidence": float(along(torch.zeros_like(log))), "scale": 1.0}]

    log.requires_grad_()

    def objective() -> tuple[Tensor, dict[str, float]]:
        value = along(log)
        return value, {"log_evidence": float(value.detach()), "scale": float(log.detach().exp())}

    trace = _ascend([log], objective)
    return prior.scaled(log.detach()), trace


def refitted_width(evidence: RefittedEvidence, prior: NormalPrior) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The same by the evidence of the linear network's own mode, by Brent's method around the best of a grid."""
    trace: list[dict[str, float]] = []
    return _times(prior, _likeliest(evidence, trace)), trace


def matched_width(evidence: RefittedEvidence, prior: NormalPrior) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The same, but no wider than makes the linear network's own mode explain the rows as well as the weights do.

    Weights whose training was stopped early are the mode of no wide prior: under the one of largest evidence the linear
    network's own mode explains the rows far better, and the evidence is of that mode. To stop early is to have a narrow
    prior (Bishop, *Regularization and complexity control in feed-forward networks*, ICANN 1995): it is the one under
    which that mode has the weights' own log-likelihood. Where the weights explain their rows better than it does under
    the largest evidence, as where they interpolate, the evidence decides. Where the prior's centre explains as much as
    the weights, nothing was learned that could tell a width, and the prior gets no wider than the model's.
    """
    trace: list[dict[str, float]] = []
    log = _likeliest(evidence, trace)

    def gain(log: float) -> float:
        return _traced(evidence, log, trace).log_likelihood - evidence.at_mode

    if log > WIDTHS[0] and gain(log) > 0:
        log = min(0.0, log) if gain(WIDTHS[0]) >= 0 else brentq(gain, WIDTHS[0], log, xtol=1e-2)
    return _times(prior, log), trace


def _likeliest(evidence: RefittedEvidence, trace: list[dict[str, float]]) -> float:
    """Log of the multiple of largest evidence, an end of the grid where there is none."""

    def lack(log: float) -> float:
        return -_traced(evidence, log, trace).evidence

    place = min(range(len(WIDTHS)), key=[lack(log) for log in WIDTHS].__getitem__)
    if place in (0, len(WIDTHS) - 1):
        return WIDTHS[place]
    around = (WIDTHS[place - 1], WIDTHS[place + 1])
    return float(minimize_scalar(lack, bounds=around, method="bounded", options={"xatol": 1e-4}).x)


def _times(prior: NormalPrior, log: float) -> NormalPrior:
    """The prior times what a search came to; at an end of the grid it is kept, which is said."""
    if log in (WIDTHS[0], WIDTHS[-1]):
        _warn_of_limit(log)
        return prior
    return prior.times(math.exp(log))


def _traced(evidence: RefittedEvidence, log: float, trace: list[dict[str, float]]) -> Refitted:
    """The linear network where the prior is so many times as wide, and a row of the trace."""
    found, multiple = evidence(math.exp(log)), math.exp(log)
    likelihoods = {"log_evidence": found.evidence, "own_log_likelihood": found.log_likelihood}
    trace.append({"tuning": float(len(trace)), "scale": multiple} | likelihoods)
    return found


def _warn_of_limit(log: float) -> None:
    """Say that an evidence is largest at an end of what is tried, so that the model's prior stays as it is."""
    end = "narrowest" if log < 0 else "widest"
    warnings.warn(
        f"The evidence is largest at the {end} prior that was tried, {math.exp(log):.4g} times as wide as the model's, "
        "and chooses no width: the model's prior is kept as it is. Give rows that the mode has not seen (heldout=...), "
        "a prior around zero (model.centre=zero) or of another width (model.deviation), or have this one with "
        "tune='none'.",
        stacklevel=3,
    )


def _ascend(
    parameters: list[Tensor], objective: Callable[[], tuple[Tensor, dict[str, float]]]
) -> list[dict[str, float]]:
    optimiser: Any = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")
    trace: list[dict[str, float]] = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        value, found = objective()
        (-value).backward()
        trace.append({"tuning": float(len(trace)), **found})
        return -value

    with torch.enable_grad():
        optimiser.step(closure)
    return trace
