"""Posteriors that are guides: the distribution that a guide has become, and its training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, TypeVar

import torch
from datasets import Dataset
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from torch.optim import Optimizer

from bayeslora.errors import PosteriorError
from bayeslora.inference.base import Run
from bayeslora.inference.softening import Softened, without
from bayeslora.inference.training.objective import Hook, Outcome, State
from bayeslora.inference.training.process import cost_of, restored_network
from bayeslora.inference.training.trainer import TrainingSettings, train
from bayeslora.inference.variational.loss import KLWarmup, NegativeELBO, ProgramLoss
from bayeslora.inference.variational.rising import Rising
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.passes import Rows
from bayeslora.posterior import Record
from bayeslora.predictors import Pairs
from bayeslora.program import Estimator, Program
from bayeslora.store import POSTERIOR
from bayeslora.weights import Site

__all__ = ["PriorMean", "VariationalPosterior", "learn", "optimise", "prior_sites"]

#: What the prior means of random matrices are: the model's, or learned with all else (empirical Bayes).
PriorMean = Literal["learned", "model"]
#: Nats a row by which a fit has to be better than the base rate of the labels.
MARGIN = 0.01


Learned = TypeVar("Learned", bound="VariationalPosterior")


class VariationalPosterior(Softened):
    """The distribution that a guide has become.

    Attributes:
        guide: that distribution.
    """

    kind: ClassVar[str] = "variational"
    # The noise is what the guide does not know: that it knows more than that, a few rows say by chance at times.
    coldest = 1.0

    def __init__(self, program: Program, record: Record, guide: Guide) -> None:
        super().__init__(program, record)
        self.guide = guide
        self.random = guide.random
        if guide.spreads() and "sample" in self.predictors:
            self.predictors = {"pairs": Pairs(), **self.predictors}

    def prior_model(self) -> dict[str, Tensor]:
        """Pyro model of the weights alone, around the means that were learned, if they were."""
        prior_mean = self.record.settings.get("prior_mean", "model")
        return self.program.prior(prior_sites(self.program, self.guide, prior_mean))

    def noise_scales(self) -> dict[str, Tensor]:
        """The guide's."""
        return self.guide.noise_scales()

    @property
    def dense(self) -> bool:
        """Whether the guide's density is known."""
        return self.guide.dense

    @property
    def independent_layers(self) -> bool:
        """Whether the guide has no correlations between layers."""
        return self.guide.independent_layers

    def draw(self) -> dict[str, Tensor]:
        """One draw of every latent site of the model, and the weights it implies."""
        with torch.no_grad(), torch.autocast(self.program.device.type, enabled=False):
            trace = poutine.trace(self.guide).get_trace()
            latents = {
                name: trace.nodes[name]["value"].detach()  # a point is the parameter itself
                for name in trace.stochastic_nodes
                if not trace.nodes[name]["infer"].get("is_auxiliary")
            }
            return latents | self.program.model.weights(latents)

    def pairs(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield ``n`` draws of the weights, every second one the mirror image of the one before.

        Given the guide's other sites, its matrices are as likely there: see `Spread`.
        """
        return islice(self._mirrored(self.draws(-(-n // 2), seed)), n)

    def _mirrored(self, draws: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The weights of each draw, and of its mirror image."""
        means = {name: spread.mean.detach() for name, spread in self.guide.spreads().items()}
        for draw in draws:
            weights = {site.name: draw[site.name] for site in self.program.sites}
            yield weights
            yield weights | {name: 2 * mean - weights[name] for name, mean in means.items()}

    def mean(self) -> dict[str, Tensor]:
        """The guide's mean of the weights, by site."""
        return self.guide.mean()

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the guide at the values of the latent sites.

        Raises:
            PosteriorError: the guide is a point estimate.
        """
        with torch.no_grad():
            return self.guide.log_prob(dict(values))

    def state(self) -> dict[str, Tensor]:
        """The guide's parameters, and the temperature of predictions, if there is one."""
        return super().state() | dict(self.guide.state_dict())

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> VariationalPosterior:
        """Make the guide that the record names, and load its parameters.

        Raises:
            PosteriorError: the parameters do not fit the guide.
        """
        guide = cls.blank(program, record)
        try:
            guide.load_state_dict(without(state))
            for name, value in guide.state_dict().items():
                if value.is_floating_point() != state[name].is_floating_point():
                    raise TypeError(f"{name} is of {state[name].dtype}")
        except (RuntimeError, TypeError) as error:
            name = record.settings.get("guide", record.backend)
            raise PosteriorError(f"The saved parameters do not fit the guide '{name}': {error}") from error
        posterior = cls(program, record, guide.to(program.device))
        posterior.soften_as(state)
        return posterior

    @classmethod
    def blank(cls, program: Program, record: Record) -> Guide:
        """The guide that a record names, before its saved parameters are in it."""
        kind, init_scale = record.settings.get("guide", "delta"), record.settings.get("init_scale", 1e-2)
        return make_guide(kind, program.model, program.sites, init_scale, record.settings.get("guide_settings"))


def prior_sites(program: Program, guide: Guide, prior_mean: PriorMean) -> Sequence[Site]:
    """The sites of a program, as its prior is to see them.

    Args:
        program: whose sites.
        guide: over them.
        prior_mean: "model": as the program has them; "learned": each random matrix around the guide's own mean, where
            that is a parameter. Of all prior means it is the one at which the bound is largest.
    """
    if prior_mean == "model":
        return program.sites
    centres = guide.centres()
    return [replace(site, centre=centres.get(site.name)) for site in program.sites]


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
        kl_warmup: part of all steps in which that weight rises linearly from zero.
        estimator: what stands for a draw of the weights in the network; the draw itself, if left out.
        hooks: called before those that keep the posterior.

    Raises:
        TrainingError: the loss became infinite or not a number.
    """
    sites = partial(prior_sites, program, guide, prior_mean)
    objective = NegativeELBO(program, guide, elbo, len(data), temperature, estimator, sites)
    record = run.record(settings.name, asdict(settings), len(data), temperature, guide.point_sites)
    warmup = [KLWarmup(objective, temperature, kl_warmup)] if kl_warmup else []
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate)
    posterior = VariationalPosterior(program, record, guide)
    rising = Rising(objective, bounded=prior_mean == "model" and not guide.point_sites)
    learn(posterior, objective, optimiser, data, settings, run, [*warmup, *hooks, rising])
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
    program, kept = posterior.program, _Kept(posterior, run)
    with restored_network(program, settings.gradient_checkpointing):
        explained = _Explained(objective)
        kept.describe(train(objective, optimiser, Rows.of(program, data), settings, run, [*hooks, explained, kept]))
    posterior.record = replace(posterior.record, finished=True)
    _warn_of_unmoved(posterior, run)
    explained.warn(data["labels"][:])
    return posterior


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
            warnings.warn(
                f"The fit ends no better than the base rate: in the last epoch the training rows had a log-likelihood "
                f"of {self.nats:.3f} a row, and by the shares of the labels alone it is {base_rate:.3f}. Train for "
                "more steps or, if it was better before (the log tells), with a lower learning rate.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Kept(Hook):
    """The posterior that a guide is to become, saved in the run's folder at every checkpoint."""

    posterior: VariationalPosterior
    run: Run

    def on_checkpoint(self, outcome: Outcome) -> None:
        """Save it."""
        self.describe(outcome)
        if self.run.output_dir is not None:
            self.posterior.save(self.run.output_dir / POSTERIOR)

    def describe(self, outcome: Outcome) -> None:
        """Put what training took and logged into the record."""
        posterior = self.posterior
        learned = sum(value.numel() for value in posterior.guide.parameters() if value.requires_grad)
        cost = cost_of(posterior.program, outcome.seconds, outcome.peak_memory_bytes, learned)
        posterior.record = replace(posterior.record, cost=cost, history=outcome.history)
