"""The study of causal language models: it runs, chooses learning rates on held-back rows, and judges."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from causal_scenarios import causal_base

from bayeslora.predict.prediction import ClassPrediction

SCIENCE = ["the sun", "the moon", "a stone", "water"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the columns of SST-2, OpenBookQA and ARC."""
    folder = tmp_path_factory.mktemp("rows")
    for task, made in {"sst2": _sentence, "openbookqa": _question, "ai2_arc_challenge": _question}.items():
        (folder / task).mkdir()
        for split, size in (("train", 60), ("validation", 12)):
            lines = [json.dumps(made(number)) for number in range(size)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _sentence(number: int) -> dict[str, Any]:
    return {"sentence": f"film {number} is {('dull', 'great')[number % 2]}", "label": number % 2, "idx": number}


def _question(number: int) -> dict[str, Any]:
    question = f"Which is {('good', 'bad')[number % 2]}?"
    choices = {"text": SCIENCE, "label": list("ABCD")}
    return {"question": question, "question_stem": question, "choices": choices, "answerKey": "ABCD"[number % 4]}


@pytest.mark.slow
def test_the_study_runs_and_reports(
    benchmarks: SimpleNamespace, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, output, results = benchmarks.language_study, tmp_path / "runs", tmp_path / "study.json"
    options = Namespace(base=str(causal_base()), data_dir=str(rows), output=output, threads=None, quick=True)
    rates = {"mle": 1e-3, "svi": 1e-2, "laplace": 1e-3}
    cells = [study.run_of("sst2", 0, backend, rate, study.RATE) for backend, rate in rates.items()]
    for task, variant in (("sst2", ""), ("openbookqa", ""), ("openbookqa", "arc")):
        cells += [study.run_of(task, 0, "zero-shot", 0.0, variant)]
        cells += [study.run_of(task, 0, backend, rate, variant) for backend, rate in rates.items()]
    benchmarks.common.work(cells, options, study.measured)
    study.main(["report", "--output", str(output), "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    found = {
        (each["task"], each["variant"], arm): each["arms"][arm]["nll"] for each in kept["runs"] for arm in each["arms"]
    }
    arms = {"zero-shot", "mle", "mle+temperature", "svi", "laplace"}
    assert found.keys() >= {("openbookqa", "arc", arm) for arm in arms} | {("sst2", "", arm) for arm in arms}
    saved = ClassPrediction.load(output / "openbookqa-svi-seed0-lr0.01-arc" / "svi.safetensors")
    assert found["openbookqa", "arc", "svi"] == pytest.approx(saved.metrics(intervals=False)["nll"].value, rel=1e-9)
    # A temperature is the same for rows of another task.
    temperatures = {
        each["temperature"] for each in kept["runs"] if each["task"] == "openbookqa" and each["backend"] == "mle"
    }
    assert len(temperatures) == 1
    printed = capsys.readouterr().out
    assert "|  | SST-2 | OpenBookQA |" in printed and "| ARC-Challenge | `svi`, 5 draws |" in printed
    assert len(kept["verdicts"]) == 6


def test_each_arm_has_the_rate_that_held_back_rows_like_best(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    study = benchmarks.language_study
    runs = study.plan(["sst2"], [0], tmp_path)
    tried = sum(len(rates) for rates in study.RATES.values())
    first = [run for _, run in zip(range(tried), runs, strict=False)]
    assert {run.variant for run in first} == {study.RATE}
    for run in first:
        # Plain LoRA likes its lower rate as it is, and the higher one when it is scaled, as SVI and Laplace do.
        plain = {"nll": {"value": run.learning_rate}}
        scaled = {"nll": {"value": -run.learning_rate}}
        arms = {"mle": plain, "mle+temperature": scaled, "svi": scaled, "laplace": scaled, "laplace+heldout": scaled}
        (tmp_path / f"{run.name}.json").write_text(json.dumps({"arms": arms}), encoding="utf-8")
    rates = [(run.backend, run.learning_rate) for run in runs if not run.variant]
    assert rates == [
        ("zero-shot", 0.0), ("mle", 3e-4), ("mle", 3e-3), ("svi", 2e-2), ("laplace", 3e-3), ("map", 3e-4),
    ]  # fmt: skip


def test_the_study_judges_against_plain_lora(benchmarks: SimpleNamespace) -> None:
    good = {"accuracy": (-0.009, 0.02), "nll": (-0.1, 0.02), "ece_15": (-0.1, 0.02)}
    bad = {"accuracy": (-0.011, 0.02), "nll": (0.0, 0.02), "ece_15": (0.1, 0.02)}
    changes = {"sst2": {"svi": good, "laplace": bad}, "openbookqa": {"svi": good, "laplace": good}}
    judged = benchmarks.language_study.verdicts(changes)
    assert [verdict["met"] for verdict in judged] == [True, True, True, False, False, False]
    assert judged[0]["found"] == "SST-2 -0.009 ± 0.020, OpenBookQA -0.009 ± 0.020"
