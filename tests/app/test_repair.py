"""Laplace around a mode that overfits, with nothing set of its own, from the shell: its NLL falls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import call

ROWS = 1000  # of the demo's validation split


def fitted(folder: Path, *flags: str | Path) -> Path:
    mode = ["--set", "epochs=15", "--set", "batch_size=16", "--set", "learning_rate=1e-2", "--set", "cpu=true"]
    task = ["--base", "demo", "--task", "demo", "--train-size", "64"]
    assert call("fit", *task, *flags, *mode, "--output", folder) == 0
    return folder


def metrics(run: Path, *flags: str) -> dict[str, float]:
    assert call("evaluate", run, *flags, "--json", run / "metrics.json") == 0
    found = json.loads((run / "metrics.json").read_text())
    return {name: found[name]["value"] for name in ("accuracy", "nll")}


def test_laplace_with_nothing_set_repairs_a_mode_that_overfits(tmp_path: Path) -> None:
    plain = fitted(tmp_path / "mle", "--backend", "mle")
    runs = [
        fitted(tmp_path / "found", "--backend", "laplace"),
        fitted(tmp_path / "given", "--backend", "laplace", "--adapter", plain),
    ]
    mode = metrics(plain)
    assert mode["nll"] > 1
    assert metrics(runs[0], "--method", "mean") == pytest.approx(mode, rel=1e-5)
    for run in runs:
        found = metrics(run)
        # Of three classes the average over logits may have another likeliest one than the mode: none was seen, two may.
        assert abs(found["accuracy"] - mode["accuracy"]) * ROWS < 2.5
        assert found["nll"] < 0.6 * mode["nll"]  # 0.57 was seen
