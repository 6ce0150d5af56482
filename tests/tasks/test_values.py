"""Classes that the values of a label column imply."""

from __future__ import annotations

from typing import Any

import pytest

from bayeslora.errors import DataError
from bayeslora.tasks import load_task
from bayeslora.tasks.sources import from_data
from bayeslora.tasks.values import infer_classes


def infer(values: list[Any]) -> tuple[str, ...]:
    return infer_classes(from_data([{"label": value} for value in values], ["label"]), "label")


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
        # As pandas writes whole numbers beside a missing one.
        (["0.0", "", "1.0"], ("0", "1")),
        (["10", "9", *(str(number) for number in range(9))] * 2, tuple(str(number) for number in range(11))),
        ([" spam", "ham", "spam "], ("ham", "spam")),
        (["caf\u00e9", "cafe\u0301", "th\u00e9"], ("caf\u00e9", "th\u00e9")),
        (
            ["\u041d\u0435\u0442", "\u0414\u0430", "\u65e5\u672c"],
            ("\u0414\u0430", "\u041d\u0435\u0442", "\u65e5\u672c"),
        ),
        (["Yes", "yes"], ("Yes", "yes")),
        (["true", "false"], ("false", "true")),
        ([f"c{number:03}" for number in range(300)] * 2, tuple(f"c{number:03}" for number in range(300))),
        ([None, " "], ()),
        ([-1, -1], ()),
    ],
)
def test_names_that_values_imply(values: list[Any], names: tuple[str, ...]) -> None:
    assert infer(values) == names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], r"are 1, 2, 3, expected 0, 1, .*labels=\['1', '2', '3'\] \(in a shell --set task.labels=1,2,3\)"),
        ([0, 2], "without a gap"),
        ([0.5, 1.0], "kind='regression'"),
        (
            ["1.5", "0.2", "1.0"],
            r"kind='regression' \(in a shell --set task.kind=regression\)",
        ),  # as a CSV file has them
        (["a", "a"], "one class, 'a', expected at least 2"),
        ([-1, 1], r"are -1, 1, expected .*labels=\['-1', '1'\]"),
        ([[0, 2], [1]], r"Row 0 .*label \[0, 2\] in column 'label' is a list, .*fit a task each .*'a\+b'"),
        ([{"a": 1}], "is a dict"),
        ([b"spam", b"ham"], "is a bytes"),
        ([f"text {number}" for number in range(150)], "150 different values in 150 rows, which are hardly classes"),
        (
            [f"text {number}" for number in range(11)] + ["a"] * 9,
            "12 different values in 20 rows, .* --set task.label=",
        ),
    ],
)
def test_values_that_imply_no_names(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        infer(values)


def test_the_order_of_rows_does_not_number_classes() -> None:
    assert infer(["b", "c", "a"]) == infer(["a", "b", "c"]) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [*["pos", "neg"] * 10, "psotive"],
            r"labels that a single row has: psotive\. .*labels=\['neg', 'pos', 'psotive'\]",
        ),
        ([*["pos"] * 10, "psotive", "negg"], "labels that a single row has: negg, psotive"),
        ([*["World", "Science, Tech"] * 10, "Wrld"], r"name the classes: labels=\[.*task_settings: {labels: \[...\]}"),
        (["pos", "neg", "Pos"], "Pos and pos differ in case alone .*in a shell --set task.labels=Pos,neg,pos"),
    ],
)
def test_classes_that_may_be_slips(values: list[Any], message: str) -> None:
    with pytest.warns(UserWarning, match=f"Column 'label' of split 'train': .*{message}"):
        infer(values)


def test_few_rows_and_classes_that_are_named_are_no_slips(recwarn: pytest.WarningsRecorder) -> None:
    infer(["pos", "neg", "pos", "neutral"])
    infer([*[0, 1] * 10, 2])  # a rare rating
    infer([*[True] * 20, False])
    infer(["Straße", "strasse"] * 10)
    rows = [{"text": "a", "label": label} for label in [*["pos", "neg"] * 10, "Pos"]]
    assert load_task(rows, labels=["neg", "pos", "Pos"]).spec.labels == ("neg", "pos", "Pos")
    assert not recwarn.list
