"""A run of the command line can be stopped and resumed, is replaced only when asked, and is never lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from command_line import FIT, QUICK, call, environment

from bayeslora import inference
from bayeslora.app import runs
from bayeslora.inference import load


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_its_number_and_a_word(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "task_of", lambda *_: os.kill(os.getpid(), number))
    assert call(*FIT, *QUICK, "--output", tmp_path / "out") == 128 + number
    assert capsys.readouterr().err == "Interrupted.\nNothing was fitted yet.\n"


def test_a_run_is_overwritten_only_when_asked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    command = [*FIT, *QUICK, "--output", folder]
    assert call(*command) == 2
    assert "holds a run already: resume it, overwrite it, or choose another folder" in capsys.readouterr().err
    assert call(*command, "--resume", "--seed", "0", "--set", "lora.r=8") == 2
    assert "holds a run with other settings (there and now): seed: 2 and 0; lora.r: 4 and 8" in capsys.readouterr().err
    (folder / "notes.txt").write_text("mine")
    assert call(*command, "--overwrite") == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0
    assert (folder / "notes.txt").read_text() == "mine"


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
        "--backend laplace --model scalabl --overwrite": "is made of other sites' draws",
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


def test_flags_of_a_resumed_run_go_over_its_own_configuration(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    assert call("fit", "--resume", "--output", folder, "--seed", "2", "--set", "batch_size=16") == 0
    assert f"The run in '{folder}' was finished before: nothing was left to do." in capsys.readouterr().err
    assert call("fit", "--resume", "--output", folder, "--set", "epochs=400") == 2
    assert "(there and now): settings.epochs: 1.0 and 400.0" in capsys.readouterr().err
    for flag, was in (("backend", "map"), ("lora", "lora")):
        other = {"backend": "laplace", "lora": "dora"}[flag]
        assert call("fit", "--resume", "--output", folder, f"--{flag}", other) == 2
        assert f"was begun with {flag} {was}, and --{flag} says {other}: leave it out" in capsys.readouterr().err
    assert call("fit", "--resume", "--output", tmp_path / "none") == 2
    assert "There is no run in" in capsys.readouterr().err


def test_flags_of_a_run_that_was_stopped_before_it_had_anything_begin_another(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "out")
    assert call(*FIT, "--set", "epochs=1", "--set", "batch_size=40", "--resume", "--output", tmp_path / "out") == 0
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (saved["seed"], saved["settings"]["batch_size"]) == (0, 40)


def test_a_run_can_be_told_to_resume_before_it_was_ever_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*FIT, *QUICK, "--set", "max_length=8", "--resume", "--output", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "training rows are cut to 8 tokens; --set max_length= says otherwise." in told
    assert "was finished before" not in told


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
    assert call("evaluate", folder, "--split", "heldout", "--draws", 1, "--json", tmp_path / "m.json") == 0
    shown = capsys.readouterr()
    assert "was stopped: what is shown is how far it had come" in shown.err and "(not finished)" in shown.out
    assert json.loads((tmp_path / "m.json").read_text())["finished"] is False


def test_a_configuration_of_ones_own_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("base: demo  # the small one\ntask: demo\n")
    before = (tmp_path / "config.yaml").read_text()
    for flags in ([], ["--overwrite"]):
        assert call("fit", "--config", tmp_path / "config.yaml", *flags, "--output", tmp_path) == 2
        assert "is no run's and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_whose_posterior_and_configuration_name_other_seeds_is_not_resumed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for finished in (True, False):
        folder = Path(shutil.copytree(run, tmp_path / str(finished)))
        finish(folder, finished)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("seed: 2", "seed: 3"))
        assert call("fit", "--resume", "--output", folder) == 2
        assert "(there and now): seed of posterior.json: 2 and 3" in capsys.readouterr().err


def test_a_second_process_is_told_at_once_who_holds_the_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    command = [*FIT, *QUICK, "--output", str(folder)]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    script = "import sys; from pathlib import Path; from bayeslora import store\n"
    script += "with store.opened(Path(sys.argv[1])): print('open', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment()}
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], **pipes) as process:
        assert process.stdout.readline() == b"open\n"
        for arguments in (command, [*command, "--resume"], [*command, "--overwrite"]):
            assert call(*arguments) == 2
            message = f"Error: '{folder}' is being written by process {process.pid} on "
            assert capsys.readouterr().err.startswith(message)
        assert call("evaluate", folder, "--split", "heldout", "--draws", 1) == 0  # who reads needs no lock
        process.kill()
    assert call("fit", "--resume", "--output", folder) == 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_successor_is_named_and_can_be_gone_on_with_or_begun_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    finish(Path(shutil.copytree(run, folder / ".bayeslora-next")), False)
    with pytest.warns(UserWarning, match=f"'{folder}' is under way or was stopped .fit --resume goes on with it"):
        assert call("evaluate", folder, "--split", "heldout", "--draws", 1) == 0
    assert "(not finished)" not in capsys.readouterr().out
    assert call(*FIT, *QUICK, "--output", folder) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert call(*FIT, *QUICK, "--overwrite", "--output", folder) == 0
    assert not (folder / ".bayeslora-next").exists() and runs.saved_config(folder).seed == 0


def test_a_run_can_be_the_adapter_of_another_one(run: Path, tmp_path: Path) -> None:
    trained = load(run).mean()
    for adapter in (run, run / "posterior"):
        arguments = ["fit", "--base", "demo", "--task", "demo", "--train-size", "16", "--backend", "map", *QUICK]
        assert call(*arguments, "--adapter", adapter, "--output", tmp_path / adapter.name) == 0
        found = load(tmp_path / adapter.name).program.sites
        assert all(torch.equal(site.initial, trained[site.name]) for site in found)


def test_held_out_rows_that_the_adapter_was_trained_on_are_told(run: Path, tmp_path: Path) -> None:
    record = load(run).record
    around = ["fit", "--base", "demo", "--task", "demo", "--backend", "laplace", "--adapter", run, "--set", "cpu=true"]
    seed, both = record.seed, (record.task["train_size"], record.task["heldout_size"])
    for name, train, heldout, told in (("same", *both, 0), ("shifted", 20, 60, 28)):
        sizes = ["--train-size", train, "--heldout-size", heldout, "--seed", seed]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert call(*around, *sizes, "--output", tmp_path / name) == 0
        said = [str(each.message) for each in caught if "the adapter was trained on" in str(each.message)]
        assert [text.partition(" of the ")[0] for text in said] == ([str(told)] if told else [])


def test_rows_to_report_on_that_the_adapter_was_trained_on_are_told(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(f"row {n},{n % 2}\n" for n in range(24)))
    quick = ["fit", "--base", "demo", "--task", tmp_path / "own.csv", "--set", "cpu=true"]
    assert call(*quick, "--backend", "map", "--set", "epochs=1", "--output", tmp_path / "all") == 0
    around = ["--backend", "laplace", "--adapter", tmp_path / "all", "--set", "task.test_size=6"]
    with pytest.warns(UserWarning, match=r"^6 of the 6 test rows are among .* own run: test_size=0\.$"):
        assert call(*quick, *around, "--output", tmp_path / "around") == 0
