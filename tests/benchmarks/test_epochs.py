"""Benchmarks of Laplace: by epoch, by width of the prior, by form of curvature."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

import bayeslora as bl
from bayeslora.predict.prediction import ClassPrediction


def test_laplace_by_epoch_runs_and_reports(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, results, picture = tmp_path / "runs", tmp_path / "epochs.json", tmp_path / "epochs.png"
    benchmarks.epochs.main(
        ["run", "--base", str(base), "--data-dir", str(data), "--output", str(output), "--quick"]
        + ["--tasks", "cola", "--seeds", "0"]
    )
    benchmarks.epochs.main(["report", "--output", str(output), "--results", str(results), "--figure", str(picture)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    (run,) = kept["runs"]
    assert set(run["epochs"]["1"]) == {*benchmarks.epochs.CURVES, *benchmarks.epochs.LAST}
    # The figures are those of the saved logits.
    saved = ClassPrediction.load(output / "cola-laplace-seed0-lr0.002" / "mle.safetensors").metrics(intervals=False)
    assert run["epochs"]["1"]["mle"]["nll"] == pytest.approx(saved["nll"].value, rel=1e-9)
    assert len(kept["verdicts"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(run["shift"]["CoLA, other domains"]) == set(benchmarks.epochs.CURVES)
    assert 0 <= run["shift"]["CoLA, other domains"]["la"]["auroc_entropy"] <= 1
    printed = capsys.readouterr().out
    assert "Seeds: CoLA 1." in printed and "| last epoch | CoLA | mean |" in printed
    assert "| plain LoRA | {0:.3f} | {0:.3f} |".format(saved["nll"].value) in printed
    assert "CoLA | CoLA, other domains | Laplace" in printed


def test_a_multiple_of_the_width_is_the_fit_that_finds_it(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path
) -> None:
    run = benchmarks.common.Run("sst2", "laplace", 0, 40, heldout_size=10, batch_size=8)
    task = bl.load_task("sst2", data, train_size=40, heldout_size=10)
    weights = bl.models.build("gaussian", sites="both", centre="zero")
    lora = LoraConfig(r=2, target_modules=["query", "dense"])
    program = bl.Program.from_pretrained(str(base), task, lora=lora, model=weights)
    trained = bl.fit(program, task.train, "mle", epochs=8, learning_rate=1e-2, batch_size=8, progress=False)
    fitted = benchmarks.epoch_parts.Fitted.around(trained, task, run)
    arms = fitted.predict_last(task)
    common = {"start": trained, "progress": False, "batch_size": 8}
    published = bl.fit(program, task.train, "laplace", tune="mode-evidence", **common)
    heldout = bl.fit(program, task.train, "laplace", tune="heldout", heldout=task.heldout, **common)
    tuned = bl.fit(program, task.train, "laplace", tune="evidence", **common)
    for arm, posterior, link in (
        ("la", tuned, "mc-joint"), ("la-probit", tuned, "probit"), ("la-mode", published, "mc-joint"),
    ):  # fmt: skip
        expected = posterior.predict(task.validation, method=link, progress=False).probabilities
        torch.testing.assert_close(arms[arm].probabilities, expected, rtol=0, atol=1e-4)
    # Widths by held-out rows lie on a grid, which begins at the prior that the evidence found or at the model's own.
    expected = heldout.predict(task.validation, progress=False).metrics(intervals=False)["nll"].value
    assert arms["la-heldout"].metrics(intervals=False)["nll"].value == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_curvature_is_compared_with_itself(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    benchmarks.curvature.main(["--quick", "--results", str(tmp_path / "curvature.json")])
    forms = json.loads((tmp_path / "curvature.json").read_text(encoding="utf-8"))["forms"]
    assert forms["full"]["matrix"] == pytest.approx(0, abs=1e-6)
    assert forms["full"]["variance"] == pytest.approx(0, abs=1e-6)
    assert 0 < forms["kron, sum, rank 64"]["blocks"] < 1


def test_laplace_verdicts_judge_the_last_epoch(benchmarks: SimpleNamespace) -> None:
    def arm(accuracy: float, nll: float, ece: float) -> dict[str, float]:
        return {"accuracy": accuracy, "nll": nll, "ece_15": ece}

    scaled, la, mle = "mle+temperature", "la", "mle"
    last = {("mrpc", mle): arm(0.8, 2.0, 0.3), ("mrpc", la): arm(0.8, 1.1, 0.09), ("mrpc", scaled): arm(0.8, 0.7, 0.0)}
    last |= {("rte", mle): arm(0.5, 0.9, 0.3), ("rte", la): arm(0.6, 0.1, 0.09), ("rte", scaled): arm(0.5, 0.6, 0.0)}
    # The NLL of MRPC alone is above 1, and it is not halved; RTE's accuracy is not judged.
    assert [verdict["met"] for verdict in benchmarks.epochs.verdicts(last)] == [True, False, True, True]
