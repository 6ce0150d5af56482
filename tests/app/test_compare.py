"""What `bayeslora compare` does: flags and files of studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import FIT, QUICK, call

from bayeslora import inference
from bayeslora.app.commands.compare import _by_backend
from bayeslora.errors import SettingError


def test_compare_twice_is_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compare",
        *FIT[1:5],
        *FIT[7:],
        *QUICK,
        "--backends",
        "map,svi",
        "--seeds",
        "0",
        "--set",
        "svi.particles=2",
    ]
    command = [*arguments, "--split", "heldout", "--draws", "2", "--output", tmp_path / "out"]
    assert call(*command) == 0
    shown = capsys.readouterr().out
    assert "NLL" in shown and "svi" in shown and "KL from truth" in shown
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cells", "report"]
    text = (out / "report" / "study.md").read_text()
    assert "Ranks" not in text  # of one task they say nothing
    assert text.startswith("# out\n") and "\n| svi" in text and "; less map" in text
    settings = {}
    for place in (out / "cells").glob("*/posterior/posterior.json"):
        record = json.loads(place.read_text())["record"]
        settings[record["backend"]] = record["settings"]
    assert settings["svi"]["particles"] == 2 and settings["svi"]["batch_size"] == settings["map"]["batch_size"] == 16
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")}
    assert call(*command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")}


def test_flags_are_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fits as those of its file, by their addresses."""
    from bayeslora.app.studies import Study

    seen: list[Study] = []
    monkeypatch.setattr(Study, "run", lambda self, **_: seen.append(self))
    words = ["--task", "demo", "--base", "demo", "--backends", "mle,svi", "--seeds", "0,3", "--train-size", "16"]
    words += ["--split", "test", "--draws", "3", "--method", "mean", "--set", "epochs=2", "--set", "svi.particles=2"]
    words += ["--set", "lora.r=4", "--set", "svi.model.components=2"]
    assert call("compare", *words, "--output", tmp_path / "out") == 0
    study = {
        "tasks": ["demo"], "bases": ["demo"], "seeds": [0, 3],
        "methods": {
            "mle": {"predict": "mean"},
            "svi": {"settings": {"particles": 2}, "model_settings": {"components": 2}, "predict": "mean"},
        },
        "common": {"train_size": 16, "lora": {"r": 4}, "settings": {"epochs": 2}},
        "evaluation": {"split": "test", "draws": 3},
    }  # fmt: skip
    assert seen[0].targets == Study(study).targets and len(seen[0].targets) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--backends map --split tset", "Unknown split of task 'demo' 'tset'. Did you mean 'test'"),
        ("--backends map,svy", "Unknown backend 'svy'. Did you mean 'svi'"),
        ("--backends map --seeds 0,0", "A seed is given twice: 0, 0"),
        ("--backends map,map", "A backend is given twice: map, map"),
        ("--backends map --set particles=2", "Unknown setting of any method of the study 'particles'"),
        ("--backends map --set map.particles=2", "Unknown setting of map 'particles'"),
        ("--backends map --seeds=", "seeds"),
        ("--backends map --task lost.csv", "There is no file lost.csv"),
        ("--backends map --train-size -1", "train_size, a number of rows, should be greater"),
        ("--backends map --set seed=3", "'seed=3' is said by a flag of its own: give --seeds."),
        ("--backends map --set map.backend=svi", "'map.backend=svi' is said by a flag of its own: give --backends."),
        ("--backends map --set map.base=demo", "give --base."),
    ],
)
def test_mistakes_of_a_comparison_are_found_before_anything_is_fitted(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["compare", "--base", "demo", "--task", "demo", "--train-size", "16", "--output", tmp_path / "out"]
    assert call(*begin, *words.split()) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_comparison_in_which_a_fit_fails_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(inference.BACKENDS["map"], "fit", fail)
    begin = ["compare", "--base", "demo", "--task", "demo", "--train-size", "16", "--output", tmp_path / "out"]
    assert call(*begin, "--backends", "map,mle", "--seeds", "0", "--draws", "2", "--set", "epochs=1") == 1
    told = capsys.readouterr()
    assert "demo, demo, map, seed 0: failed: MemoryError: no room" in told.err
    assert "1 of 2 lines failed, see study.md; --retry tries them again." in told.err and "mle" in told.out


def test_flags_of_running_reach_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayeslora.app.studies import Study

    seen: dict[str, Any] = {}
    monkeypatch.setattr(Study, "run", lambda self, **how: seen.update(how))
    words = ["--base", "demo", "--task", "demo", "--backends", "map", "--output", tmp_path / "out", "--workers", "2"]
    assert call("compare", *words, "--launcher", "ray", "--option", "a=1", "--shard", "1/2", "--retry") == 0
    told = {"workers": 2, "launcher": "ray", "options": {"a": "1"}, "shard": (1, 2), "retry": True}
    assert seen.items() >= told.items()


@pytest.mark.parametrize("file", ["", ".", "/"])
def test_a_folder_is_no_study(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", file) == 2
    assert "Cannot read the study" in capsys.readouterr().err


def test_a_base_in_this_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayeslora.app.studies import Study

    seen: list[Study] = []
    monkeypatch.setattr(Study, "run", lambda self, **_: seen.append(self))
    monkeypatch.chdir(tmp_path)
    assert call("compare", "--base", ".", "--task", "demo", "--backends", "map", "--output", tmp_path / "out") == 0
    assert {target.base for target in seen[0].targets} == {"."}
    assert seen[0].cells[0].config.base == str(tmp_path)


def test_settings_of_one_backend_go_to_it_alone() -> None:
    shared, own = _by_backend(["epochs=1", "svi.particles=2", "lora.r=4"], ["map", "svi"])
    assert shared == ["epochs=1", "lora.r=4"]
    assert own == {"map": [], "svi": ["particles=2"]}
    with pytest.raises(SettingError, match="which is not among map"):
        _by_backend(["svi.particles=2"], ["map"])


def test_compare_runs_the_file_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bayeslora.app.studies import Study

    study = {
        "tasks": ["demo"], "bases": ["demo"], "methods": ["mle"], "evaluation": {"split": "heldout"},
        "common": {"train_size": 16, "heldout_size": 20, "settings": {"epochs": 1, "cpu": True}},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert call("compare", tmp_path / "study.yaml", "--output", tmp_path / "out") == 0
    told = capsys.readouterr()
    assert "[1/1] demo, demo, mle, seed 0: " in told.err and str(tmp_path / "out") in told.out
    assert list(Study(study, tmp_path / "out").frame()["state"]) == ["done"]
    assert call("compare", tmp_path / "study.yaml", "--train-size", 8) == 2
    assert "--train-size is said by the file of a study" in capsys.readouterr().err
    assert call("compare", "--output", tmp_path / "none") == 2
    assert "takes the file of a study, or --backends and --output" in capsys.readouterr().err


def test_a_comparison_builds_its_report_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayeslora.app.studies import report

    built: list[Any] = []
    summary_of = report.summary_of

    def seen(*given: Any) -> Any:
        built.append(given)
        return summary_of(*given)

    monkeypatch.setattr(report, "summary_of", seen)
    begin = ["compare", "--base", "demo", "--task", "demo", "--train-size", "16", "--backends", "map", "--seeds", "0"]
    assert call(*begin, "--draws", "1", "--set", "epochs=1", "--output", tmp_path / "out") == 0
    assert len(built) == 1


def test_presets_stand_among_the_backends(tmp_path: Path) -> None:
    arguments = ["compare", *FIT[1:5], *FIT[7:], *QUICK, "--backends", "map,ivon-lora", "--seeds", "0"]
    assert call(*arguments, "--split", "heldout", "--draws", "2", "--output", tmp_path / "out") == 0
    (place,) = (tmp_path / "out" / "cells").glob("demo-ivon-seed0-*/posterior/posterior.json")
    record = json.loads(place.read_text())["record"]
    assert record["backend"] == "ivon" and record["settings"]["clip_radius"] == 1e-3
    assert record["settings"]["epochs"] == 1  # what the flags say


def test_a_dry_run_of_a_part_is_of_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ["compare", "--base", "demo", "--task", "demo", "--train-size", "16", "--output", tmp_path / "out"]
    begin += ["--backends", "mle", "--seeds", "0,1,2,3", "--draws", "1", "--set", "epochs=1", "--dry-run"]
    cells: list[set[str]] = []
    for number in (1, 2):
        assert call(*begin, "--shard", f"{number}/2") == 0
        told = capsys.readouterr().out
        cells.append({line for line in told.splitlines() if line.startswith("demo-mle-")})
        assert "2 cells at most" in told and "mle: 2 left" in told
    assert [len(each) for each in cells] == [2, 2] and not cells[0] & cells[1]
    assert call(*begin, "--shard", "3/2") == 2 and not (tmp_path / "out").exists()
