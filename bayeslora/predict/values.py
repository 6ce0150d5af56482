"""Predictions of real labels: the distribution of each under the posterior."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslora.predict import metrics
from bayeslora.predict.prediction import Prediction
from bayeslora.predict.resampling import Bounded

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ValuePrediction"]


@dataclass(frozen=True, eq=False, repr=False)
class ValuePrediction(Prediction):
    """A prediction of real labels, whose one output is the mean of normal noise.

    Attributes:
        scale: standard deviation of the noise.
        stretch: by how much the law of a label, noise and draws, is stretched about its mean.
    """

    kind: ClassVar[str] = "values"

    scale: float = 1.0
    stretch: float = 1.0

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Normal around the output, as far from the mean of all draws as the stretch says."""
        means = outputs.squeeze(-1)
        stretched = torch.lerp(means.mean(0, keepdim=True), means, self.stretch)
        return dist.Normal(stretched, torch.as_tensor(self.scale * self.stretch).to(outputs), validate_args=False)

    @cached_property
    def mean(self) -> Tensor:
        """Predictive mean (examples,)."""
        return self._by_rows(lambda outputs: self.distribution(outputs).mean.mean(0))

    @cached_property
    def variance(self) -> Tensor:
        """Predictive variance (examples,): the noise's plus that of the mean over draws."""

        def total(outputs: Tensor) -> Tensor:
            label = self.distribution(outputs)
            found: Tensor = label.variance.mean(0) + label.mean.var(0, correction=0)
            return found

        return self._by_rows(total)

    @property
    def disagreement(self) -> Tensor:
        """Standard deviation over draws of the mean of a label (examples,), in its unit: what is not noise."""
        return self._by_rows(lambda outputs: self.distribution(outputs).mean.std(0, correction=0))

    @property
    def below(self) -> Tensor:
        """Predicted probability that a label is below what it is (examples,): uniform if predictions are true.

        The probability integral transform (Dawid, *Statistical theory: the prequential approach*, JRSS A 1984).

        Raises:
            DataError: the labels are not known.
        """
        return self._by_rows(lambda part, labels: self.distribution(part).cdf(labels).mean(0), self._known())

    @property
    def predictions(self) -> Tensor:
        """The predictive mean (examples,)."""
        return self.mean

    @property
    def by_draw(self) -> dict[str, tuple[Tensor, dict[str, tuple[str, ...]]]]:
        """``mean`` (draws, examples)."""
        return {"mean": (self.distribution(self.outputs).mean, {})}

    def statistics(self) -> dict[str, Bounded]:
        """See `bayeslora.predict.metrics.value_statistics`."""
        return metrics.value_statistics(self.mean, self.log_predictive_density, self._known(), self.below)

    def to_pandas(self) -> pd.DataFrame:
        """Columns ``mean`` and ``deviation``, the standard deviation of a label, in its unit."""
        import pandas as pd

        return pd.DataFrame({"mean": self.mean.numpy(), "deviation": self.variance.sqrt().numpy()})
