"""Shifts of a study that cannot be predicted, before its fits and after them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call
from scenarios import write_rows

from bayeslora.app.runs import saved_task
from bayeslora.app.studies import Study
from bayeslora.errors import DataError, TaskError

Made = Callable[..., dict[str, Any]]


def shifted(study: Made, folder: Path, **shift: Any) -> dict[str, Any]:
    tasks = {"demo": {"task": str(folder / "rows.jsonl"), "shift": {"others": {"split": "train", **shift}}}}
    return study(tasks=tasks, methods=["quick"], seeds=[0])


def lost(posterior: Any, name: str | None = None, *given: Any) -> Any:
    """In place of `saved_task`: the rows of other tasks are gone."""
    if name is not None:
        raise DataError("There is no file")
    return saved_task(posterior, name, *given)


def test_a_shift_that_cannot_be_predicted_ends_the_study_before_its_fits(
    study: Made, tmp_path: Path, plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "three.jsonl", [{"text": f"soup {n}", "label": f"class {n % 3}"} for n in range(9)])
    wrong = {
        "lost.jsonl": (DataError, r"There is no file .*lost\.jsonl"),
        "three.jsonl": (TaskError, "Task 'three' is classification into"),
    }
    for name, (error, said) in wrong.items():
        with pytest.raises(error, match=said):
            Study(shifted(study, tmp_path, task=str(tmp_path / name)), tmp_path / "out").run(progress=False)
    with pytest.raises(TaskError, match="Unknown split of task 'rows' 'tset'"):
        made = shifted(study, tmp_path, task=str(tmp_path / "rows.jsonl"), split="tset")
        Study(made, tmp_path / "out").run(progress=False)
    made = shifted(study, tmp_path, task=str(tmp_path / "lost.jsonl"))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(made))
    assert call("compare", tmp_path / "study.yaml", "--output", tmp_path / "out", "--plugin", plugin, "--dry-run") == 2
    assert "There is no file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_shift_in_another_folder_is_looked_at_there(study: Made, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    made = shifted(study, tmp_path, data_dir=str(tmp_path / "there"))
    with pytest.raises(DataError, match="there"):
        Study(made, tmp_path / "out").run(progress=False)
    assert not (tmp_path / "out").exists()


def test_a_shift_that_is_new_is_predicted_though_another_one_failed(
    study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shifted(study, tmp_path, task=str(tmp_path / "rows.jsonl"))

    with monkeypatch.context() as patch:
        patch.setattr("bayeslora.app.runs.saved_task", lost)
        Study(made, tmp_path / "out").run(progress=False)
    made["tasks"]["demo"]["shift"]["new"] = {"split": "train"}
    found = Study(made, tmp_path / "out").run(progress=False)
    assert set(found.report().parts["shift"]["shift"]) >= {"new"}


def test_a_shift_that_fails_leaves_the_line_its_own_result(
    study: Made, tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shifted(study, tmp_path, task=str(tmp_path / "rows.jsonl"))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(made))
    words = ["compare", tmp_path / "study.yaml", "--output", tmp_path / "out", "--plugin", plugin]

    with monkeypatch.context() as patch:
        patch.setattr("bayeslora.app.runs.saved_task", lost)
        assert call(*words) == 1
    report = Study(made, tmp_path / "out").report()
    assert list(report.frame["state"]) == ["done"] and set(report.parts["summary"]["method"]) == {"quick"}
    assert "shift" not in report.parts and set(report.parts["detection"]["detected"]) == {"mistakes"}
    text = report.to_markdown()
    assert "- demo, demo, quick, 0, same: DataError: There is no file (shift 'others')" in text
    assert call(*words) == 1 and call(*words, "--retry") == 0
    assert len(Study(made, tmp_path / "out").report().parts["shift"]) == 1
