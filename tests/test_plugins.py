"""Files of a third party, each of forty lines at most, from the shell: fitted, predicted, saved, loaded, diagnosed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from command_line import QUICK, call

import bayeslora as bl
from bayeslora.inference import BACKENDS, POSTERIORS
from bayeslora.models import MODELS
from bayeslora.observations import OBSERVATIONS

FOLDER = Path(__file__).parent / "plugins"
CASES: dict[str, tuple[list[str], str]] = {
    "horseshoe": (["--model", "horseshoe", "--backend", "svi"], "elbo"),
    "noisy_passes": (["--backend", "noisy-passes", "--set", "lora.dropout=0.2"], ""),
    "noisy_classes": (["--set", "observation=noisy-classes", "--backend", "svi"], "elbo"),
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in (BACKENDS, MODELS, OBSERVATIONS, POSTERIORS):
        monkeypatch.setattr(registry, "_homes", dict(registry._homes))
    for name in CASES:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("case", CASES)
def test_a_third_partys_file_does_all_that_ours_do(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (settings, figure), plugin, run = CASES[case], ["--plugin", FOLDER / f"{case}.py"], tmp_path / "run"
    assert len((FOLDER / f"{case}.py").read_text().splitlines()) <= 40
    fit = ["fit", "--base", "demo", "--task", "demo", "--train-size", "48", *QUICK, *settings, "--output", run]
    assert call(*fit, *plugin) == 0, capsys.readouterr().err
    found = []
    for name in ("one", "two"):
        evaluated = ["--split", "heldout", "--draws", 3, "--json", tmp_path / f"{name}.json"]
        assert call("evaluate", run, *evaluated, *plugin) == 0, capsys.readouterr().err
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert found[0] == found[1] and found[0]["draws"] == 3
    (tmp_path / "new.csv").write_text("text\nThe soup was cold.\nLovely!\n")
    assert call("predict", run, "--file", tmp_path / "new.csv", "--output", tmp_path / "out.csv", *plugin) == 0
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == 2 and (table["mutual_information"] >= 0).all()
    report = ["--split", "heldout", "--draws", 30, "--output", tmp_path / "report"]
    assert call("diagnose", run, *report, *plugin) == 0, capsys.readouterr().err
    told = (tmp_path / "report" / "diagnosis.md").read_text()
    assert "accuracy" in told
    if figure:
        assert figure in json.loads((tmp_path / "report" / "diagnosis.json").read_text())
    else:
        assert "k-hat is left out: " in told and "Leave-one-out is left out." in told


def test_a_run_of_a_plugin_says_that_it_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["fit", "--base", "demo", "--task", "demo", "--train-size", "32", *QUICK, "--model", "horseshoe"]
    with monkeypatch.context() as patch:
        patch.setattr(MODELS, "_homes", dict(MODELS._homes))
        made = call(*command, "--backend", "map", "--output", run, "--plugin", FOLDER / "horseshoe.py")
        assert made == 0, capsys.readouterr().err
    assert call("evaluate", run, "--split", "heldout") == 2
    said = capsys.readouterr().err
    assert "'horseshoe'" in said and "--plugin FILE" in said
    assert str(FOLDER) not in "".join(path.read_text() for path in run.rglob("*.json"))


def test_only_public_names_show() -> None:
    assert dir(bl) == sorted(bl.__all__) and all(getattr(bl, name) is not None for name in bl.__all__)
    assert bl.inference.SVI(epochs=3.0).epochs == 3 and "SVI" in dir(bl.inference)
