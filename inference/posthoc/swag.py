"""SWAG: a normal posterior with the moments of the last part of a training trajectory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

import torch
from datasets import Dataset
from pydantic import Field
from torch.optim import Optimizer

from bayeslora.errors import SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.training.objective import Hook, State
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.learning import learn
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.point import Weighed
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.inference.variational.rates import groups_of
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.swag import Swag, Trajectory
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.settings import Positive

__all__ = ["SWAG", "SWAGPosterior"]


@dataclass(frozen=True, kw_only=True)
class SWAG(Weighed):
    """Stochastic weight averaging, Gaussian: the posterior is where training goes in its last part, at a constant rate.

    All weights that are trained are random, the head among them, whatever PEFT trains and whichever sites the model of
    the weights would have random. Snapshots are taken at equal distances, the last one at the end: with the defaults,
    at the ends of the last five of ten epochs.

    The law has no part for the prior, and nothing in it says that its width is right: that follows from batch size and
    learning rate. On a Bayesian linear regression it has the posterior's mean, and not its covariance. Diagnostics
    compare it with the program's posterior, to which k-hat says how far it is.

    Attributes:
        collect_from: part of all steps after which snapshots are taken.
        snapshots: how many.
        rank: how many of them, the last ones, make the part of the covariance that is not diagonal.
        collecting_rate: constant learning rate while they are taken, as a multiple of ``learning_rate``.
        scale: of the covariance, which has a diagonal part and one of low rank; 1/2 gives each its half.

    References:
        Maddox et al., *A simple baseline for Bayesian uncertainty in deep learning*, NeurIPS 2019; Onal et al.,
        *Gaussian stochastic weight averaging for Bayesian low-rank adaptation of large language models*, AABI 2024.
    """

    name: ClassVar[str] = "swag"
    paper: ClassVar[str] = "Maddox et al., NeurIPS 2019; Onal et al., AABI 2024 (SWAG-LoRA)"

    collect_from: Annotated[float, Field(ge=0, lt=1)] = 0.5
    snapshots: Annotated[int, Field(ge=2)] = 5
    rank: Annotated[int, Field(ge=2)] = 5
    collecting_rate: Positive = 0.5
    scale: Positive = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.snapshots:
            raise SettingError(f"A covariance of rank {self.rank} takes as many snapshots, found {self.snapshots}.")

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Train all weights, and collect their moments on the way.

        Raises:
            SettingError: there are fewer steps in which to collect than snapshots.
        """
        point = make_guide("delta", program.model, run.sites(program))
        trajectory = Trajectory.of(point, self.rank)
        guide = Swag(trajectory, self.scale, program.model.weights)
        objective = NegativeELBO(program, trajectory, MeanFieldBound(), len(data), self.prior_weight)
        groups = groups_of(trajectory, self.learning_rate, self.points, weight_decay=self.weight_decay)
        optimiser = torch.optim.AdamW(groups, lr=self.learning_rate)
        record = run.record(self.name, asdict(self), len(data), self.temperature, guide.point_sites)
        collect = _Collect(self, trajectory, optimiser)
        return learn(SWAGPosterior(program, record, guide), objective, optimiser, data, self, run, [collect])


class SWAGPosterior(VariationalPosterior):
    """A normal law with the moments of a trajectory."""

    kind: ClassVar[str] = "swag"

    @classmethod
    def blank(cls, program: Program, record: Record) -> Swag:
        """The guide without a trajectory."""
        point = make_guide("delta", program.model, program.sites)
        return Swag(Trajectory.of(point, record.settings["rank"]), record.settings["scale"], program.model.weights)


@dataclass(frozen=True)
class _Collect(Hook):
    """The last part of training: its constant rate, and its snapshots. What it has collected is the trajectory's."""

    settings: SWAG
    trajectory: Trajectory
    optimiser: Optimizer

    def before_step(self, state: State) -> None:
        """Set the learning rate, over that of the schedule."""
        begin = self._begin(state)
        if state.step >= begin:
            for group in self.optimiser.param_groups:
                group["lr"] = self.settings.collecting_rate * group["initial_lr"]

    def on_step(self, state: State) -> None:
        """Take a snapshot, if it is time."""
        begin, count = self._begin(state), self.settings.snapshots
        if state.step in {begin + round(k * (state.steps - begin) / count) for k in range(1, count + 1)}:
            self.trajectory.collect()

    def _begin(self, state: State) -> int:
        """Steps that come before."""
        settings, begin = self.settings, round(self.settings.collect_from * state.steps)
        if state.steps - begin < settings.snapshots:
            raise SettingError(
                f"{settings.snapshots} snapshots take as many steps, and of {state.steps} in all {state.steps - begin} "
                "are left for them: train for more epochs, or set snapshots and rank, or collect_from, lower."
            )
        return begin
