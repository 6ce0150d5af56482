"""A value: one real label a row, read as the one output of a regression head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslora.errors import DataError
from bayeslora.observations.base import Curved, Observation, refuse
from bayeslora.predict.values import ValuePrediction
from bayeslora.settings import Finite, Positive

if TYPE_CHECKING:
    from bayeslora.tasks import Split, TaskSpec

__all__ = ["Value"]

#: Standard deviation of the noise in that of the labels, where nobody says it: a fit explains three quarters of their
#: variance.
NOISE = 0.5


@dataclass(frozen=True)
class Value(Observation, Curved):
    """A real label y = mean + unit f + noise, f the output, with normal noise of a known standard deviation.

    A program of a task has the mean of the labels of its training rows, their standard deviation as the unit, and half
    of that as the noise, unless they are given. A head that was trained before keeps the mean and the unit that it was
    trained with: 0 and 1 where that is not known.

    Attributes:
        scale: standard deviation of the noise, in units of the label.
        mean: label of an output of zero.
        unit: by how much a label rises with an output, in units of the label.
    """

    name: ClassVar[str] = "value"
    kinds: ClassVar[tuple[str, ...]] = ("regression",)
    label: ClassVar[type[int] | type[float] | None] = float
    rate: ClassVar[str] = "the mean of the labels"

    scale: Positive = 1.0
    mean: Finite = 0.0
    unit: Positive = 1.0

    @classmethod
    def of(cls, spec: TaskSpec) -> Value:
        """The observation before anything is known of the labels: noise of deviation 1 around the output itself."""
        return cls()

    def for_training(self, rows: Split, head: Callable[[], Observation | None]) -> Value:
        """The same with noise by the labels' spread and, where a head is drawn, their mean and deviation as units."""
        if not rows.labelled:
            return self
        labels = rows.labels().tolist()
        if not all(map(math.isfinite, labels)):
            raise DataError(f"A label of split '{rows.name}' is beyond single precision: give labels in another unit.")
        mean = fmean(labels)
        deviation = math.sqrt(fmean((label - mean) ** 2 for label in labels)) or 1.0
        trained = head()
        if isinstance(trained, Value):
            return replace(self, scale=NOISE * deviation, mean=trained.mean, unit=trained.unit)
        return replace(self, scale=NOISE * deviation, mean=mean, unit=deviation)

    @property
    def outputs(self) -> int:
        """One: the mean of the label."""
        return 1

    def head(self, spec: TaskSpec) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1}

    def expected(self, outputs: Tensor) -> Tensor:
        """Expected labels (..., examples, 1) given outputs (..., examples, 1)."""
        return self.mean + self.unit * outputs

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Normal around the expected label."""
        scale = torch.as_tensor(self.scale).to(outputs)
        return dist.Normal(self.expected(outputs).squeeze(-1), scale, validate_args=False)

    def check(self, labels: Sequence[Any]) -> None:
        """Make sure that labels are numbers.

        Raises:
            DataError: one is none (the message names the row).
        """
        for row, label in enumerate(labels):
            if not isinstance(label, int | float) or not math.isfinite(label):
                raise refuse(row, label, "one finite number")

    def predicted(
        self, outputs: Tensor, labels: Tensor | None = None, names: tuple[str, ...] = (), **made: Any
    ) -> ValuePrediction:
        """A prediction of real labels, which have no names; its outputs are expected labels."""
        return ValuePrediction(self.expected(outputs), labels, scale=self.scale, **made)

    def constant(self, labels: Tensor) -> Tensor:
        """That of the mean label."""
        return ((labels.mean() - self.mean) / self.unit).reshape(1)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Distance of the label in units of the noise's variance, for an output's unit."""
        return (labels.unsqueeze(-1) - self.expected(outputs)) * (self.unit / self.scale**2)

    def gain(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared distance in units of the noise."""
        return ((labels - self.expected(outputs).squeeze(-1)) / self.scale).square() / 2

    def curvature_root(self, outputs: Tensor) -> Tensor:
        """The one vector whose square is the Fisher information of the output: (1, examples, 1)."""
        return torch.full_like(outputs, self.unit / self.scale).unsqueeze(0)
