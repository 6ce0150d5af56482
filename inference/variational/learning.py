"""The training of guides: a bound or another loss is minimised, and a posterior kept at every checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from datasets import Dataset
from pyro.infer import ELBO
from torch.optim import Optimizer

from bayeslora.inference.base import Run
from bayeslora.inference.training.objective import Hook, Outcome, State
from bayeslora.inference.training.process import cost_of, restored_network
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.inference.training.trainer import train
from bayeslora.inference.variational.loss import KLSchedule, KLWarmup, NegativeELBO, ProgramLoss
from bayeslora.inference.variational.posterior import PriorMean, VariationalPosterior, prior_sites
from bayeslora.inference.variational.rates import RateLimit
from bayeslora.inference.variational.rising import Rising
from bayeslora.models.guides.base import Guide
from bayeslora.passes import Rows
from bayeslora.program import Estimator, Program
from bayeslora.store import POSTERIOR

__all__ = ["describe", "learn", "optimise"]

#: Nats a row by which a fit has to be better than the base rate of the labels.
MARGIN = 0.01


Learned = TypeVar("Learned", bound=VariationalPosterior)


def optimise(
    program: Program,
    guide: Guide,
    data: Dataset,
    settings: TrainingSettings,
    run: Run,
    *,
    groups: list[dict[str, Any]],
    elbo: ELBO,
    temperature: float,
    prior_mean: PriorMean = "model",
    kl_warmup: float = 0.0,
    kl_schedule: KLSchedule = "linear",
    rate_limit: float = math.inf,
    limited: float = 0.0,
    estimator: Estimator | None = None,
    hooks: Sequence[Hook] = (),
) -> VariationalPosterior:
    """Train a guide, leaving a posterior in the run's folder at every checkpoint.

    Args:
        program: the Pyro model.
        guide: starts where training starts, and becomes the posterior.
        data: tokenised rows with labels.
        settings: of the backend, kept with the posterior.
        run: seed, output folder, resume.
        groups: AdamW's parameter groups.
        elbo: the bound to maximise.
        temperature: weight of the latent sites; 0 is maximum likelihood.
        prior_mean: see `prior_sites`.
        kl_warmup: part of all steps in which that weight is not all there.
        kl_schedule: how it is in that part.
        rate_limit: of the means of random weights.
        limited: part of all steps, the first ones, in which their rate has that limit.
        estimator: what stands for a draw of the weights in the network; the draw itself, if left out.
        hooks: called before those that keep the posterior.

    Raises:
        TrainingError: the loss became infinite or not a number.
    """
    sites = partial(prior_sites, program, guide, prior_mean)
    objective = NegativeELBO(program, guide, elbo, len(data), temperature, estimator, sites)
    record = run.record(settings.name, asdict(settings), len(data), temperature, guide.point_sites)
    warmup = [KLWarmup(objective, temperature, kl_warmup, kl_schedule)] if kl_warmup else []
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate)
    limit = RateLimit(optimiser, rate_limit, limited)
    posterior = VariationalPosterior(program, record, guide)
    rising = Rising(objective, bounded=prior_mean == "model" and not guide.point_sites)
    learn(posterior, objective, optimiser, data, settings, run, [*warmup, limit, *hooks, rising])
    if guide.random:
        rising.warn()
    return posterior


def learn(
    posterior: Learned,
    objective: ProgramLoss,
    optimiser: Optimizer,
    data: Dataset,
    settings: TrainingSettings,
    run: Run,
    hooks: Sequence[Hook] = (),
) -> Learned:
    """Train the guide of a posterior, which is left in the run's folder at every checkpoint.

    Args:
        posterior: of the guide where training starts.
        objective: of which the guide's parameters, or some of them, are the parameters.
        optimiser: of these.
        data: tokenised rows with labels.
        settings: of the backend.
        run: seed, output folder, resume.
        hooks: called before the posterior is saved.

    Raises:
        TrainingError: the loss became infinite or not a number.
    """
    program = posterior.program
    with restored_network(program, settings.gradient_checkpointing):
        explained = _Explained(objective)
        all_hooks = [*hooks, explained, _Kept(posterior, run)]
        describe(posterior, train(objective, optimiser, Rows.of(program, data), settings, run, all_hooks))
    _warn_of_unmoved(posterior, run)
    explained.warn(data["labels"][:])
    return posterior


def describe(posterior: VariationalPosterior, outcome: Outcome) -> None:
    """Put what the training of a posterior's guide took and logged into its record."""
    learned = sum(value.numel() for value in posterior.guide.parameters() if value.requires_grad)
    cost = cost_of(posterior.program, outcome.seconds, outcome.peak_memory_bytes, learned)
    posterior.record = replace(posterior.record, cost=cost, history=outcome.history)


def _warn_of_unmoved(posterior: VariationalPosterior, run: Run) -> None:
    """Say which random weights have the very mean from which training started."""
    random, mean = posterior.program.model.split(run.sites(posterior.program))[0], posterior.mean()
    unmoved = [site.name for site in random if torch.equal(mean[site.name], site.start.to(mean[site.name]))]
    if unmoved:
        warnings.warn(
            f"Nothing was learned of {', '.join(unmoved)}: their mean is what training started from. Train for more "
            "steps, or with a narrower prior, whose noise lets something of the data be seen (model.scale).",
            stacklevel=2,
        )


@dataclass
class _Explained(Hook):
    """How well the training rows were explained in the last epoch: nats an example, NaN before the first."""

    objective: ProgramLoss
    nats: float = math.nan

    def on_epoch(self, state: State) -> None:
        """Take the mean over its batches."""
        self.nats = self.objective.mean_explained()

    def warn(self, labels: Sequence[Any]) -> None:
        """Say if the labels' base rate explains them as well."""
        observation, given = self.objective.program.observation, torch.as_tensor(labels)
        same = observation.constant(given)
        base_rate = math.nan if same is None else float(observation.log_prob(same.expand(len(given), -1), given).mean())
        if self.nats < base_rate + MARGIN:
            hardly = f"hardly better than the base rate, by less than {MARGIN} nats a row"
            ends = "no better than the base rate" if self.nats <= base_rate else hardly
            warnings.warn(
                f"The fit ends {ends}: in the last epoch the training rows had a log-likelihood of {self.nats:.3f} a "
                f"row, and by {observation.rate} alone it is {base_rate:.3f}. Train for more steps or, if it was "
                "better before (the log tells), with a lower learning rate.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Kept(Hook):
    """The posterior that a guide is to become, saved in the run's folder at every checkpoint."""

    posterior: VariationalPosterior
    run: Run

    def on_checkpoint(self, outcome: Outcome) -> None:
        """Save the posterior as it is now."""
        describe(self.posterior, outcome)
        if self.run.output_dir is not None:
            self.posterior.save(self.run.output_dir / POSTERIOR)
