"""New rows in the forms that users have them in, and which tasks' rows a posterior can be given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from bayeslora.errors import DataError, TaskError
from bayeslora.tasks import TaskSpec, check_compatible, rows_of

ONE = TaskSpec("reviews", text=("body",), labels=("bad", "good"))
TWO = TaskSpec("pairs", text=("a", "b"), labels=("no", "yes"))
TEMPLATE = TaskSpec("mail", text=("{title}: {body}",), labels=("ham", "spam"))
QUIZ = TaskSpec("quiz", "multiple-choice", ("q",), "right", ("A", "B"), choices=("x", "y"))
LISTS = replace(QUIZ, choices=("x",))
SUM = TaskSpec("sums", "completion", ("a",), completion="b")


@pytest.mark.parametrize(
    "data",
    [
        ["fine", "cheap"],
        ("fine", "cheap"),
        iter(["fine", "cheap"]),
        pd.Series(["fine", "cheap"]),
        [{"body": "fine"}, {"body": "cheap", "other": 1}],
        pd.DataFrame({"other": [1, "x"], "body": ["fine", "cheap"]}),
        Dataset.from_dict({"body": ["fine", "cheap"]}),
    ],
)
def test_texts_in_any_form(data: Any) -> None:
    rows = rows_of(ONE, data)
    assert [rows.spec.texts(row) for row in rows.dataset] == [[("fine", None)], [("cheap", None)]]
    assert not rows.labelled


@pytest.mark.parametrize("data", ["fine", {"body": "fine"}])
def test_a_single_row(data: Any) -> None:
    assert rows_of(ONE, data).render(0) == "fine\n-> None"


@pytest.mark.parametrize("data", [("x", "y"), [("x", "y")], [["x", "y"]], {"a": "x", "b": "y"}])
def test_pairs(data: Any) -> None:
    assert rows_of(TWO, data).spec.texts(rows_of(TWO, data).dataset[0]) == [("x", "y")]


@pytest.mark.parametrize(
    ("spec", "row", "other", "texts"),
    [
        (ONE, {"body": 3}, {"body": 2.5}, [("3", None)]),
        (TEMPLATE, {"title": "No", "body": -7}, {"title": "No", "body": 2.5}, [("No: -7", None)]),
        (QUIZ, {"q": "a", "x": 3, "y": 4}, {"q": "a", "x": 2.5, "y": 0.5}, [("a", "3"), ("a", "4")]),
        (LISTS, {"q": "a", "x": [3, 4]}, {"q": "a", "x": [2.5, 0.5]}, [("a", "3"), ("a", "4")]),
        (SUM, {"a": 3, "b": 10}, {"a": 0.5, "b": 1e30}, [("3", "10")]),
    ],
)
def test_a_number_is_the_same_text_whatever_stands_in_other_rows(
    spec: TaskSpec, row: dict[str, Any], other: dict[str, Any], texts: list[tuple[str, str | None]]
) -> None:
    for data in ([row], [row, other], pd.DataFrame([row, other])):  # whose column is then of floats
        rows = rows_of(spec, data)
        assert rows.spec.texts(rows.dataset[0]) == texts


def test_labels_that_come_along_are_read() -> None:
    assert rows_of(ONE, [{"body": "fine", "label": "good"}]).labels().tolist() == [1]


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        (ONE, [("x", "y")], r"Row 0 of the new rows is a tuple, .*expected a text, or a mapping with body"),
        (ONE, [1], "Row 0 of the new rows is a int"),
        (ONE, 1, "found a int: give a DataFrame"),
        (TWO, ["x"], "expected a pair of texts, or a mapping with a, b"),
        (TEMPLATE, ["x"], "expected a mapping with title, body"),
        (QUIZ, ["x"], "expected a mapping with q, x, y"),
        (ONE, [{"text": "x"}], "new rows: Unknown column 'body'.* Known: text. Expected: body"),
        (TWO, pd.DataFrame({"a": ["x"], "bb": ["y"]}), "Unknown column 'b'. .*Known: a, bb. Expected: a, b"),
        (ONE, Dataset.from_dict({"text": ["x"]}), "Unknown column 'body'"),
        (ONE, [{"body": "x"}, {"body": None}], "Row 1 of split 'new rows' has no value in column 'body'"),
        (ONE, pd.DataFrame([["x", "y"]], columns=["body", "body"]), "Several columns .* 'body'"),
        (ONE, [{"body": "x", "label": "great"}], "Row 0 of split 'new rows': label 'great' .* is none of bad, good"),
        (ONE, [], "has no rows"),
        (replace(QUIZ, choices=("choices",)), [], "has no rows"),
    ],
)
def test_rows_that_do_not_fit(spec: TaskSpec, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(spec, data)


@pytest.mark.parametrize(
    "other",
    [
        replace(ONE, labels=("bad", "good", "great")),
        replace(ONE, labels=("good", "bad")),
        replace(ONE, labels=("no", "yes")),
        replace(ONE, kind="regression", labels=()),
    ],
)
def test_rows_of_a_task_with_other_classes(other: TaskSpec) -> None:
    with pytest.raises(TaskError, match=r"fitted to classification into \(bad, good\)"):
        check_compatible(ONE, other)


def test_rows_of_a_task_of_the_same_classes() -> None:
    check_compatible(ONE, replace(ONE, name="others", text=("a", "b")))
    check_compatible(ONE, replace(ONE, labels=()))
    check_compatible(QUIZ, replace(QUIZ, labels=("A", "B", "C"), choices=("x", "y", "z")))


def test_choices_to_predict_may_be_more_than_those_that_were_fitted() -> None:
    quiz = TaskSpec("quiz", "multiple-choice", ("q",), "right", ("A", "B"), choices=("choices",))
    assert rows_of(quiz, {"q": "q", "choices": ["x", "y", "z"]}).spec.labels == ("A", "B", "C")
    assert rows_of(quiz, {"q": "q", "choices": [str(choice) for choice in range(27)]}).spec.labels[-1] == "27"
    assert rows_of(replace(quiz, labels=("1", "2")), {"q": "q", "choices": ["x", "y"]}).spec.labels == ("1", "2")
