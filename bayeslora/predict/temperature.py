"""One number against over-confidence: a temperature of predictions, fitted on rows with labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch

from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.values import ValuePrediction

__all__ = ["COLDEST", "HOTTEST", "Temperable", "best_temperature", "gain", "tempered", "weighed_temperature"]

#: What can have a temperature: probabilities of classes that are flattened, or a law of real labels that is widened.
Temperable: TypeAlias = ClassPrediction | ValuePrediction

#: Deviations of log T under a hyperprior, below and above T = 1: mistakes are dearer of predictions that are too sure.
SURER, FLATTER = 0.5, 1.0
#: The coldest and the hottest temperature that is tried: what separates its rows without a mistake has no best one.
COLDEST, HOTTEST = 0.05, 20.0


def best_temperature(prediction: Temperable) -> float:
    """The temperature T at which `tempered` has the least negative log-likelihood, from 0.05 to 20.

    Of classes minus the log-likelihood is convex in 1 / T, so that there is one.

    Args:
        prediction: of rows that the weights were not trained on, with their labels.

    Raises:
        DataError: the labels are not known.

    References:
        Guo et al., *On calibration of modern neural networks*, ICML 2017.
    """
    from scipy.optimize import minimize_scalar

    nll = _nll(prediction)
    found = minimize_scalar(
        lambda log: nll(math.exp(log)), bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded"
    )
    return math.exp(found.x)


def weighed_temperature(prediction: Temperable) -> tuple[float, float]:
    """The temperature T, from 0.05 to 20, that is best under a weak hyperprior, and its cost.

    That is the least over T of

        - sum log p(label) + (log T / s)^2 / 2,  s = 0.5 below T = 1 and 1 above

    with the sum over the rows under `tempered`. The last term is a hyperprior of log T, which thirty rows overrule if
    they must: without it as few that happen to be right make predictions all too sure. It is wider above 1, since
    weights that fit their own rows without a mistake ask for a T of 3 to 5. The whole is as good as convex in log T, so
    that there is one.

    Args:
        prediction: of rows that the weights were not trained on, with their labels.

    Raises:
        DataError: the labels are not known.
    """
    from scipy.optimize import minimize_scalar

    nll = _nll(prediction)

    def cost(log: float) -> float:
        return nll(math.exp(log)) + (log / (SURER if log < 0 else FLATTER)) ** 2 / 2

    limit = math.log(HOTTEST)
    best = minimize_scalar(cost, bounds=(-limit, limit), method="bounded")
    return math.exp(best.x), float(best.fun)


def _nll(prediction: Temperable) -> Callable[[float], float]:
    """Minus the log-likelihood of all rows, in nats, as a function of the temperature."""
    labels = prediction.labels
    if labels is None:
        raise DataError("A temperature is fitted on rows with labels, and these have none.")
    if isinstance(prediction, ValuePrediction):
        return lambda temperature: -float(tempered(prediction, temperature).log_predictive_density.sum())
    logs = prediction.log_probabilities
    return lambda temperature: float(torch.nn.functional.cross_entropy(logs / temperature, labels, reduction="sum"))


def tempered(prediction: Temperable, temperature: float) -> Temperable:
    """The prediction under a temperature.

    Probabilities of classes p, averaged over draws, become p^(1 / temperature), normalised. Of one draw that is its
    logits divided by the temperature. Of several, an average of as sharp ones would be flatter than the rows ask for
    (Rahaman and Thiery, *Uncertainty quantification and deep ensembles*, NeurIPS 2021): what is reported is what is
    tempered. The mutual information keeps its part of the entropy.

    The law of a real label is stretched about its mean, so that its variance is as many times as large, as
    p^(1 / temperature) is of a normal law (Levi et al., *Evaluating and calibrating uncertainty prediction in
    regression tasks*, Sensors 2022).
    """
    if isinstance(prediction, ValuePrediction):
        return replace(prediction, stretch=prediction.stretch * math.sqrt(temperature))
    outputs = (prediction.log_probabilities / temperature).float().unsqueeze(0)
    made = replace(prediction, outputs=outputs, aleatoric=None, averaged=prediction.draws)
    part = prediction.mutual_information / prediction.entropy.clamp(min=torch.finfo(torch.float64).tiny)
    return replace(made, aleatoric=made.entropy * (1 - part))


def gain(prediction: Temperable, temperature: float) -> dict[str, float]:
    """A temperature, with the negative log-likelihood of rows without it and with it, in nats an example."""
    nlls = [-float(each.log_predictive_density.mean()) for each in (prediction, tempered(prediction, temperature))]
    return {"temperature": temperature, "heldout_nll": nlls[0], "tempered_nll": nlls[1]}
