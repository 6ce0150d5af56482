"""Pictures of predictions, as figures of matplotlib that belong to nobody but the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora import files
from bayeslora.errors import DataError
from bayeslora.predict.prediction import Prediction
from bayeslora.predict.reliability import Bins, Guesses, bin_guesses, guesses_of
from bayeslora.predict.resampling import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["figure_format", "reliability_diagram", "save_figure"]

#: Colours that the colour-blind tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#808080"
LONGEST_OF_TWO = 40  # characters, of an entry of a legend that has another one beside it


def reliability_diagram(
    predictions: Prediction | Guesses | Mapping[str, Prediction | Guesses],
    *,
    bins: int = 15,
    truth: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Accuracy against confidence, bin by bin, over a histogram of the confidence.

    One prediction is drawn as bars, with its gaps to perfect calibration; several as lines over each other. Vertical
    lines are 95 % intervals of a bin's accuracy. Crosses are the true probabilities, where they are known: they show
    the calibration without the noise of the labels.

    Args:
        predictions: one prediction or guesses, such as those of tokens; or several by name (at most seven).
        bins: number of bins of equal width.
        truth: true class probabilities (examples, classes) of the rows; by default those that predictions come with.
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
    guesses = {name: guesses_of(each, truth) for name, each in several.items()}
    binned = {name: bin_guesses(each, bins) for name, each in guesses.items()}

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
        _draw_histogram(histogram, guesses[name].confidence, bins, colour, filled=len(several) == 1)
    if any(each.truth is not None for each in guesses.values()):
        diagram.scatter([], [], marker="x", s=32, color="black", label="true probability")
    histogram.plot([], [], color=GREY, linestyle=":", linewidth=1.2, label="mean confidence")
    _finish(diagram, histogram, list(guesses.values()), title)
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


def _draw_histogram(axes: Axes, confidence: Floats, bins: int, colour: str, filled: bool) -> None:
    weights = np.full(len(confidence), 1 / len(confidence))
    edges = np.linspace(0, 1, bins + 1).tolist()
    style: dict[str, Any] = {"histtype": "step", "linewidth": 1.5, "edgecolor": colour}
    if filled:
        style = {"facecolor": colour, "alpha": 0.35, "edgecolor": colour}
    axes.hist(confidence, bins=edges, weights=weights, **style)
    axes.axvline(float(confidence.mean()), color=colour, linestyle=":", linewidth=1.2)


def _finish(diagram: Axes, histogram: Axes, guesses: Sequence[Guesses], title: str | None) -> None:
    start = max(0.0, min(each.least for each in guesses) - 0.04)
    diagram.set_xlim(start, 1.015)
    diagram.set_ylim(0, 1.03)
    diagram.set_ylabel("accuracy")
    histogram.set_ylabel(f"share of {guesses[0].unit}")
    histogram.set_xlabel(f"confidence: probability of the {guesses[0].of}")
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
