"""What the label column of a data set says: a class, a choice or a number for each row.

The rules, the same for files, data sets and rows in memory:

- A row has one label: a string, a number or a boolean. Lists (several labels), mappings and bytes are refused.
- Null, NaN and blank text are no label. Nor is -1, unless "-1" is a class; among values of a regression -1 is a value
  unless all rows have it.
- All rows of a split have a label, or none has.
- Names are compared without blanks around them and in Unicode's normal form C. Case counts.
- A whole number is the same in every spelling: 1, 1.0, "1", "1.0", "01".
- Classes that nobody names are those that the data set comes with (a ClassLabel); "False" and "True" of booleans;
  "0" ... "K-1" of whole numbers, which may leave no gap; otherwise the names, sorted. Neither the order of the rows
  nor their number counts.
- Names that are more than a hundred and are another one in most rows are no classes.
- A value is the name of a class or, unless the names are whole numbers themselves, its number.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError
from bayeslora.tasks.fields import column

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks.spec import TaskSpec

__all__ = ["class_number", "infer_classes", "is_finite", "name_of", "read_labels", "shown", "whole"]

WHOLE = re.compile(r"\s*-?[0-9]+(\.0*)?\s*")
#: More names than these are classes only if they come again.
MANY = 100


def read_labels(rows: Dataset, spec: TaskSpec, split: str = "data") -> list[int] | list[float] | None:
    """Labels of all rows as class numbers, numbers of choices or values.

    Args:
        rows: the data set.
        spec: its task.
        split: its name, for messages.

    Returns:
        One label a row; None if no row has a label: they are null, empty or -1, or there is no label column.

    Raises:
        DataError: only some rows have a label, or one is out of range; the message names the row, counted
            from 0.
    """
    if spec.label not in rows.column_names and spec.label.partition(".")[0] not in rows.column_names:
        return None
    values = column(rows, spec.label, split)
    _check_single(values, spec.label, split)
    minus_one_is_none = spec.rules.minus_one_is_none(spec, values)
    missing = [
        row for row, value in enumerate(values) if _is_missing(value) or (minus_one_is_none and whole(value) == -1)
    ]
    if len(missing) == len(values):
        return None
    if missing:
        first = values[missing[0]]
        hint = " If -1 is a class, name the classes in their order: labels=." if whole(first) == -1 else ""
        raise DataError(
            f"{len(missing)} of {len(values)} rows of split '{split}' have no label in '{spec.label}': "
            f"row {missing[0]} ({first!r}) is the first. Remove them or fill in their labels.{hint}"
        )
    return spec.rules.read(rows, values, spec, split)


def infer_classes(rows: Dataset, label: str, split: str = "train") -> tuple[str, ...]:
    """Class names that a label column implies; none if no row has a label.

    Raises:
        DataError: whole numbers that do not run from 0, fractions, a single class, or a text of its own for each row.
    """
    if names := getattr(rows.features.get(label), "names", None):
        return tuple(names)
    values = column(rows, label, split)
    _check_single(values, label, split)
    values = [value for value in values if not _is_missing(value)]
    if not values or {whole(value) for value in values} == {-1}:
        return ()
    names = _names(values, label)
    if len(names) < 2:
        raise DataError(f"Column '{label}' of split '{split}' holds {len(names)} classes, expected at least 2.")
    if len(names) > MANY and 2 * len(names) > len(values):
        raise DataError(
            f"Column '{label}' of split '{split}' holds {len(names):,} different values in {len(values):,} rows, which "
            "are hardly classes. Give the column of the classes, label=, or kind='regression', or the classes, labels=."
        )
    return names


def _names(values: Sequence[Any], label: str) -> tuple[str, ...]:
    if all(isinstance(value, bool) for value in values):
        return ("False", "True")
    numbers = {whole(value) for value in values}
    if None in numbers:
        if all(is_finite(value) for value in values):
            raise DataError(f"Column '{label}' holds fractions, expected classes, or else kind='regression'.")
        return tuple(sorted({name_of(value) for value in values}))
    found = sorted(number for number in numbers if number is not None)
    if [number for number in found if number != -1] != list(range(len(numbers - {-1}))):
        names = [str(number) for number in found]
        raise DataError(
            f"The labels in column '{label}' are {shown(names)}, expected 0, 1, ... without a gap. Name the classes in "
            f"their order: labels={names[:10]}."
        )
    return tuple(str(number) for number in found if number != -1)


def whole(value: Any) -> int | None:
    """The whole number that a value is or spells; None if it is something else."""
    if isinstance(value, str):
        return int(value.partition(".")[0]) if WHOLE.fullmatch(value) else None
    if isinstance(value, int | float | Decimal) and is_finite(value) and value == int(value):
        return int(value)
    return None


def is_finite(value: Any) -> bool:
    """Whether a value is or spells a finite number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def name_of(value: Any) -> str:
    """The one spelling of a class's name."""
    number = None if isinstance(value, bool) else whole(value)
    return unicodedata.normalize("NFC", str(value)).strip() if number is None else str(number)


def class_number(value: Any, numbers: dict[str, int], spec: TaskSpec, split: str, row: int) -> int:
    """Number of a class given by its name or, unless the names are whole numbers themselves, by its number.

    Args:
        value: the label.
        numbers: by the name of each class, in the spelling of `name_of`.
        spec: the task, for messages.
        split: name of the split, for messages.
        row: number of the row, for messages.

    Raises:
        DataError: there is no such class.
    """
    if (name := name_of(value)) in numbers:
        return numbers[name]
    number = whole(value)
    named_by_numbers = all(whole(label) is not None for label in spec.labels)
    if number is not None and not named_by_numbers and 0 <= number < len(spec.labels):
        return number
    raise DataError(
        f"Row {row} of split '{split}': label {value!r} in column '{spec.label}' is none of "
        + shown(spec.labels)
        + ("." if named_by_numbers else f", nor a number from 0 to {len(spec.labels) - 1}.")
    )


def shown(names: Sequence[str], most: int = 12) -> str:
    """The first names of many."""
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")


def _check_single(values: Sequence[Any], label: str, split: str) -> None:
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str | int | float | Decimal):
            hint = (
                " Of several labels a row, fit a task each (a column of yes and no), or join them into one name, such "
                "as 'a+b'."
            )
            raise DataError(
                f"Row {row} of split '{split}': label {value!r} in column '{label}' is a {type(value).__name__}, "
                f"expected one class or number.{hint if isinstance(value, list) else ''}"
            )


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value  # NaN is not equal to itself
