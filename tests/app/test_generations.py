"""What a posterior writes, from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from causal_scenarios import CHAT, causal_base
from command_line import call
from datasets import Dataset
from peft import LoraConfig
from scenarios import write_rows

import bayeslora as bl
from bayeslora import files
from bayeslora.app import generations
from bayeslora.errors import DataError
from bayeslora.generation.programs import STOPS
from bayeslora.generation.writing import Writer
from bayeslora.inference import fit, load
from bayeslora.tasks import Split, Task, TaskSpec

PROMPTS = ["Is water good", "What is the moon", "Answer"]
QUIZ = TaskSpec("quiz", "multiple-choice", ("ask",), "label", ("A", "B"), choices=("choices",))
DECODING = ["--draws", "2", "--max-new-tokens", "5", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    spec = QUIZ
    columns = {"ask": PROMPTS, "choices": [["yes", "no"], ["a stone", "sun"], ["A", "B"]], "label": [0, 0, 1]}
    task = Task(spec, Split(Dataset.from_dict(columns), spec))
    program = bl.Program.from_pretrained(str(causal_base()), task, lora=LoraConfig(r=2, target_modules=["q_proj"]))
    fit(program, task.train, "svi", output_dir=folder, epochs=1, progress=False, cpu=True)
    return folder


def test_texts_grow_on_the_terminal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert call("generate", folder, *prompts, "--samples", "2", *DECODING, "--output", tmp_path / "out.jsonl") == 0
    shown = capsys.readouterr().out
    # One by one, as texts come: sums of other batches may differ in their last digits.
    settings = {"draws": 2, "max_new_tokens": 5, "seed": 3, "progress": False, "batch_size": 1}
    written = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    for found, line in zip(load(folder).generate(PROMPTS[:2], 2, **settings), written, strict=True):
        assert all(f"\n{text}\n" in f"\n{shown}" for text in found)
        assert generations.summary(found) in shown and "% of 2 texts agree]" in shown
        assert json.loads(line) == found.to_dict()


def test_texts_before_an_error_are_kept(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert call("generate", folder, "--prompt", PROMPTS[0], "--prompt", "", *DECODING, "--output", target) == 2
    assert [json.loads(line)["prompt"] for line in target.read_text("utf-8").splitlines()] == PROMPTS[:1]


def test_a_file_of_prompts_is_answered_some_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": each, "note": 1}) + "\n" for each in PROMPTS), "utf-8")
    monkeypatch.setattr(generations, "CHUNK", 2)
    assert call("generate", folder, "--file", source, "--output", target, "--method", "mixture", *DECODING) == 0
    assert "3 prompts of" in capsys.readouterr().out
    found = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert [each["prompt"] for each in found] == PROMPTS and all(each["method"] == "mixture" for each in found)
    assert all(len(each["texts"]) == 1 and each["texts"][0]["log_probability"] < 0 for each in found)


@pytest.mark.parametrize("ends", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("source", ["file", "split"])
def test_what_is_written_of_many_rows_is_not_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, ends: type[BaseException]
) -> None:
    posterior, target = load(folder), tmp_path / "out.jsonl"
    settings = {"samples": 1, "method": "draw", "draws": 2, "max_new_tokens": 3, "progress": False}
    rows = [{"ask": each, "choices": ["yes", "no"]} for each in PROMPTS]
    split = Split(Dataset.from_list([{**row, "label": 0} for row in rows]), QUIZ)
    write_rows(tmp_path / "rows.jsonl", rows)

    def generate() -> None:
        if source == "file":
            generations.generate_file(posterior, tmp_path / "rows.jsonl", target, **settings)
        else:
            generations.generate_split(posterior, split, target, None, **settings)

    def lines() -> list[str]:
        return target.read_text("utf-8").splitlines(keepends=True)

    generate()
    at_once = [json.loads(line)["texts"][0]["text"] for line in lines()]
    monkeypatch.setattr(generations, "CHUNK", 1)
    generate()
    whole = lines()
    assert [json.loads(line)["texts"][0]["text"] for line in whole] == at_once
    target.unlink()
    part, written = files.hidden(target, "part"), posterior.generate

    def stops(*asked: Any, first: int, **given: Any) -> Any:
        if first == 2:  # a process that is killed leaves what it has written
            assert part.read_text("utf-8") == "".join(whole[:2])
            raise ends
        return written(*asked, first=first, **given)

    monkeypatch.setattr(posterior, "generate", stops)
    with pytest.raises(ends):
        generate()
    assert lines() == whole[:2] and not part.exists()


def test_rows_of_the_task_are_asked_by_its_template(folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [{"ask": each, "choices": ["yes", "no"]} for each in PROMPTS]
    source.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    assert call("generate", folder, "--file", source, "--output", target, *DECODING) == 0
    found = [json.loads(line)["prompt"] for line in target.read_text("utf-8").splitlines()]
    assert found == [f"Question: {each}\nAnswer:" for each in PROMPTS]
    settings = {"draws": 2, "max_new_tokens": 5, "seed": 3, "progress": False}
    posterior = load(folder)
    for mine, raw in zip(posterior.generate(rows, **settings), posterior.generate(found, **settings), strict=True):
        assert mine.tokens == raw.tokens


def test_prompts_that_are_a_column_of_the_task_are_asked_as_they_were_learned(tmp_path: Path) -> None:
    spec = TaskSpec("own", "completion", ("prompt",), completion="completion")
    rows = [{"prompt": each, "completion": "yes"} for each in PROMPTS]
    task = Task(spec, Split(Dataset.from_list(rows), spec))
    base, lora = str(causal_base("llama", "bytes", CHAT)), LoraConfig(r=2, target_modules=["q_proj"])
    program = bl.Program.from_pretrained(base, task, lora=lora, observation_settings={"chat": True})
    posterior = fit(program, task.train, "mle", epochs=1, progress=False, cpu=True)
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    settings = {"samples": 1, "method": "draw", "max_new_tokens": 3, "progress": False}
    assert generations.generate_file(posterior, source, target, **settings) == 3
    found = [json.loads(line)["prompt"] for line in target.read_text("utf-8").splitlines()]
    assert all(f"<|user|>\n{each}" in text for each, text in zip(PROMPTS, found, strict=True))


def test_answers_that_are_no_texts_are_no_truths(folder: Path, tmp_path: Path) -> None:
    rows = Split(Dataset.from_dict({"ask": PROMPTS[:1], "choices": [["yes", "no"]], "label": [1]}), QUIZ)
    settings = {"draws": 2, "max_new_tokens": 2, "progress": False}
    generations.generate_split(load(folder), rows, tmp_path / "out.jsonl", None, **settings)
    assert "truth" not in json.loads((tmp_path / "out.jsonl").read_text("utf-8"))
    with pytest.raises(DataError, match="true text of row 0 has no answer"):
        generations.generate_split(load(folder), rows, tmp_path / "no.jsonl", "gsm8k", **settings)
    assert not (tmp_path / "no.jsonl").exists()  # it was told before the work


def test_a_file_without_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("note\n1\n", "utf-8")
    assert call("generate", folder, "--file", tmp_path / "rows.csv", "--output", tmp_path / "out.jsonl") == 2
    assert (
        "Unknown column 'ask'" in capsys.readouterr().err.replace("\n", " ") and not (tmp_path / "out.jsonl").exists()
    )


def test_the_file_that_is_read_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.csv"
    source.write_text("prompt\nA\n", "utf-8")
    assert call("generate", folder, "--file", source, "--output", source, *DECODING) == 2
    assert source.read_text("utf-8") == "prompt\nA\n"


def test_sums_are_answered_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sums").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"What is {n} and 1", "answer": f"{n} + 1\n#### {n + 1}"} for n in range(6)]
        (tmp_path / "sums" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = ["--task", "gsm8k", "--data-dir", tmp_path / "sums", "--backend", "mle", "--output", tmp_path / "run"]
    small = ["--set", "epochs=1", "--set", "lora.target_modules=q_proj", "--set", "cpu=true", "--set", "batch_size=6"]
    assert call("fit", "--base", causal_base(), *task, *small) == 0
    rows = ["--split", "test", "--limit", "4", "--samples", "2", "--score", "gsm8k", "--max-new-tokens", "6"]
    capsys.readouterr()
    assert call("generate", tmp_path / "run", *rows, "--output", tmp_path / "out.jsonl") == 0
    shown = capsys.readouterr().out
    assert "mle on 4 rows of gsm8k" in shown
    assert all(name in shown for name in ("strict", "flexible", "strict_maj@2", "flexible_maj@2"))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [each["prompt"] for each in found] == [f"Question: What is {n} and 1\nAnswer:" for n in range(4)]
    assert [each["truth"] for each in found] == [f" {n} + 1\n#### {n + 1}" for n in range(4)]


def test_programs_are_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sums").mkdir()
    rows = [{"prompt": f"def add(x):\n    # {n}\n", "canonical_solution": f"    return x + {n}"} for n in range(3)]
    (tmp_path / "sums" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    tests = {"entry_point": "add", "test": "def check(add):\n    assert add(0) is None"}
    (tmp_path / "sums" / "test.jsonl").write_text("".join(json.dumps(row | tests) + "\n" for row in rows), "utf-8")
    data = ["--task", "humaneval", "--data-dir", tmp_path / "sums"]
    small = ["--set", "epochs=1", "--set", "lora.target_modules=q_proj", "--set", "cpu=true", "--set", "batch_size=6"]
    assert call("fit", "--base", causal_base(), *data, "--backend", "mle", "--output", tmp_path / "run", *small) == 0
    capsys.readouterr()
    # A random network writes no program: half of the texts are put in their place.
    asked: list[Writer] = []
    monkeypatch.setattr(Writer, "text", lambda self, *_: asked.append(self) or ("  pass", "  x(")[len(asked) % 2])
    chosen = ["--split", "test", "--limit", "2", "--score", "humaneval", "--samples", "2", "--max-new-tokens", "6"]
    assert call("generate", tmp_path / "run", *data, *chosen, "--run-programs", "--output", tmp_path / "out.jsonl") == 0
    shown = capsys.readouterr().out
    assert "mle on 2 rows of humaneval" in shown and "pass@1" in shown and "pass@2" in shown and "0.5000" in shown
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows[:2]]  # to the end of its last line
    assert [sorted(text["passed"] for text in line["texts"]) for line in lines] == [[False, True]] * 2
    assert {text["status"] for line in lines for text in line["texts"]} == {"passed", "failed"}
    assert asked[0]._decoding.stop == STOPS
    assert call("generate", tmp_path / "run", *data, *chosen, "--output", tmp_path / "no.jsonl") == 2
    assert "--run-programs" in capsys.readouterr().err and not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --prompt, --file, --split"),
        (["--prompt", "A", "--file", "x.csv"], "give one of --prompt, --file, --split"),
        (["--prompt", "A", "--score", "gsm8k"], "needs rows with a true answer"),
        (["--split", "test", "--output", "x.jsonl", "--score", "gsm9k"], "Did you mean 'gsm8k'"),
        (["--split", "test", "--output", "x.jsonl", "--score", "humaneval"], "--run-programs"),
        (
            ["--split", "test", "--output", "x.jsonl", "--score", "gsm8k", "--run-programs"],
            "goes with --score humaneval",
        ),
        (["--prompt", "A", "--task", "humaneval"], "give --split"),
        (["--file", "x.csv"], "give --output FILE.jsonl"),
        (["--prompt", "A", "--method", "drawn"], "Did you mean 'draw'"),
        (["--prompt", "A", "--temperature", "-1"], "temperature"),
        (["--prompt", ""], "Prompt 0 has no tokens"),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", folder, *arguments) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_an_encoder_asked_to_write(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", run, "--prompt", "A") == 2
    assert "cannot generate text" in capsys.readouterr().err
