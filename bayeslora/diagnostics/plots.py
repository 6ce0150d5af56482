"""Pictures of diagnostics, as figures of matplotlib that belong to nobody but the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslora.diagnostics.calibration import by_class, risk_coverage
from bayeslora.predict.plots import COLOURS, GREY, MARKERS
from bayeslora.predict.reliability import guesses_of
from bayeslora.predict.selective import auroc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from bayeslora.diagnostics.simulation import Ranks
    from bayeslora.predict.prediction import ClassPrediction, Prediction
    from bayeslora.predict.reliability import Guesses
    from bayeslora.predict.sequences import SequencePrediction
    from bayeslora.predict.values import ValuePrediction

__all__ = [
    "class_calibration",
    "khat_bars",
    "label_shares",
    "loss_trace",
    "pareto_k",
    "prior_predictive",
    "prior_texts",
    "prior_values",
    "rank_histograms",
    "risk_curves",
    "shift_histograms",
    "text_scatter",
    "transform_histogram",
    "uncertainty_scatter",
    "values_scatter",
]


def loss_trace(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """The loss, a line a fit: the negative ELBO, with the log prior of point estimates, in nats an example by epoch."""
    figure, axes = _one("epoch", "negative ELBO with the prior of point\nestimates, nats an example")
    for (name, history), colour in zip(histories.items(), cycle(COLOURS), strict=False):
        rows = [row for row in history if "loss" in row]
        axes.plot([row["epoch"] for row in rows], [row["loss"] for row in rows], color=colour, linewidth=1, label=name)
    if len(histories) > 1:
        axes.legend(frameon=False)
    return figure


def khat_bars(whole: float | None, blocks: Mapping[str, float]) -> Figure:
    """k-hat of all weights and by block, against the thresholds 0.5 and 0.7; infinite ones beyond all others."""
    shown = ({"all weights": whole} if whole is not None else {}) | dict(blocks)
    top = 1.1 * max([0.7, *(value for value in shown.values() if np.isfinite(value))])
    figure, axes = _one("k-hat: below 0.5 good, up to 0.7 usable", "", height=1.2 + 0.28 * len(shown))
    for threshold in (0.5, 0.7):
        axes.axvline(threshold, color=GREY, linestyle=":", linewidth=1)
    colours = [COLOURS[2] if value < 0.5 else COLOURS[4] if value < 0.7 else COLOURS[1] for value in shown.values()]
    axes.barh(list(shown), [min(value, top) for value in shown.values()], color=colours)
    for place, value in enumerate(shown.values()):
        if np.isinf(value):
            axes.text(top, place, "infinite ", ha="right", va="center", color="white", fontsize="small")
    axes.invert_yaxis()
    return figure


def pareto_k(numbers: np.ndarray, shapes: np.ndarray, good: float) -> Figure:
    """k-hat of the leave-one-out weights of the rows with these numbers; infinite ones above all others."""
    figure, axes = _one("", "Pareto k of leaving the row out")
    far, infinite = ~(shapes <= good), np.isinf(shapes)
    shapes = np.where(infinite, 1.1 * max([0.7, *shapes[~infinite]]), shapes)
    for chosen, colour in ((~far, COLOURS[0]), (far, COLOURS[1])):
        axes.plot(numbers[chosen], shapes[chosen], ".", color=colour, markersize=3)
    axes.axhline(good, color=GREY, linestyle=":", linewidth=1)
    beyond = f", {int(infinite.sum())} infinite" if infinite.any() else ""
    axes.set_xlabel(f"training row ({int(far.sum())} of {len(far)} above {good:.2f}{beyond})")
    return figure


def risk_curves(predictions: Mapping[str, Prediction | Guesses]) -> Figure:
    """Share of wrong answers against the share of rows (or tokens) that are answered, the surest first."""
    guesses = {name: guesses_of(each) for name, each in predictions.items()}
    unit = next(iter(guesses.values())).unit
    figure, axes = _one(f"share of {unit} that are answered, the surest first", "share of wrong answers")
    for (name, each), colour in zip(guesses.items(), cycle(COLOURS), strict=False):
        found = risk_coverage(each)
        axes.plot(found.coverage, found.risk, color=colour, label=f"{name}  (area {found.area:.3f})")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def uncertainty_scatter(prediction: ClassPrediction) -> Figure:
    """Mutual information against expected entropy of each row, right and wrong ones apart."""
    figure, axes = _one("aleatoric: expected entropy, nats", "epistemic: mutual information, nats")
    assert prediction.labels is not None
    right = prediction.predictions.eq(prediction.labels).numpy()
    for chosen, colour, marker, name in ((right, COLOURS[0], "o", "right"), (~right, COLOURS[1], "X", "wrong")):
        rows = np.flatnonzero(chosen)
        axes.plot(
            prediction.expected_entropy.numpy()[rows], prediction.mutual_information.numpy()[rows], marker,
            color=colour, markersize=4, alpha=0.5, linestyle="", markeredgewidth=0, label=f"{name} ({len(rows)})",
        )  # fmt: skip
    axes.legend(frameon=False)
    return figure


def class_calibration(prediction: ClassPrediction) -> Figure:
    """Share of rows of each class against its predicted probability."""
    figure, axes = _one("predicted probability of the class", "share of rows of the class")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    for found, colour, marker in zip(by_class(prediction), cycle(COLOURS), cycle(MARKERS), strict=False):
        label = f"{found.name}  (ECE {found.ece:.3f})"
        axes.plot(found.probability, found.share, f"{marker}-", color=colour, markersize=4, label=label)
    axes.legend(frameon=False)
    return figure


def prior_predictive(data: Any) -> Figure:
    """Probability of the likeliest class under draws of the prior and of the posterior."""
    figure, axes = _one("probability of the likeliest class", "share of rows and draws")
    classes = data["posterior_predictive"]["probabilities"].sizes["class"]
    bins = np.linspace(1 / classes, 1, 31).tolist()
    for group, colour in (("prior_predictive", GREY), ("posterior_predictive", COLOURS[0])):
        best = data[group]["probabilities"].max("class").values.ravel()
        weights = np.full(len(best), 1 / len(best))
        axes.hist(best, bins, weights=weights, color=colour, alpha=0.5, label=group.partition("_")[0])
    axes.legend(frameon=False)
    return figure


def prior_texts(data: Any) -> Figure:
    """How likely texts are under draws of the prior and of the posterior, in nats a token."""
    figure, axes = _one("negative log-likelihood, nats a token", "share of rows and draws")
    found = {name: -data[f"{name}_predictive"]["mean"].values.ravel() for name in ("prior", "posterior")}
    bins = np.linspace(0, max(float(values.max()) for values in found.values()), 31).tolist()
    for (name, values), colour in zip(found.items(), (GREY, COLOURS[0]), strict=True):
        axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=colour, alpha=0.5, label=name)
    axes.legend(frameon=False)
    return figure


def prior_values(data: Any) -> Figure:
    """Labels that are drawn from the prior and posterior predictive, and those that were observed."""
    figure, axes = _one("label", "share of rows and draws")
    groups = {"prior": "prior_predictive", "posterior": "posterior_predictive", "observed": "observed_data"}
    values = {name: data[group]["y"].values.ravel() for name, group in groups.items() if group in data}
    low, high = np.quantile(np.concatenate(list(values.values())), (0.001, 0.999)).tolist()
    bins = np.linspace(low, high, 31).tolist()
    for (name, each), colour in zip(values.items(), (GREY, COLOURS[0], COLOURS[1]), strict=False):
        style: dict[str, Any] = {"histtype": "step", "linewidth": 1.5} if name == "observed" else {"alpha": 0.5}
        axes.hist(each, bins, weights=np.full(len(each), 1 / len(each)), color=colour, label=name, **style)
    axes.legend(frameon=False)
    return figure


def transform_histogram(prediction: ValuePrediction, bins: int = 10) -> Figure:
    """Predicted probabilities that labels are below what they are, over what bins of uniform ones hold (95 %)."""
    from scipy.stats import binom

    figure, axes = _one("predicted probability that the label is below what it is", "rows")
    below, edges = prediction.below.numpy(), np.linspace(0, 1, bins + 1)
    low, high = (float(binom.ppf(level, len(below), 1 / bins)) for level in (0.025, 0.975))
    axes.axhspan(low, high, color=GREY, alpha=0.35, linewidth=0, label="uniform, 95 %")
    axes.stairs(np.histogram(below, edges)[0], edges, color=COLOURS[0], linewidth=1.5, label="labels")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def values_scatter(prediction: ValuePrediction) -> Figure:
    """Labels against predicted means, which reach by a standard deviation to both sides."""
    figure, axes = _one("predicted mean and standard deviation", "label")
    assert prediction.labels is not None
    labels = prediction.labels.numpy()
    axes.errorbar(
        prediction.mean.numpy(), labels, xerr=prediction.variance.sqrt().numpy(), fmt="o", color=COLOURS[0],
        markersize=4, alpha=0.5, elinewidth=0.5, markeredgewidth=0,
    )  # fmt: skip
    ends = labels.min(), labels.max()
    axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
    return figure


def text_scatter(prediction: SequencePrediction) -> Figure:
    """How much draws disagree about each text, against how unlikely it is."""
    figure, axes = _one("negative log-likelihood, nats a token", "disagreement of draws, nats a text")
    by_token, disagreement = prediction.nll_by_token.numpy(), prediction.disagreement.numpy()
    axes.plot(by_token, disagreement, "o", color=COLOURS[0], markersize=4, alpha=0.5)
    return figure


def label_shares(data: Any) -> Figure:
    """Share of each class among labels that are drawn from the posterior predictive, and among the observed ones."""
    figure, axes = _one("", "share of rows")
    classes = data["posterior_predictive"]["probabilities"]["class"].values
    drawn, observed = data["posterior_predictive"]["y"].values, data["observed_data"]["y"].values
    for number in range(len(classes)):
        shares = (drawn == number).mean(-1).ravel()
        if np.ptp(shares):
            axes.violinplot([shares], positions=[number], widths=0.7, showextrema=False)
        axes.plot(number, shares.mean(), "o", color=COLOURS[0], label="replicated" if number == 0 else None)
        share = (observed == number).mean()
        axes.plot(number, share, "X", color=COLOURS[1], markersize=8, label="observed" if number == 0 else None)
    axes.set_xticks(range(len(classes)), [str(name) for name in classes])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def rank_histograms(ranks: Ranks, bins: int = 10) -> Figure:
    """Ranks of true values among posterior draws, a panel a quantity, over what bins of uniform ranks hold (95 %)."""
    from matplotlib.figure import Figure
    from scipy.stats import binom

    uniform, symmetric = ranks.uniformity(bins), ranks.symmetry()
    figure = Figure(figsize=(3.2 * len(uniform) + 0.4, 3.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(uniform), squeeze=False)[0]
    edges = ranks.edges(bins)
    for axes, (name, values) in zip(panels, ranks.ranks.items(), strict=True):
        shares = np.diff(edges) / (ranks.draws + 1)
        low, high = (binom.ppf(level, len(values), shares) for level in (0.025, 0.975))
        axes.bar(edges[:-1], high - low, np.diff(edges), low, align="edge", color=GREY, alpha=0.35)
        axes.stairs(np.histogram(values, edges)[0], edges, color=COLOURS[0], linewidth=1.5)
        axes.set_title(f"{name}\nuniform p {uniform[name]:.2g}, symmetric p {symmetric[name]:.2g}", fontsize="small")
        axes.set_xlabel(f"rank among {ranks.draws} draws")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("simulations")
    return figure


def shift_histograms(values: Mapping[str, tuple[Tensor, Tensor]], names: tuple[str, str]) -> Figure:
    """Kinds of uncertainty about known rows and about rows of another kind, and how well each tells them apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(values), 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (title, (here, there)) in zip(panels, values.items(), strict=True):
        bins = np.linspace(0, max(float(here.max()), float(there.max()), 1e-9), 31).tolist()
        for each, colour, name in ((here, COLOURS[0], names[0]), (there, COLOURS[1], names[1])):
            weights = np.full(len(each), 1 / len(each))
            axes.hist(each.numpy(), bins, weights=weights, color=colour, alpha=0.5, label=name)
        axes.set_xlabel(f"{title} (AUROC {auroc(here, there):.3f})")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of rows")
    panels[0].legend(frameon=False)
    return figure


def _one(xlabel: str, ylabel: str, height: float = 3.8) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
