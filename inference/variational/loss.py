"""The loss that an optimiser sees: a negative bound on the evidence, an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from bayeslora.inference.training.objective import Hook, Objective, State
from bayeslora.inference.variational.elbo import RememberingBound, divergence, log_density
from bayeslora.models.base import full_precision
from bayeslora.program import Estimator, Program
from bayeslora.rng import isolated
from bayeslora.sites import Site

__all__ = ["KLSchedule", "KLWarmup", "NegativeELBO", "ProgramLoss"]

#: How the Kullback-Leibler weight comes to be all there: it rises from zero, or is zero before.
KLSchedule = Literal["linear", "step"]


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
        elbo: RememberingBound,
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
            traces = self.elbo.take()
            self.count(log_density(traces[0].nodes["y"]))
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
            found = {"log_likelihood": log_density(p.nodes["y"])}
            factors = [name for name in p.observation_nodes if name != "y"]
            found |= {f"factor/{name}": p.nodes[name]["fn"].log_prob(p.nodes[name]["value"]).sum() for name in factors}
            for name in q.stochastic_nodes:
                if name in p.nodes:
                    found[f"kl/{name}"] = divergence(p.nodes[name], q.nodes[name]) + self._starts.get(name, 0.0)
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
    """The Kullback-Leibler weight rises linearly to ``weight`` in the first ``part`` of all steps, or is zero in it."""

    objective: NegativeELBO
    weight: float
    part: float
    schedule: KLSchedule = "linear"

    def before_step(self, state: State) -> None:
        """Set the weight of the step."""
        passed = (state.step + 1) / state.steps / self.part
        share = min(1.0, passed) if self.schedule == "linear" else float(passed > 1)
        self.objective.kl_weight = self.weight * share


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
        return {name: float(log_density(p.nodes[name])) for name in points}
