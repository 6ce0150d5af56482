from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bayeslora.app import runs
from bayeslora.app.config import RunConfig


def test_what_few_rows_choose_is_measured_on_others(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.set_aside, "SIZES", (4, 30))
    values = {"base": str(base), "task": "sst2", "data_dir": str(data), "backend": "mle", "heldout_size": 6}
    runs.fit(
        RunConfig.from_dict(values | {"settings": {"epochs": 1, "batch_size": 8}}), tmp_path / "fit-0", progress=False
    )
    posterior, _ = benchmarks.set_aside.around(tmp_path / "fit-0")
    assert posterior.program.model.name == "gaussian" and {site.role for site in posterior.sites} == {"A", "B"}
    results = tmp_path / "set_aside.json"
    benchmarks.set_aside.main([str(tmp_path / "fit-0"), "--results", str(results)])
    found = json.loads(results.read_text(encoding="utf-8"))
    # Thirty rows are not held out.
    assert {(line["run"], line["rows"]) for line in found} == {("fit-0", 4)}
    assert len(found) == len(benchmarks.set_aside.HYPERPRIORS) and all(line["nll"] > 0 for line in found)


def test_the_rows_choose_against_the_hyperprior(benchmarks: SimpleNamespace) -> None:
    script = benchmarks.set_aside
    pairs = len(script.WIDTHS), len(script.TEMPERATURES)
    validation = torch.arange(pairs[0] * pairs[1]).double().reshape(*pairs, 1)
    heldout = torch.full((*pairs, 8), 3.0, dtype=torch.float64)
    heldout[5, 7] = 2.0  # eight nats for a pair whose hyperprior asks for half of that
    free, strict = script.Hyperprior(1.0, 1e3, 1e3, 1e3), script.Hyperprior(1.0, 1e-3, 1e-3, 1e-3)
    assert script.elsewhere(heldout, validation, free, 8) == float(validation[5, 7])
    middle = pairs[0] // 2, int(script.TEMPERATURES.log().abs().argmin())
    assert script.elsewhere(heldout, validation, strict, 8) == float(validation[middle])
