from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "scripts" / "kill.py"), "--kills", "4"]
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
