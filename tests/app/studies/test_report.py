from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bayeslora.app.studies import Study
from bayeslora.app.studies.tables import Table, chosen_table, points_tables, quality_tables
from bayeslora.app.studies.warned import notes_of, warnings_table

Made = Callable[..., dict[str, Any]]


def test_everything_is_written(study: Made, tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    made = study(
        methods={"quick": {}, "wide": {"backend": "quick", "settings": {"learning_rate": 9.0}}, "hungry": {}},
        seeds=[0],
        tasks={"demo": {"task": rows, "shift": {"others": {"split": "train"}}}},
        tuning={"values": {"learning_rate": [0.1]}},
    )
    found = Study(made, tmp_path / "out").run(progress=False)
    folder = tmp_path / "out" / "report"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "study.md", "study.json", "tables.tex", "results.csv", "summary.csv", "ranks.csv", "detection.csv",
        "shift.csv", "pareto.png", "reliability.png", "risk.png",
    }  # fmt: skip
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))
    text = (folder / "study.md").read_text()
    assert "6 lines: 4 done, 2 failed." in text and "- demo, demo, hungry, 0, same: MemoryError: no room" in text
    assert "## demo, demo: each at its own, chosen on held-out rows; less quick" in text and "## Shift" in text
    assert "|  | learning_rate |\n|---|---:|\n| demo, demo, quick | 0.1 |\n| demo, demo, wide | 0.1 |" in text
    frame = found.frame()
    wide = frame[(frame["method"] == "wide") & (frame["protocol"] == "same")].iloc[0]
    assert f"| wide | 1 | {wide['accuracy']:.3f} (" in text
    written = json.loads((folder / "study.json").read_text())
    assert written["study"] == made and written["reference"] == "quick"
    assert written["results"][1]["nll"] == pytest.approx(wide["nll"])
    assert pd.read_csv(folder / "results.csv")["nll"][1] == pytest.approx(wide["nll"])
    cost = pd.read_csv(folder / "results.csv")
    assert list(cost["tuning_seconds"].fillna(-1) > 1.4) == [False, False, False, True, True, False]


def test_the_report_is_that_which_was_written_or_of_what_there_is(study: Made, tmp_path: Path) -> None:
    mine, other = (Study(study(seeds=[0]), tmp_path / "out") for _ in range(2))
    assert set(mine.reported.frame["state"]) == {"open"}
    other.run(progress=False)
    assert set(mine.reported.frame["state"]) == {"done"}
    assert other.reported is other.reported and mine.reported is not mine.reported


def test_every_line_of_a_picture_is_told_apart(study: Made, tmp_path: Path) -> None:
    methods = {f"rate {rate}": {"backend": "quick", "settings": {"learning_rate": rate}} for rate in range(1, 10)}
    found = Study(study(methods=methods, seeds=[0]), tmp_path / "out").run(progress=False)
    lines = dict(found.report().figures())["risk"].axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 9
    assert len({line.get_markevery()[0] for line in lines}) == 9 and {line.get_linestyle() for line in lines} == {"-"}


def test_a_grid_is_reported_by_its_robustness(study: Made, tmp_path: Path) -> None:
    made = study(methods=["quick"], seeds=[0], grid={"learning_rate": [0.1, 1.0], "epochs": [1]})
    found = Study(made, tmp_path / "out").run(progress=False)
    frame = found.frame()
    robustness = pd.read_csv(tmp_path / "out" / "report" / "robustness.csv").iloc[0]
    assert robustness["intrinsic"] == pytest.approx(1 / frame["nll"].mean()) and robustness["points"] == 2
    text = (tmp_path / "out" / "report" / "study.md").read_text()
    assert "## Robustness over the grid" in text and "| demo, demo, quick | 2 |" in text
    assert not (tmp_path / "out" / "report" / "summary.csv").exists()
    assert f"| 1, 1 | {frame['accuracy'][1]:.3f} / {frame['nll'][1]:.3f} / {frame['ece_15'][1]:.3f} |" in text
    assert [name for name, _ in found.report().figures()] == ["robustness"]  # no curve is of two settings
    assert (tmp_path / "out" / "report" / "robustness.png").exists()


