from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from scenarios import saved_base, text_program, text_rows

import bayeslora as bl
from bayeslora import cli, inference, runs
from bayeslora.errors import SettingError, TrainingError

FIT = ["fit", "--model", "demo", "--task", "demo", "--backend", "map", "--train-size", "48"]
QUICK = ["--heldout-size", "60", "--set", "epochs=1", "--set", "batch_size=16", "--set", "cpu=true"]
METRICS = ["accuracy", "nll", "brier", "ece_10", "ece_15", "ece_20", "ece_adaptive", "mcc"]


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "bayeslora.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def call(*arguments: str | Path) -> int:
    """The command line in this process: its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the command line has fitted."""
    folder = tmp_path_factory.mktemp("runs") / "map"
    found = shell(*FIT, *QUICK, "--seed", "2", "--set", "lora.r=4", "--output", folder)
    assert found.returncode == 0, found.stderr
    assert "map on 48 rows of demo" in found.stdout and str(folder) in found.stdout
    assert found.stderr == ""
    return folder


def test_fit_leaves_the_posterior_and_its_configuration(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["backend"], config["seed"], config["lora"]["r"]) == ("map", 2, 4)
    assert config["settings"] == {"epochs": 1.0, "batch_size": 16, "cpu": True}
    record = json.loads((run / "posterior.json").read_text())["record"]
    assert record["finished"] and record["n_data"] == 48 and record["seed"] == 2
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 4


def test_evaluate_writes_metrics_and_a_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, picture = tmp_path / "new" / "metrics.json", tmp_path / "new" / "reliability.png"
    options = ["--split", "heldout", "--samples", "3"]
    assert call("evaluate", run, *options, "--json", metrics, "--plot", picture) == 0
    written = json.loads(metrics.read_text())
    assert list(written) == [*METRICS, "n", "samples", "method", "finished"] and written["finished"]
    # A point estimate needs one pass, however many draws are asked for.
    assert (written["n"], written["samples"], written["method"]) == (60, 1, "sample")
    for name in METRICS:
        assert written[name]["low"] <= written[name]["value"] <= written[name]["high"]
    shown = capsys.readouterr().out
    assert f"{written['nll']['value']:.4f}" in shown and "ece_true" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_diagnose_writes_verdicts_pictures_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chains = ["--backend", "svi", "--chains", "2", "--output", tmp_path / "run"]
    assert call(*FIT, *QUICK, *chains) == 0
    assert {path.name for path in (tmp_path / "run").glob("chain-*")} == {"chain-0", "chain-1"}
    capsys.readouterr()
    options = ["--split", "heldout", "--other", "test_ood", "--draws", "15", "--output", tmp_path / "report"]
    assert call("diagnose", tmp_path / "run", *options) == 0
    shown = capsys.readouterr().out
    assert "How near is it to the posterior?" in shown and "k-hat" in shown and "R-hat of predicted" in shown
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"posterior.nc", "diagnosis.md", "diagnosis.json", "reliability.png", "shift.png"} <= written
    assert call(*FIT, *QUICK, *chains) == 2 and call(*FIT, *QUICK, *chains, "--resume") == 0
    assert call(*FIT, *QUICK, *chains[:2], *chains[4:], "--overwrite") == 0
    assert not list((tmp_path / "run").glob("chain-*"))


def test_evaluation_depends_on_the_seed_alone(run: Path, tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate([1, 1, 2]):
        path = tmp_path / f"{number}.json"
        assert call("evaluate", run, "--split", "heldout", "--seed", str(seed), "--json", path) == 0
        texts.append(path.read_text())
    assert texts[0] == texts[1] != texts[2]


def test_evaluate_on_data_of_ones_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"review": "I liked the soup .", "answer": name} for name in ("no", "unsure", "yes", "yes")]
    data = tmp_path / "reviews.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    options = ["--set", "task.text=review", "--set", "task.label=answer", "--split", "train"]
    assert call("evaluate", run, "--task", data, *options, "--method", "mean", "--json", tmp_path / "m.json") == 0
    assert json.loads((tmp_path / "m.json").read_text())["n"] == 4
    capsys.readouterr()
    assert call("evaluate", run, "--task", data, *options, "--set", "task.labels=yes,no,unsure") == 2
    assert "was fitted to classification into (no, unsure, yes)" in capsys.readouterr().err


def test_laplace_around_an_adapter_keeps_its_prediction(run: Path, tmp_path: Path) -> None:
    flags = ["--backend", "laplace", "--adapter", run, "--seed", "2"]
    assert call(*FIT, *flags, *QUICK, "--output", tmp_path / "laplace") == 0
    laplace = tmp_path / "laplace"
    for name, folder, method in (("map", run, "mean"), ("mean", laplace, "mean"), ("own", laplace, "")):
        given = ["--method", method] if method else []
        assert call("evaluate", folder, *given, "--split", "heldout", "--json", tmp_path / f"{name}.json") == 0
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("map", "mean", "own")}
    assert found["mean"]["nll"] == found["map"]["nll"]
    assert found["own"]["method"] == "mc-joint" and found["own"]["nll"] != found["map"]["nll"]
    assert call(*FIT, *flags, *QUICK, "--set", "tune=heldout", "--output", tmp_path / "heldout") == 0
    assert min(row["heldout_nll"] for row in bl.load(tmp_path / "heldout").record.history) > 0


