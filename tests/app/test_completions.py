"""Completions from the shell: fit, evaluate, predict, and what is refused."""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from causal_scenarios import POSITIONS, causal_base
from command_line import call
from scenarios import write_rows

from bayeslora.app.runs import saved_task
from bayeslora.diagnostics import token_calibration
from bayeslora.inference import load

ROWS = [{"prompt": f"Question: what is {word}\nAnswer:", "completion": f" {word}"} for word in ("sun", "moon", "water")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for split, copies in (("train", 3), ("validation", 1)):
        write_rows(folder / "data" / f"{split}.jsonl", ROWS * copies)
    settings = ("--set", "epochs=1", "--set", "lora.target_modules=q_proj", "--set", "cpu=true")
    names = ("--base", causal_base(), "--task", folder / "data", "--backend", "svi", "--model", "gaussian")
    with redirect_stderr(StringIO()) as said:
        assert call("fit", *names, *settings, "--output", folder / "run") == 0
    # There is but one of these, and no other to choose.
    assert "The observation is 'completions'." in said.getvalue() and "'prompt' and 'completion'" in said.getvalue()
    assert f"Rows have up to {POSITIONS} tokens; --set max_length= says otherwise." in said.getvalue()
    return folder / "run"


def test_a_run_says_what_it_took_the_columns_for(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", run, "--draws", 3, "--json", tmp_path / "metrics.json") == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "nll" in shown.lower()
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["perplexity"]["value"] > 1 and found["n"] == 3
    assert load(run).program.observation.name == "completions"


def test_tokens_of_completions_are_judged_as_texts_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = saved_task(load(run)).split("validation")
    for method in ("sample", "mean"):
        chosen = ("--draws", 3, "--seed", 4, "--method", method)
        assert call("evaluate", run, *chosen, "--json", tmp_path / f"{method}.json") == 0
        shown = capsys.readouterr().out
        found = json.loads((tmp_path / f"{method}.json").read_text())
        expected = token_calibration(load(run), rows, 3, method, seed=4, progress=False).measured(seed=4)
        assert {"token_accuracy", "token_ece_15"} <= expected.keys()
        for name, interval in expected.items():
            assert name in shown and found[name] == pytest.approx(vars(interval), abs=1e-6)


def test_reliability_of_tokens_is_drawn(run: Path, tmp_path: Path) -> None:
    assert call("evaluate", run, "--draws", 2, "--plot", tmp_path / "picture.png") == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_posterior_of_completions_is_diagnosed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("diagnose", run, "--output", tmp_path / "report", "--draws", 30, "--other", "train") == 0
    shown = capsys.readouterr().out
    assert "k-hat" in shown and "elpd_loo" in shown and "3 texts of validation: nll" in shown
    assert "# svi on" in (tmp_path / "report" / "diagnosis.md").read_text()
    assert (tmp_path / "report" / "reliability.png").exists()


def test_completions_of_a_file_are_predicted(run: Path, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "new.jsonl", ROWS[:2]), tmp_path / "found.jsonl"
    assert call("predict", run, "--file", source, "--output", target, "--draws", 3, "--seed", 5) == 0
    found = pd.read_json(target, lines=True)
    assert list(found) == ["log_likelihood", "tokens", "perplexity", "deviation"]
    expected = load(run).predict(ROWS[:2], draws=3, seed=5, progress=False).to_pandas()
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-5)


def test_what_is_not_to_be_had_of_completions_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Question: what is sun"}])
    assert call("predict", run, "--file", prompts, "--output", tmp_path / "out.jsonl") == 2
    assert "completion" in capsys.readouterr().err
