"""Monte Carlo bounds on the evidence, and the loss that an optimiser sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from bayeslora.inference.training.objective import Hook, Objective, State
from bayeslora.models.base import full_precision
from bayeslora.models.joining import joined, kind_of
from bayeslora.program import Estimator, Program
from bayeslora.rng import isolated
from bayeslora.weights import Site

__all__ = ["ELBOS", "KLWarmup", "NegativeELBO", "ProgramLoss"]


class _Remembered(ELBO):
    """Keep the last pair of traces, from which the parts of the bound are logged."""

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


class TraceBound(_Remembered, Trace_ELBO):
    """E_q[log p(y, w) - log q(w)], every term by Monte Carlo."""


class MeanFieldBound(_Remembered, ELBO):
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


class RenyiBound(_Remembered, Trace_ELBO):
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
            gain = [_log_density(site) for site in _samples(p)]
            cost = [_log_density(site | {"fn": _detached(site["fn"])}) for site in _samples(q)]
            losses.append(torch.stack(cost).sum() - torch.stack(gain).sum())
        return torch.stack(losses).mean()


#: Bounds by name, each averaged over ``num_particles`` draws of the weights.
ELBOS: dict[str, type[ELBO]] = {
    "mean-field": MeanFieldBound,
    "trace": TraceBound,
    "path": PathBound,
    "renyi": RenyiBound,
}


class ProgramLoss(Objective):
    """Loss of a batch per example, out of ``size`` examples of a program.

    Attributes:
        program: the Pyro model.
        size: number of training examples N.
        explained: sum of the log-likelihoods of all examples, as each batch estimates them.
        batches: number of these.
    """

    program: Program
    size: int
    explained: Tensor | float = 0.0
    batches: int = 0

    def count(self, log_likelihood: Tensor) -> None:
        """Add a batch's estimate of the log-likelihood of all examples to the sum."""
        self.explained, self.batches = self.explained + log_likelihood.detach(), self.batches + 1

    def mean_explained(self) -> float:
        """Log-likelihood of an example, on average over the batches since this was asked last."""
        mean = float(self.explained) / max(self.batches, 1) / self.size
        self.explained, self.batches = 0.0, 0
        return mean


