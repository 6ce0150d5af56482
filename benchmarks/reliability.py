"""Reliability diagrams: how often a prediction is right, against how sure it was. Used by quality.py, in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeslora import metrics
from bayeslora.predictive import Predictive

BINS = 15
#: Of the arms in their order; told apart by readers who do not tell red from green.
COLOURS = ("#D55E00", "#0072B2", "#009E73")
INK = "#333333"
Floats = NDArray[np.float64]


def draw(panels: Mapping[str, Mapping[str, Sequence[Path]]], path: Path) -> None:
    """Draw one panel a task: accuracy by confidence, and below it where the predictions lie.

    Args:
        panels: title of the panel to name of the arm to its saved predictions, whose rows are pooled.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    style = {"font.size": 9, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(4.1 * columns, 4.2 * rows), layout="constrained")
        cells = figure.subfigures(rows, columns, squeeze=False).ravel()
        for cell, (title, arms) in zip(cells, panels.items(), strict=False):
            upper, lower = cell.subplots(2, 1, sharex=True, height_ratios=(4, 1))
            _panel(upper, lower, title, {arm: _pooled(files) for arm, files in arms.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, facecolor="white")
        pyplot.close(figure)


def _pooled(files: Sequence[Path]) -> tuple[Floats, NDArray[np.int64]]:
    """Class probabilities (rows, classes) and labels (rows,) of all files together."""
    predictions = [Predictive.load(file) for file in files]
    labels = [prediction.labels for prediction in predictions if prediction.labels is not None]
    probabilities = np.concatenate([prediction.probabilities.numpy() for prediction in predictions])
    return probabilities, np.concatenate([each.numpy() for each in labels])


def _panel(upper: Any, lower: Any, title: str, arms: Mapping[str, tuple[Floats, NDArray[np.int64]]]) -> None:
    least = 1 / next(iter(arms.values()))[0].shape[1]
    edges = np.linspace(0, 1, BINS + 1)
    upper.plot([least, 1], [least, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for number, (arm, (probabilities, labels)) in enumerate(arms.items()):
        colour = COLOURS[number]
        confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
        # Bins include their upper edge, as in the calibration error.
        places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
        counts = np.bincount(places, minlength=BINS)
        filled = counts > 0
        accuracies = np.bincount(places, right, BINS)[filled] / counts[filled]
        means = np.bincount(places, confidence, BINS)[filled] / counts[filled]
        share = counts / counts.sum()
        error = metrics.ece(probabilities, labels, BINS)
        label = f"{arm}   (ECE {error:.3f}, NLL {metrics.nll(probabilities, labels):.2f})"
        upper.plot(means, accuracies, color=colour, linewidth=1.5, alpha=0.7, zorder=2)
        # The area of a dot is the share of rows, with a floor so that a sparse bin is still seen.
        upper.scatter(means, accuracies, s=14 + 260 * share[filled], color=colour, edgecolor="white", zorder=3, label=label)
        # The arms' bars stand side by side, each a part of the bin.
        width = 0.8 / BINS / len(arms)
        left = edges[:-1] + 0.1 / BINS + number * width
        lower.bar(left, 100 * share, width, align="edge", color=colour)
    upper.set_title(title, loc="left", fontweight="bold", color=INK)
    upper.set(ylim=(0, 1.03), xlim=(least - 0.02, 1.02), ylabel="accuracy")
    upper.grid(color="#eeeeee", linewidth=0.8)
    upper.set_axisbelow(True)
    legend = upper.legend(loc="lower right", frameon=False, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([30.0])
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="% of rows")