def test_a_multiple_choice_posterior_predicts_any_number_of_choices(tmp_path: Path) -> None:
    def written(name: str, counts: list[int]) -> Path:
        rows = [
            {"question": "I liked the", "options": [f"soup {n} ." for n in range(count)], "answer": 0}
            for count in counts
        ]
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return tmp_path / name

    columns = ["--set", "task.text=question", "--set", "task.choices=options", "--set", "task.label=answer"]
    two, three = written("two.jsonl", [2] * 4), written("three.jsonl", [3, 2, 3])
    quick = ["--set", "epochs=1", "--set", "cpu=true", "--set", "max_length=12", "--output", tmp_path / "run"]
    assert call("fit", "--model", "demo", "--task", two, *columns, "--backend", "svi", *quick) == 0
    assert json.loads((tmp_path / "run" / "posterior.json").read_text())["program"]["max_length"] == 12
    evaluated = ["--split", "train", "--samples", "2", "--json", tmp_path / "m.json"]
    assert call("evaluate", tmp_path / "run", "--task", three, *columns, *evaluated) == 0
    assert json.loads((tmp_path / "m.json").read_text())["n"] == 3
    prediction = bl.load(tmp_path / "run").predict(
        bl.load_task(str(three), text="question", choices="options", label="answer").train,
        samples=2,
        progress=False,
    )
    assert prediction.probabilities.shape == (3, 3)
    assert prediction.probabilities[1, 2] == 0
    torch.testing.assert_close(prediction.probabilities.sum(-1), torch.ones(3, dtype=torch.float64))


def test_a_configuration_file_does_what_flags_do(run: Path, tmp_path: Path) -> None:
    assert call("fit", "--config", run / "config.yaml", "--seed", "3", "--output", tmp_path / "again") == 0
    first, second = (yaml.safe_load((each / "config.yaml").read_text()) for each in (run, tmp_path / "again"))
    assert second == first | {"seed": 3, "output": str(tmp_path / "again")}


