"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from torch.utils.data import DataLoader

from bayeslora.errors import TrainingError
from bayeslora.inference.base import Run
from bayeslora.inference.mcmc.chains import ChainSettings
from bayeslora.program import Program
from bayeslora.progress import bar
from bayeslora.settings import Count, Positive

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SGLD", "Move", "Unconstrained"]

#: One step, given the gradient of the log density by each site.
Move = Callable[[Sequence[Tensor]], None]
#: Draws of the prior from which the spread of a site is estimated, once all its entries are taken together.
SPREAD_DRAWS = 100


@dataclass(frozen=True)
class SGLD(ChainSettings):
    """Stochastic gradient Langevin dynamics with a step size that stays: theta += h/2 gradient + N(0, h).

    The gradient is that of log p(y, weights), estimated from a batch; nothing is accepted or rejected, so that the
    noise of the gradient, and a step that is too long, widen what is sampled. Each site moves in units of its own
    spread under the prior.

    Attributes:
        step_size: h, in units of the prior's variance.
        thin: steps from one draw to the next.
        batch_size: rows of a gradient.

    References:
        Welling and Teh, *Bayesian learning via stochastic gradient Langevin dynamics*, ICML 2011; Vollmer, Zygalakis
        and Teh, *Exploration of the (non-)asymptotic bias and variance of SGLD*, JMLR 2016, for the step that stays.
    """

    name: ClassVar[str] = "sgld"
    paper: ClassVar[str] = "Welling and Teh, ICML 2011"

    step_size: Positive = 1e-3
    thin: Count = 10
    batch_size: Count = 32

    def chain(self, program: Program, data: Dataset, run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Run one chain; the mean of log p(y, weights) along it comes with it."""
        space = Unconstrained(program)
        spread = space.spread()
        start = space.draw() if run.start is None else space.at(program.model.initial(run.sites(program)))
        place = {name: value.requires_grad_() for name, value in start.items()}
        move = self.mover(place, spread)
        batches = _endless(program, data, self.batch_size)
        kept: list[dict[str, Tensor]] = []
        densities: list[float] = []
        steps = (self.warmup + self.draws) * self.thin
        with bar(self.name, total=steps, show=run.progress) as shown:
            for step in range(1, steps + 1):
                with torch.enable_grad():
                    log_joint = space.log_joint(place, next(batches), len(data))
                    gradients = torch.autograd.grad(log_joint, list(place.values()))
                if not torch.isfinite(log_joint):
                    raise TrainingError(
                        f"The log density is {log_joint.item()} at step {step}: try a smaller step_size, or, at the "
                        "first one, a narrower prior (model.scale, model.deviation)."
                    )
                with torch.no_grad():
                    move(gradients)
                    if step % self.thin == 0 and step > self.warmup * self.thin:
                        kept.append({name: value.clone() for name, value in space.constrained(place).items()})
                        densities.append(log_joint.item())
                shown.update()
        draws = {name: torch.stack([draw[name] for draw in kept]) for name in kept[0]}
        return draws, {"log_joint": fmean(densities)}

    def mover(self, place: Mapping[str, Tensor], spread: Mapping[str, float]) -> Move:
        """What makes a step from ``place``, in place; each site's is in units of its spread."""

        def move(gradients: Sequence[Tensor]) -> None:
            for (name, value), gradient in zip(place.items(), gradients, strict=True):
                step = self.step_size * spread[name] ** 2
                value.add_(step / 2 * gradient + step**0.5 * torch.randn_like(value))

        return move


class Unconstrained:
    """Maps between the latent sites of a program and real numbers, and log p(y, latents) in terms of those.

    Args:
        program: whose sites.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._transforms = {
            name: biject_to(node["fn"].support)
            for name, node in poutine.trace(program.prior).get_trace().nodes.items()
            if node["type"] == "sample" and not node["is_observed"] and not node["infer"].get("_deterministic")
        }

    def draw(self) -> dict[str, Tensor]:
        """A draw of the prior."""
        nodes = poutine.trace(self.program.prior).get_trace().nodes
        return self.at({name: nodes[name]["value"] for name in self._transforms})

    def at(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the latent sites, copied."""
        return {name: each.inv(latents[name]).detach().clone() for name, each in self._transforms.items()}

    def spread(self) -> dict[str, float]:
        """Standard deviation of the entries of each site under the prior."""
        draws = [self.draw() for _ in range(SPREAD_DRAWS)]
        return {
            name: float(torch.stack([draw[name] for draw in draws]).std(0).square().mean().sqrt()) for name in draws[0]
        }

    def constrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latent sites."""
        return {name: each(values[name]) for name, each in self._transforms.items()}

    def log_joint(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor], size: int) -> Tensor:
        """Log density of latent sites and labels, of which a batch stands for all ``size``."""
        latents = self.constrained(values)
        conditioned = poutine.condition(self.program, data=latents)
        density = poutine.trace(conditioned).get_trace(batch, size).log_prob_sum()
        jacobians = [
            each.log_abs_det_jacobian(values[name], latents[name]).sum() for name, each in self._transforms.items()
        ]
        found: Tensor = density + torch.stack(jacobians).sum()
        return found


def _endless(program: Program, data: Dataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of rows in random order, again and again."""
    collate = program.observation.collator(program.padding)
    loader = DataLoader(data, min(batch_size, len(data)), shuffle=True, drop_last=True, collate_fn=collate)
    while True:
        for batch in loader:
            yield {name: value.to(program.device) for name, value in batch.items()}
