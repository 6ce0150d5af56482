from __future__ import annotations

from pathlib import Path

import pytest
from command_line import FIT, QUICK, call


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the command line has fitted."""
    folder = tmp_path_factory.mktemp("runs") / "map"
    assert call(*FIT, *QUICK, "--seed", "2", "--set", "lora.r=4", "--output", folder) == 0
    return folder
