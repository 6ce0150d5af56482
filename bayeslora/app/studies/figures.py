"""Pictures of a study, as figures of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from bayeslora.app.studies.results import Results
from bayeslora.app.studies.summary import Group, groups_of
from bayeslora.predict.plots import COLOURS, GREY, MARKERS
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.reliability import bin_guesses, guesses_of
from bayeslora.predict.selective import risk_by_coverage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayeslora.app.studies.expansion import Target

__all__ = ["boxes", "curves", "pareto", "reliabilities", "risks"]

COLUMNS = 3
#: Columns of a legend, where the figure is wide enough.
OF_LEGEND = 4
#: Characters of a line of a method's name below a box.
LABEL = 18
#: What metrics over a grid are called.
LABELS = {"nll": "NLL", "accuracy": "accuracy", "ece_15": "ECE-15"}
#: Labels that have room below a panel, and the numbers of a decade that are labelled, as many as have.
MOST_TICKS = 6
OF_A_DECADE = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
Place = tuple[str, str, str]


def pareto(summary: pd.DataFrame, frame: pd.DataFrame) -> Figure:
    """NLL against the seconds of fit and prediction, a panel for each task, base and protocol.

    The line joins the methods that no other one beats in both; bars are the intervals of the NLL over rows.
    """
    done = frame[frame["state"] == "done"]
    seconds = done.groupby(["task", "base", "protocol", "method"])[["seconds", "tuning_seconds"]].mean().sum(axis=1)
    nll = summary[summary["metric"] == "nll"]
    places = list(dict.fromkeys(zip(nll["task"], nll["base"], nll["protocol"], strict=True)))
    methods = list(nll["method"].unique())
    figure, panels = _panels(len(places))
    for axes, place in zip(panels, places, strict=False):
        part = nll[(nll[["task", "base", "protocol"]] == list(place)).all(axis=1)]
        points = []
        for row in part.to_dict("records"):
            cost = float(seconds.loc[place].loc[row["method"]])
            ends = np.nan_to_num([[row["value"] - row["rows_low"]], [row["rows_high"] - row["value"]]])
            axes.errorbar(
                cost, row["value"], ends, label=row["method"], elinewidth=1, **_style(methods.index(row["method"]))
            )
            points.append((cost, float(row["value"])))
        front = [point for point in sorted(points) if not any(_beats(other, point) for other in points)]
        axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1, zorder=1)
        axes.set(title=_title(place), xlabel="seconds of fit, trials and prediction", ylabel="NLL", xscale="log")
        ticks = _ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    _legend(figure, panels)
    return figure


def reliabilities(targets: Sequence[Target], results: Results) -> Figure:
    """Accuracy by confidence, a panel for each method and protocol, a line for each task and base; seeds are pooled.

    Crosses are the true probabilities of what was guessed, where they are known.
    """
    found: dict[str, dict[str, ClassPrediction]] = {}
    for group, predictions in _classes(targets, results):
        title = group.method + (", chosen" if group.protocol == "chosen" else "")
        found.setdefault(title, {})[f"{group.task}, {group.base}"] = _pooled(predictions)
    places = list(dict.fromkeys(place for panels in found.values() for place in panels))
    figure, panels = _panels(len(found))
    for axes, (title, tasks) in zip(panels, found.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        for place, prediction in tasks.items():
            bins = bin_guesses(guesses_of(prediction))
            errors = [bins.accuracy - bins.low, bins.high - bins.accuracy]
            style = _style(places.index(place)) | {"linestyle": "-"}
            axes.errorbar(bins.confidence, bins.accuracy, errors, label=place, elinewidth=1, **style)
            if bins.truth is not None:
                axes.scatter(bins.confidence, bins.truth, marker="x", color="black", zorder=5, label="true probability")
        least = min(1 / each.outputs.shape[-1] for each in tasks.values())
        axes.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(least - 0.03, 1.02), ylim=(0, 1.03))
    _legend(figure, panels)
    return figure


def risks(targets: Sequence[Target], results: Results) -> Figure:
    """Share of mistakes by the share of rows that are kept, the surest ones; a panel for each task, base, protocol."""
    found: dict[Place, dict[str, ClassPrediction]] = {}
    for group, predictions in _classes(targets, results):
        found.setdefault((group.task, group.base, group.protocol), {})[group.method] = _pooled(predictions)
    methods = list(dict.fromkeys(method for panel in found.values() for method in panel))
    figure, panels = _panels(len(found))
    for axes, (place, panel) in zip(panels, found.items(), strict=False):
        for method, prediction in panel.items():
            correct = prediction.predictions == prediction.labels
            coverage, risk = risk_by_coverage(prediction.probabilities.amax(-1), correct)
            number = methods.index(method)
            # Markers of one line lie between those of the others, which it may cover.
            style = _style(number) | {"linestyle": "-", "markevery": (0.2 * number / len(methods), 0.2)}
            axes.plot(coverage, risk, label=method, **style)
        axes.set(title=_title(place), xlabel="share of rows that are kept", ylabel="share of mistakes", xlim=(0, 1))
    _legend(figure, panels)
    return figure


def boxes(points: pd.DataFrame) -> Figure:
    """Box plots of NLL and accuracy over the points of a grid, a row of panels for each task and base."""
    methods = list(points["method"].unique())
    names = [fill(method, LABEL) for method in methods]
    figure, panels = _panels_of_grid(points, ("nll", "accuracy"))
    figure.set_figwidth(max(figure.get_figwidth(), 1.3 * len(methods)))  # a name of two lines needs its own place
    for axes, metric, part in panels:
        drawn = [part[metric][part["method"] == method].to_numpy() for method in methods]
        axes.boxplot(drawn, medianprops={"color": COLOURS[1]})
        axes.set_xticks(range(1, len(names) + 1), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    return figure


def curves(points: pd.DataFrame, name: str) -> Figure:
    """NLL, accuracy and ECE by the setting that a grid varies, a row of panels for each task and base."""
    methods = list(points["method"].unique())
    figure, panels = _panels_of_grid(points, tuple(LABELS))
    for axes, metric, part in panels:
        for order, method in enumerate(methods):
            own = part[part["method"] == method].sort_values(name)
            # Later lines are thinner: where methods agree, as two classes' accuracy may, every one of them is seen.
            style = _style(order) | {"linestyle": "-", "linewidth": 1 + 3 * (1 - order / len(methods))}
            axes.plot(own[name].to_numpy(), own[metric].to_numpy(), label=method, **style)
        axes.set_xlabel(name)
        if (part[name] > 0).all():
            axes.set_xscale("log")
        values = sorted(part[name].unique())
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    _legend(figure, [axes for axes, *_ in panels])
    return figure


def _panels_of_grid(
    points: pd.DataFrame, metrics: Sequence[str]
) -> tuple[Figure, list[tuple[Axes, str, pd.DataFrame]]]:
    """A row of panels for each task and base: one for each metric that it has, and its points."""
    places = points.groupby(["task", "base"], sort=False)
    metrics = [metric for metric in metrics if metric in points]
    figure, panels = _panels(len(places) * len(metrics), len(metrics))
    found = []
    for axes, ((place, part), metric) in zip(panels, product(places, metrics), strict=True):
        if part[metric].isna().all():  # values have no accuracy
            axes.remove()
            continue
        axes.set(title=", ".join(place), ylabel=LABELS[metric])
        found.append((axes, metric, part))
    return figure, found


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, few enough for their labels on a logarithmic axis."""
    if high < 2 * low:
        return [float(tick) for tick in MaxNLocator(MOST_TICKS - 2).tick_values(low, high) if low <= tick <= high]
    decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))]
    found: list[float] = []
    for numbers in OF_A_DECADE:
        found = [number * decade for decade in decades for number in numbers if low <= number * decade <= high]
        if len(found) <= MOST_TICKS:
            break
    return found