def test_a_report_takes_the_place_of_another_ones_files_alone(study: Made, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "report"
    made = study(methods=["quick"], seeds=[0], grid={"learning_rate": [0.1, 1.0]})
    Study(made, tmp_path / "out").run(progress=False)
    assert {"points.csv", "robustness.png"} <= {path.name for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    listed = json.loads((folder / "study.json").read_text())
    listed["files"] += ["../mine.csv", "lost.png"]
    (folder / "study.json").write_text(json.dumps(listed))
    (tmp_path / "out" / "mine.csv").write_text("mine")
    Study(study(methods=["quick"], seeds=[0]), tmp_path / "out").run(progress=False)
    files = {path.name for path in folder.iterdir()} - {"notes.txt"}
    assert files == set(json.loads((folder / "study.json").read_text())["files"]) and "points.csv" not in files
    assert (folder / "notes.txt").exists() and (tmp_path / "out" / "mine.csv").exists()


def test_a_grid_of_one_number_is_drawn_along_it(study: Made, tmp_path: Path) -> None:
    made = study(methods=["quick"], seeds=[0, 1], grid={"learning_rate": [1.0, 0.1]})
    found = Study(made, tmp_path / "out").run(progress=False)
    (figure,) = (figure for name, figure in found.report().figures() if name == "curves")
    means = found.frame().groupby("learning_rate")["nll"].mean()
    assert [axes.get_ylabel() for axes in figure.axes] == ["NLL", "accuracy", "ECE-15"]
    assert [each.get_text() for each in figure.axes[0].get_xticklabels()] == ["0.1", "1"]
    (line,) = figure.axes[0].get_lines()
    assert line.get_xydata().tolist() == [[rate, pytest.approx(nll)] for rate, nll in means.items()]


@pytest.mark.parametrize("grid", [{"max_length": [None, 8]}, {"lora.target_modules": [["query"], ["query", "value"]]}])
def test_a_grid_may_be_of_no_number(grid: dict[str, Any], study: Made, tmp_path: Path) -> None:
    found = Study(study(methods=["quick"], seeds=[0], grid=grid), tmp_path / "out").run(progress=False)
    text = (tmp_path / "out" / "report" / "study.md").read_text()
    assert "| demo, demo, quick | 2 |" in text
    assert ("\n| none | " in text) == ("max_length" in grid) and "nan" not in text
    assert [name for name, _ in found.report().figures()] == ["robustness"]  # nothing has a place on an axis


def test_points_of_a_task_have_the_metrics_that_it_has() -> None:
    line = {"base": "demo", "method": "quick", "learning_rate": 0.1}
    of_classes = {"task": "classes", "accuracy": 0.5, "nll": 0.75} | line
    classes, values = points_tables(
        pd.DataFrame([of_classes, {"task": "values", "nll": 1.25} | line]), ["learning_rate"]
    )
    assert classes.rows == [["0.1", "0.500 / 0.750"]] and classes.note.startswith("accuracy / NLL;")
    assert values.rows == [["0.1", "1.250"]] and values.note.startswith("NLL;")


def test_a_setting_that_was_chosen_is_told_from_one_that_a_method_lacks() -> None:
    line = {"task": "t", "base": "b", "protocol": "chosen", "seed": 0}
    one = line | {"method": "one", "chosen_tune": "none", "chosen_epochs": math.nan}
    other = line | {"method": "other", "chosen_tune": math.nan, "chosen_epochs": 3.0}
    found = chosen_table(pd.DataFrame([one, other, other | {"seed": 1}]))
    assert (found.header, found.rows) == (
        ["", "tune", "epochs"], [["t, b, one", "none", ""], ["t, b, other", "", "3"]]
    )  # fmt: skip


def test_a_grid_without_a_result_is_reported(study: Made, tmp_path: Path) -> None:
    made = study(methods=["hungry"], seeds=[0], grid={"learning_rate": [0.1, 1.0]})
    assert "2 lines: 2 not done yet." in Study(made, tmp_path / "out").report().to_markdown()
    Study(made, tmp_path / "out").run(progress=False)
    text = (tmp_path / "out" / "report" / "study.md").read_text()
    assert "| demo, demo, hungry | 0, 2 failed |" in text
    assert "- demo, demo, hungry, 0, grid, 1.0: MemoryError" in text


def test_a_failure_where_a_setting_is_none_says_so(study: Made, tmp_path: Path) -> None:
    made = study(methods=["hungry"], seeds=[0], grid={"max_length": [None, 8]})
    text = Study(made, tmp_path / "out").run(progress=False).report().to_markdown()
    assert "- demo, demo, hungry, 0, grid, none: MemoryError" in text and "nan" not in text


def test_a_study_without_results_has_a_report(study: Made, tmp_path: Path) -> None:
    report = Study(study(), tmp_path / "out").report()
    report.save(tmp_path / "report")
    assert "4 lines: 4 not done yet." in (tmp_path / "report" / "study.md").read_text()
    assert [name for name, _ in report.figures()] == []


@pytest.mark.parametrize(
    ("difference", "low", "high", "cell"),
    [
        (-0.0004, -0.0006, -0.0002, "-0.000 (-0.001 to -0.000) ≈"),  # sure, and nothing to who reads three digits
        (0.0006, 0.0002, 0.0009, "+0.001 (0.000 to 0.001)"),
        (0.01, -0.01, 0.03, "+0.010 (-0.010 to 0.030) ≈"),
    ],
)
def test_a_difference_is_marked_that_is_none_by_chance_or_by_its_digits(
    difference: float, low: float, high: float, cell: str
) -> None:
    line = {"task": "t", "base": "b", "protocol": "same", "metric": "nll", "seeds": 1, "value": 0.5}
    ends = {f"{name}_{end}": math.nan for name in ("rows", "seeds", "difference_seeds") for end in ("low", "high")}
    found = {
        "difference": difference,
        "difference_rows_low": low,
        "difference_rows_high": high,
        "chance": low < 0 < high,
    }
    summary = pd.DataFrame([line | ends | {"method": "ref"}, line | ends | found | {"method": "other"}])
    _, differences = quality_tables(summary, "ref", {})
    assert differences.rows == [["other", cell]]


def test_signs_of_latex_are_text() -> None:
    table = Table("50 % & more", ["a_b", "c"], [["x", "+0.1 ≈"]])
    text = table.to_latex()
    assert r"50 \% \& more" in text and r"a\_b & c \\" in text and r"+0.1 $\approx$ \\" in text
    assert "| a_b | c |\n|---|---:|\n| x | +0.1 ≈ |" in table.to_markdown()
    odd = Table("odd", [r"10^{-2} $ ~ \a", "c"], [["p(a|b)", "1"]])
    assert r"10\textasciicircum{}\{-2\} \$ \textasciitilde{} \textbackslash{}a & c" in odd.to_latex()
    assert r"| p(a\|b) | 1 |" in odd.to_markdown() and r"p(a\textbar{}b) & 1" in odd.to_latex()


@pytest.mark.parametrize("shown", ["ignore", "always"])
def test_what_fits_warn_of_stands_below_the_tables(shown: str, study: Made, tmp_path: Path) -> None:
    methods = {"quick": {}, "doubtful": {}, "around": {"backend": "quick", "start": "doubtful"}}
    found = Study(study(methods=methods, seeds=[0, 1, 3]), tmp_path / "out")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(shown)
        found.run(progress=False)
    texts = [str(each.message) for each in caught if "nats" in str(each.message)]
    assert bool(texts) == (shown == "always")  # kept whatever is shown, and shown as it would be
    frame = found.frame().set_index(["method", "seed"])
    assert frame["warnings"]["doubtful", 3] == "It ends at 3.5 nats |, which is no mode."
    assert frame["warnings"]["around", 3] == frame["warnings"]["doubtful", 3]
    assert frame["warnings"]["doubtful", 0] == frame["warnings"]["quick", 3] == ""
    text = (tmp_path / "out" / "report" / "study.md").read_text()
    assert "| quick | 3 |" in text and "| doubtful [1] | 3 |" in text and "| around [2] | 3 |" in text
    assert (
        "| [1] | demo, demo, doubtful | same | 2 of 3 | 1, 3 | It ends at 1.5 / 3.5 nats /, which is no mode." in text
    )
    assert text.count("It ends at") == 2 and "others" not in text
    before = {path: path.read_text() for path in (tmp_path / "out" / "report").glob("*.md")}
    Study(found.source, tmp_path / "out").run(progress=False)  # from the cells alone
    assert {path: path.read_text() for path in before} == before


def test_a_warning_has_the_figures_of_each_of_a_few_fits() -> None:
    said = "It ends at {} nats, and by chance at {}. See 20 rows."
    for ends, shown in (
        ([-1.009, -1.218], "It ends at -1.009 / -1.218 nats, and by chance at -2.009 / -2.218. See 20 rows."),
        ([1.5, 1.5, 2], "It ends at 1.5 / 2 nats, and by chance at 0.5 / 1. See 20 rows."),
        ([1, 2, 3, 4], "It ends at 1 / 2 / 3 / ... nats, and by chance at 0 / 1 / 2 / .... See 20 rows."),
    ):
        rows = [
            {"seed": seed, "warnings": said.format(end, round(end - 1, 3)), "state": "done"}
            for seed, end in enumerate(ends)
        ]
        frame = pd.DataFrame(rows).assign(task="t", base="b", protocol="same", method="m")
        (row,) = warnings_table(frame, notes_of(frame)).rows
        seeds = ", ".join(map(str, range(len(ends))))
        assert row == ["[1]", "t, b, m", "same", f"{len(ends)} of {len(ends)}", seeds, shown]


def test_points_of_a_grid_bear_warnings(study: Made, tmp_path: Path) -> None:
    made = study(methods=["doubtful"], seeds=[1], grid={"learning_rate": [0.1, 1.0]})
    text = Study(made, tmp_path / "out").run(progress=False).report().to_markdown()
    assert "| demo, demo, doubtful [1] | 2 |" in text and "| [1] | demo, demo, doubtful | grid | 2 of 2 | 1 |" in text


@pytest.mark.filterwarnings("ignore:The 20 held-out rows have no best temperature")
def test_rows_that_a_method_chose_something_on_are_named(study: Made, tmp_path: Path) -> None:
    """All of them, or some."""
    methods = {"quick": {}, "tempered": {"backend": "temperature", "start": "quick"}}
    for rows in (None, 7):
        evaluation = {"split": "heldout", "draws": 2, "rows": rows}
        made = study(methods=methods, seeds=[0], evaluation=evaluation)
        text = Study(made, tmp_path / "out").run(progress=False).report().to_markdown()
        assert "| tempered [1] | 1 |" in text and "| quick | 1 |" in text
        assert "| [1] | demo, demo, tempered | same | 1 of 1 | 0 | On the rows of 'heldout' the fit chose" in text
    made = study(methods=methods, seeds=[0], evaluation={"split": "train", "draws": 2})
    assert "the fit chose" not in Study(made, tmp_path / "out").run(progress=False).report().to_markdown()


def test_a_line_none_of_whose_trials_has_a_finite_nll_is_told_of(study: Made, tmp_path: Path) -> None:
    made = study(methods=["quick"], seeds=[0], tuning={"values": {"learning_rate": [0.1, 0.01]}})
    done = Study(made, tmp_path / "out").run(progress=False)
    for trial in (trial for target in done.targets for trial in target.trials):
        place = done.results.evaluation(trial.cell, trial.evaluations[""])
        found = json.loads(place.read_text())
        found["metrics"]["nll"]["value"] = "Infinity"
        place.write_text(json.dumps(found))
    report = Study(made, tmp_path / "out").report()
    assert list(report.failures["protocol"]) == ["chosen"]
    assert "quick, 0, chosen: No trial has a finite NLL" in report.to_markdown()
