"""What the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from causal_scenarios import causal_base
from command_line import FIT, QUICK, call, environment, shell
from scenarios import write_rows

import bayeslora as bl
from bayeslora import inference, passes
from bayeslora.inference.presets import PRESETS
from bayeslora.models.guides.auto import ALIASES, GUIDES
from bayeslora.observations import encode

METRICS = [
    "accuracy", "nll", "brier", "ece_10", "ece_15", "ece_20", "ece_15_by_chance", "ece_adaptive", "mcc",
    "kl", "ece_true",
]  # fmt: skip


def test_fit_leaves_the_posterior_and_its_configuration(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["backend"], config["seed"], config["lora"]["r"]) == ("map", 2, 4)
    assert config["settings"] == {"epochs": 1.0, "batch_size": 16, "cpu": True}
    record = json.loads((run / "posterior" / "posterior.json").read_text())["record"]
    assert record["finished"] and record["n_data"] == 48 and record["seed"] == 2
    assert json.loads((run / "posterior" / "adapter_config.json").read_text())["r"] == 4


def test_evaluate_writes_metrics_and_a_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, picture = tmp_path / "new" / "metrics.json", tmp_path / "new" / "reliability.png"
    options = ["--split", "heldout", "--draws", "3"]
    assert call("evaluate", run, *options, "--json", metrics, "--plot", picture) == 0
    written = json.loads(metrics.read_text())
    assert list(written) == [*METRICS, "interval", "n", "draws", "method", "finished"] and written["finished"]
    # A point estimate needs one pass, however many draws are asked for.
    assert (written["n"], written["draws"], written["method"]) == (60, 1, "sample")
    for name in METRICS:
        assert written[name]["low"] <= written[name]["value"] <= written[name]["high"]
    shown = capsys.readouterr().out
    # One measurement, for the table and the file.
    assert all(f"{written[name]['low']:.4f} to {written[name]['high']:.4f}" in shown for name in METRICS)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_diagnose_writes_verdicts_pictures_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chains = ["--backend", "svi", "--chains", "2", "--output", tmp_path / "run"]
    assert call(*FIT, *QUICK, *chains) == 0
    assert {path.name for path in (tmp_path / "run").glob("chain-*")} == {"chain-0", "chain-1"}
    capsys.readouterr()
    options = ["--split", "heldout", "--other", "train", "--draws", "15", "--output", tmp_path / "report"]
    assert call("diagnose", tmp_path / "run", *options) == 0
    shown, said = capsys.readouterr()
    assert "On the rows of 'heldout' the fit chose a temperature" in said
    assert "How near is it to the posterior?" in shown and "k-hat" in shown and "R-hat of predicted" in shown
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"posterior.nc", "diagnosis.md", "diagnosis.json", "reliability.png", "shift.png"} <= written
    assert call(*FIT, *QUICK, *chains) == 2 and call(*FIT, *QUICK, *chains, "--resume") == 0
    assert call(*FIT, *QUICK, *chains[:2], *chains[4:], "--overwrite") == 0
    assert not list((tmp_path / "run").glob("chain-*"))


def test_a_preset_is_fitted_and_what_is_said_goes_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["fit", "--base", "demo", "--task", "demo", "--train-size", "48", *QUICK, "--preset", "bayesian-lora"]
    assert call(*command, "--set", "guide.flow=none", "--output", run) == 0, capsys.readouterr().err
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["preset"], config["backend"], config["model"]) == ("bayesian-lora", "svi", "gaussian")
    assert config["settings"]["temperature"] == 0.6 and config["settings"]["batch_size"] == 16
    guide = config["settings"]["guide_settings"]
    assert guide["m"] == 9 and guide["flow"] is None
    assert call("fit", "--resume", "--output", run) == 0
    assert call(*command, "--resume", "--output", run) == 0  # what is not said is as it was begun
    assert call(*command, "--set", "guide.flow=16", "--resume", "--output", run) == 2
    assert "guide_settings.flow: None and 16" in capsys.readouterr().err


def test_diagnose_reports_on_another_task(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"review": "I liked the soup .", "answer": name} for name in ("no", "unsure", "yes", "yes")]
    data = tmp_path / "reviews.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    columns = ["--set", "task.text=review", "--set", "task.label=answer"]
    capsys.readouterr()
    assert call("diagnose", run, "--task", data, *columns, "--split", "train", "--output", tmp_path / "report") == 0
    assert "4 rows of train: accuracy" in capsys.readouterr().out
    assert (tmp_path / "report" / "diagnosis.md").read_text().startswith("# map on reviews")


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


def test_what_was_taken_for_what_in_the_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "reviews"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.csv").write_text("text,label\nI liked the soup .,yes\nI liked nothing .,no\n")
    command = ["fit", "--base", "demo", "--task", data, "--backend", "map", *QUICK[2:], "--output", tmp_path / "run"]
    assert call(*command) == 0
    columns = "Unasked, column 'text' is read as the text and column 'label' is read as the label."
    rows = "The rows of split 'test' stand in for a validation split."
    said = capsys.readouterr().err
    assert columns in said and rows in said
    assert call("evaluate", tmp_path / "run") == 0
    assert rows in capsys.readouterr().err
    assert call("diagnose", tmp_path / "run", "--output", tmp_path / "report") == 0
    assert "2 rows of test: accuracy" in capsys.readouterr().out
    (data / "train.csv").unlink()
    assert call(*command, "--overwrite") == 2
    assert "There is nothing to train on: split 'train' of task 'reviews' has no rows" in capsys.readouterr().err


def test_rows_that_a_temperature_was_chosen_on_are_said_to_be_such(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = [*FIT[:5], "--backend", "svi", *FIT[7:], *QUICK, "--output", tmp_path / "svi"]
    assert call(*fit) == 0
    said = {}
    for folder, split in ((tmp_path / "svi", "heldout"), (tmp_path / "svi", "validation"), (run, "heldout")):
        capsys.readouterr()
        assert call("evaluate", folder, "--split", split, "--draws", 2) == 0
        said[folder.name, split] = "On the rows of 'heldout' the fit chose a temperature" in capsys.readouterr().err
    assert said == {("svi", "heldout"): True, ("svi", "validation"): False, ("map", "heldout"): False}
    report = ["--split", "validation", "--other", "heldout", "--draws", 12, "--output", tmp_path / "report"]
    assert call("diagnose", tmp_path / "svi", *report) == 0
    assert "On the rows of 'heldout' the fit chose a temperature" in capsys.readouterr().err


def test_evaluate_reads_its_rows_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(passes, "encode", lambda data, *how: read.append(data) or encode(data, *how))
    assert call("evaluate", run, "--split", "heldout") == 0
    assert len(read) == 1


def test_laplace_around_an_adapter_keeps_its_prediction(run: Path, tmp_path: Path) -> None:
    flags = ["--backend", "laplace", "--adapter", run, "--seed", "2"]
    assert call(*FIT, *flags, *QUICK, "--output", tmp_path / "laplace") == 0
    laplace = tmp_path / "laplace"
    for name, folder, method in (("map", run, "mean"), ("mean", laplace, "mean"), ("own", laplace, "")):
        given = ["--method", method] if method else []
        assert call("evaluate", folder, *given, "--split", "heldout", "--json", tmp_path / f"{name}.json") == 0
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("map", "mean", "own")}
    assert found["mean"]["nll"] == found["map"]["nll"]
    assert found["own"]["method"] == "tempered" and found["own"]["nll"] != found["map"]["nll"]
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
    assert call("fit", "--base", "demo", "--task", two, *columns, "--backend", "svi", *quick) == 0
    assert json.loads((tmp_path / "run" / "posterior" / "posterior.json").read_text())["program"]["max_length"] == 12
    evaluated = ["--split", "train", "--draws", "2", "--json", tmp_path / "m.json"]
    assert call("evaluate", tmp_path / "run", "--task", three, *columns, *evaluated) == 0
    assert json.loads((tmp_path / "m.json").read_text())["n"] == 3
    prediction = bl.load(tmp_path / "run").predict(
        bl.load_task(str(three), text="question", choices="options", label="answer").train,
        draws=2,
        progress=False,
    )
    assert prediction.probabilities.shape == (3, 3)
    assert prediction.probabilities[1, 2] == 0
    torch.testing.assert_close(prediction.probabilities.sum(-1), torch.ones(3, dtype=torch.float64))


def test_a_configuration_file_does_what_flags_do(run: Path, tmp_path: Path) -> None:
    assert call("fit", "--config", run / "config.yaml", "--seed", "3", "--output", tmp_path / "again") == 0
    first, second = (yaml.safe_load((each / "config.yaml").read_text()) for each in (run, tmp_path / "again"))
    assert second == first | {"seed": 3, "output": str(tmp_path / "again")}


def test_lists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("list", "backends") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in inference.BACKENDS) and "Hoffman et al." in shown
    assert call("list", "backends", "-v") == 0
    assert "passes over the training data." in capsys.readouterr().out
    assert call("list", "models", "-v") == 0
    assert "components" in capsys.readouterr().out
    assert call("list", "presets", "-v") == 0
    shown = capsys.readouterr().out
    assert "bayesian-lora: Lin et al." in shown
    averaged = [line.split()[-1] for line in shown.splitlines() if "predictions (--draws)" in line]
    assert averaged == [str(preset.draws) for _, preset in PRESETS.items() if preset.draws]
    assert call("list", "recipes") == 0
    assert "Lester et al." in capsys.readouterr().out
    assert call("list", "recipes", "-v") == 0
    assert "target_modules" in capsys.readouterr().out
    assert call("list", "guides") == 0
    shown = capsys.readouterr().out
    assert "Inducing matrices for LoRA matrices" in shown
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line.strip()}
    assert {"structured", "delta", *ALIASES, *GUIDES} <= listed
    assert call("list", "tasks") == 0
    assert {"demo", "glue/mrpc"} <= set(capsys.readouterr().out.split("\n"))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bayeslora.app import cli\n"
        "try:\n    cli.main(['fit', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'pyro', 'datasets', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert found.returncode == 0, found.stderr
    assert "--train-size" in found.stdout


def test_the_package_runs_as_a_module_and_says_no_more_than_it_has_to(tmp_path: Path) -> None:
    found = shell(*FIT, *QUICK, "--output", tmp_path)
    assert found.returncode == 0, found.stderr
    assert "map on 48 rows of demo" in found.stdout and str(tmp_path) in found.stdout
    # One epoch is too little to learn anything, and this is said.
    assert all("better than the base rate" in line for line in found.stderr.splitlines())


@pytest.mark.parametrize(
    "mistake", ["--backend svii", "--model montecarlo", "--set epoch=3", "--set model.components=2", "--set task.txt=a"]
)
def test_an_error_of_spelling_needs_no_torch(mistake: str, tmp_path: Path) -> None:
    words = ["fit", "--base", "demo", "--task", "demo", *mistake.split(), "--output", str(tmp_path / "run")]
    words += ["--model", "gaussian"] if "components" in mistake else []
    code = (
        "import sys\nfrom bayeslora.app import cli\ntry:\n    cli.main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment())
    assert found.stdout == "2 []\n" and "Error: Unknown" in found.stderr, found


def test_a_causal_base_is_asked_as_the_task_calls_for_unless_another_observation_is_named(
    mrpc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--task", "mrpc", "--data-dir", mrpc, "--backend", "map", "--set", "epochs=1", "--set", "cpu=true"]
    begin = ["fit", "--base", causal_base(), *data, "--set", "lora.target_modules=q_proj"]
    assert call(*begin, "--set", "observation.likelihood=vocabulary", "--output", tmp_path / "one") == 0
    said = capsys.readouterr()
    assert "The observation is 'prompted'; --observation chooses another: classes" in said.err
    assert bl.load(tmp_path / "one").program.observation.outputs == 3
    assert call("evaluate", tmp_path / "one", "--batch-size", "4") == 0
    capsys.readouterr()
    assert call(*begin, "--observation", "classes", "--output", tmp_path / "other") == 0
    assert "--observation" not in capsys.readouterr().err
    assert bl.load(tmp_path / "other").program.observation.name == "classes"


def test_tasks_show_prints_a_row_as_every_observation_reads_it(mrpc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tasks", "show", "mrpc", "--data-dir", mrpc, "--row", "3") == 0
    shown = capsys.readouterr().out
    assert "[classes]\nfirst 3\nsecond 3\n-> equivalent\n" in shown
    asked = "Sentence 1: first 3\nSentence 2: second 3\nQuestion: Do both sentences say the same, yes or no?\nAnswer:"
    assert f"[prompted, by a causal language model]\n{asked}\n-> yes\n" in shown
    assert call("tasks", "show", "mrpc", "--data-dir", mrpc, "--split", "validation", "--row", "6") == 2
    assert "has 6 rows: there is no row 6" in capsys.readouterr().err
    assert call("tasks", "show", "mrpc", "--data-dir", mrpc, "--set", "epochs=1") == 2
    assert "settings of the task alone" in capsys.readouterr().err
    assert call("tasks", "show", "mrpc", "--data-dir", mrpc, "--set", "task.prompt={film}: it is") == 2
    assert "Unknown column 'film'" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "asked"), [("arc_easy", "A. sun\nB. moon\nAnswer:\n-> B"), ("obqa", "-> B")])
def test_tasks_show_prints_choices(tmp_path: Path, task: str, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"choices": {"text": ["sun", "moon"], "label": ["A", "B"]}, "answerKey": "B"}
    write_rows(tmp_path / "train.jsonl", [{"question": "Which?", "question_stem": "Which?", **row}])
    assert call("tasks", "show", task, "--data-dir", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "[choices]\n  Which? | sun\n* Which? | moon\n" in shown and asked in shown
    assert "[text-choices, by a causal language model]\nQuestion: Which?\nAnswer:\n  sun\n* moon\n" in shown
