"""The command line as tests call it: in this process, or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bayeslora.app import cli

FIT = ["fit", "--base", "demo", "--task", "demo", "--backend", "map", "--train-size", "48"]
QUICK = ["--heldout-size", "60", "--set", "epochs=1", "--set", "batch_size=16", "--set", "cpu=true"]


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "bayeslora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def call(*arguments: str | Path) -> int:
    """The command line in this process: its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)
