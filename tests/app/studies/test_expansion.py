from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayeslora.app.studies import Study
from bayeslora.app.studies.expansion import expand
from bayeslora.app.studies.file import StudyFile
from bayeslora.errors import SettingError

Made = Callable[..., dict[str, Any]]


def names(study: dict[str, Any]) -> list[str]:
    return [cell.name for cell in Study(study).cells]


def test_equal_fits_are_one_cell_whatever_they_are_called(study: Made) -> None:
    plain = names(study())
    assert len(plain) == 4  # two methods, two seeds
    methods = {"quick": {}, "again": {"backend": "quick"}, "mean": {"backend": "quick", "predict": "mean"}}
    assert names(study(methods=methods)) == [plain[0], plain[2]]


def test_an_address_is_of_all_that_a_fit_depends_on(study: Made) -> None:
    plain = set(names(study()))
    same = {"train_size": 12, "heldout_size": 20, "lora": {"r": 8, "alpha": 16}, "max_length": None}
    logged = study()["common"]["settings"]
    assert set(names(study(common=same | {"settings": logged | {"epochs": 1.0}}))) == plain  # said, but as by default
    assert set(names(study(evaluation={"split": "validation"}))) == plain
    for changed in ({"train_size": 13}, {"heldout_size": 21}, {"lora": {"r": 4}}, {"max_length": 8}, {"chains": 2}):
        assert not plain & set(names(study(common=same | {"settings": logged} | changed))), changed


