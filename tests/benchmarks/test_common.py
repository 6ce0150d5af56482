"""Runs that are done once, by one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_runs_of_other_settings_are_not_taken_for_finished(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    run = benchmarks.common.Run("sst2", "mle", 0, 1000)
    record = {"run": {**vars(run), "epochs": 3.0}}
    (tmp_path / f"{run.name}.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit, match="epochs"):
        benchmarks.common.finished(run, tmp_path)


def test_a_claim_is_exclusive_and_ends_with_its_process(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    holder = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with benchmarks.common.claimed(lock) as mine:
            assert not mine
        process.kill()
        process.wait()
        with benchmarks.common.claimed(lock) as mine:
            assert mine
