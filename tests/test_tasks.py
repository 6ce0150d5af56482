"""Tasks by name and of a user's own: rows, classes, subsets, records and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeslora.errors import DataError, TaskError
from bayeslora.spec import aliases, find_task
from bayeslora.tasks import Split, Task, TaskSpec, build_task, load_task, task_names


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(size: int) -> list[dict[str, Any]]:
    return [{"sentence1": f"first {row}", "sentence2": f"second {row}", "label": row % 2} for row in range(size)]


@pytest.fixture
def mrpc(tmp_path: Path) -> Path:
    write(tmp_path / "mrpc/train.jsonl", pairs(20))
    write(tmp_path / "mrpc/validation.jsonl", pairs(6))
    return tmp_path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text('body,stars\n"good, really",great\nNA,poor\nfine,great\ncheap,poor\n', encoding="utf-8")
    return path


def first_words(split: Split) -> list[str]:
    return list(split.dataset["sentence1"])


# Known tasks


@pytest.mark.parametrize("name", ["mrpc", "glue/mrpc", "glue_mrpc", "GLUE-MRPC"])
def test_a_task_has_several_names(mrpc: Path, name: str) -> None:
    task = load_task(name, mrpc)
    assert task.spec.name == "glue/mrpc"
    assert (len(task.train), len(task.validation or ())) == (20, 6)
    assert task.test is None


@pytest.mark.parametrize("folder", ["mrpc", "glue/mrpc", "glue_mrpc", "."])
def test_data_are_found_in_the_folder_or_below(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "train.jsonl", pairs(4))
    assert len(load_task("mrpc", tmp_path).train) == 4


def test_a_folder_may_be_named_like_the_task_was_asked_for(tmp_path: Path) -> None:
    row = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}
    write(tmp_path / "winogrande/train.jsonl", [row])
    task = load_task("winogrande", tmp_path)
    assert len(Task.from_dict(task.to_dict()).train) == 1


def test_every_entry_of_the_registry_is_a_task() -> None:
    for name in task_names():
        if name != "demo":
            spec = find_task(name.replace("*", "word"))
            assert spec is not None and spec.path is not None and "*" not in f"{spec.name}{spec.config}"
            assert len(spec.labels) >= 2 or spec.kind == "regression"
            assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_names_are_unambiguous() -> None:
    spellings = [alias for name in task_names() for alias in aliases(name)]
    assert len(spellings) == len(set(spellings)) > 40


def test_a_name_may_choose_the_configuration() -> None:
    found = [find_task(name) for name in ("winogrande", "winogrande_s", "mmlu/college_biology", "mmlu")]
    assert [spec and spec.config for spec in found] == ["winogrande_xl", "winogrande_s", "college_biology", None]


def test_validation_of_mnli_is_the_matched_one_unless_asked(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": f"h {label}", "label": label} for label in (0, 1, 2)]
    for split, size in (("train", 3), ("validation_matched", 2), ("validation_mismatched", 1)):
        write(tmp_path / f"{split}.jsonl", rows[:size])
    assert len(load_task("mnli", tmp_path).validation or ()) == 2
    task = load_task("mnli", tmp_path, validation="validation_mismatched")
    assert len(task.validation or ()) == 1
    assert len(task.split("validation_matched")) == 2


def test_hidden_test_labels_make_no_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(4))
    write(tmp_path / "test.jsonl", [{**row, "label": -1} for row in pairs(3)])
    task = load_task("mrpc", tmp_path)
    assert task.test is None
    hidden = task.split("test")
    assert len(hidden) == 3 and not hidden.labelled
    with pytest.raises(DataError, match="'test' .* has no labels"):
        hidden.labels()


# What the network reads


RENDERED = {
    "cola": ({"sentence": "Bill slept.", "label": 1}, "Bill slept.\n-> acceptable"),
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
    "subj": ({"text": "It rains.", "label": 0}, "It rains.\n-> objective"),
    "arc-e": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        "  q | x\n* q | y\n  q | z",
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
    "mmlu/law": ({"question": "q", "choices": ["x", "y", "z", "w"], "answer": 0}, "* q | x\n  q | y\n  q | z\n  q | w"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_row_reads_as_its_authors_meant(tmp_path: Path, name: str) -> None:
    row, expected = RENDERED[name]
    spec = find_task(name)
    assert spec is not None
    write(tmp_path / f"{spec.train}.jsonl", [row])
    assert load_task(name, tmp_path).train.render(0) == expected


def test_an_answer_is_looked_up_among_the_choices_of_its_row(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "D"},
        {"question": "b", "choices": {"text": list("xyz"), "label": list("123")}, "answerKey": "1"},
        {"question": "c", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
    ]
    write(tmp_path / "train.jsonl", rows)
    task = load_task("ai2_arc/challenge", tmp_path)
    assert task.train.labels().tolist() == [3, 0, 4]
    assert task.spec.max_choices == 5


# A user's own data


def test_a_csv_file_with_words_as_labels(reviews: Path) -> None:
    task = load_task(reviews, text="body", label="stars")
    assert task.spec.labels == ("great", "poor")
    assert task.train.labels().tolist() == [0, 1, 0, 1]
    assert task.train.render(1) == "NA\n-> poor"
    assert task.validation is None
    assert task.summary() == "reviews: classification into 2 classes (great, poor); train 4 rows"


def test_given_labels_set_the_order(reviews: Path) -> None:
    task = load_task(reviews, text="body", label="stars", labels=["poor", "great"])
    assert task.train.labels().tolist() == [1, 0, 1, 0]


def test_a_folder_of_a_users_own(tmp_path: Path) -> None:
    write(tmp_path / "tickets/train.jsonl", [{"a": "x", "b": "y", "c": label} for label in (0, 1, 2)])
    write(tmp_path / "tickets/dev.jsonl", [{"a": "x", "b": "y", "c": 2}])
    task = load_task(tmp_path / "tickets", text=["{a}, {b}", "b"], label="c")
    assert task.train.render(2) == "x, y\ny\n-> 2"
    assert task.validation is not None and task.validation.labels().tolist() == [2]
    same = load_task("tickets", tmp_path, text=["{a}, {b}", "b"], label="c")
    assert same.train.labels().equal(task.train.labels())


def test_regression_of_a_users_own(tmp_path: Path) -> None:
    path = write(tmp_path / "prices.jsonl", [{"text": "t", "price": price} for price in (-1.0, 2.5, -1.0)])
    task = load_task(path, text="text", label="price", kind="regression")
    assert task.train.labels().tolist() == [-1.0, 2.5, -1.0]
    assert task.train.labels().dtype == torch.float32
    assert task.spec.labels == ()


def test_multiple_choice_of_a_users_own(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", [{"q": "q", "x": "no", "y": "yes", "right": 1}])
    task = load_task(path, text="q", label="right", choices=["x", "y"])
    assert task.train.render(0) == "  q | no\n* q | yes"
    assert (task.spec.kind, task.spec.labels) == ("multiple-choice", ("A", "B"))


def test_rows_in_memory() -> None:
    spec = TaskSpec("tiny", labels=("no", "yes"))
    task = build_task(spec, {"train": [{"text": "a", "label": "yes"}], "validation": [{"text": "b", "label": 0}]})
    assert task.train.labels().tolist() == [1]
    assert task.validation is not None and task.validation.labels().tolist() == [0]


def test_unlabelled_rows_to_predict_for(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(4))
    write(tmp_path / "new.jsonl", [{"sentence1": "a", "sentence2": "b"}])
    split = load_task("mrpc", tmp_path).split("new")
    assert not split.labelled
    assert split.render(0) == "a\nb\n-> None"


# Subsets


def test_subsets_are_nested_and_depend_on_the_seed_alone(mrpc: Path) -> None:
    small, large = (first_words(load_task("mrpc", mrpc, train_size=size).train) for size in (5, 12))
    assert large[:5] == small
    assert first_words(load_task("mrpc", mrpc, train_size=5).train) == small
    assert first_words(load_task("mrpc", mrpc, train_size=12, seed=1).train) != large


def test_held_out_rows_are_the_next_ones(mrpc: Path) -> None:
    task = load_task("mrpc", mrpc, train_size=5, heldout_size=4)
    assert task.heldout is not None
    assert first_words(task.train) + first_words(task.heldout) == first_words(
        load_task("mrpc", mrpc, train_size=9).train
    )


def test_held_out_rows_are_cut_off_the_end(mrpc: Path) -> None:
    task = load_task("mrpc", mrpc, heldout_size=4)
    assert task.heldout is not None
    assert (len(task.train), len(task.heldout)) == (16, 4)
    assert sorted(first_words(task.train) + first_words(task.heldout)) == sorted(f"first {row}" for row in range(20))
    assert task.split("heldout") is task.heldout


def test_the_demo_is_a_task_like_any_other() -> None:
    task = load_task("demo", train_size=30, heldout_size=10)
    assert task.heldout is not None
    assert (len(task.train), len(task.heldout)) == (30, 10)
    assert Task.from_dict(task.to_dict()).train.labels().equal(task.train.labels())


# Records


@pytest.mark.parametrize("moved", [False, True])
def test_a_task_comes_back_from_its_record(mrpc: Path, moved: bool) -> None:
    task = load_task("mrpc", mrpc, train_size=5, heldout_size=3, seed=7)
    record = json.loads(json.dumps(task.to_dict()))
    if moved:
        (mrpc / "mrpc").rename(mrpc / "elsewhere")
    again = Task.from_dict(record, mrpc / "elsewhere" if moved else None)
    assert again.spec == task.spec
    assert first_words(again.train) == first_words(task.train)
    assert again.heldout is not None and task.heldout is not None
    assert first_words(again.heldout) == first_words(task.heldout)


def test_a_record_keeps_the_order_of_the_classes(reviews: Path) -> None:
    task = load_task(reviews, text="body", label="stars")
    reviews.write_text("body,stars\nbad,poor\nnice,great\n", encoding="utf-8")
    assert Task.from_dict(task.to_dict()).train.labels().tolist() == [1, 0]


def test_a_record_is_found_from_another_folder(mrpc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mrpc)
    record = load_task("mrpc", "mrpc").to_dict()
    monkeypatch.chdir("/")
    assert len(Task.from_dict(record).train) == 20


# Errors


def test_an_unknown_task_names_the_nearest() -> None:
    for data_dir in (None, "."):
        with pytest.raises(TaskError, match="'glue/mrcp'.* Did you mean 'glue/mrpc'.*text= and label="):
            load_task("glue/mrcp", data_dir)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file .*nothing.csv"):
        load_task(tmp_path / "nothing.csv", text="a", label="b")


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No data of task 'glue/mrpc' .*train\.jsonl"):
        load_task("mrpc", tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder .*nowhere"):
        load_task("mrpc", tmp_path / "nowhere")


def test_columns_that_nobody_named(reviews: Path) -> None:
    with pytest.raises(TaskError, match="text= and label="):
        load_task(reviews)


@pytest.mark.parametrize("columns", [{"text": "boby", "label": "stars"}, {"text": "body", "label": "stras"}])
def test_a_missing_column_names_those_that_exist(reviews: Path, columns: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="Unknown column .* Did you mean .* Known: body, stars"):
        load_task(reviews, **columns)


def test_a_label_out_of_range_says_row_and_value(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*pairs(3), {**pairs(1)[0], "label": 2}])
    with pytest.raises(DataError, match="Row 3 of split 'train': label 2 .*not_equivalent, equivalent.* 0 to 1"):
        load_task("mrpc", tmp_path)


def test_a_class_that_only_validation_has(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    write(tmp_path / "validation.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    with pytest.raises(DataError, match="Row 1 of split 'validation': label 'z'"):
        load_task(tmp_path, text="text", label="label")


@pytest.mark.parametrize("missing", [None, -1])
def test_missing_labels_in_training_rows(tmp_path: Path, missing: int | None) -> None:
    write(tmp_path / "train.jsonl", [*pairs(3), {**pairs(1)[0], "label": missing}])
    with pytest.raises(DataError, match="1 of 4 rows of split 'train' have no label .* row 3"):
        load_task("mrpc", tmp_path)


def test_training_rows_without_any_label(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{**row, "label": -1} for row in pairs(3)])
    with pytest.raises(DataError, match="No row of the training split 'train' has a label"):
        load_task("mrpc", tmp_path)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_empty_data(mrpc: Path, split: str) -> None:
    write(mrpc / f"mrpc/{split}.jsonl", [])
    with pytest.raises(DataError, match=f"Split '{split}' of task 'glue/mrpc' has no rows"):
        load_task("mrpc", mrpc)


def test_a_text_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*pairs(2), {"sentence1": "a", "sentence2": None, "label": 1}])
    with pytest.raises(DataError, match="Row 2 of split 'train' has no value in column 'sentence2'"):
        load_task("mrpc", tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 21}, "train_size is 21, but split 'train' has 20 rows"),
        ({"train_size": 15, "heldout_size": 6}, "heldout_size is 6, but split 'train' can spare 5 rows"),
        ({"heldout_size": 20}, "heldout_size is 20, but split 'train' can spare 19 rows"),
        ({"train_size": 0}, "train_size is 0"),
        ({"heldout_size": -1}, "heldout_size -1"),
    ],
)
def test_subsets_that_are_too_large(mrpc: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task("mrpc", mrpc, **sizes)


def test_an_unknown_split(mrpc: Path) -> None:
    with pytest.raises(TaskError, match="Unknown split .* 'validaton'. Did you mean 'validation'"):
        load_task("mrpc", mrpc).split("validaton")
    with pytest.raises(TaskError, match="Unknown split .* 'dev'"):
        load_task("mrpc", mrpc, validation="dev")
    with pytest.raises(TaskError, match="heldout_size="):
        load_task("mrpc", mrpc).split("heldout")


def test_no_training_split(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", pairs(3))
    with pytest.raises(TaskError, match="Unknown split .* 'train'.* Known: test. .*train="):
        load_task("mrpc", tmp_path)
    assert len(load_task("mrpc", tmp_path, train="test").train) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "regresion"}, "Did you mean 'regression'"),
        ({"text": ("a", "b", "c")}, "3 texts, expected 1 or 2"),
        ({"kind": "multiple-choice"}, "needs one text, the question, and its choices"),
        ({"labels": ("a", "a")}, "names a class twice"),
    ],
)
def test_a_task_that_contradicts_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TaskSpec("t", **fields)


def test_an_unknown_property_of_a_task() -> None:
    with pytest.raises(TaskError, match="Did you mean 'label'"):
        TaskSpec.from_dict({"name": "t", "lable": "x"})


def test_the_hub_out_of_reach_says_how_to_use_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Offline mode is enabled.")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Cannot load nyu-mll/glue \(mrpc\) from the hub: Offline .* data_dir="):
        load_task("mrpc")


def test_the_hubs_class_names_win(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["subjective", "objective"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    monkeypatch.setattr("bayeslora.sources.read_hub", lambda *_: {"train": rows})
    assert load_task("subj").train.render(0) == "a\n-> subjective"
    assert load_task("someone/data", text="text", label="label").spec.labels == ("subjective", "objective")


def test_importing_tasks_stays_light() -> None:
    code = "import sys, bayeslora.tasks, bayeslora.data; print({'datasets', 'yaml', 'pyarrow'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
