"""Reading label columns."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features

from bayeslora.errors import DataError
from bayeslora.tasks.sources import column, from_data, pick
from bayeslora.tasks.spec import TaskSpec
from bayeslora.tasks.values import infer_classes


def labelled(values: list[Any]) -> Dataset:
    return from_data([{"label": value} for value in values], ["label"])


def read(values: list[Any], **fields: Any) -> list[int] | list[float] | None:
    spec = TaskSpec("t", **fields)
    return spec.rules.labels(labelled(values), spec)


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
        ([-1, 0, 1], ("-1", "0", "1"), [0, 1, 2]),
        ([" yes", "no "], ("no", "yes"), [1, 0]),
        (["cafe\u0301", "tea"], ("tea", "caf\u00e9"), [1, 0]),
        (["1.0", "0.0"], ("no", "yes"), [1, 0]),
        (["007", "7", "7.0"], ("7", "8"), [0, 0, 0]),
        ([Decimal(1), Decimal(0)], ("no", "yes"), [1, 0]),
    ],
)
def test_classes_by_name_or_number(values: list[Any], labels: tuple[str, ...], numbers: list[int]) -> None:
    assert read(values, labels=labels) == numbers


@pytest.mark.parametrize(("value", "labels"), [(2, ("no", "yes")), ("maybe", ("no", "yes")), (0, ("1", "2"))])
def test_a_value_that_is_no_class(value: Any, labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=f"Row 0 .*{value!r}"):
        read([value], labels=labels)


@pytest.mark.parametrize(("labels", "numbers"), [(("1", "2"), [0, 1]), (("2", "1"), [1, 0]), (("bad", "good"), [0, 1])])
def test_numbers_of_a_class_label_count_its_own_names(labels: tuple[str, ...], numbers: list[int]) -> None:
    stars = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["1", "2"])}))
    assert infer_classes(stars, "label") == ("1", "2")
    spec = TaskSpec("t", labels=labels)
    assert spec.rules.labels(stars, spec) == numbers


def test_minus_one_beside_other_values_may_be_a_class() -> None:
    with pytest.raises(DataError, match=r"row 1 \(-1\) is the first.* If -1 is a class, name the classes"):
        read([0, -1, 1], labels=("0", "1"))


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_several_labels_a_row(kind: str) -> None:
    with pytest.raises(DataError, match=r"Row 0 .* \[0.5\] in column 'label' is a list, expected one class or number"):
        read([[0.5], [1.0, 2.0]], kind=kind)


@pytest.mark.parametrize("values", [[None, None], [-1, -1], ["", " "], [-1, None], [float("nan")]])
def test_no_row_has_a_label(values: list[Any]) -> None:
    assert read(values, labels=("no", "yes")) is None


def test_regression_labels() -> None:
    assert read(["1.5", "-1"], kind="regression") == [1.5, -1.0]
    assert read([-1, 0, 1], kind="regression") == [-1.0, 0.0, 1.0]
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
        spec.rules.labels(from_data([row], row), spec)


def test_a_field_that_a_column_lacks() -> None:
    with pytest.raises(DataError, match="Column 'choices' of split 'data' has no field 'texts'"):
        column(from_data([{"choices": {"text": ["x"]}}], ["choices"]), "choices.texts")


def test_fields_of_fields() -> None:
    row = {"choices": [{"text": "x"}, {"text": "y"}], "a.b": 1, "c": {"d": 2}}
    assert (pick(row, "choices.text"), pick(row, "a.b"), pick(row, "c.d")) == (["x", "y"], 1, 2)
