from __future__ import annotations

from pathlib import Path

import pytest
from command_line import FIT, QUICK, shell


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the command line has fitted."""
    folder = tmp_path_factory.mktemp("runs") / "map"
    found = shell(*FIT, *QUICK, "--seed", "2", "--set", "lora.r=4", "--output", folder)
    assert found.returncode == 0, found.stderr
    assert "map on 48 rows of demo" in found.stdout and str(folder) in found.stdout
    # One epoch is too little to learn anything, and this is said.
    assert all("no better than the base rate" in line for line in found.stderr.splitlines())
    return folder
