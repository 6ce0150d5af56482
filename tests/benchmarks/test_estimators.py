from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_variances_are_measured(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "estimators.json"
    options = ["--base", str(base), "--data-dir", str(data / "sst2"), "--passes", "8", "--train-size", "32"]
    benchmarks.estimators.main([*options, "--results", str(results)])
    found = json.loads(results.read_text(encoding="utf-8"))["found"]
    assert list(found) == ["draw", "flipout", "local"]
    assert found["local"]["location"] < found["draw"]["location"]  # 32 rows in place of one: 8 passes tell
    assert "| relative to a draw | location | scale | point | seconds |" in capsys.readouterr().out