def test_a_file_has_one_address_however_its_path_is_spelled(
    study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for folder in ("one", "two"):
        (tmp_path / folder / "rows").mkdir(parents=True)
        (tmp_path / folder / "own.csv").write_text("text,label\na,0\n")
        monkeypatch.chdir(tmp_path / folder)
        spelled = ("own.csv", "./own.csv", f"../{folder}/own.csv", str(tmp_path / folder / "own.csv"))
        shifts = [{"demo": {"shift": {"a": {"task": task}}}} for task in spelled]
        entries = [
            Study(study(tasks=each, methods=["quick"], seeds=[0])).targets[0].candidates[0].entry for each in shifts
        ]
        (found[folder],) = {tuple(names(study(tasks=[task], methods=["quick"], seeds=[0]))) for task in spelled}
        (found[folder, "shift"],) = {each.evaluations["a"].name for each in entries}
        assert found[folder][0].startswith("own-quick-")
        assert names(study(tasks=["rows"], methods=["quick"], seeds=[0]))[0].startswith("rows-quick-")
    assert len(set(found.values())) == 4  # other data in another folder


def test_a_task_in_a_folder_that_is_given_stays_a_name_in_it(
    study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reviews").mkdir()
    monkeypatch.chdir(tmp_path)
    shift = {"a": {"task": "reviews", "data_dir": "."}}
    made = study(tasks={"reviews": {"data_dir": ".", "shift": shift}}, methods=["quick"], seeds=[0])
    entry = Study(made).targets[0].candidates[0].entry
    for found in (entry.cell.config, entry.evaluations["a"]):
        assert (found.task, found.data_dir) == ("reviews", str(tmp_path))


def test_entries_go_over_each_other_and_points_over_all(study: Made) -> None:
    found = expand(
        StudyFile.from_dict(
            study(
                tasks={"demo": {"settings": {"epochs": 3}, "max_length": 9}},
                bases={"small": {"base": "demo", "settings": {"epochs": 2, "learning_rate": 0.5}, "max_length": 8}},
                common={"settings": {"epochs": 1}, "max_length": 7},
                grid={"lora.r": [2, 4], "seconds": ["1e-3", 2]},
                seeds=[1],
            )
        )
    )
    assert [target.title for target in found[:2]] == [
        "demo, small, quick, seed 1, lora.r=2, seconds=1e-3", "demo, small, wide, seed 1, lora.r=2, seconds=1e-3"
    ]  # fmt: skip
    (first,), (second,) = found[0].candidates, found[1].candidates
    config = first.entry.cell.config
    assert config.settings | {"log": ""} == {"learning_rate": 0.5, "epochs": 3.0, "seconds": 0.001, "log": ""}
    assert (config.max_length, config.lora.r) == (9, 2)
    assert second.entry.cell.config.settings["learning_rate"] == 0.1  # the method's own
    assert len(found) == 2 * 4


def test_shared_settings_go_to_those_that_have_them(study: Made) -> None:
    methods = {"quick": {}, "map": {}}
    shared = {"settings": {"seconds": 2.0, "max_grad_norm": 0.5}, "model_settings": {"components": 5}}
    quick, point = Study(study(methods=methods, seeds=[0], common=shared)).cells
    assert quick.config.settings["seconds"] == 2.0 and point.config.settings["max_grad_norm"] == 0.5
    assert point.config.model_settings["components"] == 5 and "components" not in quick.config.model_settings


def test_presets_are_methods(study: Made) -> None:
    (cell,) = Study(study(methods=["ivon-lora"], seeds=[0], common={"settings": {"epochs": 2}})).cells
    assert cell.config.backend == "ivon" and cell.config.preset is None
    assert cell.config.settings["epochs"] == 2.0 and cell.config.settings["clip_radius"] == 1e-3


def test_a_start_is_the_cell_of_that_method(study: Made) -> None:
    methods = {"quick": {}, "around": {"backend": "quick", "start": "quick"}}
    first, around = Study(study(methods=methods, seeds=[0])).cells
    assert around.start is first and around.chain == (first, around)
    assert around.name != first.name  # though its own settings are the same
    other = Study(study(methods=methods | {"quick": {"settings": {"epochs": 2}}}, seeds=[0])).cells[1]
    assert other.name != around.name


def test_trials_are_as_many_for_each_method(study: Made) -> None:
    tuning = {"trials": 3, "values": {"learning_rate": [0.1, 0.2], "epochs": [1, 2]}}
    found = [each for each in expand(StudyFile.from_dict(study(tuning=tuning))) if each.protocol == "chosen"]
    assert [len(target.candidates) for target in found] == [3] * 4
    assert len({str(target.candidates[0].point) for target in found}) == 1  # drawn by the study's seed
    first, later = found[0], found[2]
    assert (first.seed, later.seed) == (0, 3)
    assert first.trials == later.trials  # with the first seed alone
    for candidate in first.candidates:
        assert candidate.trial is not None
        assert candidate.trial.cell is candidate.entry.cell  # no fit of its own
        assert candidate.trial.evaluations[""].split == "heldout"
    own = {"quick": {"tuning": {"learning_rate": [7.0]}}}
    found = expand(StudyFile.from_dict(study(tuning=tuning, methods=own)))
    assert {each.point["learning_rate"] for each in found[-1].candidates} == {7.0}


def test_rows_of_other_tasks_are_evaluated_beside(study: Made) -> None:
    shift = {"hard": {"split": "test"}, "other": "mrpc"}
    tasks = {"demo": {"shift": shift, "split": "train"}}
    (target,) = expand(StudyFile.from_dict(study(tasks=tasks, methods=["quick"], seeds=[0])))
    found = target.candidates[0].entry.evaluations
    assert {name: (each.task, each.split, each.draws) for name, each in found.items()} == {
        "": (None, "train", 2), "hard": (None, "test", 2), "other": ("mrpc", "validation", 2)
    }  # fmt: skip
    assert len({each.name for each in found.values()}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": None}, "A study needs tasks, as a list such as .* found None"),
        ({"methods": {"quik": {}}}, "Unknown backend 'quik'. Did you mean 'quick'"),
        ({"methods": {"a": {"backend": "quick", "setings": {}}}}, "field of 'a' in a study's methods 'setings'. Did"),
        ({"methods": {"quick": {"settings": {"epoch": 1}}}}, "Unknown setting of quick 'epoch'"),
        ({"methods": {"quick": {"start": "qick"}}}, "Unknown start of method 'quick' 'qick'. Did you mean 'quick'"),
        ({"methods": {"quick": {"start": "quick"}}}, "start from each other: quick from quick"),
        ({"methods": {"quick": 3}}, "'quick' among the methods of a study is 3"),
        ({"seeds": [1, 1]}, "A seed is given twice: 1, 1"),
        ({"seeds": []}, "a study: seeds .*at least 1 item"),
        ({"seeds": ["a"]}, "a study: seeds"),
        ({"sedes": [1]}, "Unknown setting of a study 'sedes'. Did you mean 'seeds'"),
        ({"reference": "mle"}, "Unknown reference of a study 'mle'"),
        ({"grid": {"epochs": []}}, r"The grid of a study has \[\] for 'epochs', expected a list of values"),
        ({"grid": {"epochs": [1, 2, 1]}}, "The grid of a study has a value of 'epochs' twice: 1, 2, 1"),
        ({"grid": {"seed": [1, 2]}}, r"The grid of a study varies 'seed': seeds are the study's own \(seeds: "),
        ({"grid": {"backend": ["mle", "map"]}}, "The grid of a study varies 'backend': .* backends are methods"),
        ({"grid": {"settings": [1]}}, "The grid of a study varies 'settings': .* vary by their own names"),
        ({"grid": {"epoch": [1]}}, "Unknown setting of any method of the study 'epoch'"),
        ({"tuning": {}}, "tuning needs values"),
        ({"tuning": {"values": {"seed": [1, 2]}}}, "The tuning of a study varies 'seed'"),
        ({"methods": {"quick": {"tuning": {"epochs": [1, 2]}}}}, "'quick' has values of its own .* chooses none"),
        *(
            ({"tuning": {"values": {"epochs": [1, 2]}}, "methods": {"quick": {"tuning": own}}}, message)
            for own, message in (
                (["a"], r"The tuning of method 'quick' is \['a'\], expected lists of values by the names"),
                ({"epochs": 3}, "The tuning of method 'quick' has 3 for 'epochs', expected a list of values"),
                ({"guide": "low-rank"}, "The tuning of method 'quick' has 'low-rank' for 'guide', expected a list"),
            )
        ),
        ({"tuning": {"values": {"epochs": [1]}}, "grid": {"epochs": [1]}}, "has a grid, .* or tuning: give only one"),
        ({"evaluation": {"rows": 0}}, "evaluation: rows"),
        ({"tasks": {"demo": {"rows": 0}}}, "evaluation: rows"),
        ({"tasks": {"demo": {"rows": "some"}}}, "evaluation: rows"),
        ({"evaluation": {"drawz": 3}}, "Unknown setting of evaluation 'drawz'. Did you mean 'draws'"),
        ({"common": {"seed": 3}}, "Unknown field of 'common' in a study's common 'seed'"),
        ({"common": {"settings": None}}, "'settings' of 'common' in a study's common is None, expected key: value"),
        ({"methods": {"quick": {"draws": "many"}}}, "evaluation: draws .* found 'many'"),
        ({"methods": {"quick": {"draws": 2.7}}}, "evaluation: draws .* found 2.7"),
        ({"methods": {"quick": {"draws": 0}}}, "evaluation: draws .* found 0"),
        ({"tasks": {"demo": {"split": 3}}}, "evaluation: split .* found 3"),
        ({"tasks": {"demo": {"shift": ["test"]}}}, r"The shift of task 'demo' is \['test'\], expected name: rows"),
        ({"tasks": {"demo": {"shift": {"": "mrpc"}}}}, "A shift of task 'demo' has no name"),
        (
            {"tasks": {"demo": {"shift": {"a": {"task_settings": {"text": "b"}}}}}},
            r"The shift 'a' has task_settings, which are of another task: name it \(task: ...\)",
        ),
        ({"tasks": {"demo": {"shift": {"a": None}}}}, "The shift 'a' is None, expected a task, or key: value lines"),
        ({"tasks": {"demo": {"shift": {"a": {"spilt": "test"}}}}}, "of a shift 'spilt'. Did you mean 'split'"),
        ({"tasks": {"demo": {"shift": {"a": {"task": "rte", "task_settings": {"txt": "b"}}}}}}, "of a task 'txt'. Did"),
        ({"tasks": {"demo": {"shift": {"a": {"data_dir": "nowhere"}}}}}, "There is no data folder 'nowhere'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(changes: dict[str, Any], message: str, study: Made) -> None:
    with pytest.raises(SettingError, match=message):
        expand(StudyFile.from_dict(study(**changes)))


def test_what_is_shared_goes_to_the_backend_that_another_one_is_over(study: Made) -> None:
    methods = {"ensemble": {"settings": {"of": "quick", "members": 2}}, "map": {"lora": "dora"}}
    grid = {"epochs": [3]}
    shared = {"settings": {"seconds": 2.0, "max_grad_norm": 0.5}, "lora": {"r": 4}}
    over, plain = Study(study(methods=methods, seeds=[0], common=shared, grid=grid)).cells
    assert over.config.settings["of_settings"] | {"log": ""} == {
        "learning_rate": 1e-3, "epochs": 3.0, "seconds": 2.0, "log": ""
    }  # fmt: skip
    assert plain.config.settings["max_grad_norm"] == 0.5 and plain.config.lora.method == "dora"
    assert (over.config.lora.r, plain.config.lora.r) == (4, 4)


def test_a_method_has_the_candidates_of_its_start(study: Made) -> None:
    methods = {
        "quick": {"tuning": {"learning_rate": [7.0, 8.0]}},
        "tempered": {"backend": "temperature", "start": "quick"},
        "around": {"backend": "quick", "start": "quick", "tuning": {"epochs": [3]}},
    }
    tuning = {"values": {"learning_rate": [0.1], "epochs": [1, 2]}}
    found = expand(StudyFile.from_dict(study(methods=methods, tuning=tuning, seeds=[0])))
    tried = {target.method: {tuple(each.point.values()) for each in target.candidates} for target in found[-3:]}
    assert tried["quick"] == tried["tempered"] == {(7.0, 1), (7.0, 2), (8.0, 1), (8.0, 2)}
    assert tried["around"] == {(7.0, 3), (8.0, 3)}


def test_a_point_may_be_a_list(study: Made) -> None:
    grid = {"lora.target_modules": [["query"], ["query", "value"]]}
    found = expand(StudyFile.from_dict(study(methods=["quick"], seeds=[0], grid=grid)))
    modules = [each.candidates[0].entry.cell.config.lora.target_modules for each in found]
    assert modules == ["query", ("query", "value")]
