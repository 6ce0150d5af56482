from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayeslora import inference
from bayeslora.app.comparison import Comparison, Evaluation, Outcome, compare
from bayeslora.app.config import RunConfig
from bayeslora.errors import SettingError
from bayeslora.predict import metrics
from bayeslora.predict.metrics import Interval, Metrics
from bayeslora.predict.prediction import ClassPrediction

CONFIG = RunConfig(
    base="demo",
    task="demo",
    train_size=48,
    heldout_size=60,
    settings={"epochs": "1", "batch_size": 16, "cpu": True},
)
EVALUATION = Evaluation("heldout", draws=2)
ARMS = {"map": {"backend": "map"}, "svi-cold": {"backend": "svi", "settings": {"temperature": "0.1"}}}
RUNS = ["map-seed0", "map-seed3", "svi-cold-seed0", "svi-cold-seed3"]


def run(folder: Path, **changes: Any) -> Comparison:
    config = replace(CONFIG, **{key: value for key, value in changes.items() if key not in ("evaluation", "arms")})
    evaluation = changes.get("evaluation", EVALUATION)
    return compare(config, changes.get("arms", ARMS), [0, 3], folder, evaluation=evaluation, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("comparison")
    return folder, run(folder)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the folders that are fitted in, while the fitting goes on as ever."""
    folders: list[str] = []
    original = inference.fit

    def record(*args: Any, **keywords: Any) -> Any:
        folders.append(keywords["output_dir"].name)
        return original(*args, **keywords)

    monkeypatch.setattr(inference, "fit", record)
    yield folders


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_every_arm_is_run_with_every_seed(finished: tuple[Path, Comparison]) -> None:
    folder, found = finished
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*RUNS, "comparison.json", "comparison.md", "reliability.png"]
    )
    assert {arm: [outcome.seed for outcome in found.outcomes[arm]] for arm in ARMS} == {
        "map": [0, 3],
        "svi-cold": [0, 3],
    }
    for name in RUNS:
        inside = {path.name for path in (folder / name).iterdir()}
        assert {"config.yaml", "posterior", "predictive.safetensors", "metrics.json"} <= inside
    record = json.loads((folder / "svi-cold-seed3" / "posterior" / "posterior.json").read_text())["record"]
    assert (record["seed"], record["settings"]["temperature"], record["settings"]["epochs"]) == (3, 0.1, 1.0)


def test_metrics_are_those_of_the_saved_predictions(finished: tuple[Path, Comparison]) -> None:
    folder, found = finished
    prediction = ClassPrediction.load(folder / "svi-cold-seed3" / "predictive.safetensors")
    assert prediction.draws == 2 and len(prediction) == 60
    expected = prediction.metrics(intervals=False)
    outcome = found.outcomes["svi-cold"][1]
    assert outcome.metrics["nll"].value == pytest.approx(expected["nll"].value)
    assert {"kl", "ece_true"} <= set(outcome.metrics)  # the demo task knows the true probabilities
    assert set(outcome.cost) == {"seconds", "peak_memory_bytes", "parameters", "extra_parameters"}


def test_the_distance_from_the_truth_is_that_of_the_rows(finished: tuple[Path, Comparison]) -> None:
    from bayeslora.app import runs

    folder, found = finished
    split = runs.task_of(replace(CONFIG, seed=3)).split("heldout")
    prediction = ClassPrediction.load(folder / "map-seed3" / "predictive.safetensors")
    truth = np.asarray(split.dataset["probabilities"])
    expected = metrics.against_truth(prediction.log_probabilities, truth, intervals=False)
    assert found.outcomes["map"][1].metrics["kl"].value == pytest.approx(expected["kl"].value)


def test_the_table_has_means_over_seeds(finished: tuple[Path, Comparison]) -> None:
    folder, found = finished
    values = [outcome.metrics["nll"].value for outcome in found.outcomes["map"]]
    written = json.loads((folder / "comparison.json").read_text())
    assert written["arms"]["map"]["metrics"]["nll"] == {
        "mean": pytest.approx(np.mean(values)),
        "spread": pytest.approx(np.std(values, ddof=1)),
    }
    assert [each["seed"] for each in written["arms"]["map"]["runs"]] == [0, 3]
    assert written["evaluation"] == {"split": "heldout", "draws": 2, "method": None}
    text = (folder / "comparison.md").read_text()
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in text
    assert (
        "seeds 0, 3; prediction by each posterior's own method, 2 draws of weights" in text and "| svi-cold |" in text
    )
    assert "KL from truth" in text and "peak memory (MiB)" in text
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated(finished: tuple[Path, Comparison], fits: list[str], tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    for name in ("comparison.json", "comparison.md", "reliability.png"):
        (folder / name).unlink()
    before = {path: os.stat(path).st_mtime_ns for path in folder.glob("*/*")}
    assert run(folder) == finished[1]
    assert fits == []
    assert before == {path: os.stat(path).st_mtime_ns for path in folder.glob("*/*")}
    assert (folder / "comparison.md").read_text() == (finished[0] / "comparison.md").read_text()


def test_another_evaluation_fits_nothing_again(
    finished: tuple[Path, Comparison], fits: list[str], tmp_path: Path
) -> None:
    folder = copied(finished[0], tmp_path)
    found = run(folder, evaluation=Evaluation("heldout", method="mean"))
    assert fits == []
    assert found.outcomes["svi-cold"][0].metrics.method == "mean"
    assert json.loads((folder / "map-seed0" / "metrics.json").read_text())["evaluation"]["method"] == "mean"


def test_a_lost_prediction_is_made_again(finished: tuple[Path, Comparison], fits: list[str], tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    (folder / "map-seed0" / "predictive.safetensors").unlink()
    assert run(folder).outcomes["map"][0].metrics == finished[1].outcomes["map"][0].metrics
    assert fits == []
    assert (folder / "map-seed0" / "predictive.safetensors").exists()


def test_a_stopped_comparison_goes_on(
    finished: tuple[Path, Comparison], fits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between runs, after a fit but before its evaluation: only what is missing is done."""
    folder = copied(finished[0], tmp_path)
    for name in ("map-seed3", "svi-cold-seed3"):
        (folder / name / "metrics.json").unlink()
    shutil.rmtree(folder / "svi-cold-seed3" / "posterior")
    shutil.rmtree(folder / "svi-cold-seed3" / "checkpoints")
    original = ClassPrediction.save
    monkeypatch.setattr(ClassPrediction, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(ClassPrediction, "save", original)
    found = run(folder)
    assert fits == ["svi-cold-seed3"]
    for arm in ARMS:
        again = [outcome.metrics["nll"].value for outcome in found.outcomes[arm]]
        assert again == pytest.approx([outcome.metrics["nll"].value for outcome in finished[1].outcomes[arm]])


def test_a_run_of_other_settings_is_an_error_and_stays(finished: tuple[Path, Comparison], fits: list[str]) -> None:
    folder = finished[0]
    before = (folder / "map-seed0" / "metrics.json").read_bytes()
    changed = {**CONFIG.settings, "epochs": 2}
    with pytest.raises(
        SettingError, match=r"map-seed0' holds a run with other settings .*settings.epochs: 1.0 and 2.0"
    ):
        run(folder, settings=changed)
    assert fits == [] and (folder / "map-seed0" / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arms", "seeds", "message"),
    [
        ([], [0], "needs arms and seeds, found 0 and 1"),
        (["map"], [], "needs arms and seeds, found 1 and 0"),
        (["map"], [0, 0], "A seed is given twice: 0, 0"),
        (["map", "svy"], [0], "Unknown backend 'svy'. Did you mean 'svi'"),
        ({"a/b": {"backend": "map"}}, [0], "'a/b' cannot name a folder"),
        ({"a": {"backend": "map", "settings": {"particles": 2}}}, [0], "Unknown setting of map 'particles'"),
        ({"a": {"beckend": "map"}}, [0], "Unknown setting of a run 'beckend'"),
    ],
)
def test_mistakes_are_found_before_anything_is_fitted(
    arms: Any, seeds: list[int], message: str, tmp_path: Path, fits: list[str]
) -> None:
    with pytest.raises(SettingError, match=message):
        compare(CONFIG, arms, seeds, tmp_path / "new")
    assert fits == [] and not (tmp_path / "new").exists()


def test_infinite_metrics_and_single_seeds_survive_json(tmp_path: Path) -> None:
    def outcome(seed: int, nll: float) -> Outcome:
        return Outcome(seed, Metrics({"nll": Interval(nll)}, 5), {"seconds": 1.0})

    found = Comparison(CONFIG, EVALUATION, {"a": [outcome(0, math.inf)], "b": [outcome(0, 0.5)]})
    found.save(tmp_path)
    written = json.loads((tmp_path / "comparison.json").read_text())["arms"]
    assert written["a"]["metrics"]["nll"] == {"mean": "Infinity", "spread": "NaN"}
    assert written["b"]["metrics"]["nll"] == {"mean": 0.5, "spread": "NaN"}
    assert "| b | 0.5000 | 1.0 |" in (tmp_path / "comparison.md").read_text()
    two = Comparison(CONFIG, EVALUATION, {"a": [outcome(0, math.inf), outcome(1, math.inf)]})
    assert math.isnan(two.summary("a", "nll")[1])
