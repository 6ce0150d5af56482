from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call

from bayeslora.app.studies import Study
from bayeslora.app.studies.estimate import _linear, estimate

Made = Callable[..., dict[str, Any]]


def test_seconds_are_linear_in_rows(study: Made, tmp_path: Path, fits: Callable[[], list[str]]) -> None:
    assert _linear(1.0, 1.5, 9) == 5.0 and _linear(1.0, 0.9, 9) == 1.0
    methods = {"quick": {"settings": {"seconds": 0.4}}, "around": {"backend": "quick", "start": "quick"}, "hungry": {}}
    quick, around, hungry = estimate(Study(study(methods=methods, seeds=[0, 1]), tmp_path / "out"))
    assert quick.fit_seconds >= 0.4 and around.fit_seconds < quick.fit_seconds
    assert (quick.cells, around.cells, hungry.cells) == (2, 2, 2)
    assert hungry.error.startswith("MemoryError: no room") and not (tmp_path / "out").exists()


def test_a_dry_run_shows_cells_and_runs_none(
    study: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], plugin: Path
) -> None:
    made = study(methods=["quick"], seeds=[0])
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(made))
    words = ["compare", tmp_path / "study.yaml", "--output", tmp_path / "out", "--plugin", plugin]
    assert call(*words, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert Study(made).cells[0].name in shown and "1 cells at most, about " in shown
    assert not (tmp_path / "out").exists()
