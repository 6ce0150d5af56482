"""Reliability diagrams side by side: how often a prediction is right, against how sure it was. quality.py draws them.

What a bin holds is said by `bayeslora.predict.reliability.bin_guesses`; here it is laid out as one panel a task.
The rows of all seeds are pooled; they are the same rows, so a bin's share of right answers gets no interval here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bayeslora.predict.metrics import ece
from bayeslora.predict.plots import save_figure
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.reliability import bin_guesses, guesses_of

BINS = 15
#: Of the arms in their order; the colour-blind tell them apart (Okabe and Ito).
COLOURS = ("#D55E00", "#0072B2", "#009E73")
INK = "#333333"


def draw(panels: Mapping[str, Mapping[str, Sequence[Path]]], path: Path) -> None:
    """Draw one panel a task: accuracy by confidence, and below it where the predictions lie.

    Args:
        panels: title of the panel to name of the arm to its saved predictions, whose rows are pooled.
        path: of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    style: Any = {"font.size": 9, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(4.1 * columns, 4.2 * rows), dpi=160, layout="constrained")
        cells = figure.subfigures(rows, columns, squeeze=False).ravel()
        for cell, (title, arms) in zip(cells, panels.items(), strict=False):
            upper, lower = cell.subplots(2, 1, sharex=True, height_ratios=(4, 1))
            upper.set_title(title, loc="left", fontweight="bold", color=INK)
            _panel(upper, lower, {arm: pooled(files) for arm, files in arms.items()})
        save_figure(figure, path)


def pooled(files: Sequence[Path]) -> ClassPrediction:
    """The rows of all files as those of one prediction."""
    parts = [ClassPrediction.load(file) for file in files]
    labels = torch.cat([part.labels for part in parts if part.labels is not None])
    return ClassPrediction(torch.cat([part.outputs for part in parts], dim=1), labels)


def _panel(upper: Any, lower: Any, arms: Mapping[str, ClassPrediction]) -> None:
    least = 1 / max(prediction.outputs.shape[-1] for prediction in arms.values())
    upper.plot([least, 1], [least, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    # The arms' bars stand side by side, each a part of the bin.
    width = 0.8 / BINS / len(arms)
    for number, ((arm, prediction), colour) in enumerate(zip(arms.items(), COLOURS, strict=False)):
        found = bin_guesses(guesses_of(prediction), BINS)
        share = found.rows / found.rows.sum()
        assert prediction.labels is not None
        error = ece(prediction.probabilities, prediction.labels, BINS)
        nll = -float(prediction.log_predictive_density.mean())
        upper.plot(found.confidence, found.accuracy, color=colour, linewidth=1.5, alpha=0.7, zorder=2)
        # The area of a dot is the share of rows, with a floor so that a sparse bin is still seen.
        dots = {"s": 14 + 260 * share, "color": colour, "edgecolor": "white", "zorder": 3}
        upper.scatter(found.confidence, found.accuracy, label=f"{arm}   ECE {error:.3f}, NLL {nll:.2f}", **dots)
        left = found.centre - 0.4 / BINS + number * width
        lower.bar(left, 100 * share, width, align="edge", color=colour)
    upper.set(ylim=(0, 1.03), xlim=(int(least * BINS) / BINS, 1.02), ylabel="accuracy")
    upper.grid(color="#E5E5E5", linewidth=0.6)
    upper.set_axisbelow(True)
    for handle in upper.legend(loc="lower right", frameon=False, fontsize=8).legend_handles:
        handle.set_sizes([30.0])
    lower.set(xlabel="confidence: probability of the predicted class", ylabel="% of rows")
