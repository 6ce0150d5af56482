"""Point estimates of the same program: its posterior mode, and maximum likelihood, which is LoRA as practised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset
from torch import Tensor

from bayeslora.inference.base import Run
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.learning import optimise
from bayeslora.inference.variational.posterior import PriorMean, VariationalPosterior, prior_sites
from bayeslora.inference.variational.rates import groups_of, rate_beside_prior
from bayeslora.models.guides.auto import make_guide
from bayeslora.program import Program
from bayeslora.settings import NotNegative, Positive

__all__ = ["MAP", "MLE", "Mode", "Weighed", "mode_of", "point_estimate", "weights_given"]


@dataclass(frozen=True, kw_only=True)
class MAP(TrainingSettings):
    """Maximum a posteriori estimation of the weights; hyper-sites keep their starting values (see `make_guide`).

    Attributes:
        temperature: weight of the log prior against the whole data's log-likelihood; 1 is Bayes' rule. Without
            a prior there is `mle`.
        prior_mean: as of `svi`, whose prior this is: "learned" leaves A to the likelihood alone.
        learning_rate: of the matrices A, if they are random in the model, for AdamW.
        point_learning_rate: learning rate of all others, such as B and the head; by default ``learning_rate``, but no
            less than 2e-3 where the prior mean is the model's: that prior pulls at A from the first step, when A learns
            nothing of the data yet since B is zero.
    """

    name: ClassVar[str] = "map"
    paper: ClassVar[str] = "the posterior mode; MacKay, Neural Computation 1992"

    temperature: Positive = 1.0
    prior_mean: PriorMean = "learned"
    point_learning_rate: NotNegative | None = None

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Maximise log p(y, weights) over the weights."""
        return point_estimate(
            self,
            program,
            data,
            run,
            prior_weight=self.temperature,
            prior_mean=self.prior_mean,
            points=self.point_learning_rate,
        )


@dataclass(frozen=True, kw_only=True)
class MLE(TrainingSettings):
    """Maximum likelihood by AdamW: plain LoRA fine-tuning, without the program's prior.

    Attributes:
        weight_decay: AdamW's decoupled decay towards zero.

    References:
        Hu et al., *LoRA: low-rank adaptation of large language models*, ICLR 2022.
    """

    name: ClassVar[str] = "mle"
    paper: ClassVar[str] = "Hu et al., ICLR 2022 (LoRA)"

    weight_decay: NotNegative = 0.01

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Maximise log p(y | weights) over the weights."""
        return point_estimate(
            self, program, data, run, prior_weight=0.0, weight_decay=self.weight_decay, points=self.learning_rate
        )


@dataclass(frozen=True, kw_only=True)
class Weighed(MLE):
    """The training of `mle`, with the log prior in it by some weight: what a posterior is then laid around.

    Attributes:
        prior_weight: of the log prior in what is trained: 0 is `mle`, 1 `map` under the model's prior mean.
    """

    prior_weight: NotNegative = 0.0

    @property
    def points(self) -> float:
        """Learning rate of all weights but the matrices A."""
        return rate_beside_prior(self.learning_rate) if self.prior_weight else self.learning_rate

    @property
    def temperature(self) -> float:
        """Of the posterior, for its record: 1 if no prior was weighed, since one of 0 would be a point."""
        return self.prior_weight or 1.0


def point_estimate(
    settings: TrainingSettings,
    program: Program,
    data: Dataset,
    run: Run,
    *,
    prior_weight: float,
    prior_mean: PriorMean = "model",
    weight_decay: float = 0.0,
    points: float | None = None,
) -> VariationalPosterior:
    """Maximise log p(y | weights) + prior_weight log p(weights) over all weights, by AdamW.

    Args:
        settings: of the optimisation; its ``learning_rate`` is that of the matrices A.
        program: the Pyro model.
        data: tokenised rows with labels.
        run: seed, output folder, resume.
        prior_weight: of the log prior.
        prior_mean: see `prior_sites`.
        weight_decay: AdamW's.
        points: learning rate of all other weights; by default that of A, and beside a prior that holds A that of
            `rate_beside_prior`.
    """
    guide = make_guide("delta", program.model, run.sites(program))
    if points is None:
        sites = prior_sites(program, guide, prior_mean)
        held = bool(guide.centres()) and all(site.centre is None for site in sites)
        points = rate_beside_prior(settings.learning_rate) if held else settings.learning_rate
    return optimise(
        program,
        guide,
        data,
        settings,
        run,
        groups=groups_of(guide, settings.learning_rate, points, weight_decay=weight_decay),
        elbo=MeanFieldBound(),
        temperature=prior_weight,
        prior_mean=prior_mean,
    )


class Mode(NamedTuple):
    """The mode of every latent site, and what its training logged and cost, which is nothing where it was given."""

    latents: dict[str, Tensor]
    history: list[dict[str, Any]]
    cost: dict[str, float]


def weights_given(program: Program, run: Run) -> bool:
    """Whether there is something to start from, or the weights are not known to be fresh: see `Weights.fresh`."""
    return run.start is not None or not program.weights.fresh


def mode_of(
    settings: TrainingSettings,
    program: Program,
    data: Dataset,
    run: Run,
    *,
    given: bool,
    prior_weight: float,
    weight_decay: float = 0.0,
    points: float | None = None,
) -> Mode:
    """A mode to put a posterior around: the weights that are given, or those that `point_estimate` finds.

    Args:
        settings: of the optimisation.
        program: the Pyro model.
        data: tokenised rows with labels.
        run: its ``start`` is what is given, or else the weights that the program was made with.
        given: whether to take these.
        prior_weight: as for `point_estimate`, like all that follows.
        weight_decay: see there.
        points: see there.
    """
    if given:
        return Mode(program.model.initial(run.sites(program)), [], {})
    found = point_estimate(
        settings, program, data, run, prior_weight=prior_weight, weight_decay=weight_decay, points=points
    )
    latents = {name: value.detach().clone() for name, value in found.draw().items()}
    return Mode(latents, found.record.history, found.record.cost)
