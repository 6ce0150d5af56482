"""A mistake ends in one message and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import FIT, QUICK, call
from scenarios import saved_base, text_program, text_rows

import bayeslora as bl
from bayeslora import inference
from bayeslora.app import cli
from bayeslora.errors import TrainingError

FITTED = [*FIT, "--output", "out"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*FITTED, "--backend", "sv1"], "Error: Unknown backend 'sv1'. Did you mean 'svi'?"),
        ([*FITTED, "--task", "dmo"], "Error: Unknown task 'dmo'. Did you mean 'demo'?"),
        ([*FITTED, "--model", "monteclara"], "Did you mean 'monteclora'?"),
        ([*FITTED, "--set", "epcohs=1"], "Error: Unknown setting of map 'epcohs'. Did you mean 'epochs'?"),
        ([*FITTED, "--set", "epochs=-1"], "Error: map: epochs should be greater than 0"),
        ([*FITTED, "--train-size", "1000000"], "Error: train_size is 1000000"),
        ([*FITTED, "--base", "./missing"], "Error: There is no base network './missing'"),
        ([*FITTED, "--base", "nobody/nothing"], "Without the hub, give a local folder: --base"),
        ([*FITTED, "--task", "demo", "--data-dir", "."], "Error: The rows of the demo ship with the package"),
        ([*FITTED, "--seed", "-1"], "Error: a run: seed should be greater than or equal to 0, found -1"),
        ([*FITTED, "--set", "lora.alpha=-3"], "Error: lora: alpha should be greater than or equal to 1"),
        ([*FITTED, "--set", "max_length=2"], "Error: max_length is 2, expected more than the 3 tokens around texts"),
        ([*FITTED, "--set", "schedule=cosine_with_min_lr"], "map: schedule should be 'linear', 'cosine',"),
        ([*FITTED, "--task", "glue/mrpc"], "Error: Cannot load nyu-mll/glue"),
        ([*FITTED, "--task", "glue/mrpc", "--data-dir", "missing"], "Error: There is no data folder 'missing'"),
        ([*FITTED, "--config", "missing.yaml"], "Error: Cannot read the configuration missing.yaml"),
        ([*FITTED, "--resume", "--config", "missing.yaml"], "Error: Cannot read the configuration missing.yaml"),
        ([*FITTED, "--set", "modle.eps=1"], "Unknown prefix of a setting 'modle'. Did you mean 'model'?"),
        ([*FITTED, "--model", "demo"], "the base network, such as 'demo', is 'base'"),
        ([*FIT, "--output", ""], "the path is empty"),
        ([*FIT, "--output", f"{__file__}/run"], "cannot be written"),
        (["evaluate", "missing", "--json", f"{__file__}/x.json"], "cannot be written"),
        (["evaluate", "missing", "--plot", ""], "the path is empty"),
        (["evaluate", "missing", "--seed", "-1"], "Invalid value for '--seed'"),
        (["evaluate", "missing", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["compare", *FIT[1:5], "--backends", "mle,mle", "--output", "x"], "A backend is given twice: mle, mle"),
        (["evaluate", "missing"], "There is no posterior in 'missing'"),
        (["evaluate", "samples"], "There is no posterior in 'samples'"),  # a name of one's own, and no flag
        (["fit", "--resume", "--output", "missing"], "There is no run in 'missing': expected a file config.yaml"),
        (["fit", "--base", "demo", "--output", "x"], "a run needs a value for task"),
        (["compare", *FIT[1:5], "--backends", "map,sv1", "--output", "x"], "Unknown backend 'sv1'"),
        (["compare", *FIT[1:5], "--backends", "map", "--seeds", "a", "--output", "x"], "found 'a'"),
        (["compare", *FIT[1:5], "--backends", "map", "--set", "svi.epochs=1", "--output", "x"], "not among map"),
        (["compare", *FIT[1:5], "--backends", "map", "--set", "mpa.epochs=1", "--output", "x"], "Did you mean 'map'"),
    ],
)
def test_mistakes_end_in_one_message_and_leave_nothing(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*command) == 2
    captured = capsys.readouterr()
    shown = " ".join(captured.err.replace("│", " ").split())  # a long path breaks the lines elsewhere
    assert message in shown and "Traceback" not in shown
    assert captured.out == "" and list(tmp_path.iterdir()) == []


def test_what_evaluate_cannot_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["--split", "vlidation"], "Did you mean 'validation'?"),
        (["--method", "mode"], "Unknown method of prediction 'mode'"),
        (["--plot", tmp_path / "picture.txt"], "Cannot draw into 'picture.txt'"),
        (["--base", tmp_path / "missing"], "missing"),
        (["--set", "epochs=1"], "evaluate takes --set for settings of another task"),
    ]:
        assert call("evaluate", run, *arguments) == 2
        assert message in capsys.readouterr().err


def test_a_posterior_without_a_task_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = text_program(saved_base(tmp_path / "base"))
    bl.fit(program, text_rows(), "map", epochs=1, cpu=True, progress=False).save(tmp_path / "run")
    assert call("evaluate", tmp_path / "run") == 2
    assert "fitted without a task by name: say which one" in capsys.readouterr().err


def test_another_task_must_have_the_same_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.csv").write_text("text,label\nnothing,bad\nall,good\n")
    other = ["evaluate", run, "--task", tmp_path / "other.csv", "--split", "train", "--set", "task.text=text"]
    other += ["--set", "task.label=label", "--set"]
    assert call(*other, "task.labels=bad,good") == 2
    message = capsys.readouterr().err
    assert "classification into (bad, good), but the posterior was fitted to classification into" in message
    classes = re.search(r"say so by their names: .* --set (\S+)\)\.", message)
    assert classes is not None
    (tmp_path / "other.csv").write_text("text,label\nnothing,0\nall,1\n")
    assert call(*other, classes[1]) == 0
    assert "2 rows" in capsys.readouterr().out


def test_a_failed_training_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TrainingError("The loss is nan at step 3.")

    monkeypatch.setattr(inference, "fit", fail)
    command = [*FIT, *QUICK, "--output", str(tmp_path / "out")]
    assert call(*command) == 2
    assert capsys.readouterr().err == "Error: The loss is nan at step 3.\n"
    with pytest.raises(TrainingError):
        cli.main([*command, "--debug"])
