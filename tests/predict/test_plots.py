from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scenarios import class_prediction

from bayeslora.diagnostics import TokenCalibration
from bayeslora.errors import DataError
from bayeslora.predict import metrics
from bayeslora.predict.plots import reliability_diagram, save_figure
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.values import ValuePrediction


def test_a_confidence_of_one_is_drawn() -> None:
    certain = ClassPrediction(torch.tensor([[[100.0, -100.0]] * 4]), torch.tensor([0, 0, 0, 1]))
    reliability_diagram(certain).draw_without_rendering()


def test_one_prediction_shows_bars_gaps_and_a_histogram() -> None:
    found, truth = class_prediction()
    figure = reliability_diagram(found, truth=truth, title="demo")
    diagram, histogram = figure.axes
    names = diagram.get_legend_handles_labels()[1]
    ece = metrics.ece(found.probabilities, found.labels)
    assert {"perfect calibration", "accuracy", "gap to the confidence", "true probability"} < set(names)
    assert f"95 % interval  (ECE {ece:.3f})" in names and diagram.get_title() == "demo"
    heights = [patch.get_height() for patch in histogram.patches]
    assert sum(heights) == pytest.approx(1)


def test_tokens_are_drawn_as_rows_are() -> None:
    confidence, right = np.linspace(0.01, 0.99, 60), np.arange(60) % 2.0
    tokens = TokenCalibration(confidence, right, np.arange(60) // 5)
    diagram, histogram = reliability_diagram(tokens, title="texts").axes
    assert histogram.get_ylabel() == "share of tokens" and "likeliest token" in histogram.get_xlabel()
    # The likeliest of a vocabulary may be as improbable as it likes.
    assert diagram.get_xlim()[0] == 0 and reliability_diagram(class_prediction()[0]).axes[0].get_xlim()[0] > 0.2
    assert f"95 % interval  (ECE {tokens.ece():.3f})" in diagram.get_legend_handles_labels()[1]


def test_several_predictions_are_lines_over_each_other() -> None:
    figure = reliability_diagram({"map": class_prediction()[0], "svi": class_prediction(seed=1)[0]})
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert [label.split("  ")[0] for label in labels] == ["perfect calibration", "map", "svi"]


@pytest.mark.parametrize("name", ["plain LoRA", "laplace around plain LoRA, prior by the evidence as published"])
def test_the_legend_covers_nothing_and_is_not_cut(name: str) -> None:
    figure = reliability_diagram({name: class_prediction(20)[0]} | {each: class_prediction()[0] for each in "abcdef"})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_texts()[-1].get_text() == "mean confidence"
    assert all(axes.get_legend() is None for axes in figure.axes)
    place = legend.get_window_extent()
    assert not any(place.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert figure.bbox.x0 <= place.x0 and place.x1 <= figure.bbox.x1 and place.y0 >= figure.bbox.y0


def test_figures_are_saved_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = reliability_diagram(class_prediction()[0])
    for name, start in [("a.png", b"\x89PNG"), ("new/b.pdf", b"%PDF"), ("c.svg", b"<?xml")]:
        save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(DataError, match=r"Cannot draw into 'd.txt': expected a name ending in .*pdf, .*png"):
        save_figure(figure, tmp_path / "d.txt")
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(type(figure), "savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "c.svg", "new"]


def test_what_cannot_be_drawn_is_refused() -> None:
    found, _ = class_prediction()
    with pytest.raises(DataError, match="needs predicted classes and their labels"):
        reliability_diagram(ClassPrediction(found.logits, None))
    with pytest.raises(DataError, match="needs predicted classes"):
        reliability_diagram(ValuePrediction(torch.zeros(1, 2, 1), torch.zeros(2)))
    with pytest.raises(DataError, match=r"shape \(300, 2\), predictions \(300, 3\)"):
        reliability_diagram(found, truth=torch.zeros(300, 2))
    with pytest.raises(DataError, match="1 to 7 predictions, found 0"):
        reliability_diagram({})


def test_drawing_leaves_the_global_state_of_matplotlib_alone() -> None:
    code = (
        "import sys, torch\n"
        "import bayeslora.predict.plots as plots\n"
        "from bayeslora.predict.prediction import ClassPrediction\n"
        "assert 'matplotlib' not in sys.modules\n"
        "found = ClassPrediction(torch.zeros(1, 3, 2), torch.tensor([0, 1, 0]))\n"
        "plots.reliability_diagram(found).savefig('/dev/null', format='png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
