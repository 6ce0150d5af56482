"""The width of the prior that maximises an evidence.

Or else the width at which rows that were held out are predicted best: one pass for all widths that are compared, or, of
texts, a few for each. Or the widest one whose draws of the weights leave the network intact.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace.evidence import Evidence
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised, linked
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.inference.laplace.refitted import Refitted, RefittedEvidence
from bayeslora.observations import Curved
from bayeslora.passes import Rows, undisturbed
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import HOTTEST, tempered
from bayeslora.program import Program

__all__ = [
    "MULTIPLES",
    "Tuned",
    "best_width",
    "intact_width",
    "matched_width",
    "refitted_width",
    "tuned_width",
]

STEPS = 50
#: Logs of multiples where the search for a width begins; two a decade where each takes steps of Newton's.
GRID = [number / 2 for number in range(-30, 31)]
WIDTHS = [number * math.log(10) / 2 for number in range(-4, 7)]
#: Multiples of the prior's standard deviations that are compared: ten a decade.
MULTIPLES = torch.logspace(-2, 2, 41, dtype=torch.float64)
#: The same where each takes passes of the network: two a decade; and the draws by which each predicts.
FEW_MULTIPLES, FEW_DRAWS = torch.logspace(-3, 1, 9, dtype=torch.float64).tolist(), 3
#: Rows on which draws of the weights are tried, and the part of the mode's loss there that a draw may add to it.
TRIED_ROWS, TOLERANCE = 32, 0.01
#: What the next width is at least of the last one, and of the one at which a quadratic loss would just be tolerated.
LEAST, LESS = 0.1, 0.9


def tuned_width(evidence: Evidence, prior: NormalPrior) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The prior of largest evidence among its multiples.

    Returns:
        The prior, and the log evidence and the multiple at each step.
    """
    along = evidence.along(prior)
    like = next(iter(prior.roots.values()))
    # Far from the best width the evidence is flat on one side: the search begins at the best of a grid.
    grid = [like.new_full((1,), log) for log in GRID]
    log = max(grid, key=lambda each: float(along(each)))
    if float(log) in (GRID[0], GRID[-1]):
        _warn_of_limit(float(log) < 0)
        return prior, [{"tuning": 0.0, "log_evidence": float(along(torch.zeros_like(log))), "scale": 1.0}]

    log.requires_grad_()

    def objective() -> tuple[Tensor, dict[str, float]]:
        value = along(log)
        return value, {"log_evidence": float(value.detach()), "scale": float(log.detach().exp())}

    trace = _ascend([log], objective)
    return prior.scaled(log.detach()), trace


