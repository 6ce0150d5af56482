from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bayeslora.app.studies.figures import boxes, curves, pareto


@pytest.mark.parametrize("seconds", [(5.0, 5.2), (240.0, 920.0), (70.0, 430.0), (66.0, 300.0), (0.5, 40.0), (1, 9e4)])
def test_costs_are_read_off_ticks_whose_labels_are_apart(seconds: tuple[float, float]) -> None:
    tasks, rows, costs = ("CoLA", "MRPC", "SST-2"), [], []  # three panels: as many as are side by side
    for task in tasks:
        for name, cost in zip(("one", "other"), seconds, strict=True):
            line = {"task": task, "base": "MiniLM", "protocol": "same", "method": name}
            rows.append(line | {"metric": "nll", "value": 0.512, "rows_low": 0.401, "rows_high": 0.603})
            costs.append(line | {"state": "done", "seconds": cost, "tuning_seconds": 0.0})
    figure = pareto(pd.DataFrame(rows), pd.DataFrame(costs))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for minor in (False, True) for tick in axes.xaxis.get_ticklabels(minor=minor) if tick.get_text()]
    ticks = sorted(
        (tick for tick in ticks if low <= tick.get_position()[0] <= high), key=lambda tick: tick.get_position()[0]
    )
    boxes = [tick.get_window_extent(canvas.get_renderer()) for tick in ticks]
    digit = boxes[0].width / len(ticks[0].get_text())  # with less between them two numbers read as one
    assert len(boxes) >= 2
    assert all(one.x1 + digit < other.x0 for one, other in zip(boxes, boxes[1:], strict=False))


def test_a_legend_is_no_wider_than_its_figure() -> None:
    names = ["plain LoRA", "plain LoRA, temperature", "ensemble of plain LoRA", "checkpoint ensemble"]
    place = {"task": "CoLA", "base": "MiniLM", "protocol": "same"}
    rows, costs = [], []
    for number, name in enumerate(names):
        value = {"value": 0.5 + number / 100, "rows_low": 0.4, "rows_high": 0.7}
        rows.append(place | {"method": name, "metric": "nll"} | value)
        costs.append(place | {"method": name, "state": "done", "seconds": 5.0 + number, "tuning_seconds": 0.0})
    panels = []
    for kept in (1, 4):  # one name fits as it is
        figure = pareto(pd.DataFrame(rows[:kept]), pd.DataFrame(costs[:kept]))
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert [text.get_text() for text in legend.get_texts()] == names[:kept]
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        panels.append(figure.axes[0].get_window_extent().height)
    assert panels[1] == pytest.approx(panels[0], rel=0.02)  # more rows of the legend are not taken from the panel


@pytest.mark.parametrize("drawn", [boxes, lambda points: curves(points, "learning_rate")])
def test_a_task_has_no_panel_of_a_metric_that_it_lacks(drawn: Callable[[pd.DataFrame], Figure]) -> None:
    rates = ({"base": "demo", "method": "quick", "learning_rate": rate} for rate in (0.1, 0.1, 1.0, 1.0))
    metrics = [{"task": "values", "nll": 1.25}, {"task": "classes", "nll": 0.75, "accuracy": 0.5}] * 2
    figure = drawn(pd.DataFrame([line | found for line, found in zip(rates, metrics, strict=True)]))
    titles = [(axes.get_title(), axes.get_ylabel()) for axes in figure.axes]
    assert titles == [("values, demo", "NLL"), ("classes, demo", "NLL"), ("classes, demo", "accuracy")]
