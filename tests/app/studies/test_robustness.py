from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bayeslora.app.studies.robustness import by_point, robustness_of, robustness_tests

NLL = {1e-4: (0.4, 0.6), 1e-3: (0.3, 0.3), 1e-2: (1.0, 2.0), 1e-1: (0.7, 0.7)}


def grid(factor: float = 1.0, method: str = "mle", task: str = "t") -> pd.DataFrame:
    rows = []
    for rate, values in NLL.items():
        for seed, nll in enumerate(values):
            rows.append({
                "task": task, "base": "b", "method": method, "seed": seed, "protocol": "grid", "learning_rate": rate,
                "state": "done", "nll": factor * nll, "accuracy": 1 / (1 + nll),
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_measures_are_those_of_the_points() -> None:
    row = robustness_of(grid(), ["learning_rate"]).iloc[0]
    means = [0.5, 0.3, 1.5, 0.7]
    assert row["intrinsic"] == pytest.approx(1 / np.median(means)) and row["nll_spread"] == pytest.approx(1.2)
    assert row["nll_iqr"] == pytest.approx(np.subtract(*np.quantile(means, [0.75, 0.25])))
    accuracy = [np.mean([1 / (1 + each) for each in values]) for values in NLL.values()]
    assert row["extrinsic"] == pytest.approx(np.median(accuracy)) and row["accuracy_spread"] == pytest.approx(
        max(accuracy) - min(accuracy)
    )
    assert (row["points"], row["failed"]) == (4, 0)


def test_a_point_with_a_seed_that_failed_is_none() -> None:
    frame = grid()
    frame.loc[2, ["state", "nll"]] = ["failed", math.nan]
    assert sorted(by_point(frame, ["learning_rate"])["learning_rate"]) == [1e-4, 1e-2, 1e-1]
    row = robustness_of(frame, ["learning_rate"]).iloc[0]
    assert (row["points"], row["failed"]) == (3, 1)
    frame.loc[2, "state"] = "open"  # which is no failure
    row = robustness_of(frame, ["learning_rate"]).iloc[0]
    assert (row["points"], row["failed"]) == (3, 0)


def test_a_method_that_failed_everywhere_has_a_row() -> None:
    dead = grid(method="svi").assign(state="failed", nll=math.nan, accuracy=math.nan)
    found = robustness_of(pd.concat([grid(), dead]), ["learning_rate"]).set_index("method")
    assert (found.loc["svi", "points"], found.loc["svi", "failed"]) == (0, 4) and math.isnan(
        found.loc["svi", "extrinsic"]
    )
    assert found.loc["mle", "points"] == 4
    alone = robustness_of(dead.drop(columns=["nll", "accuracy"]), ["learning_rate"])
    assert list(alone["failed"]) == [4]
    assert robustness_tests(alone, "mle").empty  # and no error


def test_no_value_is_a_point_of_a_grid() -> None:
    frame = grid().astype({"learning_rate": object})
    frame.loc[frame["learning_rate"] == 1e-4, "learning_rate"] = None  # as max_length has it
    found = robustness_of(frame, ["learning_rate"])
    pd.testing.assert_frame_equal(found, robustness_of(grid(), ["learning_rate"]))


def test_methods_are_compared_over_tasks() -> None:
    frames = [grid(factor, method, f"t{number}") for number in range(6) for factor, method in ((1, "mle"), (2, "svi"))]
    found = robustness_tests(robustness_of(pd.concat(frames), ["learning_rate"]), "mle").set_index("measure")
    assert found.loc["intrinsic", "wilcoxon"] == pytest.approx(2 / 2**6) and found.loc["intrinsic", "pairs"] == 6
    assert found.loc["extrinsic", "pairs"] == 0 and math.isnan(found.loc["extrinsic", "wilcoxon"])


def test_medians_of_the_points_that_did_not_fail_are_not_compared() -> None:
    """A method that is the reference but for its worst point, at which it fails, is not more robust."""
    frames = [grid(1 + number / 10, method, f"t{number}") for number in range(7) for method in ("mle", "svi")]
    frame = pd.concat(frames, ignore_index=True)
    failed = (frame["method"] == "svi") & (frame["learning_rate"] == 1e-2) & (frame["task"] != "t0")
    frame.loc[failed, ["state", "nll", "accuracy"]] = ["failed", math.nan, math.nan]
    assert robustness_of(frame, ["learning_rate"])["failed"].sum() == 6
    found = robustness_tests(robustness_of(frame, ["learning_rate"]), "mle")
    assert set(found["method"]) == {"svi"} and not found["pairs"].any() and found["wilcoxon"].isna().all()
    frame.loc[frame["method"] == "svi", "state"] = "failed"
    assert not robustness_tests(robustness_of(frame, ["learning_rate"]), "mle")["pairs"].any()


def test_box_plots_have_a_box_for_each_method(tmp_path: Path) -> None:
    from bayeslora.app.studies.figures import boxes

    points = by_point(pd.concat([grid(), grid(2, "svi")]), ["learning_rate"])
    figure = boxes(points)
    assert [axes.get_ylabel() for axes in figure.axes] == ["NLL", "accuracy"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["mle", "svi"]
