"""Point estimates of the same program: its posterior mode, and maximum likelihood, which is LoRA as practised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset

from bayeslora.inference.base import Run
from bayeslora.inference.training.trainer import TrainingSettings
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.posterior import VariationalPosterior, optimise
from bayeslora.models.guides.auto import make_guide
from bayeslora.program import Program
from bayeslora.settings import NotNegative, Positive

__all__ = ["MAP", "MLE", "point_estimate"]


@dataclass(frozen=True)
class MAP(TrainingSettings):
    """Maximum a posteriori estimation of the weights; hyper-sites keep their starting values (see `make_guide`).

    Attributes:
        temperature: weight of the log prior against the whole data's log-likelihood; 1 is Bayes' rule. Without
            a prior there is `mle`.
    """

    name: ClassVar[str] = "map"
    paper: ClassVar[str] = "the posterior mode; MacKay, Neural Computation 1992"

    temperature: Positive = 1.0

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Maximise log p(y, weights) over the weights."""
        return point_estimate(self, program, data, run, prior_weight=self.temperature, weight_decay=0.0)


@dataclass(frozen=True)
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
        return point_estimate(self, program, data, run, prior_weight=0.0, weight_decay=self.weight_decay)


def point_estimate(
    settings: TrainingSettings,
    program: Program,
    data: Dataset,
    run: Run,
    *,
    prior_weight: float,
    weight_decay: float,
) -> VariationalPosterior:
    """Maximise log p(y | weights) + prior_weight log p(weights) over all weights, by AdamW."""
    guide = make_guide("delta", program.model, run.sites(program))
    weights = {
        "params": guide.parameter_groups()["point"],
        "lr": settings.learning_rate,
        "weight_decay": weight_decay,
    }
    return optimise(
        program,
        guide,
        data,
        settings,
        run,
        groups=[weights],
        elbo=MeanFieldBound(),
        temperature=prior_weight,
    )
