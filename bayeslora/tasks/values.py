"""Values of a label column, and the classes that they imply.

What a label column may hold, the same for files, data sets and rows in memory:

- A row has one label: a string, a number or a boolean. Lists (several labels), mappings and bytes are refused.
- Null, NaN and blank text are no label. Nor is -1, unless "-1" is a class; among values of a regression -1 is a value
  unless all rows have it.
- All rows of a split have a label, or none has.
- Names are compared without blanks around them and in Unicode's normal form C. Case counts.
- A whole number is the same in every spelling: 1, 1.0, "1", "1.0", "01".
- Classes that nobody names are those that the data set comes with (a ClassLabel); "False" and "True" of booleans;
  "0" ... "K-1" of whole numbers, which may leave no gap; otherwise the names, sorted. Neither the order of the rows
  nor their number counts.
- Names that are more than ten and are another one in most rows are no classes.
- A class that a single row has beside many rows of another, and classes that differ in case alone, may be a slip of
  the hand: a warning says so, unless the classes are named.
- A value is the name of a class or, unless the names are whole numbers themselves, its number.
"""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from shlex import quote
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError
from bayeslora.tasks.sources import column

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["infer_classes", "is_finite", "is_missing", "name_of", "numbered", "shown", "single", "whole"]

WHOLE = re.compile(r"\s*-?[0-9]+(\.0*)?\s*")
#: More names than these are classes only if they come again.
MANY = 10
#: Beside so many rows of another class, a single one may be a slip of the hand.
USUAL = 10
OF_CLASSES = "the column of the classes, label=COLUMN (in a shell --set task.label=COLUMN)"
AS_VALUES = "kind='regression' (in a shell --set task.kind=regression)"


def infer_classes(rows: Dataset, label: str, split: str = "train") -> tuple[str, ...]:
    """Class names that a label column implies; none if no row has a label.

    Raises:
        DataError: whole numbers that do not run from 0, fractions, a single class, or a text of its own for each row.
    """
    if names := getattr(rows.features.get(label), "names", None):
        return tuple(names)
    values = [value for value in single(rows, label, split) if not is_missing(value)]
    if not values or {whole(value) for value in values} == {-1}:
        return ()
    names = _names(values, label)
    if len(names) < 2:
        raise DataError(
            f"Column '{label}' of split '{split}' holds one class, '{names[0]}', expected at least 2. Add rows of "
            f"another class, or give {OF_CLASSES}."
        )
    if len(names) > MANY and 2 * len(names) > len(values):
        raise DataError(
            f"Column '{label}' of split '{split}' holds {len(names):,} different values in {len(values):,} rows, which "
            f"are hardly classes. Give {OF_CLASSES}, or {AS_VALUES}, or the classes, "
            "labels=[...] (in a shell --set task.labels=...)."
        )
    if slips := list(_slips(values, names)):
        warnings.warn(
            f"Column '{label}' of split '{split}': {'; '.join(slips)}. If these are slips, correct the rows. If not, "
            f"name the classes: {_naming(names)}.",
            stacklevel=2,
        )
    return names


def name_of(value: Any) -> str:
    """The one spelling of a class's name."""
    number = None if isinstance(value, bool) else whole(value)
    return unicodedata.normalize("NFC", str(value)).strip() if number is None else str(number)


def single(rows: Dataset, label: str, split: str) -> list[Any]:
    """Values of a label column, each a single one.

    Raises:
        ColumnError: there is no such column.
        DataError: a value is a list or something else that is no class or number.
    """
    values = column(rows, label, split)
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str | int | float | Decimal):
            hint = " Of several labels a row, fit a task each (a column of yes and no), or join them into one: 'a+b'."
            raise DataError(
                f"Row {row} of split '{split}': label {value!r} in column '{label}' is a {type(value).__name__}, "
                f"expected one class or number.{hint if isinstance(value, list) else ''}"
            )
    return values


def is_missing(value: Any) -> bool:
    """Whether a value says that a row has no label."""
    return not value.strip() if isinstance(value, str) else value is None or value != value  # as NaN is


def is_finite(value: Any) -> bool:
    """Whether a value is or spells a finite number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def whole(value: Any) -> int | None:
    """The whole number that a value is or spells; None if it is something else."""
    if isinstance(value, str):
        return int(value.partition(".")[0]) if WHOLE.fullmatch(value) else None
    if isinstance(value, int | float | Decimal) and is_finite(value) and value == int(value):
        return int(value)
    return None


def numbered(rows: Sequence[int]) -> str:
    """Numbers of some rows, at least one: the first of many."""
    return f"row{'s' * (len(rows) > 1)} {shown([str(row) for row in rows])}"


def shown(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:12]) + (f" ... ({len(names)} in all)" if len(names) > 12 else "")


def _names(values: Sequence[Any], label: str) -> tuple[str, ...]:
    if all(isinstance(value, bool) for value in values):
        return ("False", "True")
    numbers = {whole(value) for value in values}
    if None in numbers:
        if all(is_finite(value) for value in values):
            raise DataError(f"Column '{label}' holds fractions, expected classes, or else {AS_VALUES}.")
        return tuple(sorted({name_of(value) for value in values}))
    found = sorted(number for number in numbers if number is not None)
    classes = [number for number in found if number != -1]
    if classes != list(range(len(classes))):
        names = [str(number) for number in found]
        raise DataError(
            f"The labels in column '{label}' are {shown(names)}, expected 0, 1, ... without a gap. Name the classes "
            f"in their order: {_naming(names)}."
        )
    return tuple(str(number) for number in classes)


def _slips(values: Sequence[Any], names: Sequence[str]) -> Iterator[str]:
    """Which of the classes may be slips of the hand, in words."""
    rows = Counter(name_of(value) for value in values)
    written = not all(isinstance(value, bool) or whole(value) is not None for value in values)
    rare = [name for name in names if rows[name] == 1] if written else []  # a number or a truth is hardly misspelled
    if rare and max(rows[name] for name in names) >= USUAL:
        yield f"labels that a single row has: {shown(rare)}"
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.lower(), []).append(name)
    for same in alike.values():
        if len(same) > 1:
            yield f"{' and '.join(same)} differ in case alone and are a class each"


def _naming(names: Sequence[str]) -> str:
    """How to name these classes."""
    if any("," in name for name in names):  # which stands between names in a shell
        return f"labels={[*names][:MANY]}, or task_settings: {{labels: [...]}} in a file (--config)"
    if len(names) > MANY:
        return "labels=[...] (in a shell --set task.labels=...)"
    flag = quote(f"task.labels={','.join(names)}")
    return f"labels={[*names]} (in a shell --set {flag})"