def test_compare_twice_is_once(tmp_path: Path) -> None:
    arguments = [
        "compare",
        *FIT[1:5],
        *FIT[7:],
        *QUICK,
        "--backends",
        "map,svi",
        "--seeds",
        "0",
        "--set",
        "svi.particles=2",
    ]
    command = [*arguments, "--split", "heldout", "--samples", "2", "--output", tmp_path / "out"]
    found = shell(*command)
    assert found.returncode == 0, found.stderr
    assert "NLL" in found.stdout and "svi" in found.stdout
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.json", "comparison.md", "map-seed0", "reliability.png", "svi-seed0",
    ]  # fmt: skip
    record = json.loads((out / "svi-seed0" / "posterior.json").read_text())["record"]
    assert record["settings"]["particles"] == 2 and record["settings"]["batch_size"] == 16
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    assert call(*command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*")}


def test_ctrl_c_stops_a_fit_and_resume_ends_it(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    arguments = [*FIT, "--set", "epochs=6", "--set", "batch_size=4", "--set", "cpu=true", "--output", str(folder)]
    command = [sys.executable, "-m", "bayeslora.cli", *arguments]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not any(folder.rglob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=200)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-2:] == ["Interrupted.", f"Go on with: bayeslora fit --resume --output {folder}"]
    assert not json.loads((folder / "posterior.json").read_text())["record"]["finished"]
    assert call("fit", "--resume", "--output", folder) == 0
    record = json.loads((folder / "posterior.json").read_text())["record"]
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
        "--model missing-folder/at/all --overwrite": "missing-folder",
        "--backend svi --set guide=nonsense --overwrite": "Unknown guide 'nonsense'",
        "--overwrite --resume": "either resumed or overwritten",
        "--backend laplace --program gaussian --set scales=hyper --overwrite": "scales='hyper' needs a model",
    }
    for flags, message in wrong.items():
        assert call(*FIT, *QUICK, *flags.split(), "--output", folder) == 2
        assert message in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_comes_back_if_its_successor_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def killed(*_: object, **__: object) -> None:
        assert (folder / ".replaced" / "posterior.json").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inference, "fit", killed)
        assert call(*FIT, *QUICK, "--overwrite", "--output", folder) == 130
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # As a process leaves it that is killed at once.
    (folder / ".replaced").mkdir()
    for name in ("posterior.json", "posterior.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        (folder / name).rename(folder / ".replaced" / name)
    assert call(*FIT, *QUICK, "--backend", "svi", "--set", "guide=nonsense", "--overwrite", "--output", folder) == 2
    assert call(*FIT, *QUICK, "--overwrite", "--output", folder) == 0
    assert not (folder / ".replaced").exists() and call("evaluate", folder, "--samples", 1) == 0


def test_a_fit_that_was_stopped_is_evaluated_as_such(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    described = json.loads((folder / "posterior.json").read_text())
    described["record"]["finished"] = False
    (folder / "posterior.json").write_text(json.dumps(described))
    assert call("evaluate", folder, "--samples", 1, "--json", tmp_path / "m.json") == 0
    shown = capsys.readouterr()
    assert "was stopped: what is evaluated is how far it had come" in shown.err and "(not finished)" in shown.out
    assert json.loads((tmp_path / "m.json").read_text())["finished"] is False


def test_a_configuration_of_ones_own_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("model: demo  # the small one\ntask: demo\n")
    before = (tmp_path / "config.yaml").read_text()
    for flags in ([], ["--overwrite"]):
        assert call("fit", "--config", tmp_path / "config.yaml", *flags, "--output", tmp_path) == 2
        assert "is no run's and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "sv1"], "Error: Unknown backend 'sv1'. Did you mean 'svi'?"),
        (["--task", "dmo"], "Error: Unknown task 'dmo'. Did you mean 'demo'?"),
        (["--program", "monteclara"], "Did you mean 'monteclora'?"),
        (["--set", "epcohs=1"], "Error: Unknown setting of map 'epcohs'. Did you mean 'epochs'?"),
        (["--set", "epochs=-1"], "Error: epochs must be positive"),
        (["--train-size", "1000000"], "Error: train_size is 1000000"),
        (["--model", "./missing"], "Error: There is no model folder './missing'"),
        (["--model", "nobody/nothing"], "Without the hub, give a local folder: --model"),
        (["--task", "demo", "--data-dir", "."], "Error: The rows of the demo ship with the package"),
        (["--seed", "-1"], "Error: A seed is a whole number from 0 to 4294967295, found -1"),
        (["--set", "lora.alpha=-3"], "Error: lora: alpha must be at least 1"),
        (["--set", "max_length=2"], "Error: max_length is 2, expected more than the 3 tokens around texts"),
        (["--set", "schedule=cosine_with_min_lr"], "Error: Unknown schedule 'cosine_with_min_lr'"),
        (["--task", "glue/mrpc"], "Error: Cannot load nyu-mll/glue"),
        (["--task", "glue/mrpc", "--data-dir", "missing"], "Error: There is no data folder 'missing'"),
        (["--config", "missing.yaml"], "Error: Cannot read the configuration missing.yaml"),
        (["--resume", "--config", "missing.yaml"], "Error: Cannot read the configuration missing.yaml"),
    ],
)
def test_mistakes_end_in_one_message_and_leave_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*FIT, *arguments, "--output", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "missing"], "There is no posterior in 'missing'"),
        (["fit", "--resume", "--output", "missing"], "There is no run in 'missing': expected a file config.yaml"),
        (["fit", "--model", "demo", "--output", "x"], "a run needs a value for task"),
        (["compare", *FIT[1:5], "--backends", "map,sv1", "--output", "x"], "Unknown backend 'sv1'"),
        (["compare", *FIT[1:5], "--backends", "map", "--seeds", "a", "--output", "x"], "found 'a'"),
        (["compare", *FIT[1:5], "--backends", "map", "--set", "svi.epochs=1", "--output", "x"], "not among map"),
        (["compare", *FIT[1:5], "--backends", "map", "--set", "mpa.epochs=1", "--output", "x"], "Did you mean 'map'"),
    ],
)
def test_mistakes_of_other_commands(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_evaluate_cannot_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["--split", "vlidation"], "Did you mean 'validation'?"),
        (["--method", "mode"], "Unknown method 'mode'"),
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
    classes = re.search(r"say so by their names: (\S+)\.", message)
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


def test_lists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("list", "backends") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in inference.BACKENDS) and "Hoffman et al." in shown
    assert call("list", "backends", "-v") == 0
    assert "passes over the training data." in capsys.readouterr().out
    assert call("list", "models", "-v") == 0
    assert "components" in capsys.readouterr().out
    assert call("list", "tasks") == 0
    assert {"demo", "glue/mrpc"} <= set(capsys.readouterr().out.split("\n"))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bayeslora import cli\n"
        "try:\n    cli.main(['fit', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'pyro', 'datasets', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert found.returncode == 0, found.stderr
    assert "--train-size" in found.stdout


def test_settings_of_one_backend_go_to_it_alone() -> None:
    shared, own = cli._by_backend(["epochs=1", "svi.particles=2", "lora.r=4"], ["map", "svi"])
    assert shared == ["epochs=1", "lora.r=4"]
    assert own == {"map": {}, "svi": {"particles": "2"}}
    with pytest.raises(SettingError, match="which is not among map"):
        cli._by_backend(["svi.particles=2"], ["map"])
