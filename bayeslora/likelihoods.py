"""Likelihoods: maps from the network's logits to the distribution of a label.

They are kept apart from the network, since curvature needs the two separately.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslora.errors import SettingError, unknown

__all__ = ["Categorical", "Likelihood", "Normal", "build_likelihood"]


@dataclass(frozen=True)
class Categorical:
    """Class labels 0 ... classes - 1 with probabilities softmax(logits).

    Attributes:
        classes: number of classes, or of choices of a multiple-choice task.
    """

    name: ClassVar[str] = "categorical"
    classes: int

    @property
    def outputs(self) -> int:
        """Number of logits of an example."""
        return self.classes

    def distribution(self, logits: Tensor) -> dist.TorchDistribution:
        """Distribution of the labels (batch,) given logits (batch, classes)."""
        return dist.Categorical(logits=logits, validate_args=False)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities, in the shape of the logits."""
        return logits.softmax(-1)


@dataclass(frozen=True)
class Normal:
    """A real label y = f + noise with noise of a known standard deviation.

    Attributes:
        scale: standard deviation of the noise, in units of the label.
    """

    name: ClassVar[str] = "normal"
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """Number of outputs of an example."""
        return 1

    def distribution(self, logits: Tensor) -> dist.TorchDistribution:
        """Distribution of the labels (batch,) given outputs (batch, 1)."""
        return dist.Normal(logits.squeeze(-1), torch.as_tensor(self.scale).to(logits), validate_args=False)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The outputs themselves: a real label has no class probabilities."""
        return logits


Likelihood = Categorical | Normal
LIKELIHOODS: dict[str, type[Categorical] | type[Normal]] = {"categorical": Categorical, "normal": Normal}


def build_likelihood(settings: dict[str, Any]) -> Likelihood:
    """The likelihood that ``to_dict`` described.

    Raises:
        SettingError: its name is unknown.
    """
    fields = dict(settings)
    name = fields.pop("name")
    if name not in LIKELIHOODS:
        raise SettingError(unknown("likelihood", name, LIKELIHOODS))
    return LIKELIHOODS[name](**fields)


def to_dict(likelihood: Likelihood) -> dict[str, Any]:
    """Plain data from which `build_likelihood` makes the same likelihood."""
    return {"name": likelihood.name, **asdict(likelihood)}
