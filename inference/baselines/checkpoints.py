"""Checkpoint ensembles: the weights at the ends of the last epochs of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.training.objective import Hook, State
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.learning import learn
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.point import Weighed
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.inference.variational.rates import groups_of
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.models.guides.swag import Trajectory
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.settings import Count

__all__ = ["CheckpointEnsemble", "CheckpointPosterior"]


@dataclass(frozen=True, kw_only=True)
class CheckpointEnsemble(Weighed):
    """The weights at the ends of the last epochs of one fit, each as likely as any other: an ensemble for one training.

    All weights that are trained are in it, whatever PEFT trains. Members are near one another, the more so since the
    learning rate falls: how far apart they are says nothing of the posterior's width.

    Attributes:
        checkpoints: how many epochs, the last ones.

    References:
        Chen, Lundberg and Lee, *Checkpoint ensembles: ensemble methods from a single training process*, arXiv
        1710.03282, 2017.
    """

    name: ClassVar[str] = "checkpoint-ensemble"
    paper: ClassVar[str] = "Chen et al., arXiv 1710.03282"

    checkpoints: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoints > self.epochs:
            raise SettingError(
                f"The last {self.checkpoints} epochs of {self.epochs:g} were asked for: train for more epochs, or set "
                "checkpoints lower."
            )

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Train all weights, and keep them at the end of each epoch."""
        trajectory = Trajectory.of(make_guide("delta", program.model, run.sites(program)), self.checkpoints)
        groups = groups_of(trajectory, self.learning_rate, self.points, weight_decay=self.weight_decay)
        fixed = set(trajectory.latents) - set(trajectory.moving)
        record = run.record(self.name, asdict(self), len(data), self.temperature, fixed)
        return learn(
            CheckpointPosterior(program, record, trajectory),
            NegativeELBO(program, trajectory, MeanFieldBound(), len(data), self.prior_weight),
            torch.optim.AdamW(groups, lr=self.learning_rate),
            data,
            self,
            run,
            [_Collect(trajectory)],
        )


class CheckpointPosterior(VariationalPosterior):
    """The empirical distribution of checkpoints; before the first one, where training is."""

    kind: ClassVar[str] = "checkpoints"

    def __init__(self, program: Program, record: Record, guide: Guide) -> None:
        super().__init__(program, record, guide)
        self.random = True

    @property
    def most_draws(self) -> int:
        """As many as there are checkpoints."""
        return len(self.kept())

    def differing(self, draws: int) -> int:
        """No more than there are checkpoints."""
        return min(draws, self.most_draws)

    def kept(self) -> Tensor:
        """The weights that are trained, in one vector for each checkpoint (checkpoints, weights)."""
        found = self.guide
        assert isinstance(found, Trajectory)
        count = min(int(found.count), len(found.snapshots))
        return found.snapshots[-count:] if count else found.here().unsqueeze(0)

    def draw(self) -> dict[str, Tensor]:
        """One of the checkpoints."""
        kept = self.kept()
        return self._at(kept[int(torch.randint(len(kept), ()))])

    def draws(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """So many checkpoints, the last ones in their order, whatever the seed.

        Raises:
            PosteriorError: there are not so many.
        """
        kept = self.kept()
        if n > len(kept):
            raise PosteriorError(f"{len(kept)} checkpoints were kept, and {n} draws were asked for.")
        for each in kept[len(kept) - n :]:
            yield self._at(each)

    def mean(self) -> dict[str, Tensor]:
        """The average of the weights over all checkpoints, by site."""
        weights = self._at(self.kept().mean(0))
        return {site.name: weights[site.name].detach().clone() for site in self.program.sites}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Checkpoints have no density.

        Raises:
            PosteriorError: always.
        """
        raise PosteriorError(f"The posterior of '{self.record.backend}' is a set of weights: it has no density.")

    @classmethod
    def blank(cls, program: Program, record: Record) -> Trajectory:
        """The guide without checkpoints."""
        return Trajectory.of(make_guide("delta", program.model, program.sites), record.settings["checkpoints"])

    def _at(self, flat: Tensor) -> dict[str, Tensor]:
        assert isinstance(self.guide, Trajectory)
        latents = {name: value.detach() for name, value in self.guide.sites(flat).items()}
        return latents | self.program.model.weights(latents)


@dataclass(frozen=True)
class _Collect(Hook):
    """Keep where the point is at the end of each epoch."""

    trajectory: Trajectory

    def on_epoch(self, state: State) -> None:
        """Take a snapshot."""
        self.trajectory.collect()
