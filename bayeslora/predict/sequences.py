"""Predictions of sequences: how likely a posterior finds texts that are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.predict import metrics
from bayeslora.predict.prediction import Prediction
from bayeslora.predict.resampling import Bounded

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Scored", "SequencePrediction"]


class Scored(dist.TorchDistribution):
    """Observations whose log density is known: it was computed where they were at hand.

    Args:
        log_density: of each.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real

    def __init__(self, log_density: Tensor) -> None:
        self.log_density = log_density
        super().__init__(log_density.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Scored:
        """The same for more of them."""
        return Scored(self.log_density.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """What was computed."""
        return self.log_density

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Refuse.

        Raises:
            PosteriorError: always.
        """
        raise PosteriorError("The likelihood of a given text has no other texts to draw: let the posterior write them.")


@dataclass(frozen=True, eq=False, repr=False)
class SequencePrediction(Prediction):
    """How likely given sequences are: the one output of a row is the log-likelihood of all of its tokens.

    Labels are numbers of tokens. A sequence is as likely as it is on average over draws: it is probabilities of whole
    sequences that are averaged, since all tokens of a text see the same weights.
    """

    kind: ClassVar[str] = "sequences"
    replicable: ClassVar[bool] = False

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """The sequences with their log-likelihoods."""
        return Scored(outputs.squeeze(-1))

    @property
    def tokens(self) -> Tensor:
        """Number of tokens of each sequence (examples,).

        Raises:
            DataError: they are not known.
        """
        return self._known()

    @property
    def nll_by_token(self) -> Tensor:
        """Negative log-likelihood of each sequence over the number of its tokens (examples,), in nats."""
        return -self.log_predictive_density / self.tokens

    @property
    def perplexity(self) -> Tensor:
        """Perplexity of each sequence (examples,): one over the geometric mean of the probabilities of its tokens."""
        return self.nll_by_token.exp()

    @property
    def disagreement(self) -> Tensor:
        """What each sequence tells of which draw it is from (examples,), in nats: 0 if all find it as likely.

        log mean_s p_s(y) - mean_s log p_s(y), the divergence of no preference from how draws count once y was seen, and
        what is gained by averaging probabilities in place of taking a draw.
        """
        return (self.log_predictive_density - self.log_likelihood.mean(0)).clamp(min=0)

    @property
    def predictions(self) -> Tensor:
        """Refuse.

        Raises:
            PosteriorError: always.
        """
        raise PosteriorError("Likelihoods of given texts hold no best guess of them.")

    @property
    def by_draw(self) -> dict[str, tuple[Tensor, dict[str, tuple[str, ...]]]]:
        """``mean``, the log-likelihood of a token on average (draws, examples)."""
        return {"mean": (self.outputs[..., 0] / self.tokens, {})}

    def statistics(self) -> dict[str, Bounded]:
        """See `bayeslora.predict.metrics.sequence_statistics`."""
        return metrics.sequence_statistics(self.log_predictive_density, self.tokens)

    def to_pandas(self) -> pd.DataFrame:
        """Columns ``log_likelihood`` in nats, ``tokens``, ``perplexity``, and ``deviation`` of the first over draws."""
        import pandas as pd

        columns = {
            "log_likelihood": self.log_predictive_density,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "deviation": self.log_likelihood.std(0, correction=0),
        }
        return pd.DataFrame({name: value.numpy() for name, value in columns.items()})
