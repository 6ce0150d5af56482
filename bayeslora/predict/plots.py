"""Pictures of predictions, as figures of matplotlib that belong to nobody but the caller."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora import files
from bayeslora.errors import DataError
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.resampling import Floats, bin_of, indicator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["Bins", "bin_predictions", "figure_format", "reliability_diagram", "save_figure"]

#: Colours that the colour-blind tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#808080"
LONGEST_OF_TWO = 40  # characters, of an entry of a legend that has another one beside it


class Bins(NamedTuple):
    """Rows of a prediction by the confidence of the predicted class, in the bins that have rows.

    Attributes:
        rows: number of rows (bins,).
        confidence: mean probability of the predicted class.
        accuracy: share of rows whose label it was.
        low: lower end of the 95 % Wilson interval of the accuracy.
        high: upper end.
        truth: mean true probability of the predicted class, if that is known.
        centre: middle of the bin.
    """

    rows: Floats
    confidence: Floats
    accuracy: Floats
    low: Floats
    high: Floats
    truth: Floats | None
    centre: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error over these bins."""
        return float(self.rows @ np.abs(self.accuracy - self.confidence) / self.rows.sum())


def bin_predictions(prediction: Prediction, bins: int = 15, truth: ArrayLike | None = None) -> Bins:
    """What a reliability diagram shows.

    Args:
        prediction: of classes, with labels.
        bins: number of bins of equal width.
        truth: true class probabilities (examples, classes), where they are known.

    Raises:
        DataError: the prediction has no labels or no classes, or the true probabilities have another shape.
    """
    from scipy.stats import binomtest

    if prediction.labels is None or not isinstance(prediction, ClassPrediction) or not len(prediction):
        raise DataError("A reliability diagram needs predicted classes and their labels.")
    probabilities = prediction.probabilities.numpy()
    predicted, labels = probabilities.argmax(1), prediction.labels.numpy()
    members = indicator(bin_of(probabilities.max(1), bins), bins)
    filled = members.sum(0) > 0
    rows = members.sum(0)[filled]

    def mean(values: NDArray[Any]) -> Floats:
        return np.asarray((values @ members)[filled] / rows)

    correct = (predicted == labels) @ members
    intervals = [
        binomtest(int(right), int(n)).proportion_ci(method="wilson")
        for right, n in zip(correct[filled], rows, strict=True)
    ]
    low, high = np.transpose(intervals)
    known = None
    if truth is not None:
        true = np.asarray(truth, dtype=np.float64)
        if true.shape != probabilities.shape:
            raise DataError(f"True probabilities have the shape {true.shape}, predictions {probabilities.shape}.")
        known = mean(true[np.arange(len(true)), predicted])
    centre = ((np.arange(bins) + 0.5) / bins)[filled]
    return Bins(rows, mean(probabilities.max(1)), correct[filled] / rows, low, high, known, centre)


