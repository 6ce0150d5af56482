"""Calibration of tokens of completions: how sure the mixture of draws is of the likeliest one, and whether it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.observations import Completions
from bayeslora.observations.completions import log_likelihoods, positions_at_once, spread
from bayeslora.observations.decoder import logits_at
from bayeslora.passes import Rows, undisturbed
from bayeslora.posterior import Posterior
from bayeslora.predict.resampling import calibration, once
from bayeslora.program import Program

__all__ = ["TokenCalibration", "token_calibration"]


@dataclass(frozen=True)
class TokenCalibration:
    """How sure the likeliest token was at each place of the completions, and whether it came.

    Attributes:
        confidence: its probability (tokens,).
        correct: 1 where it came, else 0 (tokens,).
    """

    confidence: NDArray[np.float64]
    correct: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the likeliest."""
        return float(self.correct.mean())

    def ece(self, bins: int = 15) -> float:
        """Expected calibration error in bins of equal width."""
        return once(calibration(self.confidence, self.correct, bins), len(self.correct))


def token_calibration(
    posterior: Posterior, data: Any, draws: int = 10, *, seed: int = 0, batch_size: int = 8, progress: bool = True
) -> TokenCalibration:
    """Confidence of the likeliest token under the mixture, given the data's own tokens before it.

    The probability of a token is that of the mixture over whole texts: draws count by how likely they have found the
    text so far, p(y_t | y_<t) = sum_s p_s(y_<t) p_s(y_t | y_<t) / sum_s p_s(y_<t).

    Args:
        posterior: of completions.
        data: rows with completions.
        draws: number of weight draws.
        seed: of the draws.
        batch_size: rows a pass.
        progress: show a bar.

    Raises:
        PosteriorError: it is of something else.
    """
    program = posterior.program
    if not isinstance(program.observation, Completions):
        raise PosteriorError(f"Tokens are those of completions, and this posterior is of '{program.observation.name}'.")
    rows = Rows.of(program, data, batch_size, progress)
    weights = list(posterior.draws(posterior.differing(draws), seed))
    found = []
    with undisturbed(program), torch.no_grad():
        for batch, _ in rows.batches(program.device, "tokens"):
            found += [each.double().cpu() for each in _likeliest(program, program.observation, weights, batch)]
    confidence, correct = (torch.cat(found[start::2]).numpy() for start in (0, 1))
    return TokenCalibration(confidence, correct)


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
