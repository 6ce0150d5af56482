from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bayeslora.app import runs
from bayeslora.app.config import RunConfig
from bayeslora.predict.prediction import ClassPrediction


@pytest.mark.slow
def test_groups_of_draws_stand_for_predictions_by_fewer(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"epochs": 1, "batch_size": 8}
    values = {"base": str(base), "task": "sst2", "data_dir": str(data), "backend": "svi", "settings": settings}
    runs.fit(RunConfig.from_dict(values), tmp_path / "fit", progress=False)
    results, output = tmp_path / "draws.json", tmp_path / "draws"
    command = [str(tmp_path / "fit"), "--draws", "5", "--results", str(results), "--output", str(output)]
    benchmarks.draws.main(command)
    fits = json.loads(results.read_text(encoding="utf-8"))["fits"]["fit"]
    for method in ("sample", "pairs"):
        found, kept = fits[method], output / f"fit-{method}.safetensors"
        prediction = ClassPrediction.load(kept)
        assert (prediction.draws, prediction.method) == (5, method) and set(found) == {"2", "4"}
        # Four of five draws are one group; of two draws each there are two.
        (four,) = benchmarks.draws.groups(prediction, 4)
        assert found["4"]["nll"] == {"mean": pytest.approx(four.metrics(intervals=False)["nll"].value)}
        two = [each.metrics(intervals=False)["nll"].value for each in benchmarks.draws.groups(prediction, 2)]
        assert found["2"]["nll"]["mean"] == pytest.approx(sum(two) / 2) and found["2"]["nll"]["deviation"] > 0
        kept.rename(output / f"again-{method}.safetensors")
    benchmarks.draws.main([str(tmp_path / "again"), *command[1:]])  # nothing is predicted again: there is no such fit
    assert "| again | pairs | 2 |" in capsys.readouterr().out
