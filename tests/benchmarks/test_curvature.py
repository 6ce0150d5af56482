"""The benchmark of forms of curvature."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.slow
def test_curvature_is_compared_with_itself(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    benchmarks.curvature.main(["--quick", "--results", str(tmp_path / "curvature.json")])
    forms = json.loads((tmp_path / "curvature.json").read_text(encoding="utf-8"))["forms"]
    assert forms["full"]["matrix"] == pytest.approx(0, abs=1e-6)
    assert forms["full"]["variance"] == pytest.approx(0, abs=1e-6)
    assert 0 < forms["kron, sum, rank 64"]["blocks"] < 1
