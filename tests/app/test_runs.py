"""A run of the command line can be stopped and resumed, is replaced only when asked, and is never lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_line import FIT, QUICK, call, environment

from bayeslora import inference
from bayeslora.app import runs


def test_ctrl_c_stops_a_fit_and_resume_ends_it(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    arguments = [*FIT, "--set", "epochs=6", "--set", "batch_size=4", "--set", "cpu=true", "--output", str(folder)]
    command = [sys.executable, "-m", "bayeslora.app.cli", *arguments]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not any(folder.rglob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=200)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-2:] == ["Interrupted.", f"Go on with: bayeslora fit --resume --output {folder}"]
    assert not json.loads((folder / "posterior" / "posterior.json").read_text())["record"]["finished"]
    assert call("fit", "--resume", "--output", folder) == 0
    record = json.loads((folder / "posterior" / "posterior.json").read_text())["record"]
    assert record["finished"] and record["settings"]["epochs"] == 6
    assert call("fit", "--resume", "--output", folder) == 0  # nothing is left to do


def test_ctrl_c_before_the_fit_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "task_of", interrupt)
    assert call(*FIT, *QUICK, "--output", tmp_path / "out") == 130
    assert capsys.readouterr().err == "Interrupted.\nNothing was fitted yet.\n"


def test_a_run_is_overwritten_only_when_asked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    command = [*FIT, *QUICK, "--output", folder]
    assert call(*command) == 2
    assert "holds a run already: resume it, overwrite it, or choose another folder" in capsys.readouterr().err
    assert call(*command, "--resume") == 2  # it has another seed and rank
    assert "holds a run with other settings (there and now): seed: 2 and 0; lora.r: 4 and 8" in capsys.readouterr().err
    (folder / "notes.txt").write_text("mine")
    (folder / "metrics.json").write_text("{}")
    assert call(*command, "--overwrite") == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "metrics.json").exists()  # of the run that was there


def test_a_run_is_not_removed_for_one_that_cannot_start(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wrong = {
        "--task glue/mrcp --overwrite": "Unknown task 'glue/mrcp'",
        "--base missing-folder/at/all --overwrite": "missing-folder",
        "--backend svi --set guide=nonsense --overwrite": "Unknown guide 'nonsense'",
        "--overwrite --resume": "either resumed or overwritten",
        "--backend laplace --model gaussian --set scales=hyper --overwrite": "scales='hyper' needs a model",
    }
    for flags, message in wrong.items():
        assert call(*FIT, *QUICK, *flags.split(), "--output", folder) == 2
        assert message in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_stays_until_its_successor_has_come_to_its_end(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def stopped(*_: object, **__: object) -> None:
        assert before == {path: path.read_bytes() for path in before}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inference, "fit", stopped)
        assert call(*FIT, *QUICK, "--overwrite", "--output", folder) == 130
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    successor = Path(shutil.copytree(folder, folder / ".bayeslora-next"))  # as a process leaves it that is killed
    finish(successor, False)
    with pytest.warns(UserWarning, match="A run that is to replace the one in .* was stopped"):
        assert inference.load(folder).record.finished
    assert call("fit", "--resume", "--output", folder) == 0
    assert inference.load(folder).record.finished and not successor.exists()


def finish(folder: Path, finished: bool) -> None:
    path = folder / "posterior" / "posterior.json"
    described = json.loads(path.read_text())
    described["record"]["finished"] = finished
    path.write_text(json.dumps(described))


def test_a_fit_that_was_stopped_is_evaluated_as_such(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    finish(folder, False)
    assert call("evaluate", folder, "--draws", 1, "--json", tmp_path / "m.json") == 0
    shown = capsys.readouterr()
    assert "was stopped: what is evaluated is how far it had come" in shown.err and "(not finished)" in shown.out
    assert json.loads((tmp_path / "m.json").read_text())["finished"] is False


def test_a_configuration_of_ones_own_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("base: demo  # the small one\ntask: demo\n")
    before = (tmp_path / "config.yaml").read_text()
    for flags in ([], ["--overwrite"]):
        assert call("fit", "--config", tmp_path / "config.yaml", *flags, "--output", tmp_path) == 2
        assert "is no run's and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == before
