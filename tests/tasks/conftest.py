from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text('body,stars\n"good, really",great\nNA,poor\nfine,great\ncheap,poor\n', encoding="utf-8")
    return path
