"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, repeat
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from torch.utils.data import DataLoader

from bayeslora.errors import TrainingError
from bayeslora.inference.base import Run
from bayeslora.inference.mcmc.chains import ChainSettings, Tempering
from bayeslora.inference.mcmc.steps import Gradient, Meter, Stiffness, joined
from bayeslora.program import Program
from bayeslora.progress import bar
from bayeslora.settings import Count, Positive

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SGLD", "Move", "Unconstrained"]

#: One step, given the gradient of the log density by each site, and how long it is.
Move = Callable[[Sequence[Tensor], float], None]
#: Draws of the prior from which the spread of a site is estimated, once all its entries are taken together.
SPREAD_DRAWS = 100
#: Part by which the variance may be too large when the warm-up begins.
FIRST_BIAS = 0.25
#: Batches by which curvature and noise are measured.
MEASURED = 8


@dataclass(frozen=True, kw_only=True)
class SGLD(ChainSettings):
    """Stochastic gradient Langevin dynamics with a step size that stays: theta += h/2 gradient + N(0, h).

    The gradient is that of log p(y, weights), estimated from a batch; nothing is accepted or rejected, so that the
    noise of the gradient, and a step that is too long, widen what is sampled. Each site moves in units of its own
    spread under the prior. The chain starts where training does, not at a draw of the prior: that of a deep network is
    at a place so steep that no step out of it would be short enough.

    Along an eigenvector of a normal posterior of precision l, with a gradient of variance v, the chain has the variance
    (1 + h v / 4) / (1 - h l / 4) / l. By default h is the longest step at which that is no more than ``bias`` too
    large, with the largest l and v found where the chain is. In the warm-up that part falls from 1/4 to ``bias``, so
    that the chain first goes far, and l and v are found again and again. What moves by h is slow where the data say
    nothing: ``relaxations`` in the history is how often the chain forgot where it was along a direction that only the
    prior knows. Of a deep network that is far below one (a warning says so), and draws are around the mode that was
    found.

    Attributes:
        step_size: h, in units of the prior's variance, from the first step to the last; chosen, if left out.
        bias: part by which the variance may be too large where ``step_size`` is left out.
        thin: steps from one draw to the next.
        batch_size: rows of a gradient.

    References:
        Welling and Teh, *Bayesian learning via stochastic gradient Langevin dynamics*, ICML 2011, whose steps fall;
        Vollmer, Zygalakis and Teh, *Exploration of the (non-)asymptotic bias and variance of SGLD*, JMLR 2016, for the
        step that stays and the variance that it has.
    """

    name: ClassVar[str] = "sgld"
    paper: ClassVar[str] = "Welling and Teh, ICML 2011"

    step_size: Positive | None = None
    bias: Annotated[float, Field(gt=0, le=1)] = 0.05
    thin: Count = 10
    batch_size: Count = 32

    def chain(self, program: Program, data: Dataset, run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Run one chain; its step size and the mean of the log joint density, tempered, along it come with it."""
        space = Unconstrained(program, self.temperature)
        spread = space.spread()
        start = space.at(program.model.initial(run.sites(program)))
        place = {name: value.requires_grad_() for name, value in start.items()}
        move = self.mover(place, spread)
        batches = _endless(program, data, self.batch_size)
        gradient = space.gradient_near(place, spread, len(data))
        some = 1 if len(data) <= self.batch_size else MEASURED
        sizes = self._sizes(gradient, place, lambda: list(islice(batches, some)))
        kept: list[dict[str, Tensor]] = []
        densities: list[float] = []
        warmup, steps = self.warmup * self.thin, (self.warmup + self.draws) * self.thin
        with bar(self.name, total=steps, show=run.progress) as shown:
            for step, size in zip(range(steps), sizes, strict=False):
                with torch.enable_grad():
                    log_joint = space.log_joint(place, next(batches), len(data))
                    gradients = torch.autograd.grad(log_joint, list(place.values()))
                if not torch.isfinite(log_joint):
                    raise TrainingError(
                        f"The log density is {log_joint.item()} at step {step + 1}: try a smaller step_size, or, at "
                        "the first one, a narrower prior (model.scale, model.deviation)."
                    )
                with torch.no_grad():
                    move(gradients, size)
                    if step >= warmup and (step + 1) % self.thin == 0:
                        kept.append({name: value.clone() for name, value in space.constrained(place).items()})
                        densities.append(log_joint.item())
                shown.update()
        draws = {name: torch.stack([draw[name] for draw in kept]) for name in kept[0]}
        if not all(value.isfinite().all() for value in draws.values()):  # of the last no density is taken
            raise TrainingError("A draw is infinite or not a number: try a smaller step_size.")
        relaxations = self.draws * self.thin * self.drift(size)
        if relaxations < 1:
            warnings.warn(
                f"The chain ends {relaxations:.2g} times as far as it takes to forget where it began, along directions "
                "of which the data say nothing: its draws are around one place, and narrower than the posterior. Draw "
                "more of them (draws, thin), or have fewer weights (rank, target_modules).",
                stacklevel=2,
            )
        return draws, {"log_joint": fmean(densities), "step_size": size, "relaxations": relaxations}

    def _sizes(
        self, gradient: Gradient, place: Mapping[str, Tensor], some: Callable[[], Sequence[Mapping[str, Tensor]]]
    ) -> Iterator[float]:
        """How long each step is: measured by some batches whenever as many steps of the warm-up were made again."""
        if self.step_size is not None:
            yield from repeat(self.step_size)
        warmup = self.warmup * self.thin
        meter = Meter(gradient, joined(place))
        first = max(FIRST_BIAS, self.bias)
        # At 0, 1, 2, 4, 8, ...: the prior's noise alone makes a network steeper as the first steps are made.
        measured = {0, warmup, *(2**power for power in range(warmup.bit_length()))}
        for step in count():
            if step in measured:
                stiffness = meter(some())
            yield self.longest(stiffness, first * (self.bias / first) ** min(1.0, step / max(warmup, 1)))

    def mover(self, place: Mapping[str, Tensor], spread: Mapping[str, float]) -> Move:
        """What makes a step from ``place``, in place; each site's is in units of its spread."""

        def move(gradients: Sequence[Tensor], size: float) -> None:
            for (name, value), gradient in zip(place.items(), gradients, strict=True):
                step = size * spread[name] ** 2
                value.add_(step / 2 * gradient + step**0.5 * torch.randn_like(value))

        return move

    def longest(self, stiffness: Stiffness, bias: float) -> float:
        """The longest step that widens the variance by no more than a part of it."""
        return 4 * bias / (stiffness.noise + (1 + bias) * stiffness.curvature)

    def drift(self, size: float) -> float:
        """Part of the way to the prior's mean that a step of that size goes where the data say nothing."""
        return size / 2


class Unconstrained:
    """Maps between the latent sites of a program and real numbers, and log p(y, latents) in terms of those.

    Args:
        program: whose sites.
        temperature: of the posterior.
    """

    def __init__(self, program: Program, temperature: float = 1.0) -> None:
        self.program, self._model = program, Tempering(temperature)(program)
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
        """Log density of latent sites and labels, tempered, of which a batch stands for all ``size``."""
        latents = self.constrained(values)
        conditioned = poutine.condition(self._model, data=latents)
        density = poutine.trace(conditioned).get_trace(batch, size).log_prob_sum()
        jacobians = [
            each.log_abs_det_jacobian(values[name], latents[name]).sum() for name, each in self._transforms.items()
        ]
        found: Tensor = density + torch.stack(jacobians).sum()
        return found

    def gradient_near(self, place: Mapping[str, Tensor], spread: Mapping[str, float], size: int) -> Gradient:
        """The gradient of the log density near ``place``, which may move; entries in units of their site's spread."""

        def gradient(away: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
            parts = away.split([value.numel() for value in place.values()])
            values = {
                name: (value.detach() + spread[name] * part.view_as(value)).requires_grad_()
                for (name, value), part in zip(place.items(), parts, strict=True)
            }
            with torch.enable_grad():
                found = torch.autograd.grad(self.log_joint(values, batch, size), list(values.values()))
            return joined({name: spread[name] * each for name, each in zip(values, found, strict=True)})

        return gradient


def _endless(program: Program, data: Dataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of rows in random order, again and again."""
    collate = program.observation.collator(program.padding)
    loader = DataLoader(data, min(batch_size, len(data)), shuffle=True, drop_last=True, collate_fn=collate)
    while True:
        for batch in loader:
            yield {name: value.to(program.device) for name, value in batch.items()}