def _panels(count: int, columns: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), dpi=130, layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    return figure, panels[:count]


def _style(number: int) -> dict[str, Any]:
    """Colour and marker, of which no two pairs are alike among the first 49."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": marker,
        "markersize": 5,
        "linestyle": "",
    }


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries}
    if not entries:
        return
    tried = []
    for columns in range(OF_LEGEND, 0, -1):  # as many as the figure is wide enough for
        legend = figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
        )
        tried.append(legend.get_window_extent())
        if columns == 1 or tried[-1].width <= figure.bbox.width:
            break
        legend.remove()
    more = tried[-1].height - tried[0].height  # which is not taken from the panels
    figure.set_figheight(figure.get_figheight() + more / figure.dpi)


def _classes(targets: Sequence[Target], results: Results) -> Iterator[tuple[Group, list[ClassPrediction]]]:
    """Groups whose predictions are of classes, and these."""
    for group in groups_of(targets, results):
        loaded = [results.predicted(target) for target in group.lines]
        classes = [each for each in loaded if isinstance(each, ClassPrediction)]
        if classes:
            yield group, classes


def _pooled(predictions: Sequence[ClassPrediction]) -> ClassPrediction:
    """Rows of all seeds as those of one prediction: averaged probabilities, since draws differ in number."""
    labels = [each.labels for each in predictions if each.labels is not None]
    averaged = [each.log_probabilities for each in predictions]
    truth = [each.truth for each in predictions if each.truth is not None]
    whole = torch.cat(truth) if len(truth) == len(predictions) else None
    return ClassPrediction(torch.cat(averaged).float().unsqueeze(0), torch.cat(labels), truth=whole)


def _beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
    return other != point and other[0] <= point[0] and other[1] <= point[1]


def _title(place: Mapping[str, str] | Sequence[str]) -> str:
    task, base, protocol = place
    return f"{task}, {base}" + (", chosen" if protocol == "chosen" else "")
