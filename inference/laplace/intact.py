"""The widest prior whose draws of the weights leave the network intact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from datasets import Dataset
from torch import Tensor

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program

__all__ = ["intact_width"]

#: Rows on which draws of the weights are tried, how many draws, and the part of the mode's loss that one may add to it.
TRIED_ROWS, FEW_DRAWS, TOLERANCE = 32, 3, 0.01
#: What the next width is at least of the last one, and of the one at which a quadratic loss would just be tolerated.
LEAST, LESS = 0.1, 0.9


def intact_width(
    posterior: LaplacePosterior, data: Dataset, batch_size: int, progress: bool
) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The prior, narrowed until a draw of the weights adds at most `TOLERANCE` to the mode's loss on some rows.

    The widest noise within a tolerance of the loss is the criterion of Shi, Wang, Han, Zhang, Wang and Wang,
    *Training-free Bayesianization for low-rank adapters of large language models*, NeurIPS 2025. Here the loss is that
    of one draw, not of an average over draws: however many draws predict or write, each is a sound model by itself.
    Rows that the mode was trained on are good enough, since a network that is broken is so on them as well; but they
    say little of how unsure a mode is that they are all but certain under. Then rows that are held out say more.

    Args:
        posterior: under the prior as it is, the widest that is tried.
        data: tokenised rows with labels.
        batch_size: rows a pass.
        progress: show a bar.

    Returns:
        The prior, and for each width ``multiple``, ``mode_nll`` and ``draw_nll``, in nats an example.

    Raises:
        TrainingError: the loss at the mode is infinite or not a number.
    """
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:TRIED_ROWS].tolist()
    rows = Rows.of(posterior.program, data.select(chosen), batch_size, progress)
    trace, multiple = [], 1.0
    with undisturbed(posterior.program), torch.no_grad():
        mode = _loss(rows, posterior.program, [posterior.mean()])
        if not math.isfinite(mode):
            raise TrainingError(f"The loss at the mode is {mode}: no width of the prior leaves that as it is.")
        allowed = TOLERANCE * abs(mode)
        while True:  # the end comes for certain: noise below rounding adds nothing
            draws = posterior.under(posterior.prior.times(multiple)).draws(FEW_DRAWS)
            drawn = _loss(rows, posterior.program, draws)
            trace.append({"multiple": multiple, "mode_nll": mode, "draw_nll": drawn})
            if drawn - mode <= allowed:
                return posterior.prior.times(multiple), trace
            # Near the mode the loss rises with the square of the width; where it rises faster, there is one more try.
            factor = LESS * math.sqrt(allowed / (drawn - mode)) if math.isfinite(drawn) else LEAST
            multiple *= max(LEAST, factor)


def _loss(rows: Rows, program: Program, draws: Iterable[Mapping[str, Tensor]]) -> float:
    """Negative log-likelihood of an example, on average over examples and draws."""
    outputs, labels = rows.outputs_of(program, draws), rows.labels
    assert labels is not None  # `labelled` sees to it
    return -float(rows.observation.log_prob(outputs, labels).double().mean())