def refitted_width(evidence: RefittedEvidence, prior: NormalPrior) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The same by the evidence of the linear network's own mode, by Brent's method around the best of a grid."""
    trace: list[dict[str, float]] = []
    log = _likeliest(evidence, trace)
    return (prior if log is None else _times(prior, math.exp(log))), trace


def matched_width(evidence: RefittedEvidence, prior: NormalPrior) -> tuple[NormalPrior, list[dict[str, float]]]:
    """The same, but no wider than makes the linear network's own mode explain the rows as well as the weights do.

    Weights whose training was stopped early are the mode of no wide prior: under the one of largest evidence the linear
    network's own mode explains the rows far better, and the evidence is of that mode. To stop early is to have a narrow
    prior (Bishop, *Regularization and complexity control in feed-forward networks*, ICANN 1995): it is the one under
    which that mode has the weights' own log-likelihood. Where the weights explain their rows better than it does under
    the largest evidence, as where they interpolate, the evidence decides. Where the prior's centre explains as much as
    the weights, nothing was learned that could tell a width, and the prior gets no wider than the model's.
    """
    trace: list[dict[str, float]] = []
    log = _likeliest(evidence, trace)
    if log is None:
        return prior, trace

    def gain(log: float) -> float:
        return _traced(evidence, log, trace).log_likelihood - evidence.at_mode

    if gain(log) > 0:
        log = min(0.0, log) if gain(WIDTHS[0]) >= 0 else brentq(gain, WIDTHS[0], log, xtol=1e-2)
    return _times(prior, math.exp(log)), trace


def _likeliest(evidence: RefittedEvidence, trace: list[dict[str, float]]) -> float | None:
    """Log of the multiple of largest evidence; none where there is none, which is said."""

    def lack(log: float) -> float:
        return -_traced(evidence, log, trace).evidence

    place = min(range(len(WIDTHS)), key=[lack(log) for log in WIDTHS].__getitem__)
    if place in (0, len(WIDTHS) - 1):
        _warn_of_limit(place == 0)
        return None
    around = (WIDTHS[place - 1], WIDTHS[place + 1])
    return float(minimize_scalar(lack, bounds=around, method="bounded", options={"xatol": 1e-4}).x)


def _traced(evidence: RefittedEvidence, log: float, trace: list[dict[str, float]]) -> Refitted:
    """The linear network where the prior is so many times as wide, and a row of the trace."""
    found, multiple = evidence(math.exp(log)), math.exp(log)
    likelihoods = {"log_evidence": found.evidence, "own_log_likelihood": found.log_likelihood}
    trace.append({"tuning": float(len(trace)), "scale": multiple} | likelihoods)
    return found


def _warn_of_limit(none: bool) -> None:
    """Say that an evidence has no best width, so that the model's prior stays as it is."""
    limit = "no width, which leaves the point estimate" if none else "any width, which is no prior"
    warnings.warn(
        f"By the evidence the best prior has {limit}: that of the model is kept as it is. Give rows that the mode has "
        "not seen (heldout=...), a prior around zero (model.centre=zero), or a width with tune='none'.",
        stacklevel=3,
    )


class Tuned(NamedTuple):
    """A prior, so many times as wide as it was, the temperature of what is predicted, and by what both were chosen."""

    prior: NormalPrior
    multiple: float
    temperature: float
    trace: list[dict[str, float]]


def best_width(posterior: LaplacePosterior, data: Dataset, batch_size: int, progress: bool) -> Tuned:
    """The prior, so many times as wide, and the temperature of predictions that make held-out rows likeliest.

    With p the default prediction under a prior that is m times as wide, both have the least of

        - sum log softmax(log p / T)[label] + (log m)^2 / 2 + 2 (log T)^2

    over the rows: under normal hyperpriors of their logarithms, of deviations 1 and 0.5, which thirty rows overrule
    where they must. Without the latter thirty rows that happen to be right make the mode all too sure. A width alone
    cannot make a mode surer that is not sure enough, and is little use where the whole network is too sure; a
    temperature alone knows nothing of what the rows leave open. Where labels are no classes there is no temperature. Of
    texts the prediction is by draws of the weights, the same few for every width, and the width has no hyperprior: the
    model's says nothing of what leaves a network intact.

    Args:
        posterior: under the prior as it is; only the prior's width changes, not the mode.
        data: tokenised rows with labels, which the mode has not seen.
        batch_size: rows a pass.
        progress: show a bar.

    Returns:
        The trace has for each width the ``multiple``, ``heldout_nll``, in nats an example, of classes the best
        ``temperature`` with it and its ``tempered_nll``, and whether it was ``chosen``.
    """
    rows = Rows.of(posterior.program, data, batch_size, progress)
    by_links = isinstance(rows.observation, Curved)
    trace: list[dict[str, float]] = []
    costs = []
    for multiple, outputs in (_by_links if by_links else _by_draws)(posterior, rows):
        found = rows.observation.predicted(outputs, rows.labels)
        row = {"multiple": multiple, "heldout_nll": -float(found.log_predictive_density.mean())}
        cost = row["heldout_nll"] * len(rows)
        if by_links and isinstance(found, ClassPrediction):
            row["temperature"], cost = _weighted_temperature(found)
            row["tempered_nll"] = -float(tempered(found, row["temperature"]).log_predictive_density.mean())
        trace.append(row)
        costs.append(cost + math.log(multiple) ** 2 / 2 if by_links else cost)
    best = trace[min(range(len(costs)), key=costs.__getitem__)]
    for row in trace:
        row["chosen"] = float(row is best)
    if best in (trace[0], trace[-1]):
        warnings.warn(
            f"The best prior is {best['multiple']:g} times as wide, the last one that was tried: set another.",
            stacklevel=2,
        )
    multiple = best["multiple"]
    return Tuned(_times(posterior.prior, multiple), multiple, best.get("temperature", 1.0), trace)


