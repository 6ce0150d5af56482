"""The temperature of what a posterior predicts by default, chosen on rows that its weights have not seen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bayeslora.inference.base import Run
from bayeslora.posterior import Posterior
from bayeslora.predict.temperature import COLDEST, Temperable, gain, weighed_temperature
from bayeslora.predictors import Predictor, Tempered
from bayeslora.progress import note

__all__ = ["DRAWS", "SOFTENING", "Softened", "soften", "soften_whole", "without"]

#: Draws by which the rows are predicted: as many as by default in any prediction.
DRAWS = 10
#: Nats by which a temperature has to make rows likelier. If 1 were right, chance gave less in 95 of 100 cases: half
#: the quantile of chi-squared (Wilks, *The large-sample distribution of the likelihood ratio*, 1938).
BEYOND_CHANCE = 1.92
#: Name of the temperature among a posterior's tensors.
SOFTENING = "softening"


class Softened(Posterior):
    """A posterior that may predict by default under a temperature of what its first predictor says.

    Attributes:
        coldest: the least temperature that is chosen; a lower one only if rows are likelier by it beyond chance.
        softening: temperature of those predictions (see `bayeslora.predict.temperature.tempered`), if one was chosen;
            other ways to predict, and the weights, are without it.
    """

    coldest: float = COLDEST
    softening: float | None = None

    def __repr__(self) -> str:
        shown = super().__repr__()
        return shown if self.softening is None else f"{shown[:-1]}, T = {self.softening:.3g})"

    @property
    def untempered(self) -> dict[str, Predictor]:
        """Ways to predict without that temperature, the default first."""
        ways = dict(self.predictors)
        if self.softening is not None:
            del ways["tempered"]
        return ways

    def soften(self, temperature: float) -> None:
        """Predict by default under a temperature, in place of another one, if there was one."""
        ways = self.untempered
        self.softening = temperature
        self.predictors = {"tempered": Tempered(next(iter(ways.values())), temperature), **ways}

    def state(self) -> dict[str, Tensor]:
        """The temperature, if there is one."""
        return {} if self.softening is None else {SOFTENING: torch.tensor(self.softening, dtype=torch.float64)}

    def soften_as(self, state: Mapping[str, Tensor]) -> None:
        """Predict under the temperature of a saved state, if it has one."""
        if SOFTENING in state:
            self.soften(float(state[SOFTENING]))


def without(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved state without the temperature."""
    return {name: value for name, value in state.items() if name != SOFTENING}


def soften(posterior: Softened, run: Run) -> None:
    """Choose the temperature of a posterior's predictions on the run's held-out rows, and say so in its record.

    A bound on the likelihood of the training rows cannot tell how sure predictions of other rows may be: all that is a
    point estimate, such as B, the head and, with ``prior_mean="learned"``, the mean of A, fits the training rows as
    closely as it can. One number, chosen under a hyperprior (see `weighed_temperature`), tells what is left of that
    beside the noise. It is of the default predictions alone, and the best guess of a label stays what it was.

    Args:
        posterior: whose weights were trained on other rows.
        run: whose ``heldout`` rows have labels that are classes or real numbers.

    References:
        Guo, Pleiss, Sun and Weinberger, *On calibration of modern neural networks*, ICML 2017.
    """
    assert run.heldout is not None  # who asks for a temperature has rows for it
    begun = time.monotonic()
    method = next(iter(posterior.untempered))
    batch_size = posterior.chains[0].record.settings["batch_size"]  # which there is memory for
    found = posterior.predict(run.heldout, DRAWS, method, run.seed, batch_size, run.progress)
    assert isinstance(found, Temperable)
    temperature = weighed_temperature(found)[0]
    won = gain(found, temperature)
    likelier = (won["heldout_nll"] - won["tempered_nll"]) * len(run.heldout)
    if temperature < posterior.coldest and likelier < BEYOND_CHANCE:
        temperature = posterior.coldest
        won = gain(found, temperature)
    posterior.soften(temperature)
    note(f"Predictions have a temperature of {temperature:.3g}, by {len(run.heldout):,} held-out rows.", run.progress)
    record = posterior.record
    cost = record.cost | {"seconds": record.cost["seconds"] + time.monotonic() - begun}
    posterior.record = replace(record, cost=cost, history=[*record.history, won])


def soften_whole(whole: Softened, run: Run) -> None:
    """Choose one temperature of what fits predict together, where each of them has one of its own.

    Fits that differ are less sure together than each is alone, and need less of a temperature, if any: an average of
    predictions that are tempered one by one would be flatter than the rows ask for (Rahaman and Thiery, *Uncertainty
    quantification and deep ensembles*, NeurIPS 2021).

    Args:
        whole: mixture of independent fits.
        run: of the fits, with the rows that their own were chosen on.
    """
    if all(isinstance(fit, Softened) and fit.softening is not None for fit in whole.chains):
        soften(whole, run)
