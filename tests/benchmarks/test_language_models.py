"""The benchmark of causal language models compares ways that give the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_language_models_are_compared(
    benchmarks: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "language_models.json"
    for parts in (["choices"], ["choices-gradient", "labels", "labels-gradient", "draws", "draws-token"]):
        benchmarks.language_models.main(["--quick", "--results", str(results), "--parts", *parts])
    (measured,) = json.loads(results.read_text(encoding="utf-8")).values()
    assert set(measured["results"]) == set(benchmarks.language_models.COMPARISONS)
    for found in measured["results"].values():
        assert found["difference"] < 1e-5 and min(found["seconds"].values()) > 0
    assert "times faster" in capsys.readouterr().out
