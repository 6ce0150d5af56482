"""Predictors: how a posterior becomes predictions.

A posterior names those that it has in `Posterior.predictors`. One more is a small class with two members: a predictor
over another one (a temperature), passes with dropout, or whatever else ends in outputs of the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from bayeslora.passes import Rows
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import Temperable, tempered

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior

__all__ = ["Draws", "Mean", "Outputs", "Pairs", "Predictor", "Tempered"]


class Outputs(NamedTuple):
    """What a way to predict makes of rows.

    Attributes:
        outputs: of the network (draws, examples, outputs).
        aleatoric: expected entropy (examples,), where it is not theirs.
        averaged: draws whose average each of the outputs is made of.
        stretch: of the law of real labels about its mean.
    """

    outputs: Tensor
    aleatoric: Tensor | None = None
    averaged: int = 1
    stretch: float = 1.0


class Predictor(Protocol):
    """A way to predict.

    Attributes:
        by_draws: whether its outputs are those of the draws that `Posterior.draws` gives by the same seed, which are
            independent or those of a Markov chain.
    """

    by_draws: bool

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs for every row; dropout is off and gradients are."""


class Draws:
    """A pass for each draw of the weights; few rows pass at several draws at once."""

    by_draws = True

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs (draws, examples, outputs); a point estimate has one draw."""
        values = posterior.draws(posterior.differing(draws), seed)
        return Outputs(rows.outputs_of(posterior.program, values))


class Pairs:
    """A pass for each draw of the weights, every second one the mirror image of the one before.

    Each has the posterior's law, so that averages are of the same mean as those of independent draws. Their errors are
    smaller, since within a pair they cancel as far as the network's outputs are linear in the noise
    (``benchmarks/results/draws.json``).

    References:
        Hammersley and Morton, *A new Monte Carlo technique: antithetic variates*, 1956.
    """

    by_draws = False

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs (draws, examples, outputs)."""
        return Outputs(rows.outputs_of(posterior.program, posterior.pairs(draws, seed)))


class Mean:
    """One pass at the posterior mean: the plain-LoRA prediction."""

    by_draws = False

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs (1, examples, outputs)."""
        return Outputs(rows.outputs(posterior.program, posterior.mean()).unsqueeze(0))


class Tempered:
    """Another way to predict classes or real labels, under a temperature.

    Args:
        of: the other way.
        temperature: see `bayeslora.predict.temperature.tempered`.
    """

    by_draws = False

    def __init__(self, of: Predictor, temperature: float) -> None:
        self.of, self.temperature = of, temperature

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Log probabilities (1, examples, classes); of real labels the other way's outputs, to be stretched."""
        raw = self.of(posterior, rows, draws, seed)
        found = rows.predicted(*raw)
        assert isinstance(found, Temperable)  # no others are given a temperature
        made = tempered(found, self.temperature)
        if isinstance(made, ClassPrediction):
            return Outputs(made.outputs, made.aleatoric, made.averaged)
        return raw._replace(stretch=made.stretch)
