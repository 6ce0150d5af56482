"""Tasks by name and of a user's own: rows, classes, subsets and records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from scenarios import sentence_pairs, tiny_program, tiny_rows, write_rows

from bayeslora import fit
from bayeslora.app.resolving import task_settings
from bayeslora.errors import DataError, SettingError, TaskError
from bayeslora.tasks import Split, TaskSpec, build_task, load_task, reload_task


def first_words(split: Split) -> list[str]:
    return list(split.dataset["sentence1"])


# A user's own data


def test_a_csv_file_with_words_as_labels(reviews: Path) -> None:
    task = load_task(reviews, text="body", label="stars")
    assert task.spec.labels == ("great", "poor")
    assert task.train.labels().tolist() == [0, 1, 0, 1]
    assert task.train.render(1) == "NA\n-> poor"
    assert task.validation is None
    assert task.summary() == "reviews: classification into 2 classes (great, poor); train 4 rows"
    assert repr(task) == "Task('reviews', classification, train=4)"


def test_columns_called_text_and_label_are_taken_and_this_is_said(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\nfine,good\ncheap,bad\n", encoding="utf-8")
    task = load_task(path)
    assert (task.spec.labels, task.train.labels().tolist()) == (("bad", "good"), [1, 0])
    assert task.notes == ("Unasked, column 'text' is read as the text and column 'label' is read as the label.",)
    assert task.notes[0] in task.summary()
    assert not load_task(path, text="text", label="label").notes


def test_a_lacking_validation_split_is_replaced_and_this_is_said(mrpc: Path) -> None:
    (mrpc / "mrpc/validation.jsonl").rename(mrpc / "mrpc/test.jsonl")
    task = load_task("mrpc", mrpc)
    assert first_words(task.split("validation")) == first_words(task.split("test"))
    assert (
        task.notes
        == reload_task(task.to_dict()).notes
        == ("The rows of split 'test' stand in for a validation split.",)
    )
    write_rows(mrpc / "mrpc/test.jsonl", [{**row, "label": -1} for row in sentence_pairs(3)])
    hidden = load_task("mrpc", mrpc)
    assert hidden.validation is None and not hidden.notes  # hidden labels stand in for nothing


def test_fit_says_that_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"text": "w1", "label": label} for label in (0, 1, 2)])
    task = load_task(tmp_path, text="text", label="label")
    assert task.spec.labels == ("0", "1", "2")
    program = tiny_program()
    with pytest.raises(DataError, match="nothing to train on: split 'train' of task .* has no rows"):
        fit(program, task.train)
    with pytest.raises(DataError, match="nothing to choose on: split 'train' of task .* has no rows"):
        fit(program, tiny_rows(3), "tfb", heldout=task.train)
    with pytest.raises(DataError, match="The rows to choose on have no column 'labels'"):
        fit(program, tiny_rows(3), "tfb", heldout=tiny_rows(3).remove_columns("labels"))


ROWS = [{"text": "fine", "label": "good", "note": 1}, {"text": "cheap", "label": "bad", "note": [2]}]


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        pd.DataFrame(ROWS),
        {"train": ROWS, "validation": ROWS},
        {"train": pd.DataFrame(ROWS), "dev": ROWS},
        Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in ROWS]),
        DatasetDict({"train": Dataset.from_dict({"text": ["fine", "cheap"], "label": ["good", "bad"]})}),
        pd.DataFrame(ROWS).astype({"label": "category"}),
    ],
)
def test_data_in_memory(data: Any) -> None:
    task = load_task(data)
    assert task.spec.labels == ("bad", "good")
    assert task.train.labels().tolist() == [1, 0]
    assert (task.validation is not None) == (isinstance(data, dict) and len(data) == 2)


def test_missing_numbers_of_a_dataframe_are_no_labels() -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, None]})
    with pytest.raises(DataError, match="1 of 3 rows of split 'train' have no label"):
        load_task(frame)
    assert load_task(frame[:2]).train.labels().tolist() == [0, 1]


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA])
def test_missing_texts_in_memory(missing: Any) -> None:
    rows = [{"text": "a", "label": 0}, {"text": missing, "label": 1}]
    for data in (rows, pd.DataFrame(rows)):
        with pytest.raises(DataError, match="Row 1 of split 'train' has no value in column 'text'"):
            load_task(data)


@pytest.mark.parametrize("data", [3, {"text": ["a"], "label": [0]}, [["a", 0]]])
def test_data_in_memory_that_are_no_rows(data: Any) -> None:
    with pytest.raises((DataError, TaskError), match="Expected rows, found|no splits|Unknown split"):
        load_task(data)


def test_several_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"], ["x"], [1]], names=["text", "text", "label", "other"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    frame = pd.DataFrame([["a", "b", 0]], columns=["text", "text", "label"])
    for data in (tmp_path / "rows.parquet", frame):
        with pytest.raises(DataError, match="Several columns of .* are called 'text': rename all but one"):
            load_task(data)
    with pytest.raises(DataError, match="Several columns of .* are called 'label'"):
        load_task(pd.DataFrame([["a", 0, 1]], columns=["text", "label", "label"]))


def test_one_name_of_several_is_given_as_it_is() -> None:
    spec = TaskSpec("t", text="body", labels=[0, 1], choice_keys="key")
    assert (spec.text, spec.labels, spec.choice_keys) == (("body",), ("0", "1"), ("key",))


def test_no_rows_have_no_labels(mrpc: Path) -> None:
    assert not load_task("mrpc", mrpc).train.select([]).labelled


def test_splits_that_nobody_asks_for_are_not_read(mrpc: Path) -> None:
    (mrpc / "mrpc/notes.csv").write_text("other,columns\n1,2\n", encoding="utf-8")
    task = load_task("mrpc", mrpc)
    with pytest.raises(DataError, match="notes.csv: Unknown column 'sentence1'. Known: other, columns|columns, other"):
        task.split("notes")


def test_given_labels_set_the_order(reviews: Path) -> None:
    task = load_task(reviews, text="body", label="stars", labels=["poor", "great"])
    assert task.train.labels().tolist() == [1, 0, 1, 0]


def test_a_folder_of_a_users_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "tickets/train.jsonl", [{"a": "x", "b": "y", "c": label} for label in (0, 1, 2)])
    write_rows(tmp_path / "tickets/dev.jsonl", [{"a": "x", "b": "y", "c": 2}])
    task = load_task(tmp_path / "tickets", text=["{a}, {b}", "b"], label="c")
    assert task.train.render(2) == "x, y\ny\n-> 2"
    assert task.validation is not None and task.validation.labels().tolist() == [2]
    same = load_task("tickets", tmp_path, text=["{a}, {b}", "b"], label="c")
    assert same.train.labels().equal(task.train.labels())


def test_regression_of_a_users_own(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prices.jsonl", [{"text": "t", "price": price} for price in (-1.0, 2.5, -1.0)])
    task = load_task(path, text="text", label="price", kind="regression")
    assert task.train.labels().tolist() == [-1.0, 2.5, -1.0]
    assert task.train.labels().dtype == torch.float32
    assert task.spec.labels == ()


def test_multiple_choice_of_a_users_own(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "quiz.jsonl", [{"q": "q", "x": "no", "y": "yes", "right": 1}])
    task = load_task(path, text="q", label="right", choices=["x", "y"])
    assert task.train.render(0) == "  q | no\n* q | yes"
    assert (task.spec.kind, task.spec.labels) == ("multiple-choice", ("A", "B"))


def test_rows_in_memory() -> None:
    spec = TaskSpec("tiny", labels=("no", "yes"))
    task = build_task(spec, {"train": [{"text": "a", "label": "yes"}], "validation": [{"text": "b", "label": 0}]})
    assert task.train.labels().tolist() == [1]
    assert task.validation is not None and task.validation.labels().tolist() == [0]


def test_unlabelled_rows_to_predict_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", sentence_pairs(4))
    write_rows(tmp_path / "new.jsonl", [{"sentence1": "a", "sentence2": "b"}])
    split = load_task("mrpc", tmp_path).split("new")
    assert not split.labelled
    assert split.render(0) == "a\nb\n-> None"


def test_numbers_are_texts() -> None:
    rows = [{"text": 1, "label": 0}, {"text": 2, "label": 1}]
    assert build_task(TaskSpec("t", labels=("0", "1")), {"train": rows}).train.render(1) == "2\n-> 1"


def test_no_training_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", sentence_pairs(3))
    task = load_task("mrpc", tmp_path)
    assert list(task.roles) == ["validation", "test"] and not len(task.train)
    (note,) = (each for each in task.notes if "There is no split 'train' to train on, only test: " in each)
    assert "train=SPLIT (in a shell --set task.train=SPLIT), or call its file train.jsonl" in note
    with pytest.raises(TaskError, match="Unknown split .* 'training'. Known: test"):
        load_task("mrpc", tmp_path, train="training")
    trained = load_task("mrpc", tmp_path, train="test")
    assert len(trained.train) == 3 and trained.validation is None  # what is trained on stands in for nothing


def test_the_hubs_class_names_win(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["subjective", "objective"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    monkeypatch.setattr("bayeslora.tasks.sources.read_hub", lambda *_: {"train": rows})
    assert load_task("subj").train.render(0) == "a\n-> subjective"
    assert load_task("someone/data", text="text", label="label").spec.labels == ("subjective", "objective")


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
    assert reload_task(task.to_dict()).train.labels().equal(task.train.labels())


# Records


@pytest.mark.parametrize("moved", [False, True])
def test_a_task_comes_back_from_its_record(mrpc: Path, moved: bool) -> None:
    task = load_task("mrpc", mrpc, train_size=5, heldout_size=3, seed=7)
    record = json.loads(json.dumps(task.to_dict()))
    if moved:
        (mrpc / "mrpc").rename(mrpc / "elsewhere")
    again = reload_task(record, mrpc / "elsewhere" if moved else None)
    assert again.spec == task.spec
    assert first_words(again.train) == first_words(task.train)
    assert again.heldout is not None and task.heldout is not None
    assert first_words(again.heldout) == first_words(task.heldout)


def test_a_task_comes_back_without_its_training_rows(mrpc: Path) -> None:
    record = load_task("mrpc", mrpc, train_size=5).to_dict()
    (mrpc / "mrpc" / "train.jsonl").unlink()
    again = reload_task(record)
    assert again.validation is not None and len(again.validation) and "train" not in again.roles
    with pytest.raises(TaskError, match="Unknown split of task 'glue/mrpc' 'train'"):
        again.split("train")
    assert "train" not in load_task("mrpc", mrpc).roles


def test_a_record_is_read_where_the_data_are_now(tmp_path: Path) -> None:
    for name in ("then", "now"):
        write_rows(tmp_path / name / "train.jsonl", [{"text": name, "label": label} for label in (0, 1)])
    record = load_task(tmp_path / "then").to_dict()
    assert [reload_task(record, place).train.render(1) for place in (None, tmp_path / "now")] == [
        "then\n-> 1",
        "now\n-> 1",
    ]


def test_a_record_keeps_the_order_of_the_classes(reviews: Path) -> None:
    task = load_task(reviews, text="body", label="stars")
    reviews.write_text("body,stars\nbad,poor\nnice,great\n", encoding="utf-8")
    assert reload_task(task.to_dict()).train.labels().tolist() == [1, 0]


def test_a_record_is_found_from_another_folder(mrpc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mrpc)
    record = load_task("mrpc", "mrpc").to_dict()
    monkeypatch.chdir("/")
    assert len(reload_task(record).train) == 20


# Imports


def test_importing_tasks_stays_light() -> None:
    code = (
        "import sys, bayeslora.tasks; print({'torch', 'numpy'} & set(sys.modules))\n"
        "import bayeslora.observations.encoding; print({'datasets', 'yaml', 'pyarrow', 'pandas'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["set()", "set()"]


def test_rows_to_report_on_are_drawn_before_all_others(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("text,label\n" + "".join(f"t{row},{row % 2}\n" for row in range(20)))
    task = load_task(path, test_size=5, heldout_size=3)
    texts = {name: split.dataset["text"][:] for name, split in task.roles.items()}
    stand_in = texts.pop("validation")
    assert {name: len(each) for name, each in texts.items()} == {"train": 12, "heldout": 3, "test": 5}
    assert stand_in == texts["test"] and len({text for each in texts.values() for text in each}) == 20
    assert task.notes[-1] == "The rows that test_size cuts off stand in for a validation split."
    other = load_task(path, test_size=5, train_size=4, seed=1)
    assert other.split("test").dataset["text"][:] == texts["test"]  # the same of all seeds
    again = reload_task(task.to_dict())
    assert {name: again.split(name).dataset["text"][:] for name in texts} == texts
    assert "test_size" not in load_task(path).arguments
    assert len(load_task(path, **task_settings({"test_size": "4"})).test) == 4
    with pytest.raises(DataError, match="test_size is 20, expected from 1 to 19 rows of split 'train'"):
        load_task(path, test_size=20)
    for size in (-1, 2.5, True):
        with pytest.raises(SettingError, match=f"test_size, a number of rows, .*, found '?{size}"):
            load_task(path, test_size=size)
    with pytest.raises(DataError, match="test_size cuts rows off the split 'train', which is none of validation"):
        load_task({"validation": [{"text": "a", "label": 0}, {"text": "b", "label": 1}]}, test_size=1)
    with pytest.raises(DataError, match="has a test split, 'test': leave out test_size"):
        load_task({"train": [{"text": "a", "label": 0}, {"text": "b", "label": 1}], "test": []}, test_size=1)
    with pytest.raises(TaskError, match="Unknown split .*'test'.* with test_size= [(]in a shell --set task.test_size="):
        load_task(path, heldout_size=2).split("test")
