"""One number against over-confidence: a temperature of predicted class probabilities, fitted on rows with labels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction

__all__ = ["COLDEST", "HOTTEST", "best_temperature", "gain", "tempered", "weighed_temperature"]

#: Deviations of log T under a hyperprior, below and above T = 1: mistakes are dearer of predictions that are too sure.
SURER, FLATTER = 0.5, 1.0
#: The coldest and the hottest temperature that is tried: what separates its rows without a mistake has no best one.
COLDEST, HOTTEST = 0.05, 20.0


def best_temperature(prediction: ClassPrediction) -> float:
    """The temperature T at which `tempered` has the least negative log-likelihood, from 0.05 to 20.

    Minus the log-likelihood is convex in 1 / T, so that there is one.

    Args:
        prediction: of rows that the weights were not trained on, with their labels.

    Raises:
        DataError: the labels are not known.

    References:
        Guo et al., *On calibration of modern neural networks*, ICML 2017.
    """
    from scipy.optimize import minimize_scalar

    logs, labels = _known(prediction)

    def nll(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logs / math.exp(log_temperature), labels))

    found = minimize_scalar(nll, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded")
    return math.exp(found.x)


def weighed_temperature(prediction: ClassPrediction) -> tuple[float, float]:
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

    logs, labels = _known(prediction)

    def cost(log: float) -> float:
        nll = torch.nn.functional.cross_entropy(logs / math.exp(log), labels, reduction="sum")
        return float(nll) + (log / (SURER if log < 0 else FLATTER)) ** 2 / 2

    limit = math.log(HOTTEST)
    best = minimize_scalar(cost, bounds=(-limit, limit), method="bounded")
    return math.exp(best.x), float(best.fun)


def _known(prediction: ClassPrediction) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities and labels."""
    if prediction.labels is None:
        raise DataError("A temperature is fitted on rows with labels, and these have none.")
    return prediction.log_probabilities, prediction.labels


def tempered(prediction: ClassPrediction, temperature: float) -> ClassPrediction:
    """The prediction whose probabilities are in proportion to p^(1 / temperature), p averaged over draws.

    Of one draw that is its logits divided by the temperature. Of several, an average of as sharp ones would be flatter
    than the rows ask for (Rahaman and Thiery, *Uncertainty quantification and deep ensembles*, NeurIPS 2021): what is
    reported is what is tempered. The mutual information keeps its part of the entropy.
    """
    outputs = (prediction.log_probabilities / temperature).float().unsqueeze(0)
    made = replace(prediction, outputs=outputs, aleatoric=None, averaged=prediction.draws)
    part = prediction.mutual_information / prediction.entropy.clamp(min=torch.finfo(torch.float64).tiny)
    return replace(made, aleatoric=made.entropy * (1 - part))


def gain(prediction: ClassPrediction, temperature: float) -> dict[str, float]:
    """A temperature, with the negative log-likelihood of rows without it and with it, in nats an example."""
    nlls = [-float(each.log_predictive_density.mean()) for each in (prediction, tempered(prediction, temperature))]
    return {"temperature": temperature, "heldout_nll": nlls[0], "tempered_nll": nlls[1]}
