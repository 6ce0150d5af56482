"""Tasks of the harness from files, from Python and from the shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from causal_scenarios import CHAT
from command_line import call
from harness_scenarios import posterior_of, write_tasks

from bayeslora.errors import SettingError
from bayeslora.harness import PosteriorLM, evaluate, running
from bayeslora.inference import load
from bayeslora.posterior import Posterior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and tasks beside it."""
    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder)
    posterior_of().save(folder / "run")
    return folder


@pytest.fixture(autouse=True)
def only_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own thousands of tasks are not read."""
    original = running.TaskManager
    monkeypatch.setattr(running, "TaskManager", lambda **settings: original(**settings | {"include_defaults": False}))


def test_results_are_shown_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--average", "choices", "--draws", "3", "--seed", "2", "--output", folder / "found.json"]
    tasks = ["--tasks", folder / "quiz.yaml", "--tasks", folder / "texts.yaml"]
    assert call("lm-eval", folder / "run", *tasks, *options) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    found = json.loads((folder / "found.json").read_text("utf-8"))
    model = PosteriorLM(load(folder / "run"), "choices", draws=3, seed=2, progress=False)
    again = evaluate(model, [str(folder / "quiz.yaml"), str(folder / "texts.yaml")])
    assert found["results"] == again["results"] and found["posterior"] == model.described
    assert found["posterior"]["average"] == "choices" and found["posterior"]["draws"] == 3
    # The harness shows three digits or four, by how large other numbers of the column are.
    assert "|quiz " in shown and "word_perplexity" in shown and f"{found['results']['quiz']['acc,none']:.3f}" in shown
    assert "choices" in shown


def test_a_folder_of_tasks_and_a_part_of_the_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "says", "--include-path", folder, "--limit", "2", "--method", "draw", "--draws", "2"]
    assert call("lm-eval", folder / "run", *options, "--output", folder / "says.json") == 0, capsys.readouterr().err
    found = json.loads((folder / "says.json").read_text("utf-8"))
    assert found["n-samples"]["says"]["effective"] == 2 and found["posterior"]["method"] == "draw"
    assert "exact_match" in capsys.readouterr().out


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return posterior_of()


class TestExamples:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Contexts that a model is asked."""
        found: list[str] = []

        def answer(self: PosteriorLM, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found.extend(each.args[0] for each in requests)
            return [(0.0, False)] * len(requests)

        monkeypatch.setattr(PosteriorLM, "loglikelihood", answer)
        return found

    def test_come_before_the_question(self, posterior: Posterior, folder: Path, asked: list[str]) -> None:
        before = torch.get_rng_state()
        for count in (0, 1, None):
            evaluate(PosteriorLM(posterior), [str(folder / "quiz.yaml")], limit=1, num_fewshot=count)
        assert [each.count("Question:") for each in asked[::3]] == [1, 2, 1]
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(("own", "found"), [(0, 0), (2, 1)])
    def test_a_task_may_insist_on_none(
        self, posterior: Posterior, folder: Path, tmp_path: Path, asked: list[str], own: int, found: int
    ) -> None:
        (tmp_path / "task.yaml").write_text(f"include: {folder / 'quiz.yaml'}\nnum_fewshot: {own}\n", "utf-8")
        for count in (None, 1):
            evaluate(PosteriorLM(posterior), [str(tmp_path / "task.yaml")], limit=1, num_fewshot=count)
        assert [each.count("Question:") for each in asked[::3]] == [1 + own, 1 + found]

    def test_a_chat_is_the_tokenizers(self, posterior: Posterior, folder: Path, asked: list[str]) -> None:
        model = PosteriorLM(posterior)
        model.tokenizer.chat_template = CHAT
        try:
            evaluate(model, [str(folder / "quiz.yaml")], limit=1, chat=True)
        finally:
            model.tokenizer.chat_template = None
        assert asked[0].startswith("<|user|>\nQuestion:") and asked[0].endswith("<|assistant|>\n")


def test_a_task_that_there_is_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("lm-eval", folder / "run", "--tasks", "quizz") == 2
    assert "The harness cannot load quizz" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(SettingError, match="--include-path"):
        evaluate(PosteriorLM(load(folder / "run"), draws=1), ["quizz"])


def test_a_task_that_runs_programs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(f"include: {folder / 'says.yaml'}\nunsafe_code: true\n", "utf-8")
    with pytest.raises(SettingError, match="The task says runs programs that a model writes"):
        evaluate(PosteriorLM(load(folder / "run"), draws=1), [str(tmp_path / "task.yaml")])


def test_without_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval" or "bayeslora.harness" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert call("lm-eval", folder / "run", "--tasks", folder / "quiz.yaml") == 2
    assert "pip install 'bayeslora[harness]'" in capsys.readouterr().err
