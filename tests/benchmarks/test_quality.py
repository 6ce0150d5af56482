"""Benchmarks of quality: runs that are done once, their reports and verdicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bayeslora.predict.prediction import ClassPrediction


def test_quality_runs_once_and_reports_partial_results(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs"
    command = ["run", "--base", str(base), "--data-dir", str(data), "--output", str(output), "--quick"]
    command += ["--tasks", "sst2", "--seeds", "0", "--backends", "mle", "svi"]
    benchmarks.quality.main(command)
    first = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert len(first) == 2
    benchmarks.quality.main(command)
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.json")} == first
    assert capsys.readouterr().out.count("finished before") == 2

    results, picture = tmp_path / "quality.json", tmp_path / "images" / "reliability.png"
    benchmarks.quality.main(["report", "--output", str(output), "--results", str(results), "--figure", str(picture)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert set(kept["summary"]["sst2"]) == {"mle", "mle+temperature", "svi", "svi-mean"}
    assert len(kept["missing"]) == 4 * 3 * 3 - 2
    assert len(kept["verdicts"]) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "SST-2 | SVI" in printed and "Missing (34 runs" in printed
    # The kept figure is that of the saved logits.
    saved = ClassPrediction.load(output / "sst2-svi-seed0-lr0.002" / "svi.safetensors").metrics(intervals=False)
    assert kept["summary"]["sst2"]["svi"]["nll"]["mean"] == pytest.approx(saved["nll"].value, rel=1e-9)


def test_runs_of_other_settings_are_not_taken_for_finished(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    run = benchmarks.common.Run("sst2", "mle", 0, 1000)
    record = {"run": {**vars(run), "epochs": 3.0}}
    (tmp_path / f"{run.name}.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit, match="epochs"):
        benchmarks.common.finished(run, tmp_path)


def test_a_claim_is_exclusive_and_ends_with_its_process(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    holder = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with benchmarks.common.claimed(lock) as mine:
            assert not mine
        process.kill()
        process.wait()
        with benchmarks.common.claimed(lock) as mine:
            assert mine


def test_quality_verdicts_judge_means_over_tasks(benchmarks: SimpleNamespace) -> None:
    def record(task: str, arms: dict[str, float]) -> dict[str, object]:
        metrics = {name: {"value": 0.05} for name in benchmarks.common.METRICS}
        return {
            "run": {"task": task, "seed": 0},
            "seconds": {"fit": 1.0},
            "arms": {arm: metrics | {"nll": {"value": nll}} for arm, nll in arms.items()},
        }

    figures = benchmarks.quality.Figures(
        [
            record("mrpc", {"mle": 1.5, "mle+temperature": 0.60}),
            record("mrpc", {"svi": 0.55, "svi-mean": 0.7}),
            record("sst2", {"mle": 0.5, "mle+temperature": 0.40}),
            record("sst2", {"svi": 0.45, "svi-mean": 0.7}),
        ]
    )
    # NLL 0.5 on average, against 1.0 of plain LoRA and 0.5 with temperature, which is beaten on MRPC alone.
    assert [verdict["met"] for verdict in benchmarks.quality.verdicts(figures)] == [True, True, False, True, True]


def test_robustness_runs_and_reports(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, results = tmp_path / "runs", tmp_path / "robustness.json"
    command = ["run", "--base", str(base), "--data-dir", str(data), "--output", str(output), "--quick"]
    benchmarks.robustness.main([*command, "--learning-rates", "2e-3"])
    benchmarks.robustness.main(["report", "--output", str(output), "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    (entry,) = kept["runs"]["svi"]
    assert kept["summary"]["svi"]["intrinsic"] == pytest.approx(1 / entry["nll"])
    assert len(kept["missing"]) == 8
    assert "Missing (8 runs" in capsys.readouterr().out


def test_robustness_over_a_grid(benchmarks: SimpleNamespace) -> None:
    nll = [0.6, 0.5, 0.9, 0.4, 0.7]
    grid = {10.0**-number: {"accuracy": 1 - each, "nll": each} for number, each in enumerate(nll)}
    found = benchmarks.robustness.summarise(grid)
    assert found["nll"] == pytest.approx({"median": 0.6, "spread": 0.5, "iqr": 0.2})
    assert (found["intrinsic"], found["extrinsic"]) == pytest.approx((1 / 0.6, 0.4))


def test_diagnosis_runs_and_reports(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, results = tmp_path / "runs", tmp_path / "diagnosis.json"
    command = ["run", "--base", str(base), "--data-dir", str(data), "--output", str(output), "--quick"]
    benchmarks.diagnosis.main(command)
    benchmarks.diagnosis.main(["report", "--output", str(output), "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))["figures"]
    assert set(kept) == {"map", "svi", "laplace"} and "khat" not in kept["map"]
    assert all({"khat", "khat_by_block", "nll"} <= set(kept[name]) for name in ("svi", "laplace"))
    assert (output / "mrpc-svi-seed0-lr0.002" / "diagnosis.md").is_file()
    assert "| MAP | no density | no density | one draw |" in capsys.readouterr().out
