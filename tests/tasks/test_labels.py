"""Reading label columns."""

from __future__ import annotations

from typing import Any

import pytest

from bayeslora.errors import DataError
from bayeslora.tasks.fields import column, pick
from bayeslora.tasks.labels import infer_classes, read_labels
from bayeslora.tasks.sources import from_rows
from bayeslora.tasks.spec import TaskSpec


def infer(values: list[Any]) -> tuple[str, ...]:
    return infer_classes(from_rows({"label": value} for value in values), "label")


def read(values: list[Any], **fields: Any) -> list[int] | list[float] | None:
    return read_labels(from_rows({"label": value} for value in values), TaskSpec("t", **fields))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 0, 2], ("0", "1", "2")),
        (["1", "0"], ("0", "1")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("False", "True")),
        (["spam", "ham", "spam"], ("ham", "spam")),
        (["1", "two"], ("1", "two")),
        ([0, 1, None, -1], ("0", "1")),
    ],
)
def test_names_that_values_imply(values: list[Any], names: tuple[str, ...]) -> None:
    assert infer(values) == names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], r"are 1, 2, 3, expected 0, 1, .*labels=\['1', '2', '3'\]"),
        ([0, 2], "without a gap"),
        ([0.5, 1.0], "kind='regression'"),
        (["1.5", "0.2", "1.0"], "kind='regression'"),  # as a CSV file has them
        (["a", "a"], "1 classes, expected at least 2"),
    ],
)
def test_values_that_imply_no_names(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        infer(values)


@pytest.mark.parametrize(
    ("values", "labels", "numbers"),
    [
        ([0, 1], ("no", "yes"), [0, 1]),
        (["yes", "no"], ("no", "yes"), [1, 0]),
        ([True, False], ("no", "yes"), [1, 0]),
        ([True, False], ("False", "True"), [1, 0]),
        # Names that are integers are names: 1 is the class called "1", not the class with number 1.
        ([1, 2], ("1", "2"), [0, 1]),
        (["-1", "1"], ("-1", "1"), [0, 1]),
    ],
)
def test_classes_by_name_or_number(values: list[Any], labels: tuple[str, ...], numbers: list[int]) -> None:
    assert read(values, labels=labels) == numbers


@pytest.mark.parametrize(("value", "labels"), [(2, ("no", "yes")), ("maybe", ("no", "yes")), (0, ("1", "2"))])
def test_a_value_that_is_no_class(value: Any, labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=f"Row 0 .*{value!r}"):
        read([value], labels=labels)


@pytest.mark.parametrize("values", [[None, None], [-1, -1], ["", " "], [-1, None]])
def test_no_row_has_a_label(values: list[Any]) -> None:
    assert read(values, labels=("no", "yes")) is None


def test_regression_labels() -> None:
    assert read(["1.5", "-1"], kind="regression") == [1.5, -1.0]
    assert read([-1.0, -1.0], kind="regression") is None
    with pytest.raises(DataError, match="'high' .* is not a finite number"):
        read(["1", "high"], kind="regression")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"keys": ["A", "B"], "texts": ["x", "y"], "answer": "C"}, "Row 0 .* answer 'C' .* A, B"),
        ({"keys": ["A", "B"], "texts": ["x", "y", "z"], "answer": "A"}, "3 choices and 2 names"),
        ({"keys": list("ABCD"), "texts": list("wxyz"), "answer": "A"}, "from 2 to 3"),
    ],
)
def test_answers_that_fit_no_choice(row: dict[str, Any], message: str) -> None:
    spec = TaskSpec(
        "t", "multiple-choice", ("q",), "answer", ("A", "B", "C"), choices=("texts",), choice_keys=("keys",)
    )
    with pytest.raises(DataError, match=message):
        read_labels(from_rows([row]), spec)


def test_a_field_that_a_column_lacks() -> None:
    with pytest.raises(DataError, match="Column 'choices' of split 'data' has no field 'texts'"):
        column(from_rows([{"choices": {"text": ["x"]}}]), "choices.texts")


def test_fields_of_fields() -> None:
    row = {"choices": [{"text": "x"}, {"text": "y"}], "a.b": 1, "c": {"d": 2}}
    assert (pick(row, "choices.text"), pick(row, "a.b"), pick(row, "c.d")) == (["x", "y"], 1, 2)