class NegativeELBO(ProgramLoss):
    """Loss of stochastic variational inference: the negative bound of a batch, scaled to N examples, divided by N.

    A point has no divergence from its prior, but a density there. It is counted from the density where the point
    starts: of a prior over many weights the rest is a constant that would hide what is learned.

    The parameters that learn are the guide's alone, and so is the state that is saved: the network is frozen.

    Attributes:
        loss: of the last batch, without its graph.

    Args:
        program: the Pyro model.
        guide: the variational distribution.
        elbo: a bound of `ELBOS`.
        size: number of training examples N.
        kl_weight: of the latent sites; 1 is Bayes' rule.
        estimator: what stands for a draw of the weights in the network; the draw itself, if left out.
        sites: makes those of the prior, where the program is; see `Program.prior`.
    """

    loss: Tensor

    def __init__(
        self,
        program: Program,
        guide: nn.Module,
        elbo: ELBO,
        size: int,
        kl_weight: float = 1.0,
        estimator: Estimator | None = None,
        sites: Callable[[], Sequence[Site]] | None = None,
    ) -> None:
        super().__init__()
        self.program = program
        self.guide = guide
        self.elbo = elbo
        self.size = size
        self.kl_weight = kl_weight
        self.estimator = estimator
        self._sites = sites
        self.sites = None if sites is None else sites()
        self._parts: dict[str, Tensor] = {}
        self._starts = _densities_of_points(program, guide, self.sites)

    def _apply(self, *args: Any, **kwargs: Any) -> NegativeELBO:
        super()._apply(*args, **kwargs)
        self.sites = None if self._sites is None else self._sites()  # those that there were stay on their device
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss per example, a scalar. Under autocast only the network is in reduced precision: no density, no draw."""
        device = self.program.device
        enabled = torch.is_autocast_enabled(device.type)
        ambient = torch.autocast(device.type, torch.get_autocast_dtype(device.type)) if enabled else nullcontext()

        def model(batch: Mapping[str, Tensor]) -> None:
            with ambient, self._weighted():
                self.program(batch, self.size, self.estimator, self.sites)

        with full_precision(device):
            loss: Tensor = self.elbo.differentiable_loss(model, self._guide, batch)
            if isinstance(self.elbo, _Remembered):
                traces = self.elbo.take()
                self.count(_log_density(traces[0].nodes["y"]))
                if self.keep_parts:
                    self._parts = self._measure(*traces)
        scaled = (loss + self.kl_weight * sum(self._starts.values())) / self.size
        self.loss = scaled.detach()
        return scaled

    def _guide(self, batch: Mapping[str, Tensor]) -> None:
        with self._weighted():
            self.guide()

    def _weighted(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.kl_weight == 1 else _weighted_latents(self.kl_weight)

    def parts(self) -> dict[str, float]:
        """The parts of the last bound in nats an example, from the last draw of the weights that it took.

        ``log_likelihood``, ``kl/SITE``, ``factor/NAME`` of the prior, and ``kl/auxiliary``: an autoguide keeps the
        entropy of all its sites there. ``kl_weight`` is what the divergences were weighted by.
        """
        return {name: float(value) / self.size for name, value in self._parts.items()} | {"kl_weight": self.kl_weight}

    def _measure(self, p: Trace, q: Trace) -> dict[str, Tensor]:
        with torch.no_grad():
            found = {"log_likelihood": _log_density(p.nodes["y"])}
            factors = [name for name in p.observation_nodes if name != "y"]
            found |= {f"factor/{name}": p.nodes[name]["fn"].log_prob(p.nodes[name]["value"]).sum() for name in factors}
            for name in q.stochastic_nodes:
                if name in p.nodes:
                    found[f"kl/{name}"] = _divergence(p.nodes[name], q.nodes[name]) + self._starts.get(name, 0.0)
                else:
                    entropy = q.nodes[name]["fn"].log_prob(q.nodes[name]["value"]).sum()
                    found["kl/auxiliary"] = found.get("kl/auxiliary", 0.0) + entropy
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The guide's state: the frozen network is not part of a checkpoint."""
        state = self.guide.state_dict(*args, **kwargs)
        # Some of Pyro's guides keep views of one tensor, which safetensors refuses to write.
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave: all of it, since a part would be no point of the same run."""
        return self.guide.load_state_dict(state_dict, strict=True, assign=assign)


@dataclass(frozen=True)
class KLWarmup(Hook):
    """The Kullback-Leibler weight rises linearly from zero to ``weight`` in the first ``part`` of all steps."""

    objective: NegativeELBO
    weight: float
    part: float

    def before_step(self, state: State) -> None:
        """Set the weight of the step."""
        self.objective.kl_weight = self.weight * min(1.0, (state.step + 1) / state.steps / self.part)


class _weighted_latents(poutine.messenger.Messenger):
    """Scale the log density of every latent site and factor, as a Kullback-Leibler weight does; data keep theirs."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        is_prior = not msg["is_observed"] or isinstance(msg["fn"], dist.Unit)
        if is_prior:
            msg["scale"] = msg["scale"] * self.weight


def _densities_of_points(program: Program, guide: nn.Module, sites: Sequence[Site] | None) -> dict[str, float]:
    """Log density of the prior at each point estimate, by site."""
    with torch.no_grad(), isolated(0, program.device):
        q = poutine.trace(guide).get_trace()
        p = poutine.trace(poutine.replay(program.prior, trace=q)).get_trace(sites)
        points = [name for name in q.stochastic_nodes if type(q.nodes[name]["fn"]) is dist.Delta and name in p.nodes]
        return {name: float(_log_density(p.nodes[name])) for name in points}


def _mean_field_loss(p: Trace, q: Trace) -> Tensor:
    gain = [_log_density(p.nodes[name]) for name in p.observation_nodes]
    cost = list(_divergences(p, q))
    # An autoguide draws all sites from one auxiliary variable; they are then functions of it.
    cost += [_log_density(q.nodes[name]) for name in q.stochastic_nodes if name not in p.nodes]
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
    return found


def _log_density(site: dict[str, Any]) -> Tensor:
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
            found = _divergence(p.nodes[names[0]], q.nodes[names[0]])
        else:
            posterior, prior = (joined([trace.nodes[name]["fn"] for name in names]) for trace in (q, p))
            found = kl_divergence(posterior, prior)
        yield _scaled(found, p.nodes[names[0]]["scale"])


def _divergence(p: dict[str, Any], q: dict[str, Any]) -> Tensor:
    """Divergence of one latent site, or an estimate of it where none is known in closed form."""
    try:
        found: Tensor = kl_divergence(q["fn"], p["fn"])
        return found if found.dim() == 0 else found.sum()
    except NotImplementedError:
        # Documented by `kl_divergence` for a pair of laws that no formula is registered for, and the only way to ask
        # which those are; the guide's own draw is then an unbiased estimate.
        return q["fn"].log_prob(q["value"]).sum() - p["fn"].log_prob(q["value"]).sum()