def _weighted_temperature(found: ClassPrediction) -> tuple[float, float]:
    """The likeliest temperature under its hyperprior, and what `best_width` minimises there but for the width's part.

    The former is as good as convex in log T, so that there is one.
    """
    logs, labels = found.log_probabilities, found.labels
    assert labels is not None  # `labelled` sees to it

    def cost(log: float) -> float:
        nll = torch.nn.functional.cross_entropy(logs / math.exp(log), labels, reduction="sum")
        return float(nll) + 2 * log**2

    limit = math.log(HOTTEST)
    best = minimize_scalar(cost, bounds=(-limit, limit), method="bounded")
    return math.exp(best.x), float(best.fun)


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
            draws = posterior.under(_times(posterior.prior, multiple)).draws(FEW_DRAWS)
            drawn = _loss(rows, posterior.program, draws)
            trace.append({"multiple": multiple, "mode_nll": mode, "draw_nll": drawn})
            if drawn - mode <= allowed:
                return _times(posterior.prior, multiple), trace
            # Near the mode the loss rises with the square of the width; where it rises faster, there is one more try.
            factor = LESS * math.sqrt(allowed / (drawn - mode)) if math.isfinite(drawn) else LEAST
            multiple *= max(LEAST, factor)


def _loss(rows: Rows, program: Program, draws: Iterable[Mapping[str, Tensor]]) -> float:
    """Negative log-likelihood of an example, on average over examples and draws."""
    outputs, labels = rows.outputs_of(program, draws), rows.labels
    assert labels is not None  # `labelled` sees to it
    return -float(rows.observation.log_prob(outputs, labels).double().mean())


def _by_links(posterior: LaplacePosterior, rows: Rows) -> Iterator[tuple[float, Tensor]]:
    """Outputs (draws, examples, outputs) of the linear network at each width."""
    means, covariances = linearised(posterior, rows, MULTIPLES)
    method, _ = posterior.predictor()
    for multiple, covariance in zip(MULTIPLES.tolist(), covariances, strict=True):
        outputs, _ = linked(rows.observation, means, covariance, method, 0)
        yield multiple, outputs


def _by_draws(posterior: LaplacePosterior, rows: Rows) -> Iterator[tuple[float, Tensor]]:
    """Outputs (draws, examples, outputs) of the network as it is at each width."""
    for multiple in FEW_MULTIPLES:
        each = posterior.under(_times(posterior.prior, multiple))
        with undisturbed(posterior.program), torch.no_grad():
            outputs = rows.outputs_of(posterior.program, each.draws(FEW_DRAWS))
        yield multiple, outputs


def _times(prior: NormalPrior, multiple: float) -> NormalPrior:
    return prior.scaled(torch.tensor([multiple], dtype=torch.float64).log())


def _ascend(
    parameters: list[Tensor], objective: Callable[[], tuple[Tensor, dict[str, float]]]
) -> list[dict[str, float]]:
    optimiser: Any = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")
    trace: list[dict[str, float]] = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        value, found = objective()
        (-value).backward()
        trace.append({"tuning": float(len(trace)), **found})
        return -value

    with torch.enable_grad():
        optimiser.step(closure)
    return trace
