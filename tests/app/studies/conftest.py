from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenarios import write_rows

from bayeslora import registry
from bayeslora.inference import BACKENDS
from bayeslora.registry import load_file

PLUGIN = Path(__file__).parent / "backends.py"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of backends, which is forgotten after each test."""
    monkeypatch.setattr(BACKENDS, "_homes", dict(BACKENDS._homes))
    monkeypatch.setattr(registry, "_LOADED", {})
    monkeypatch.delitem(sys.modules, "backends", raising=False)
    load_file(PLUGIN)
    return PLUGIN


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A study of cells that take no time; each fit is a line of ``fits``."""
    words = ["cold soup", "warm bread", "old cheese", "fresh figs"]
    rows = [{"text": f"{words[number % 4]} {number}", "label": ("no", "yes")[number % 2]} for number in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)

    def made(**changes: Any) -> dict[str, Any]:
        common = {"train_size": 12, "heldout_size": 20, "settings": {"log": str(tmp_path / "fits")}}
        return {
            "tasks": {"demo": str(tmp_path / "rows.jsonl")},
            "bases": ["demo"],
            "methods": {"quick": {}, "wide": {"backend": "quick", "settings": {"learning_rate": 0.1}}},
            "seeds": [0, 3],
            "common": common,
            "evaluation": {"split": "train" if "tuning" in changes else "heldout", "draws": 2},
        } | changes

    return made


@pytest.fixture
def fits(tmp_path: Path) -> Callable[[], list[str]]:
    """Lines that the fits have left."""

    def lines() -> list[str]:
        file = tmp_path / "fits"
        return file.read_text().splitlines() if file.exists() else []

    return lines
