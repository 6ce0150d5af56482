from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from bayeslora import files
from bayeslora.app.studies import Study
from bayeslora.app.studies.detection import detection_of, shift_of
from bayeslora.app.studies.ranking import ranking_of, signed_rank
from bayeslora.app.studies.summary import BETTER, _averages, _Scores, over_seeds, summary_of
from bayeslora.predict.metrics import ece_by_chance
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.resampling import Share
from bayeslora.predict.sequences import SequencePrediction
from bayeslora.predict.values import ValuePrediction

Made = Callable[..., dict[str, Any]]
ROWS = 400


def filled(study: dict[str, Any], folder: Path, predicted: Callable[[str, int], Prediction]) -> Study:
    """A study whose predictions are made up: those of a method and seed."""
    found = Study(study, folder)
    for target in found.targets:
        for candidate in target.candidates:
            cell, evaluations = candidate.entry.cell, candidate.entry.evaluations
            found.results.write_fit(cell, {"seconds": 2.0})
            prediction = predicted(target.method, target.seed)
            for evaluation in evaluations.values():
                prediction.save(found.results.prediction(cell, evaluation))
                found.results.write_evaluation(cell, evaluation, prediction.metrics(intervals=False), 1.0)
    return found


def classes(shift: float, seed: int = 0) -> ClassPrediction:
    """Predictions of two classes by a score whose mean for the right class is ``shift``."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(2, (ROWS,), generator=generator)
    noise = torch.randn(ROWS, generator=generator) + 0.02 * seed
    score = (2 * labels - 1) * shift + noise
    return ClassPrediction(torch.stack([-score, score], dim=-1).unsqueeze(0), labels)


def test_an_interval_over_seeds_is_students() -> None:
    values = [0.5, 0.7, 0.6]
    found = over_seeds(values)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)))
    assert over_seeds([0.0, 1.0], 0.0, 1.0).high == 1.0
    assert math.isnan(over_seeds([0.5]).low) and math.isnan(over_seeds([math.inf, 1.0]).low)


def test_differences_are_of_pairs(study: Made, tmp_path: Path) -> None:
    """What both methods have in common, the noise of the rows, is no part of the interval of their difference."""
    methods = {name: {"backend": "quick", "settings": {"epochs": number}} for number, name in enumerate("abc", 1)}
    shifts = {"a": 0.7, "b": 0.72, "c": 0.7}
    found = filled(study(methods=methods, seeds=[0, 1, 2]), tmp_path, lambda name, seed: classes(shifts[name], seed))
    table = summary_of(found.targets, found.results, "a").set_index(["method", "metric"])
    values = [classes(0.72, seed).metrics(intervals=False)["nll"].value for seed in (0, 1, 2)]
    row = table.loc["b", "nll"]
    assert row["value"] == pytest.approx(np.mean(values)) and row["seeds"] == 3
    assert row["rows_low"] < row["value"] < row["rows_high"]
    assert row["difference"] == pytest.approx(row["value"] - table.loc["a", "nll"]["value"])
    assert row["difference_rows_high"] - row["difference_rows_low"] < 0.1 * (row["rows_high"] - row["rows_low"])
    assert row["difference_rows_high"] < 0 and row["difference_seeds_high"] < 0 and not row["chance"]
    same = table.loc["c", "nll"]
    assert same["difference"] == 0 and same["chance"]
    assert math.isnan(table.loc["a", "nll"]["difference"])


def test_distances_from_the_truth_stand_beside_the_others(study: Made, tmp_path: Path) -> None:
    """A method that says the true probabilities has none, and is nearer by all the distance of the other one."""

    def predicted(name: str, seed: int) -> ClassPrediction:
        made = classes(0.7, seed)
        return replace(made, truth=made.probabilities if name == "quick" else made.probabilities.flip(-1))

    found = filled(study(), tmp_path, predicted)
    table = summary_of(found.targets, found.results, "wide").set_index(["method", "metric"])
    row = table.loc["quick", "kl"]
    assert row["value"] == pytest.approx(0) and row["difference"] == pytest.approx(-table.loc["wide", "kl"]["value"])
    assert row["difference_rows_high"] < 0 and not row["chance"]
    assert {"mcc", "ece_true"} <= set(table.loc["quick"].index)


@pytest.mark.parametrize(
    ("known", "reference"), [("quick-0 quick-3 wide-0", "quick"), ("wide-0 wide-3 quick-3", "wide")]
)
def test_predictions_that_do_not_know_the_truth_leave_its_cells_empty(
    known: str, reference: str, study: Made, tmp_path: Path
) -> None:
    """As those do that were saved before it was a part of them, of some seeds or of all."""

    def predicted(name: str, seed: int) -> ClassPrediction:
        made = classes(0.7, seed)
        return replace(made, truth=made.probabilities if f"{name}-{seed}" in known else None)

    quality, differences, *_ = filled(study(reference=reference), tmp_path, predicted).report().tables()
    column = list(quality.header).index("KL from truth")
    assert {row[0] for row in quality.rows if row[column]} == {reference} and len(quality.rows) == 2
    (row,) = differences.rows
    assert row[list(differences.header).index("KL from truth")] == "" and row[1].startswith("+")


def measured(right: bool) -> dict[str, float]:
    """Metrics of predictions of every kind that are right, or wrong in every row."""
    labels, values = torch.arange(8) % 2, torch.linspace(0, 1, 8)
    score = (2 * labels - 1) * (2.0 if right else -2.0)
    kinds = (
        ClassPrediction(torch.stack([-score, score], -1).unsqueeze(0), labels, truth=torch.eye(2)[labels].double()),
        ValuePrediction((values if right else values.flip(0)).reshape(1, 8, 1), values),
        SequencePrediction(torch.full((1, 8, 1), -1.0 if right else -9.0), torch.full((8,), 4)),
    )
    return {name: found.value for each in kinds for name, found in each.metrics(intervals=False).items()}


def test_what_is_better_is_so_where_predictions_are_right() -> None:
    right, wrong = measured(True), measured(False)
    assert {name: right[name] > wrong[name] for name in BETTER} == BETTER


def test_what_is_better_neither_way_is_told_and_not_compared(study: Made, tmp_path: Path) -> None:
    report = filled(study(), tmp_path, lambda name, seed: classes(0.7, seed)).report()
    quality, differences, *_ = report.tables()
    assert quality.header[quality.header.index("ECE-15") + 1] == "ECE-15 by chance"
    expected = np.mean([ece_by_chance(classes(0.7, seed).probabilities.numpy()) for seed in (0, 3)])
    assert all(row[quality.header.index("ECE-15 by chance")].startswith(f"{expected:.3f} (") for row in quality.rows)
    assert "ECE-15" in differences.header and "by chance" not in " ".join(differences.header)
    ranked = set(report.parts["ranks"]["metric"])
    assert "ece_15" in ranked and "ece_15_by_chance" not in ranked


def test_an_interval_over_rows_covers(study: Made, tmp_path: Path) -> None:
    """Of 40 intervals at 95 %, each over rows of its own, 33 or more hold the truth but for one case in a thousand."""
    held = 0
    truth = float(stats.norm.cdf(0.7))
    for number in range(40):
        generator = np.random.default_rng(number)
        labels = generator.integers(2, size=100)
        score = (2 * labels - 1) * 0.7 + generator.normal(size=100)
        outputs = torch.tensor(np.stack([-score, score], -1), dtype=torch.float32).unsqueeze(0)
        prediction = ClassPrediction(outputs, torch.as_tensor(labels))
        table = {"accuracy": prediction.statistics()["accuracy"]}
        ends = _averages({0: _Scores(table, 100)})["accuracy"]
        held += ends["rows_low"] <= truth <= ends["rows_high"]
    assert held >= 33


def test_ranks_and_wilcoxon_are_over_tasks() -> None:
    rows = []
    for number in range(7):
        for method, value in {"ref": 0.5, "better": 0.5 - 0.01 * (number + 1), "worse": 0.9}.items():
            if (number, method) != (6, "worse"):
                rows.append({"task": f"t{number}", "base": "b", "protocol": "same", "method": method, "metric": "nll",
                             "seeds": 3, "value": value})  # fmt: skip
    found = ranking_of(pd.DataFrame(rows), "ref").set_index("method")
    assert dict(found["rank"]) == {"ref": 2.0, "better": 1.0, "worse": 3.0} and set(found["tasks"]) == {6}
    assert found.loc["better", "wilcoxon"] == pytest.approx(2 / 2**7) and found.loc["better", "pairs"] == 7
    assert found.loc["worse", "wilcoxon"] == pytest.approx(2 / 2**6) and math.isnan(found.loc["ref", "wilcoxon"])
    assert signed_rank([0.0, math.nan, 0.3])[1] == 1 and math.isnan(signed_rank([0.0])[0])
    accuracy = ranking_of(pd.DataFrame(rows).assign(metric="accuracy"), "ref").set_index("method")
    assert accuracy.loc["worse", "rank"] == 1.0  # more is better


def test_an_infinite_difference_counts_against_a_method() -> None:
    ordinary = [-0.1, -0.2, -0.3, -0.4, -0.5]
    assert signed_rank([*ordinary, math.inf]) == signed_rank([*ordinary, 9.0])
    assert signed_rank([*ordinary, math.nan]) == signed_rank(ordinary)


def test_differences_that_only_rounding_tells_apart_are_ties() -> None:
    better, worse = [0.81, 0.72, 0.55, 0.92, 0.63, 0.44, 0.77, 0.71], [0.80, 0.71, 0.56, 0.90, 0.61, 0.46, 0.74, 0.70]
    p, pairs = signed_rank(np.array(better) - np.array(worse))
    assert pairs == 8 and p == stats.wilcoxon([1, 1, -1, 2, 2, -2, 3, 1]).pvalue
    assert signed_rank([0.1 + 0.2 - 0.3])[1] == 0


def test_seeds_that_are_all_right_do_not_make_an_accuracy_certain() -> None:
    right = np.ones(10)
    table = {"accuracy": (Share(right), 0.0, 1.0)}
    for seeds in (1, 3):
        ends = _averages({seed: _Scores(table, 10) for seed in range(seeds)})["accuracy"]
        assert ends["value"] == ends["rows_high"] == 1
        assert ends["rows_low"] == stats.beta.ppf(0.025, 10, 1) == pytest.approx(0.025 ** (1 / 10))


def test_means_of_the_seeds_that_did_not_fail_have_no_rank() -> None:
    """A method that lost its worst seed on one of two tasks is not the best there."""
    rows = [
        {"task": task, "base": "b", "protocol": "same", "method": method, "metric": "nll", "seeds": seeds,
         "value": value}
        for task, method, seeds, value in
        [("s", "ref", 3, 0.5), ("s", "lucky", 2, 0.1), ("t", "ref", 3, 0.5), ("t", "lucky", 3, 0.6)]
    ]  # fmt: skip
    found = ranking_of(pd.DataFrame(rows), "ref").set_index("method")
    assert dict(found["rank"]) == {"ref": 1.0, "lucky": 2.0} and set(found["tasks"]) == {1}
    assert found.loc["lucky", "pairs"] == 1
    alone = ranking_of(pd.DataFrame(rows[:2]), "ref").set_index("method")
    assert list(alone.index) == ["ref", "lucky"] and set(alone["tasks"]) == {0} and alone["rank"].isna().all()


def test_lines_that_are_not_done_are_left_out(study: Made, tmp_path: Path) -> None:
    found = filled(study(), tmp_path, lambda name, seed: classes(0.7, seed))
    last = found.targets[-1].candidates[0].entry
    (found.results.at(last.cell) / "evaluations" / f"{last.evaluations[''].name}.json").unlink()
    files.write_json(found.results.at(last.cell) / "error.json", {"type": "", "message": "no", "traceback": ""})
    table = summary_of(found.targets, found.results, "quick").set_index(["method", "metric"])
    assert table.loc["quick", "nll"]["seeds"] == 2 and table.loc["wide", "nll"]["seeds"] == 1
    assert table.loc["wide", "nll"]["difference"] == pytest.approx(0)  # over the seed that both have


def unsure(size: float, seed: int) -> ClassPrediction:
    """Predictions of three draws, of logits of that size and noise of one."""
    generator = torch.Generator().manual_seed(seed)
    true = size * torch.randn(60, 2, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator).squeeze(1)
    return ClassPrediction(true + torch.randn(3, 60, 2, generator=generator), labels)


def shifted(study: Made, folder: Path) -> Study:
    """A study of two seeds with predictions of its own rows, and less sure ones of those of a shift."""
    tasks = {"demo": {"task": str(folder / "rows.jsonl"), "shift": {"others": {"split": "train"}}}}
    found = filled(study(tasks=tasks, methods=["quick"]), folder, lambda _, seed: unsure(2.0, seed))
    for target in found.targets:
        entry, other = found.results.entry(target), unsure(1.0, 10 + target.seed)
        other.save(found.results.prediction(entry.cell, entry.evaluations["others"]))
        metrics = other.metrics(intervals=False)
        found.results.write_evaluation(entry.cell, entry.evaluations["others"], metrics, 1.0)
    return found


def test_what_is_detected_is_so_by_how_unsure_each_seed_is(study: Made, tmp_path: Path) -> None:
    found = shifted(study, tmp_path)
    table = detection_of(found.targets, found.results).set_index("detected")
    assert set(table["seeds"]) == {2}
    for name in ("entropy", "mutual_information"):
        mistakes, others = [], []
        for seed in (0, 3):
            own, other = unsure(2.0, seed), unsure(1.0, 10 + seed)
            mistakes.append(roc_auc_score(own.predictions != own.labels, getattr(own, name)))
            both = torch.cat([getattr(own, name), getattr(other, name)])
            others.append(roc_auc_score([0] * 60 + [1] * 60, both))
        assert table.loc["mistakes", name] == pytest.approx(np.mean(mistakes))
        assert table.loc["others", name] == pytest.approx(np.mean(others))
        assert mistakes[0] != mistakes[1] and others[0] != others[1]


def test_the_risk_is_of_the_surest_rows(study: Made, tmp_path: Path) -> None:
    found = shifted(study, tmp_path)
    risks = []
    for own in (unsure(2.0, 0), unsure(2.0, 3)):
        order = own.probabilities.amax(-1).argsort(descending=True)
        assert own.labels is not None
        wrong = own.predictions.ne(own.labels)[order].double()
        risks.append(float((wrong.cumsum(0) / torch.arange(1, 61)).mean()))
    table = detection_of(found.targets, found.results).set_index("detected")
    assert table.loc["mistakes", "risk"] == pytest.approx(np.mean(risks))


def test_metrics_of_a_shift_are_means_over_seeds_of_its_rows(study: Made, tmp_path: Path) -> None:
    found = shifted(study, tmp_path)
    (row,) = shift_of(found.targets, found.results).to_dict("records")
    values = [unsure(1.0, 10 + seed).metrics(intervals=False)["nll"].value for seed in (0, 3)]
    assert (row["shift"], row["rows"], row["seeds"]) == ("others", 60, 2) and row["nll"] == pytest.approx(
        np.mean(values)
    )
