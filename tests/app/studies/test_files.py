"""The studies of this repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bayeslora.app.studies import Study
from bayeslora.tasks.spec import find_task

FOLDER = Path(__file__).parents[3] / "benchmarks" / "studies"


#: Lines of the tables of one task with one seed.
LINES = {"tiny": 5, "methods": 18 * 2, "little": 17, "defaults": 5, "robustness": 8 * 12, "epochs": 7 * 4}
LINES |= {
    "language": 2 * 6,
    "answers": 4,
    "own_settings": 5 * 2,
    "smollm2": 17,
    "settings": 20,
    "rates": 6 * 4,
    "mrpc-rates": 3 * 5,
    "learning_rates": 3 * 5,
    "without_heldout": 5,
}


def test_every_study_is_looked_at() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(LINES)


@pytest.mark.parametrize(("name", "lines"), LINES.items())
def test_the_studies_of_this_repository_are_right(name: str, lines: int) -> None:
    source = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert all(find_task(task["task"] if "task" in task else key) for key, task in source["tasks"].items())
    one = {**source, "seeds": [0], "tasks": dict(list(source["tasks"].items())[:1])}
    study = Study(one)
    assert len(study.targets) == lines
    for target in study.targets:
        trials = study.file.tuning.trials if target.protocol == "chosen" and study.file.tuning else 1
        assert len(target.candidates) == trials, target.title


@pytest.mark.parametrize("name", ["settings", "rates", "mrpc-rates"])
def test_every_line_of_a_study_of_settings_is_a_fit_of_its_own(name: str) -> None:
    study = Study(FOLDER / f"{name}.yaml")
    assert len({target.candidates[0].entry.cell.name for target in study.targets}) == len(study.targets)


def test_the_study_of_settings_changes_one_at_a_time() -> None:
    targets = Study(FOLDER / "settings.yaml").targets
    configs = {target.method: target.candidates[0].entry.cell.config for target in targets}
    first = configs["SVI"]
    assert (first.settings["prior_mean"], first.settings["noise_warmup"], first.model_settings["scale"]) == (
        "model",
        0,
        1.5,
    )
    changed = {name: each for name, each in configs.items() if each.backend == "svi" and each.model == "monteclora"}
    several = {
        "scale 3, eps 1/3": 2,
        "four draws a step": 2,
        "learned eps from 0.1": 2,
        "learned eps from 0.1, KL warm-up": 3,
    }
    for name, each in changed.items():
        ours, theirs = ({**config.settings, **config.model_settings} for config in (each, first))
        number = sum(ours[key] != theirs[key] for key in theirs)
        assert number == (0 if name == "SVI" else several.get(name, 1)), name
    assert all(target.candidates[0].entry.evaluations[""].split == "heldout" for target in targets)
