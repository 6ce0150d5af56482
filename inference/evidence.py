"""Laplace's approximation of the evidence, and the prior that maximises it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bayeslora.inference.curvature import Curvature
from bayeslora.inference.priors import HyperPrior, NormalPrior

__all__ = ["SCALES", "log_evidence", "maximise", "maximise_hyper"]

#: What has a prior scale of its own when the scales are tuned.
SCALES = ("all", "site", "layer")
STEPS = 50


def log_evidence(log_likelihood: float, prior: NormalPrior, mode: Mapping[str, Tensor], curvature: Curvature) -> Tensor:
    """Laplace's log p(data) = log p(data | mode) - |phi|^2 / 2 - log det (I + F) / 2, in nats.

    The determinants of prior and posterior leave just that of I + F in the coordinates phi of a standard normal prior.
    """
    distance = torch.stack([value.square().sum() for value in prior.whitened(mode).values()]).sum()
    return log_likelihood - distance / 2 - curvature.gains(prior.roots).clamp(min=0).log1p().sum() / 2


def maximise(
    log_likelihood: float,
    prior: NormalPrior,
    mode: Mapping[str, Tensor],
    curvature: Curvature,
    scales: str,
) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The prior of largest evidence among its multiples.

    Args:
        log_likelihood: of the data at the mode.
        prior: where the search starts.
        mode: matrices by site.
        curvature: of the log-likelihood there.
        scales: what is multiplied by a number of its own, one of `SCALES`.

    Returns:
        The prior, and the log evidence and multiples at each step.
    """
    wide = {"all": 1, "site": len(prior.roots), "layer": sum(len(root) for root in prior.roots.values())}[scales]
    logs = next(iter(prior.roots.values())).new_zeros(wide, requires_grad=True)

    def by_site() -> dict[str, Tensor]:
        if scales == "all":
            return dict.fromkeys(prior.roots, logs)
        sizes = [1 if scales == "site" else len(root) for root in prior.roots.values()]
        return dict(zip(prior.roots, logs.split(sizes), strict=True))

    def objective() -> tuple[Tensor, dict[str, float]]:
        value = log_evidence(log_likelihood, prior.scaled(by_site()), mode, curvature)
        multiples = {
            f"scale/{name}" + (f"/{place}" if len(each) > 1 else ""): float(multiple)
            for name, each in by_site().items()
            for place, multiple in enumerate(each.detach().exp())
        }
        return value, {"log_evidence": float(value.detach())} | multiples

    trace = _ascend([logs], objective)
    return prior.scaled({name: each.detach() for name, each in by_site().items()}), trace


def maximise_hyper(
    log_likelihood: float, hyper: HyperPrior, mode: Mapping[str, Tensor], curvature: Curvature
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Hyper-sites of largest evidence times their own prior density.

    Returns:
        The hyper-sites' values, and the log evidence and the log density of the hyper-sites at each step.
    """
    values = {name: value.double().requires_grad_() for name, value in hyper.start.items()}

    def objective() -> tuple[Tensor, dict[str, float]]:
        prior, log_density = hyper.at(values)
        evidence = log_evidence(log_likelihood, prior, mode, curvature)
        found = {"log_evidence": float(evidence.detach()), "log_hyperprior": float(log_density.detach())}
        return evidence + log_density, found

    trace = _ascend(list(values.values()), objective)
    return {name: value.detach() for name, value in hyper.constrained(values).items()}, trace


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
