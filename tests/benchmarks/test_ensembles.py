from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.slow
def test_an_ensemble_is_timed_against_one_fit(
    benchmarks: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "ensembles.json"
    monkeypatch.setattr(benchmarks.ensembles, "SIZES", ((16, 4),))
    benchmarks.ensembles.main(["--rounds", "1", "--results", str(results)])
    (found,) = json.loads(results.read_text(encoding="utf-8"))["found"]
    assert found["ratios"]["one fit"] == 1
    assert found["seconds"]["five one by one"] > 2 * found["seconds"]["one fit"]  # five times as many steps
    assert found["ratios"]["five stacked"] < found["ratios"]["five one by one"]
    assert "| 16 rows, batches of 4 | 1.00 |" in capsys.readouterr().out
