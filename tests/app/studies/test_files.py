"""The studies of this repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bayeslora.app.studies import Study
from bayeslora.tasks.spec import find_task

FOLDER = Path(__file__).parents[3] / "benchmarks" / "studies"


@pytest.mark.parametrize(("name", "lines"), [("tiny", 5), ("methods", 18 * 2), ("robustness", 7 * 12)])
def test_the_studies_of_this_repository_are_right(name: str, lines: int) -> None:
    source = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert all(find_task(task["task"] if "task" in task else key) for key, task in source["tasks"].items())
    one = {**source, "seeds": [0], "tasks": dict(list(source["tasks"].items())[:1])}
    targets = Study(one).targets
    assert len(targets) == lines
    for target in targets:
        assert len(target.candidates) == (6 if target.protocol == "chosen" else 1), target.title
