"""A value: one real label a row, read as the one output of a regression head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslora.observations.base import Curved, Observation, refuse
from bayeslora.predict.values import ValuePrediction

if TYPE_CHECKING:
    from bayeslora.tasks import TaskSpec

__all__ = ["Value"]


@dataclass(frozen=True)
class Value(Observation, Curved):
    """A real label y = f + noise with normal noise of a known standard deviation.

    Attributes:
        scale: standard deviation of the noise, in units of the label.
    """

    name: ClassVar[str] = "value"
    kinds: ClassVar[tuple[str, ...]] = ("regression",)
    label: ClassVar[type[int] | type[float] | None] = float

    scale: float = 1.0

    @classmethod
    def of(cls, spec: TaskSpec) -> Value:
        """With noise of standard deviation 1."""
        return cls()

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    def head(self, spec: TaskSpec) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1}

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Normal around the output."""
        return dist.Normal(outputs.squeeze(-1), torch.as_tensor(self.scale).to(outputs), validate_args=False)

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
        """A prediction of real labels, which have no names."""
        return ValuePrediction(outputs, labels, scale=self.scale, **made)

    def constant(self, labels: Tensor) -> Tensor:
        """The mean label."""
        return labels.mean().reshape(1)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Distance of the label in units of the noise's variance."""
        return (labels.unsqueeze(-1) - outputs) / self.scale**2

    def gain(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared distance in units of the noise."""
        return ((labels - outputs.squeeze(-1)) / self.scale).square() / 2

    def curvature_root(self, outputs: Tensor) -> Tensor:
        """The one vector whose square is the Fisher information of the output: (1, examples, 1)."""
        return torch.full_like(outputs, 1 / self.scale).unsqueeze(0)
