"""One number against over-confidence: a temperature of predicted class probabilities, fitted on rows with labels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction

__all__ = ["COLDEST", "HOTTEST", "best_temperature", "tempered"]

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

    if prediction.labels is None:
        raise DataError("A temperature is fitted on rows with labels, and these have none.")
    logs, labels = prediction.log_probabilities, prediction.labels

    def nll(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logs / math.exp(log_temperature), labels))

    found = minimize_scalar(nll, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded")
    return math.exp(found.x)


def tempered(prediction: ClassPrediction, temperature: float) -> ClassPrediction:
    """The prediction whose probabilities are in proportion to p^(1 / temperature), p averaged over draws.

    Of one draw that is its logits divided by the temperature. Of several, an average of as sharp ones would be flatter
    than the rows ask for (Rahaman and Thiery, *Uncertainty quantification and deep ensembles*, NeurIPS 2021): what is
    reported is what is tempered. The mutual information keeps its part of the entropy.
    """
    outputs = (prediction.log_probabilities / temperature).float().unsqueeze(0)
    made = replace(prediction, outputs=outputs, aleatoric=None)
    part = prediction.mutual_information / prediction.entropy.clamp(min=torch.finfo(torch.float64).tiny)
    return replace(made, aleatoric=made.entropy * (1 - part))
