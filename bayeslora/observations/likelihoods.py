"""Likelihoods: maps from the network's logits to the distribution of a label.

They are kept apart from the network, since curvature needs the two separately.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

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

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Derivative of the log-likelihood of ``labels`` (batch,) by the logits, in their shape."""
        return nn.functional.one_hot(labels, logits.shape[-1]) - logits.softmax(-1)

    def gain(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How much the log-likelihood of ``labels`` (batch,) could rise at most, with other logits: (batch,)."""
        return -self.distribution(logits).log_prob(labels)

    def curvature_root(self, logits: Tensor) -> Tensor:
        """Vectors r with sum_k r_k r_k^T = diag(p) - p p^T, the Fisher information of logits: (classes - 1, *shape).

        They are the columns of its Cholesky factor, known in closed form (Tanabe and Sagae, *An exact Cholesky
        decomposition and the generalized inverse of the variance-covariance matrix of the multinomial distribution*,
        JRSS B 1992).
        """
        p = logits.softmax(-1)
        # Mass of the classes from each one on; of those after it, less the rounding of a difference.
        rest = p.flip(-1).cumsum(-1).flip(-1)
        after = torch.cat([rest[..., 1:], torch.zeros_like(rest[..., :1])], dim=-1)
        diagonal = (p * after / rest.clamp(min=torch.finfo(p.dtype).tiny)).sqrt()
        columns = []
        for number in range(p.shape[-1] - 1):
            scale = diagonal[..., number] / after[..., number].clamp(min=torch.finfo(p.dtype).tiny)
            column = torch.zeros_like(p)
            column[..., number] = diagonal[..., number]
            column[..., number + 1 :] = -p[..., number + 1 :] * scale.unsqueeze(-1)
            columns.append(column)
        return torch.stack(columns)


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

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Derivative of the log-likelihood of ``labels`` (batch,) by the outputs, in their shape."""
        return (labels.unsqueeze(-1) - logits) / self.scale**2

    def gain(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How much the log-likelihood of ``labels`` (batch,) could rise at most, with other outputs: (batch,)."""
        return ((labels - logits.squeeze(-1)) / self.scale).square() / 2

    def curvature_root(self, logits: Tensor) -> Tensor:
        """The one vector whose square is the Fisher information of the output: (1, batch, 1)."""
        return torch.full_like(logits, 1 / self.scale).unsqueeze(0)


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
