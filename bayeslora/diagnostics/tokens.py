"""Calibration of tokens of completions: how sure the mixture of draws is of the likeliest one, and whether it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayeslora.errors import PosteriorError, unknown
from bayeslora.observations import Completions
from bayeslora.observations.completions import log_likelihoods, positions_at_once, spread
from bayeslora.observations.decoder import logits_at
from bayeslora.passes import Rows, undisturbed
from bayeslora.posterior import Posterior
from bayeslora.predict.metrics import BINS
from bayeslora.predict.reliability import Guesses
from bayeslora.predict.resampling import Interval, Statistic, bootstrap, calibration, ratio
from bayeslora.program import Program

__all__ = ["METHODS", "TokenCalibration", "token_calibration"]

#: By what tokens are predicted: the mixture of draws, or the posterior mean (of several fits, that of theirs).
METHODS = ("pairs", "sample", "mean")


@dataclass(frozen=True)
class TokenCalibration(Guesses):
    """How sure the likeliest token was at each place of the completions, and whether it came.

    Attributes:
        row: number of the row whose completion each is of (tokens,).
    """

    of: ClassVar[str] = "likeliest token"
    unit: ClassVar[str] = "tokens"

    row: NDArray[np.int64]

    @property
    def groups(self) -> NDArray[np.int64]:
        """The rows."""
        return self.row

    def measured(self, intervals: bool = True, seed: int = 0) -> dict[str, Interval]:
        """All metrics of tokens, with intervals over texts: those of one text depend on each other.

        Args:
            intervals: make 95 % bootstrap intervals as well; see `bayeslora.predict.resampling.bootstrap`.
            seed: of the resamples.

        Returns:
            ``token_accuracy``, ``token_confidence``, its mean, and the calibration error in 10, 15 and 20 bins.
        """
        sizes = np.bincount(self.row).astype(np.float64)

        def mean(values: NDArray[np.float64]) -> tuple[Statistic, float, float]:
            return ratio(np.bincount(self.row, values).astype(np.float64), sizes), 0.0, 1.0

        table = {"token_accuracy": mean(self.correct), "token_confidence": mean(self.confidence)}
        for bins in BINS:
            table[f"token_ece_{bins}"] = (calibration(self.confidence, self.correct, bins, self.row), 0.0, 1.0)
        return bootstrap(table, len(sizes), seed, intervals)


def token_calibration(
    posterior: Posterior,
    data: Any,
    draws: int = 10,
    method: str | None = None,
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> TokenCalibration:
    """Confidence of the likeliest token under the mixture, given the data's own tokens before it.

    The probability of a token is that of the mixture over whole texts: draws count by how likely they have found the
    text so far, p(y_t | y_<t) = sum_s p_s(y_<t) p_s(y_t | y_<t) / sum_s p_s(y_<t).

    Args:
        posterior: of completions.
        data: rows with completions.
        draws: number of weight draws.
        method: ``"sample"``, the mixture of draws, or ``"mean"``, the weights' mean; by default the posterior's first.
            Draws are independent, of ``"pairs"`` as well.
        seed: of the draws.
        batch_size: rows a pass.
        progress: show a bar.

    Returns:
        All tokens of completions, row after row.

    Raises:
        PosteriorError: it is of something else, or has no such method.
    """
    program = posterior.program
    if not isinstance(program.observation, Completions):
        raise PosteriorError(f"Tokens are those of completions, and this posterior is of '{program.observation.name}'.")
    weights = _weights(posterior, draws, method, seed)
    rows = Rows.of(program, data, batch_size, progress)
    found = []
    with undisturbed(program), torch.no_grad():
        for batch, index in rows.batches(program.device, "tokens"):
            confidence, correct = _likeliest(program, program.observation, weights, batch)
            places, _ = batch["target"].nonzero(as_tuple=True)
            found.append((confidence.double().cpu(), correct.double().cpu(), index[places.cpu()]))
    confidence, correct, row = (torch.cat(each) for each in zip(*found, strict=True))
    order = row.argsort(stable=True)
    return TokenCalibration(confidence[order].numpy(), correct[order].numpy(), row[order].numpy())


def _weights(posterior: Posterior, draws: int, method: str | None, seed: int) -> list[Mapping[str, Tensor]]:
    """Those by whose mixture tokens are predicted."""
    posterior.check_weights()
    name, _ = posterior.predictor(method)
    fits = len(posterior.chains)
    if name not in METHODS:
        raise PosteriorError(unknown("method for tokens", name, METHODS))
    if name == "mean":
        return list(posterior.means())
    return list(posterior.draws(-(-posterior.differing(draws) // fits) * fits, seed))  # as many of each fit


def _likeliest(
    program: Program, observation: Completions, weights: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Probability of the likeliest token, and whether it came, at every place of a batch (positions,)."""
    target = batch["target"]
    states, said = [], []
    for each in weights:
        program.weights.install(each)
        hidden, expected = observation.places(program.network, batch)
        states.append(hidden)
        said.append(spread(log_likelihoods(program.network, hidden, expected), batch))
    own = torch.stack(said)
    before = (own.cumsum(-1) - own).log_softmax(0)[:, target]  # (draws, positions)
    step = positions_at_once(program.network)
    confidence, correct = [], []
    for start in range(0, len(expected), step):
        part = slice(start, start + step)
        mixture: Tensor | None = None
        for each, hidden, weight in zip(weights, states, before, strict=True):
            program.weights.install(each)
            logs = logits_at(program.network, hidden[part]).log_softmax(-1) + weight[part].unsqueeze(-1)
            mixture = logs if mixture is None else torch.logaddexp(mixture, logs)
        assert mixture is not None  # there is one draw at least
        best = mixture.max(-1)
        confidence.append(best.values.exp())
        correct.append(best.indices == expected[part])
    return torch.cat(confidence), torch.cat(correct)
