"""The No-U-Turn sampler: the reference posterior of an adapter that is small enough."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from pyro.infer import mcmc
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from torch import Tensor

from bayeslora.errors import SettingError, TrainingError
from bayeslora.inference.base import Run
from bayeslora.inference.mcmc.chains import ChainSettings, Tempering
from bayeslora.inference.training.process import available
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.progress import bar
from bayeslora.settings import Count

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["NUTS"]

#: Weights of the largest adapter that is sampled: with ten times as many a trajectory already takes its most steps.
MOST = 10_000
#: Split R-hat above which a chain has not come to rest.
HIGHEST = 1.1


@dataclass(frozen=True, kw_only=True)
class NUTS(ChainSettings):
    """The No-U-Turn sampler of Pyro: the reference posterior of an adapter of some hundred weights.

    It starts at a draw of the prior, or where it is told to. Every step of a trajectory is a pass over all rows, forth
    and back. Step size and mass matrix adapt in the warm-up.

    Attributes:
        target_accept: acceptance probability that the step size adapts to.
        max_tree_depth: a trajectory has at most 2^max_tree_depth steps.
        dense_mass: adapt a full mass matrix; otherwise its diagonal.

    References:
        Hoffman and Gelman, *The No-U-Turn sampler*, JMLR 2014.
    """

    name: ClassVar[str] = "nuts"
    paper: ClassVar[str] = "Hoffman and Gelman, JMLR 2014"

    draws: Annotated[int, Field(ge=4)] = 500  # Pyro's report on a chain needs four
    warmup: Count = 500
    target_accept: Annotated[float, Field(gt=0, lt=1)] = 0.8
    max_tree_depth: Count = 10
    dense_mass: bool = False

    def chain(self, program: Program, data: Dataset, run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Run one chain; its acceptance rate, divergent transitions, step size and worst split R-hat come with it."""
        self._check(program, len(data))
        batch, _ = next(Rows.of(program, data, len(data)).batches(program.device))
        model, start = Tempering(self.temperature)(program), init_to_sample
        if run.start is not None:
            start = init_to_value(values=program.model.initial(run.sites(program)))
        kernel = mcmc.NUTS(
            lambda: model(batch, len(data)),
            target_accept_prob=self.target_accept,
            max_tree_depth=self.max_tree_depth,
            full_mass=self.dense_mass,
            init_strategy=start,
        )
        with bar(self.name, total=self.warmup + self.draws, show=run.progress) as shown:
            sampler = mcmc.MCMC(
                kernel,
                num_samples=self.draws,
                warmup_steps=self.warmup,
                disable_progbar=True,
                hook_fn=lambda *_: shown.update(),
            )
            try:
                sampler.run()
            except ValueError as error:  # Pyro has found no place to start from
                raise TrainingError(
                    f"The log density is not finite where a chain could start ({error}): give a narrower prior "
                    "(model.scale, model.deviation)."
                ) from error
        found, draws = sampler.diagnostics(), sampler.get_samples()
        divergences = len(found["divergences"]["chain 0"])
        halves = torch.cat([found[name]["r_hat"].flatten() for name in draws])
        r_hat = float(halves.nan_to_num(math.inf).max())  # there is none of a chain that never moved
        _warn_of_chain(divergences, self.draws, r_hat)
        return draws, {
            "acceptance": float(found["acceptance rate"]["chain 0"]),
            "divergences": float(divergences),
            "step_size": float(kernel.step_size),
            "r_hat": r_hat,
        }

    def _check(self, program: Program, rows: int) -> None:
        """Refuse what would take days, or more memory than there is, before it is begun.

        Raises:
            SettingError: there are too many weights.
        """
        size = sum(value.numel() for value in program.model.initial(program.sites).values())
        # The draws; the mass matrix, its factor and its inverse.
        needed = 4 * size * self.draws + (12 * size**2 if self.dense_mass else 0)
        free = available(program.device)
        if size > MOST or needed > free:
            steps = (self.warmup + self.draws) * 2**self.max_tree_depth
            raise SettingError(
                f"nuts would sample {size:,} weights: up to {steps:,} passes forth and back over {rows:,} rows, and "
                f"{needed / 2**30:,.1f} GiB of {free / 2**30:,.1f} GiB that are free. It is for adapters of some "
                f"hundred weights, {MOST:,} at most: take a lower rank and fewer layers (target_modules), or the "
                "backend sgld, sghmc or laplace."
            )


def _warn_of_chain(divergences: int, draws: int, r_hat: float) -> None:
    """Say if a chain is no sample of the posterior: halves that differ, or places that it could not enter.

    References:
        Gelman and Rubin, *Inference from iterative simulation using multiple sequences*, Statistical Science 1992,
        whose bound for the ratio is 1.1; Betancourt, *A conceptual introduction to Hamiltonian Monte Carlo*, 2017.
    """
    if r_hat > HIGHEST:
        warnings.warn(
            f"The chain has not converged: the split R-hat of its worst weight is {r_hat:.2f}, and should be below "
            f"{HIGHEST}. Draw more (warmup, draws), or have fewer weights.",
            stacklevel=2,
        )
    if divergences:
        warnings.warn(
            f"{divergences} of {draws} transitions diverged: there are places that the chain cannot enter. Take a "
            "higher target_accept.",
            stacklevel=2,
        )
