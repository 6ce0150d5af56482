"""The benchmark of the diagnosis: its runs, once each, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_diagnosis_runs_once_and_reports(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, results = tmp_path / "runs", tmp_path / "diagnosis.json"
    command = ["run", "--base", str(base), "--data-dir", str(data), "--output", str(output), "--quick"]
    benchmarks.diagnosis.main(command)
    first = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert len(first) == 3
    benchmarks.diagnosis.main(command)
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.json")} == first
    assert capsys.readouterr().out.count("finished before") == 3
    benchmarks.diagnosis.main(["report", "--output", str(output), "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))["figures"]
    assert set(kept) == {"map", "svi", "laplace"} and "khat" not in kept["map"]
    assert all({"khat", "khat_by_block", "nll"} <= set(kept[name]) for name in ("svi", "laplace"))
    assert (output / "mrpc-svi-seed0-lr0.002" / "diagnosis.md").is_file()
    assert "| MAP | no density | no density | one draw |" in capsys.readouterr().out
    # The figures that are kept are of a prior whose means stay where the model has them.
    svi = json.loads((output / "mrpc-svi-seed0-lr0.002.json").read_text(encoding="utf-8"))
    assert svi["settings"]["prior_mean"] == "model" and svi["settings"]["noise_warmup"] == 0
