"""What the label column of a data set says: a class, a choice or a number for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks.spec import TaskSpec

__all__ = ["column", "infer_labels", "pick", "read_labels"]


def pick(row: Any, path: str) -> Any:
    """Value of a field; "choices.text" is the field `text` of the field `choices`."""
    if isinstance(row, list):
        return [pick(part, path) for part in row]
    if not isinstance(row, dict) or path in row:
        return row[path]
    head, _, tail = path.partition(".")
    return pick(row[head], tail)


def column(rows: Dataset, path: str, split: str = "data") -> list[Any]:
    """Values of a field in all rows.

    Raises:
        DataError: there is no such column.
    """
    head = path if path in rows.column_names else path.partition(".")[0]
    if head not in rows.column_names:
        raise DataError(f"Split '{split}': {unknown('column', head, rows.column_names)}")
    values: list[Any] = rows[head][:]
    tail = path.removeprefix(head).removeprefix(".")
    try:
        return [pick(value, tail) for value in values] if tail else values
    except (KeyError, TypeError) as error:
        raise DataError(f"Column '{head}' of split '{split}' has no field '{tail}'.") from error


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
    # -1 may be a value like any other, but not if it is the only one.
    minus_one_is_none = spec.kind != "regression" or all(_integer(value) == -1 for value in values)
    missing = [
        row for row, value in enumerate(values) if _is_missing(value, minus_one_is_none and "-1" not in spec.labels)
    ]
    if len(missing) == len(values):
        return None
    if missing:
        raise DataError(
            f"{len(missing)} of {len(values)} rows of split '{split}' have no label in '{spec.label}': "
            f"row {missing[0]} ({values[missing[0]]!r}) is the first. Remove them or fill in their labels."
        )
    if spec.kind == "regression":
        return [_number(value, spec, split, row) for row, value in enumerate(values)]
    if spec.kind == "multiple-choice":
        return _answers(rows, values, spec, split)
    numbers = {name: number for number, name in enumerate(spec.labels)}
    return [_class_number(value, numbers, spec, split, row) for row, value in enumerate(values)]


def infer_labels(rows: Dataset, label: str, split: str = "train") -> tuple[str, ...]:
    """Class names that the label column of a training set implies.

    The names that the hub gives with a data set; "False" and "True"; "0" ... "K-1" for integers; the strings
    themselves in the order of their first appearance.

    Raises:
        DataError: integers that do not run from 0, fractions, or a single class.
    """
    feature = rows.features.get(label)
    if names := getattr(feature, "names", None):
        return tuple(names)
    values = [value for value in column(rows, label, split) if value is not None and str(value).strip()]
    if values and all(isinstance(value, bool) for value in values):
        return ("False", "True")
    found = {_integer(value) for value in values}
    if None in found:
        if all(_is_finite(value) for value in values):
            raise DataError(f"Column '{label}' holds fractions, expected classes, or else kind='regression'.")
        names = tuple(dict.fromkeys(str(value) for value in values))
    else:
        numbers = sorted(number for number in found if number is not None and number != -1)
        if numbers != list(range(len(numbers))):
            shown = [str(number) for number in numbers]
            raise DataError(
                f"The labels in column '{label}' are {', '.join(shown[:10])}, expected 0, 1, ... without "
                f"a gap. Name the classes in their order: labels={shown[:10]}."
            )
        names = tuple(str(number) for number in numbers)
    if len(names) < 2:
        raise DataError(f"Column '{label}' of split '{split}' holds {len(names)} classes, expected at least 2.")
    return names


def _integer(value: Any) -> int | None:
    """The integer that a value is or spells; None if it is something else."""
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        return int(value) if digits.isascii() and digits.isdigit() else None
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return None


def _is_finite(value: Any) -> bool:
    """Whether a value is or spells a number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_missing(value: Any, minus_one_is_none: bool) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str) and not value.strip():
        return True
    return minus_one_is_none and _integer(value) == -1


def _number(value: Any, spec: TaskSpec, split: str, row: int) -> float:
    if not _is_finite(value):
        raise DataError(
            f"Row {row} of split '{split}': label {value!r} in column '{spec.label}' is not a finite number."
        )
    return float(value)


def _class_number(value: Any, numbers: dict[str, int], spec: TaskSpec, split: str, row: int) -> int:
    """Number of a class given by its name or, unless the names are integers themselves, by its number."""
    integer = _integer(value)
    name = str(value) if integer is None or isinstance(value, bool) else str(integer)
    for candidate in (value, name):
        if isinstance(candidate, str) and candidate in numbers:
            return numbers[candidate]
    named_by_integers = all(_integer(label) is not None for label in spec.labels)
    if integer is not None and not named_by_integers and 0 <= integer < len(spec.labels):
        return integer
    raise DataError(
        f"Row {row} of split '{split}': label {value!r} in column '{spec.label}' is none of "
        + _shown(spec.labels)
        + ("." if named_by_integers else f", nor a number from 0 to {len(spec.labels) - 1}.")
    )


def _answers(rows: Dataset, values: Sequence[Any], spec: TaskSpec, split: str) -> list[int]:
    """Number of the right choice of each row, looked up among that row's own choices."""
    if len(spec.choices) == 1:
        widths = [len(choices) for choices in column(rows, spec.choices[0], split)]
    else:
        widths = [len(spec.choices)] * len(values)
    if len(spec.choice_keys) == 1:
        keys = column(rows, spec.choice_keys[0], split)
    else:
        keys = [spec.choice_keys or range(width) for width in widths]
    answers = []
    for row, (value, known, width) in enumerate(zip(values, keys, widths, strict=True)):
        if not 2 <= width <= spec.max_choices or len(known) != width:
            raise DataError(
                f"Row {row} of split '{split}' has {width} choices and {len(known)} names for them, expected "
                f"equally many, from 2 to {spec.max_choices}."
            )
        names = [str(key).strip() for key in known]
        answer = str(_integer(value)) if _integer(value) is not None else str(value).strip()
        if answer not in names:
            raise DataError(
                f"Row {row} of split '{split}': answer {value!r} in column '{spec.label}' is none of the "
                f"row's choices {_shown(names)}."
            )
        answers.append(names.index(answer))
    return answers


def _shown(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")
