"""The benchmark of families beside the sampler: runs, its report, and what it compares."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bayeslora.predict.prediction import ClassPrediction


@pytest.mark.slow
def test_families_are_compared_with_the_sampler(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, results, picture = tmp_path / "runs", tmp_path / "nearest.json", tmp_path / "nearest.png"
    command = ["run", "--base", str(base), "--data-dir", str(data), "--output", str(output), "--quick"]
    report = ["report", "--output", str(output), "--results", str(results), "--figure", str(picture)]
    benchmarks.nearest.main([*command, "--families", "svi, entry"])
    with pytest.raises(SystemExit, match="--families nuts"):
        benchmarks.nearest.main(report)
    benchmarks.nearest.main([*command, "--families", "nuts"])
    benchmarks.nearest.main(report)
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert {"rhat", "ess", "elpd_loo", "between_chains"} <= set(kept["reference"])
    assert set(kept["summary"]) == {"svi, entry"}
    assert set(kept["summary"]["svi, entry"]["khat_by_layer"]) == {
        "base_model.model.pooler",
        "base_model.model.classifier",
    }
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| `nuts`, one chain and the other |" in capsys.readouterr().out


def test_distance_and_spread(benchmarks: SimpleNamespace) -> None:
    noise = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(5, dtype=torch.long)
    one, three = (
        ClassPrediction(torch.stack([torch.zeros_like(noise), size * noise], -1), labels) for size in (1.0, 3.0)
    )
    found = benchmarks.nearest.compared([three], [one])
    assert found["spread"] == pytest.approx(3, rel=1e-5) and found["variation"] < 0.02  # both are of even chances
    sure = ClassPrediction(torch.tensor([[[0.0, 50.0]] * 5, [[0.0, 50.0]] * 5]), labels)
    assert benchmarks.nearest.compared([sure], [one])["variation"] == pytest.approx(0.5, abs=0.02)