def reliability_diagram(
    predictions: Prediction | Mapping[str, Prediction],
    *,
    bins: int = 15,
    truth: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Accuracy against confidence, bin by bin, over a histogram of the confidence.

    One prediction is drawn as bars, with its gaps to perfect calibration; several as lines over each other. Vertical
    lines are 95 % intervals of a bin's accuracy. Crosses are the true probabilities, where they are given: they show
    the calibration without the noise of the labels.

    Args:
        predictions: one prediction, or several by name (at most seven).
        bins: number of bins of equal width.
        truth: true class probabilities (examples, classes) of the rows, where they are known.
        title: of the figure.

    Raises:
        DataError: no prediction or too many, or one without labels or classes.
    """
    from matplotlib.figure import Figure

    several = predictions if isinstance(predictions, Mapping) else {"": predictions}
    if not 1 <= len(several) <= len(COLOURS):
        raise DataError(f"A reliability diagram shows 1 to {len(COLOURS)} predictions, found {len(several)}.")
    figure = Figure(figsize=(5.2, 6.4), dpi=150, layout="constrained")
    diagram, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    binned = {name: bin_predictions(each, bins, truth) for name, each in several.items()}
    chance = 1 / max(each.outputs.shape[-1] for each in several.values())

    diagram.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    if len(several) == 1:
        _draw_bars(diagram, next(iter(binned.values())), bins)
    for (name, found), colour, marker in zip(binned.items(), COLOURS, MARKERS, strict=False):
        several_lines = f"{name}  (ECE {found.ece:.3f})", f"{marker}-"
        label, style = several_lines if len(several) > 1 else (f"95 % interval  (ECE {found.ece:.3f})", marker)
        _draw_accuracy(diagram, found, colour, style, label)
        if found.truth is not None:
            crosses = colour if len(several) > 1 else "black"
            diagram.scatter(found.confidence, found.truth, marker="x", s=32, color=crosses, zorder=5, clip_on=False)
        _draw_histogram(histogram, cast("ClassPrediction", several[name]), bins, colour, filled=len(several) == 1)
    if truth is not None:
        diagram.scatter([], [], marker="x", s=32, color="black", label="true probability")
    histogram.plot([], [], color=GREY, linestyle=":", linewidth=1.2, label="mean confidence")
    _finish(diagram, histogram, chance, title)
    _legend(figure)
    return figure


def figure_format(path: str | Path) -> str:
    """Format of a picture by the ending of its name.

    Raises:
        DataError: matplotlib does not know that ending.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    name, known = Path(path), FigureCanvasBase.get_supported_filetypes()
    ending = name.suffix.removeprefix(".").lower()
    if ending not in known:
        raise DataError(f"Cannot draw into '{name.name}': expected a name ending in {', '.join(sorted(known))}.")
    return ending


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in one step, in the format of the file's ending.

    Raises:
        DataError: matplotlib does not know that ending.
    """
    target, ending = Path(path), figure_format(path)
    with files.replaced(target) as new:
        figure.savefig(new, format=ending)


def _draw_bars(axes: Axes, found: Bins, bins: int) -> None:
    width = 1 / bins
    axes.bar(found.centre, found.accuracy, width, color=COLOURS[0], alpha=0.35, edgecolor=COLOURS[0], label="accuracy")
    gap = found.confidence - found.accuracy
    axes.bar(
        found.centre,
        gap,
        width,
        bottom=found.accuracy,
        facecolor="none",
        edgecolor=COLOURS[1],
        hatch="////",
        linewidth=0.8,
        label="gap to the confidence",
    )


def _draw_accuracy(axes: Axes, found: Bins, colour: str, style: str, label: str) -> None:
    errors = [found.accuracy - found.low, found.high - found.accuracy]
    axes.errorbar(
        found.confidence,
        found.accuracy,
        errors,
        fmt=style,
        markersize=4.5,
        color=colour,
        linewidth=1.5,
        elinewidth=1,
        label=label,
        zorder=4,
        clip_on=False,
    )


def _draw_histogram(axes: Axes, prediction: ClassPrediction, bins: int, colour: str, filled: bool) -> None:
    confidence = prediction.probabilities.max(-1).values.numpy()
    weights = np.full(len(confidence), 1 / len(confidence))
    edges = np.linspace(0, 1, bins + 1).tolist()
    style: dict[str, Any] = {"histtype": "step", "linewidth": 1.5, "edgecolor": colour}
    if filled:
        style = {"facecolor": colour, "alpha": 0.35, "edgecolor": colour}
    axes.hist(confidence, bins=edges, weights=weights, **style)
    axes.axvline(float(confidence.mean()), color=colour, linestyle=":", linewidth=1.2)


def _finish(diagram: Axes, histogram: Axes, chance: float, title: str | None) -> None:
    start = max(0.0, chance - 0.04)  # no class of K can be predicted with less than 1 / K
    diagram.set_xlim(start, 1.015)
    diagram.set_ylim(0, 1.03)
    diagram.set_ylabel("accuracy")
    histogram.set_ylabel("share of rows")
    histogram.set_xlabel("confidence: probability of the predicted class")
    for axes in (diagram, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    if title:
        diagram.set_title(title, fontsize=11)


def _legend(figure: Figure) -> None:
    """One legend below the axes, since intervals of sparse bins reach through all of their height."""
    entries = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles, labels = (list(chain(*parts)) for parts in zip(*entries, strict=True))
    columns = 2 if max(map(len, labels)) <= LONGEST_OF_TWO else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
