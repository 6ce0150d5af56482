"""Maximum a posteriori estimation: LoRA fine-tuning as a point estimate of the same program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bayeslora.errors import SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.svi import GuidePosterior, optimise
from bayeslora.inference.training import TrainingSettings
from bayeslora.models.guides import make_guide
from bayeslora.program import Program

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["MAP"]


@dataclass(frozen=True)
class MAP(TrainingSettings):
    """Maximum a posteriori estimation of the weights, hyper-sites kept at their prior's starting value.

    Hyper-sites do not move because the joint mode is degenerate: the density of many columns under a covariance that
    shrinks to zero around them is unbounded.

    Attributes:
        temperature: weight of the log prior; 1 is the posterior mode, 0 is maximum likelihood, that is LoRA as
            practised.
        weight_decay: AdamW's decoupled decay towards zero, which practice has and Bayes' rule has not.

    References:
        Hu et al., *LoRA: low-rank adaptation of large language models*, ICLR 2022.
    """

    name: ClassVar[str] = "map"
    paper: ClassVar[str] = "Hu et al., ICLR 2022 (LoRA)"

    temperature: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 0 or self.weight_decay < 0:
            raise SettingError(
                f"temperature and weight_decay cannot be negative, found {self.temperature} and {self.weight_decay}."
            )

    def fit(self, program: Program, data: Dataset, run: Run) -> GuidePosterior:
        """Maximise log p(y, weights) over the weights."""
        guide = make_guide("delta", program.model, program.sites)
        groups = guide.parameter_groups()
        for hyper in groups["scale"]:
            hyper.requires_grad_(False)
        weights = {"params": groups["location"], "lr": self.learning_rate, "weight_decay": self.weight_decay}
        return optimise(self, program, guide, [weights], data, run, lambda done: self.temperature)
