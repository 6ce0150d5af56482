"""Known tasks: their names, where their files lie, and what a network reads of their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenarios import sentence_pairs, write_rows

from bayeslora.errors import DataError, TaskError
from bayeslora.tasks import TaskSpec, load_task, reload_task, task_names
from bayeslora.tasks.spec import aliases, find_task


@pytest.mark.parametrize("name", ["mrpc", "glue/mrpc", "glue_mrpc", "GLUE-MRPC"])
def test_a_task_has_several_names(mrpc: Path, name: str) -> None:
    task = load_task(name, mrpc)
    assert task.spec.name == "glue/mrpc"
    assert (len(task.train), len(task.validation or ())) == (20, 6)
    assert task.test is None


@pytest.mark.parametrize("folder", ["mrpc", "glue/mrpc", "glue_mrpc", "."])
def test_data_are_found_in_the_folder_or_below(tmp_path: Path, folder: str) -> None:
    write_rows(tmp_path / folder / "train.jsonl", sentence_pairs(4))
    assert len(load_task("mrpc", tmp_path).train) == 4


@pytest.mark.parametrize("folder", ["winogrande", "winogrande_xl"])
def test_a_folder_may_be_named_like_the_task_was_asked_for(tmp_path: Path, folder: str) -> None:
    row = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}
    write_rows(tmp_path / folder / "train.jsonl", [row])
    task = load_task("winogrande", tmp_path)
    assert len(reload_task(task.to_dict()).train) == 1


def test_every_entry_of_the_registry_is_a_task() -> None:
    for name in task_names():
        if name != "demo":
            spec = find_task(name.replace("*", "word"))
            assert spec is not None and spec.path is not None and "*" not in f"{spec.name}{spec.config}"
            assert len(spec.labels) >= 2 or spec.kind in ("regression", "completion")
            assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_names_are_unambiguous() -> None:
    spellings = [alias for name in task_names() for alias in aliases(name)]
    assert len(spellings) == len(set(spellings)) > 40


def test_a_name_may_choose_the_configuration() -> None:
    found = [find_task(name) for name in ("winogrande", "winogrande/*", "winogrande_s", "mmlu/college_biology")]
    assert [spec and spec.config for spec in found] == [
        "winogrande_xl",
        "winogrande_xl",
        "winogrande_s",
        "college_biology",
    ]


@pytest.mark.parametrize("name", ["mmlu", "mmlu/*"])
def test_a_configuration_without_a_default_has_to_be_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"several tasks: .* asterisk in 'mmlu/\*'"):
        load_task(name, tmp_path)


def test_validation_of_mnli_is_the_matched_one_unless_asked(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": f"h {label}", "label": label} for label in (0, 1, 2)]
    for split, size in (("train", 3), ("validation_matched", 2), ("validation_mismatched", 1)):
        write_rows(tmp_path / f"{split}.jsonl", rows[:size])
    assert len(load_task("mnli", tmp_path).validation or ()) == 2
    task = load_task("mnli", tmp_path, validation="validation_mismatched")
    assert len(task.validation or ()) == 1
    assert len(task.split("validation_matched")) == 2


def test_hidden_test_labels_make_no_test_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", sentence_pairs(4))
    write_rows(tmp_path / "test.jsonl", [{**row, "label": -1} for row in sentence_pairs(3)])
    task = load_task("mrpc", tmp_path)
    assert task.test is None
    hidden = task.split("test")
    assert len(hidden) == 3 and not hidden.labelled
    with pytest.raises(DataError, match="'test' .* has no labels"):
        hidden.labels()


# What the network reads


RENDERED = {
    "cola": ({"sentence": "Bill slept.", "label": 1}, "Bill slept.\n-> acceptable"),
    "sst2": ({"sentence": "good fun", "label": 1}, "good fun\n-> positive"),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1}, "a\nb\n-> equivalent"),
    "qqp": ({"question1": "a", "question2": "b", "label": 1}, "a\nb\n-> duplicate"),
    "wnli": ({"sentence1": "a", "sentence2": "b", "label": 1}, "a\nb\n-> entailment"),
    "rte": ({"sentence1": "a", "sentence2": "b", "label": 1}, "a\nb\n-> not_entailment"),
    "qnli": ({"question": "q?", "sentence": "s", "label": 0}, "q?\ns\n-> entailment"),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.5}, "a\nb\n-> 3.5"),
    "mnli": ({"premise": "p", "hypothesis": "h", "label": 2}, "p\nh\n-> contradiction"),
    "cb": ({"premise": "p", "hypothesis": "h", "label": 1}, "p\nh\n-> contradiction"),
    "boolq": ({"question": "is it", "passage": "It is.", "label": 1}, "is it\nIt is.\n-> True"),
    "wic": (
        {"word": "bank", "sentence1": "The bank pays.", "sentence2": "The bank is muddy.", "label": 0},
        "bank: The bank pays.\nThe bank is muddy.\n-> False",
    ),
    "trec": ({"text": "Who is he?", "label_coarse_original": "HUM"}, "Who is he?\n-> HUM"),
    "ag_news": ({"text": "Shares fell.", "label": 2}, "Shares fell.\n-> Business"),
    "subj": ({"text": "It rains.", "label": 0}, "It rains.\n-> objective"),
    "arc-e": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        "  q | x\n* q | y\n  q | z",
    ),
    "arc-c": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        "* q | x\n  q | y",
    ),
    "commonsense_qa": (
        {"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
        "  q | x\n* q | y",
    ),
    "openbookqa": (
        {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["B", "A"]}, "answerKey": "B"},
        "* q | x\n  q | y",
    ),
    "winogrande": (
        {"sentence": "He hit Bo as _ was rude.", "option1": "He", "option2": "Bo", "answer": "2"},
        "  He hit Bo as | He was rude.\n* He hit Bo as | Bo was rude.",
    ),
    "piqa": ({"goal": "g", "sol1": "x", "sol2": "y", "label": 1}, "  g | x\n* g | y"),
    "social_i_qa": (
        {"context": "c", "question": "q", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
        "  c q | x\n  c q | y\n* c q | z",
    ),
    "gsm8k": ({"question": "1+1?", "answer": "2\n#### 2"}, "Question: 1+1?\nAnswer:\n->  2\n#### 2"),
    "humaneval": (
        {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "t", "entry_point": "f"},
        "def f():\n\n->     return 1\n",
    ),
    "mmlu/law": ({"question": "q", "choices": ["x", "y", "z", "w"], "answer": 0}, "* q | x\n  q | y\n  q | z\n  q | w"),
}


def test_every_known_task_has_a_row() -> None:
    rendered = {spec.name for name in RENDERED if (spec := find_task(name)) is not None}
    known = {spec.name for name in task_names() if "*" not in name and (spec := find_task(name)) is not None}
    assert known - {"demo"} <= rendered and {"winogrande/xl", "mmlu/law"} <= rendered


@pytest.mark.parametrize("name", RENDERED)
def test_a_row_reads_as_its_authors_meant(tmp_path: Path, name: str) -> None:
    row, expected = RENDERED[name]
    spec = find_task(name)
    assert spec is not None
    write_rows(tmp_path / f"{spec.train}.jsonl", [row])
    assert load_task(name, tmp_path).train.render(0) == expected


def test_an_answer_is_looked_up_among_the_choices_of_its_row(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "D"},
        {"question": "b", "choices": {"text": list("xyz"), "label": list("123")}, "answerKey": "1"},
        {"question": "c", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    task = load_task("ai2_arc/challenge", tmp_path)
    assert task.train.labels().tolist() == [3, 0, 4]
    assert task.spec.max_choices == 5
