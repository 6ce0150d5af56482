"""Data and names that are no task: what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scenarios import sentence_pairs, write_rows

from bayeslora.errors import DataError, SettingError, TaskError
from bayeslora.tasks import TaskSpec, build_task, load_task, reload_task


def test_rows_in_memory_cannot_be_loaded_again() -> None:
    task = build_task(TaskSpec("mine", labels=("no", "yes")), {"train": [{"text": "a", "label": 0}]})
    with pytest.raises(TaskError, match="'mine' were given in memory: .*data_dir="):
        reload_task(task.to_dict())


def test_an_unknown_task_names_the_nearest() -> None:
    for data_dir in (None, "."):
        with pytest.raises(TaskError, match="'glue/mrcp'.* Did you mean 'glue/mrpc'.*text=COLUMN and label=COLUMN"):
            load_task("glue/mrcp", data_dir)


@pytest.mark.parametrize(
    ("name", "near"),
    [("reviewz", "reviews"), ("train.cvs", "train.csv"), ("trian.csv", "train.csv"), ("./reviewz", "reviews")],
)
def test_data_that_are_not_here_name_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    for file in ("train.csv", "reviewz.md"):
        (tmp_path / file).write_text("text,label\n", encoding="utf-8")
    with pytest.raises((TaskError, DataError), match=f"is (there a|no) file .*{Path(name).name}.* mean '{near}'"):
        load_task(name)


@pytest.mark.parametrize("name", ["", " "])
def test_a_task_without_a_name(reviews: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(reviews.parent)
    with pytest.raises(TaskError, match="The task has no name: give .* folder \\('.' for this one\\)"):
        load_task(name)


@pytest.mark.parametrize("columns", [{}, {"text": "a", "label": "b"}])
def test_a_missing_file(tmp_path: Path, columns: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no file .*nothing.csv"):
        load_task(tmp_path / "nothing.csv", **columns)


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No data of task 'glue/mrpc' .*train\.jsonl"):
        load_task("mrpc", tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder .*nowhere"):
        load_task("mrpc", tmp_path / "nowhere")


def test_columns_that_nobody_named(reviews: Path) -> None:
    advice = r"text=COLUMN and label=COLUMN \(in a shell --set task.text=COLUMN"
    with pytest.raises(DataError, match=f"Unknown column 'text'. Known: body, stars. .*{advice}"):
        load_task(reviews)
    with pytest.raises(DataError, match=f"Unknown column 'label'. Known: body, stars. .*{advice}"):
        load_task(reviews, text="body")


@pytest.mark.parametrize("columns", [{"text": "boby", "label": "stars"}, {"text": "body", "label": "stras"}])
def test_a_missing_column_names_those_that_exist(reviews: Path, columns: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="Unknown column .* Did you mean .* Known: body, stars"):
        load_task(reviews, **columns)


def test_a_label_out_of_range_says_row_and_value(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [*sentence_pairs(3), {**sentence_pairs(1)[0], "label": 2}])
    with pytest.raises(DataError, match="Row 3 of split 'train': label 2 .*not_equivalent, equivalent.* 0 to 1"):
        load_task("mrpc", tmp_path)


def test_a_class_that_only_validation_has(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    write_rows(tmp_path / "validation.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    with pytest.raises(DataError, match="Row 1 of split 'validation': label 'z'"):
        load_task(tmp_path, text="text", label="label")


@pytest.mark.parametrize("missing", [None, -1])
def test_missing_labels_in_training_rows(tmp_path: Path, missing: int | None) -> None:
    write_rows(tmp_path / "train.jsonl", [*sentence_pairs(3), {**sentence_pairs(1)[0], "label": missing}])
    with pytest.raises(DataError, match="1 of 4 rows of split 'train' have no label .* row 3"):
        load_task("mrpc", tmp_path)


def test_training_rows_without_any_label(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{**row, "label": -1} for row in sentence_pairs(3)])
    with pytest.raises(DataError, match="No row of the training split 'train' has a label"):
        load_task("mrpc", tmp_path)


@pytest.mark.parametrize("columns", [{}, {"choices": ["a", "b"]}, {"choices": "a"}])
def test_a_file_without_rows(tmp_path: Path, columns: dict[str, Any]) -> None:
    (tmp_path / "quiz.csv").write_text("text,a,b,label\n", encoding="utf-8")
    with pytest.raises(DataError, match="Split 'train' of task 'quiz' has no rows"):
        load_task(tmp_path / "quiz.csv", **columns)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_empty_data(mrpc: Path, split: str) -> None:
    write_rows(mrpc / f"mrpc/{split}.jsonl", [])
    with pytest.raises(DataError, match=f"Split '{split}' of task 'glue/mrpc' has no rows"):
        load_task("mrpc", mrpc)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "b"], "Row 0 .* has a list in column 'text', expected a text. Join its parts"),
        (b"a", "Row 0 .* has a bytes in column 'text'"),
        ({"a": 1}, "Row 0 .* has a dict in column 'text'"),
        (float("nan"), "Row 1 .* has no value in column 'text': remove it. Rows are counted from 0"),
        (float("inf"), "Row 1 .* has a float in column 'text'"),
        (" ", "1 of 2 rows .* have no text in 'text': row 1, counted from 0[.]"),
    ],
)
def test_a_value_that_is_no_text(value: Any, message: str) -> None:
    first = value if isinstance(value, list | bytes | dict) else 1.5 if isinstance(value, float) else "c"
    rows = [{"text": first, "label": 0}, {"text": value, "label": 1}]
    with pytest.raises(DataError, match=message):
        build_task(TaskSpec("t", labels=("0", "1")), {"train": rows})


def test_an_empty_text_in_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,title,label\na,b,0\n,c,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 of 2 rows of split 'train' have no text in 'text': row 1, counted from 0"):
        load_task(tmp_path / "rows.csv")
    # One of two may be empty, as in published data.
    assert load_task(tmp_path / "rows.csv", text=["title", "text"]).train.render(1) == "c\n\n-> 1"


def test_what_multiple_choice_lacks_is_named_by_its_setting() -> None:
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    rows = [{"q": "which?", "choices": choices, "right": "B"}] * 2
    with pytest.raises(DataError, match="For multiple choice give .*task.choices=COLUMN and --set task.choice_keys="):
        load_task(rows)
    with pytest.raises(TaskError, match="its choices: text=COLUMN and choices=COLUMN, .*--set task.choices=choices"):
        load_task(rows, text="q", label="right", kind="multiple-choice")
    with pytest.raises(DataError, match="a dict in column 'choices', .*--set task.choices=choices.text"):
        load_task(rows, text="q", label="right", choices="choices")
    with pytest.raises(DataError, match="'B' .* none of the row's choices 0, 1[.] .*task.choice_keys=choices.label"):
        load_task(rows, text="q", label="right", choices="choices.text")
    task = load_task(rows, text="q", label="right", choices="choices.text", choice_keys="choices.label")
    assert task.train.labels().tolist() == [1, 1]


def test_choices_that_are_no_list() -> None:
    spec = TaskSpec("t", "multiple-choice", ("q",), "right", ("A", "B"), choices=("choices",))
    with pytest.raises(DataError, match="Row 0 .* has a str in column 'choices', expected a list of choices"):
        build_task(spec, {"train": [{"q": "q", "choices": "ab", "right": 0}]})


def test_a_text_that_is_not_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [*sentence_pairs(2), {"sentence1": "a", "sentence2": None, "label": 1}])
    with pytest.raises(DataError, match="Row 2 of split 'train' has no value in column 'sentence2'"):
        load_task("mrpc", tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 21}, "train_size is 21, but split 'train' has 20 rows"),
        ({"train_size": 15, "heldout_size": 6}, "heldout_size is 6, but split 'train' can spare 5 rows"),
        ({"heldout_size": 20}, "heldout_size is 20, but split 'train' can spare 19 rows"),
        ({"train_size": 0}, "train_size, a number of rows, should be greater than or equal to 1, found 0"),
        ({"heldout_size": -1}, "heldout_size, a number of rows, should be greater than or equal to 0, found -1"),
        ({"heldout_size": 0.2}, "heldout_size, a number of rows, .* integer.*, found 0.2"),
    ],
)
def test_subsets_that_cannot_be(mrpc: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises((DataError, SettingError), match=message):
        load_task("mrpc", mrpc, **sizes)


def test_an_unknown_split(mrpc: Path) -> None:
    with pytest.raises(TaskError, match="Unknown split .* 'validaton'. Did you mean 'validation'"):
        load_task("mrpc", mrpc).split("validaton")
    with pytest.raises(TaskError, match="Unknown split .* 'dev'"):
        load_task("mrpc", mrpc, validation="dev")
    with pytest.raises(TaskError, match="heldout_size="):
        load_task("mrpc", mrpc).split("heldout")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "regresion"}, "Did you mean 'regression'"),
        ({"text": ("a", "b", "c")}, "3 texts, expected 1 or 2"),
        ({"kind": "multiple-choice"}, "needs one text, the question, and its choices"),
        ({"kind": "multiple-choice", "choices": "all", "prompt": "{text}:"}, "shows none of them: put {choices}"),
        ({"labels": ("a", "a")}, "names a class twice"),
        ({"labels": 2}, "labels is 2, expected names"),
        ({"text": 0}, "text is 0, expected names"),
        ({"label": 1}, "label is 1, expected a text"),
    ],
)
def test_a_task_that_contradicts_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TaskSpec("t", **fields)


@pytest.mark.parametrize("prompt", ["{text} {choices}:", "{text} {one} or {two}:"])
def test_a_prompt_may_show_choices_together_or_each_by_itself(prompt: str) -> None:
    assert TaskSpec("t", "multiple-choice", choices=("one", "two"), prompt=prompt).prompt == prompt


def test_an_unknown_property_of_a_task() -> None:
    with pytest.raises(TaskError, match="Did you mean 'label'"):
        TaskSpec.from_dict({"name": "t", "lable": "x"})


def test_the_hub_out_of_reach_says_how_to_use_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Offline mode is enabled.")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Cannot load nyu-mll/glue \(mrpc\) from the hub: Offline .* data_dir="):
        load_task("mrpc")


def test_rows_that_were_set_aside_are_named_where_there_is_no_validation_split(reviews: Path) -> None:
    task = load_task(reviews, text="body", label="stars", heldout_size=1)
    with pytest.raises(TaskError, match="Rows that were cut off the training split are 'heldout'"):
        task.split("validation")
