"""Monte Carlo bounds on the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from copy import copy
from dataclasses import is_dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from bayeslora.models.joining import joined, kind_of

__all__ = ["ELBOS", "MeanFieldBound", "RememberingBound", "RenyiBound", "divergence", "log_density"]


class RememberingBound(ELBO):
    """A bound that keeps the last pair of traces, from which the parts of the bound are logged."""

    last: tuple[Trace, Trace] | None = None

    def _get_trace(self, *args: Any) -> tuple[Trace, Trace]:
        traces: tuple[Trace, Trace] = super()._get_trace(*args)
        self.last = traces
        return traces

    def take(self) -> tuple[Trace, Trace]:
        """The last traces, of the model and of the guide; they are forgotten here.

        A graph that lives on through the next step scatters its memory: the peak is a tenth higher.
        """
        assert self.last is not None
        traces, self.last = self.last, None
        return traces


class TraceBound(RememberingBound, Trace_ELBO):
    """E_q[log p(y, w) - log q(w)], every term by Monte Carlo."""


class MeanFieldBound(RememberingBound, ELBO):
    """The same with each site's divergence in closed form where one is registered: less variance.

    Equal to Pyro's `TraceMeanField_ELBO`, which also evaluates the density of every latent site that it then has no use
    for: half of the cost of a step beyond the network.
    """

    def _get_trace(self, *given: Any) -> tuple[Trace, Trace]:
        """The traces without log densities, which are taken of the sites that need them."""
        model, guide, args, kwargs = given
        q = poutine.trace(guide).get_trace(*args, **kwargs)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args, **kwargs)
        self.last = prune_subsample_sites(p), prune_subsample_sites(q)
        return self.last

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """Negative bound; gradients are by reparameterisation."""
        losses = [_mean_field_loss(p, q) for p, q in self._get_traces(model, guide, args, {})]
        return torch.stack(losses).mean()


class RenyiBound(RememberingBound, Trace_ELBO):
    r"""The bound of the Rényi divergence, L_a = log E_q[(p(y, w) / q(w))^(1 - a)] / (1 - a).

    a = 0 is the importance-weighted bound; a -> 1 is the ELBO. With one particle all are the ELBO.

    References:
        Li and Turner, *Rényi divergence variational inference*, NeurIPS 2016, equation 9.
    """

    def __init__(self, order: float = 0.5, num_particles: int = 2) -> None:
        super().__init__(num_particles=num_particles)
        self.order = order

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """Negative bound; gradients are by reparameterisation."""
        ratios = [p.log_prob_sum() - q.log_prob_sum() for p, q in self._get_traces(model, guide, args, {})]
        power = 1 - self.order
        particles = torch.stack(ratios)
        return -(torch.logsumexp(power * particles, 0) - math.log(len(ratios))) / power


class PathBound(MeanFieldBound):
    """E_q[log p(y, w) - log q(w)] by Monte Carlo, with the gradient along the path of the draw alone.

    The density of the guide is taken as if its parameters were known: what is left out is zero on average, and what is
    left has no variance where the guide is the posterior. A guide that can be the posterior comes to rest there; one
    that is far narrower than the posterior has more noise than by the other bounds.
    So it has under a prior mean that is learned: a prior that moves with the guide has no pull to cancel the
    guide's.

    References:
        Roeder, Wu and Duvenaud, *Sticking the landing: simple, lower-variance gradient estimators for variational
        inference*, NIPS 2017.
    """

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """Negative bound."""
        losses = []
        for p, q in self._get_traces(model, guide, args, {}):
            gain = [log_density(site) for site in _samples(p)]
            cost = [log_density(site | {"fn": _detached(site["fn"])}) for site in _samples(q)]
            losses.append(torch.stack(cost).sum() - torch.stack(gain).sum())
        return torch.stack(losses).mean()


#: Bounds by name, each averaged over ``num_particles`` draws of the weights.
ELBOS: dict[str, type[RememberingBound]] = {
    "mean-field": MeanFieldBound,
    "trace": TraceBound,
    "path": PathBound,
    "renyi": RenyiBound,
}


def _mean_field_loss(p: Trace, q: Trace) -> Tensor:
    gain = [log_density(p.nodes[name]) for name in p.observation_nodes]
    cost = list(_divergences(p, q))
    # An autoguide draws all sites from one auxiliary variable; they are then functions of it.
    cost += [log_density(q.nodes[name]) for name in q.stochastic_nodes if name not in p.nodes]
    return torch.stack(cost).sum() - torch.stack(gain).sum()


def _samples(trace: Trace) -> list[dict[str, Any]]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _detached(law: Distribution) -> Distribution:
    """The same law, with parameters that have no gradient; of a point, its Jacobian is one of the draw."""
    if isinstance(law, dist.Delta):
        return law
    found = copy(law)
    for name, value in vars(law).items():
        if isinstance(value, Tensor):
            setattr(found, name, value.detach())
        elif isinstance(value, Distribution):
            setattr(found, name, _detached(value))
        elif is_dataclass(value) and not isinstance(value, type):  # such as the frames of a law's directions
            parts = {part: each for part, each in vars(value).items() if isinstance(each, Tensor)}
            setattr(found, name, replace(value, **{part: each.detach() for part, each in parts.items()}))
    return found


def log_density(site: dict[str, Any]) -> Tensor:
    """Log density of the value of a trace's site, a scalar, by the scale that its plates and handlers give it."""
    return _scaled(site["fn"].log_prob(site["value"]), site["scale"])


def _scaled(value: Tensor, scale: float | Tensor) -> Tensor:
    """The sum of ``scale * value``."""
    scaled = value if isinstance(scale, float) and scale == 1 else scale * value
    return scaled if scaled.dim() == 0 else scaled.sum()


def _divergences(p: Trace, q: Trace) -> Iterator[Tensor]:
    """Scaled divergences of all latent sites, with one formula for all sites whose laws are of one kind."""
    alike: dict[Hashable, list[str]] = {}
    for name in p.stochastic_nodes:
        kind, scale = kind_of(q.nodes[name]["fn"]), p.nodes[name]["scale"]
        same = kind is not None and kind == kind_of(p.nodes[name]["fn"])
        alike.setdefault((kind, scale) if same else name, []).append(name)
    for names in alike.values():
        if len(names) == 1:
            found = divergence(p.nodes[names[0]], q.nodes[names[0]])
        else:
            posterior, prior = (joined([trace.nodes[name]["fn"] for name in names]) for trace in (q, p))
            found = kl_divergence(posterior, prior)
        yield _scaled(found, p.nodes[names[0]]["scale"])


def divergence(p: dict[str, Any], q: dict[str, Any]) -> Tensor:
    """Divergence of one latent site, or an estimate of it where none is known in closed form."""
    try:
        found: Tensor = kl_divergence(q["fn"], p["fn"])
        return found if found.dim() == 0 else found.sum()
    except NotImplementedError:
        # Documented by `kl_divergence` for a pair of laws that no formula is registered for, and the only way to ask
        # which those are; the guide's own draw is then an unbiased estimate.
        return q["fn"].log_prob(q["value"]).sum() - p["fn"].log_prob(q["value"]).sum()
