"""The width of the prior, and the temperature of predictions, at which rows that were held out are predicted best.

One pass for all widths that are compared, or, of texts, a few for each.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised, linked
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.observations import Curved
from bayeslora.passes import Rows, undisturbed
from bayeslora.predict.temperature import Temperable, tempered, weighed_temperature

__all__ = ["MULTIPLES", "Best", "best_width"]

#: The width that a hyperprior has for the likeliest beside a temperature, which flattens what overfits, and the
#: deviation of its logarithm (``benchmarks/set_aside.py``).
CENTRE, DEVIATION = 0.3, 0.5
#: Multiples of the prior's standard deviations that are compared: ten a decade.
MULTIPLES = torch.logspace(-2, 2, 41, dtype=torch.float64)
#: The same where each takes passes of the network: two a decade; and the draws by which each predicts.
FEW_MULTIPLES, FEW_DRAWS = torch.logspace(-3, 1, 9, dtype=torch.float64).tolist(), 3


class Best(NamedTuple):
    """A prior, so many times as wide as it was, the temperature of what is predicted, and by what both were chosen."""

    prior: NormalPrior
    multiple: float
    temperature: float | None
    trace: list[dict[str, float]]


def best_width(posterior: LaplacePosterior, data: Dataset, batch_size: int, progress: bool) -> Best:
    """The prior, so many times as wide, and the temperature of predictions that make held-out rows likeliest.

    With p the default prediction under a prior that is m times as wide, both have the least of

        - sum log softmax(log p / T)[label] + 2 (log(m / 0.3))^2 + the cost of T

    over the rows: under a normal hyperprior of log m around log 0.3, of deviation 0.5, and that of
    `weighed_temperature`, which thirty rows overrule where they must. A width alone cannot make a mode surer that is
    not sure enough, and is little use where the whole network is too sure; a temperature alone knows nothing of what
    the rows leave open. What a few rows say of the width holds less well elsewhere than what they say of the
    temperature. Of real labels the first term is minus their log density under `tempered`. Of texts there is no
    temperature, the prediction is by draws of the weights, the same few for every width, and the width has no
    hyperprior: the model's says nothing of what leaves a network intact.

    Args:
        posterior: under the prior as it is; only the prior's width changes, not the mode.
        data: tokenised rows with labels, which the mode has not seen.
        batch_size: rows a pass.
        progress: show a bar.

    Returns:
        The trace has for each width the ``multiple``, ``heldout_nll``, in nats an example, but of texts the best
        ``temperature`` with it and its ``tempered_nll``, and whether it was ``chosen``.

    Raises:
        TrainingError: the loss of the rows is infinite or not a number under all widths.
    """
    rows = Rows.of(posterior.program, data, batch_size, progress)
    by_links = isinstance(rows.observation, Curved)
    ways = (_by_links if by_links else _by_draws)(posterior, rows)
    tried = [_tried(rows, multiple, outputs, by_links) for multiple, outputs in ways]
    trace = [row for _, row in tried]
    cost, best = min(tried, key=itemgetter(0))
    if not math.isfinite(cost):
        raise TrainingError(
            "The loss of the held-out rows is infinite or not a number under every width of the prior, however near to "
            "the mode: look at what the mode itself predicts of them."
        )
    for row in trace:
        row["chosen"] = float(row is best)
    if best in (trace[0], trace[-1]):
        warnings.warn(
            f"The best prior is {best['multiple']:g} times as wide as the model's, the end of what was tried: give the "
            "model another width (its deviation or scale).",
            stacklevel=2,
        )
    multiple = best["multiple"]
    return Best(posterior.prior.times(multiple), multiple, best.get("temperature"), trace)


def _tried(rows: Rows, multiple: float, outputs: Tensor, by_links: bool) -> tuple[float, dict[str, float]]:
    """What a width costs, in nats of all rows and of the hyperpriors, and its line of the trace."""
    row = {"multiple": multiple, "heldout_nll": rows.nll(outputs)}
    cost, centre = row["heldout_nll"] * len(rows), 1.0
    if not by_links:
        return cost, row
    found = rows.predicted(outputs) if math.isfinite(cost) else None
    if isinstance(found, Temperable):
        row["temperature"], cost = weighed_temperature(found)
        row["tempered_nll"] = -float(tempered(found, row["temperature"]).log_predictive_density.mean())
        centre = CENTRE
    return cost + (math.log(multiple / centre) / DEVIATION) ** 2 / 2, row


def _by_links(posterior: LaplacePosterior, rows: Rows) -> Iterator[tuple[float, Tensor]]:
    """Outputs (draws, examples, outputs) of the linear network at each width."""
    means, covariances = linearised(posterior, rows, MULTIPLES)
    method, _ = posterior.predictor()
    for multiple, covariance in zip(MULTIPLES.tolist(), covariances, strict=True):
        yield multiple, linked(rows.observation, means, covariance, method, 0).outputs


def _by_draws(posterior: LaplacePosterior, rows: Rows) -> Iterator[tuple[float, Tensor]]:
    """Outputs (draws, examples, outputs) of the network as it is at each width."""
    for multiple in FEW_MULTIPLES:
        each = posterior.under(posterior.prior.times(multiple))
        with undisturbed(posterior.program), torch.no_grad():
            outputs = rows.outputs_of(posterior.program, each.draws(FEW_DRAWS))
        yield multiple, outputs
