from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayeslora.app.studies import Study
from bayeslora.app.studies.inputs import changes, fingerprints
from bayeslora.demo import MODEL_PATH
from bayeslora.registry import load_file

Made = Callable[..., dict[str, Any]]
Lines = Callable[[], list[str]]
#: A file of a user's own.
WIDER = """
from dataclasses import dataclass, replace
from typing import ClassVar

import bayeslora as bl
from backends import Quick

@bl.register
@dataclass(frozen=True)
class Wider(Quick):
    name: ClassVar[str] = "wider"

    def fit(self, program, data, run):
        return replace(self, learning_rate=0.5)._fit(program, data, run)

    _fit = Quick.fit
"""


def run(study: dict[str, Any], folder: Path) -> Study:
    return Study(study, folder).run(progress=False)


def test_changed_rows_are_warned_of_and_what_is_done_stays(study: Made, tmp_path: Path, fits: Lines) -> None:
    made = study(methods=["quick"], seeds=[0])
    found = run(made, tmp_path / "out")
    assert not changes(found.targets, found.results)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("cold soup", "hot soup"))
    with pytest.warns(UserWarning, match="Files have changed since .*rows.jsonl.* remove rows-quick"):
        run(made, tmp_path / "out")
    assert len(fits()) == 1
    assert "Files have changed since" in (tmp_path / "out" / "report" / "study.md").read_text()


def test_what_is_not_known_is_not_said(study: Made, tmp_path: Path) -> None:
    found = run(study(methods=["quick"], seeds=[0]), tmp_path / "out")
    rows = tmp_path / "rows.jsonl"
    text = rows.read_text()
    rows.unlink()
    assert not changes(found.targets, found.results)
    rows.write_text(text.replace("cold soup", "hot soup"))
    assert changes(found.targets, found.results)
    folder = found.results.at(found.cells[0])  # of a time when there were no digests
    for kept in (folder / "cell.json", *(folder / "evaluations").glob("*.json")):
        known = json.loads(kept.read_text())
        kept.write_text(json.dumps({name: each for name, each in known.items() if name != "files"}))
    assert not changes(found.targets, found.results)


def test_files_are_those_of_the_task_alone_and_of_the_network(study: Made, tmp_path: Path) -> None:
    made = study(methods=["quick"], seeds=[0])
    rows = (tmp_path / "rows.jsonl").read_text()
    for name in ("mine", "other"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "train.jsonl").write_text(rows)
    task = {"task": "mine", "data_dir": str(tmp_path / "data")}
    made |= {"tasks": {"mine": task}, "bases": {"small": {"base": str(MODEL_PATH)}}}
    (cell,) = Study(made).cells
    found = {Path(each) for each in fingerprints(cell.config)}
    assert {each for each in found if each.is_relative_to(tmp_path)} == {tmp_path / "data" / "mine" / "train.jsonl"}
    assert MODEL_PATH / "config.json" in found and MODEL_PATH / "model.safetensors" in found


def test_a_changed_plug_in_is_warned_of(study: Made, tmp_path: Path) -> None:
    """Of what it was when it was imported: a fit is made with that, whatever is in the file by then."""
    own = tmp_path / "wider.py"
    own.write_text(WIDER)
    load_file(own)
    before = own.read_text()
    own.write_text(before.replace("0.5", "5.0"))
    found = run(study(methods=["wider"], seeds=[0]), tmp_path / "out")
    assert "wider.py" in changes(found.targets, found.results)
    own.write_text(before)
    assert not changes(found.targets, found.results)
    del sys.modules["wider"]
    own.write_text(before.replace("0.5", "5.0"))
    load_file(own)
    with pytest.warns(UserWarning, match="Files have changed since .*wider.py.* remove rows-wider"):
        again = run(found.source, tmp_path / "out")
    assert [each.name for each in again.cells] == [each.name for each in found.cells]


def test_changed_rows_of_a_shift_are_warned_of(study: Made, tmp_path: Path, fits: Lines) -> None:
    others = tmp_path / "others.jsonl"
    others.write_text((tmp_path / "rows.jsonl").read_text())
    shift = {"others": {"task": str(others), "split": "train"}}
    tasks = {"demo": {"task": str(tmp_path / "rows.jsonl"), "shift": shift}}
    found = run(study(tasks=tasks, methods=["quick"], seeds=[0]), tmp_path / "out")
    assert not changes(found.targets, found.results)
    others.write_text("".join(line + "\n" for line in others.read_text().splitlines()[:8]))
    said = changes(found.targets, found.results)
    (place,) = re.findall(r"others.jsonl. To have them made anew, remove (\S+) in ", said)
    assert place.startswith("rows-quick-seed0-") and "rows.jsonl" not in said
    with pytest.warns(UserWarning, match="Files have changed since"):
        run(found.source, tmp_path / "out")
    (tmp_path / "out" / "cells" / place).unlink()
    again = run(found.source, tmp_path / "out")
    assert list(again.report().parts["shift"]["rows"]) == [8] and len(fits()) == 1
    assert not changes(again.targets, again.results)


def test_a_fit_that_was_stopped_does_not_go_on_with_other_files(study: Made, tmp_path: Path) -> None:
    made = study(methods=["quick"], seeds=[0])
    found = run(made, tmp_path / "out")
    folder = found.results.at(found.cells[0])
    (folder / "cell.json").unlink()  # as if it had been killed before its end
    shutil.rmtree(folder / "evaluations")
    record = folder / "posterior" / "posterior.json"
    described = json.loads(record.read_text())
    described["record"]["finished"] = False
    record.write_text(json.dumps(described))
    rows = tmp_path / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("cold soup", "hot soup"))
    (error,) = run(made, tmp_path / "out").frame()["error"]
    assert f"Files have changed since this fit was begun: {rows}" in error and f"remove the folder '{folder}'" in error
    assert "--output" not in error
    shutil.copytree(tmp_path / "out", tmp_path / "back")
    rows.write_text(before)
    back = Study(made, tmp_path / "back").run(retry=True, progress=False)
    assert list(back.frame()["state"]) == ["done"]
    rows.write_text(before.replace("cold soup", "hot soup"))
    shutil.rmtree(folder)
    anew = run(made, tmp_path / "out")
    assert list(anew.frame()["state"]) == ["done"] and not changes(anew.targets, anew.results)
