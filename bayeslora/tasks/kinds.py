"""Kinds of tasks: what differs between classes, values and choices stands here, one class each.

A kind is named in `TaskSpec.kind`, so that a task is plain data; `KINDS` knows the names. What a label column may hold,
the same for files, data sets and rows in memory:

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
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError, TaskError
from bayeslora.registry import Registry
from bayeslora.tasks.sources import ColumnError, column, pick, render

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks.spec import TaskSpec

__all__ = ["KINDS", "Classification", "Kind", "MultipleChoice", "Regression", "infer_classes", "name_of"]

Texts = list[tuple[str, str | None]]

WHOLE = re.compile(r"\s*-?[0-9]+(\.0*)?\s*")
#: More names than these are classes only if they come again.
MANY = 100


class Kind(ABC):
    """What a task asks of a row; unless a kind says otherwise, of one or two texts."""

    def check(self, spec: TaskSpec) -> None:
        """Check that a spec says what this kind needs.

        Raises:
            TaskError: otherwise.
        """
        if not 1 <= len(spec.text) <= 2:
            raise TaskError(
                f"Task '{spec.name}' has {len(spec.text)} texts, expected 1 or 2. Join columns by a "
                "template, such as text='{title}: {body}'."
            )
        if len({name_of(label) for label in spec.labels}) < len(spec.labels):
            raise TaskError(f"Task '{spec.name}' names a class twice: {', '.join(spec.labels)}.")

    def describe(self, spec: TaskSpec) -> str:
        """The question, on one line."""
        return spec.kind

    def classes(self, spec: TaskSpec, splits: Mapping[str, Dataset]) -> tuple[str, ...]:
        """Names of the classes or choices that spec and data tell; the training rows are the first of ``splits``."""
        return ()

    def fits(self, spec: TaskSpec, other: TaskSpec) -> bool:
        """Whether what was fitted to one task of this kind answers another one's question."""
        return True

    def labels(self, rows: Dataset, spec: TaskSpec, split: str = "data") -> list[int] | list[float] | None:
        """Labels of all rows as class numbers, numbers of choices or values; None if no row has one.

        Raises:
            DataError: only some rows have a label, or one is out of range; the message names the row, counted from 0.
        """
        try:
            values = self.values(rows, spec, split)
        except ColumnError:
            return None
        minus_one_is_none = self.minus_one_is_none(spec, values)
        missing = [
            row for row, value in enumerate(values) if _is_missing(value) or (minus_one_is_none and _whole(value) == -1)
        ]
        if len(missing) == len(values):
            return None
        if not missing:
            return self.read(rows, values, spec, split)
        first = values[missing[0]]
        hint = " If -1 is a class, name the classes in their order: labels=." if _whole(first) == -1 else ""
        raise DataError(
            f"{len(missing)} of {len(values)} rows of split '{split}' have no label in '{spec.answer}': "
            f"row {missing[0]} ({first!r}) is the first. Remove them or fill in their labels.{hint}"
        )

    def values(self, rows: Dataset, spec: TaskSpec, split: str) -> list[Any]:
        """What the rows say is right, each a single value.

        Raises:
            ColumnError: nothing says it.
        """
        return _single(rows, spec.label, split)

    def minus_one_is_none(self, spec: TaskSpec, values: Sequence[Any]) -> bool:
        """Whether -1 marks a row without a label."""
        return "-1" not in spec.labels

    @abstractmethod
    def read(self, rows: Dataset, values: Sequence[Any], spec: TaskSpec, split: str) -> list[int] | list[float]:
        """Labels of rows that all have one, from the values of the label column.

        Raises:
            DataError: a value is none of the labels that its row may have.
        """

    def choices(self, spec: TaskSpec, row: Mapping[str, Any]) -> list[str]:
        """Texts of a row's choices; none where rows have none."""
        return []

    def holds(self, spec: TaskSpec, name: str) -> str:
        """What a field is to hold, in words."""
        return "a list of choices" if spec.choices == (name,) else "a text"

    def parts(self, spec: TaskSpec, name: str, value: Any) -> list[Any] | None:
        """The texts that a field holds; None if its value is nothing that holds texts."""
        many = spec.choices == (name,)
        if value is None or (many and not isinstance(value, list)):
            return None
        return value if many else [value]

    def texts(self, spec: TaskSpec, row: Mapping[str, Any]) -> Texts:
        """What a network reads of a row."""
        parts = [render(text, row) for text in spec.text]
        return [(parts[0], parts[1] if len(parts) == 2 else None)]

    def render(self, spec: TaskSpec, texts: Texts, label: float | None) -> str:
        """Texts and label of a row for the eye."""
        return _lines(texts, label)


class Classification(Kind):
    """A row has one of some classes."""

    def describe(self, spec: TaskSpec) -> str:
        """The number of classes and the first names."""
        names = ", ".join(spec.labels[:6]) + (", ..." if len(spec.labels) > 6 else "")
        return f"classification into {len(spec.labels)} classes ({names})"

    def classes(self, spec: TaskSpec, splits: Mapping[str, Dataset]) -> tuple[str, ...]:
        """Those that come with the data, whatever the registry says; then the registry's; then those found."""
        for split, rows in splits.items():
            if not spec.labels or hasattr(rows.features.get(spec.label), "names"):
                spec = replace(spec, labels=infer_classes(rows, spec.label, split))
        return spec.labels

    def fits(self, spec: TaskSpec, other: TaskSpec) -> bool:
        """Whether the classes are the same; rows without labels may leave them open."""
        return other.labels in ((), spec.labels)

    def read(self, rows: Dataset, values: Sequence[Any], spec: TaskSpec, split: str) -> list[int] | list[float]:
        """Class numbers, from names or, unless the names are whole numbers themselves, from numbers."""
        numbers = {name_of(name): number for number, name in enumerate(spec.labels)}
        names = getattr(rows.features.get(spec.label), "names", None)
        if names and {name_of(name) for name in names} <= set(numbers):
            # The numbers of a ClassLabel count its own names, which may be numbers, too.
            values = [names[value] for value in values]
        numeric = all(_whole(name) is not None for name in spec.labels)
        found = []
        for row, value in enumerate(values):
            number = numbers.get(name_of(value), None if numeric else _whole(value))
            if number is None or not 0 <= number < len(spec.labels):
                raise DataError(
                    f"Row {row} of split '{split}': label {value!r} in column '{spec.label}' is none of "
                    + _shown(spec.labels)
                    + ("." if numeric else f", nor a number from 0 to {len(spec.labels) - 1}.")
                )
            found.append(number)
        return found

    def render(self, spec: TaskSpec, texts: Texts, label: float | None) -> str:
        """The texts and the name of the class."""
        return _lines(texts, None if label is None else spec.labels[int(label)])


class Regression(Kind):
    """A row has a value."""

    def minus_one_is_none(self, spec: TaskSpec, values: Sequence[Any]) -> bool:
        """Whether no row has another value."""
        return all(_whole(value) == -1 for value in values)

    def read(self, rows: Dataset, values: Sequence[Any], spec: TaskSpec, split: str) -> list[int] | list[float]:
        """Finite numbers."""
        for row, value in enumerate(values):
            if not _is_finite(value):
                raise DataError(
                    f"Row {row} of split '{split}': label {value!r} in column '{spec.label}' is not a finite number."
                )
        return [float(value) for value in values]


class MultipleChoice(Kind):
    """A row has choices of its own, one of which is right."""

    def check(self, spec: TaskSpec) -> None:
        """One text, the question, and its choices."""
        if len(spec.text) != 1 or not spec.choices:
            raise TaskError(f"Task '{spec.name}': multiple choice needs one text, the question, and its choices.")
        super().check(spec)

    def classes(self, spec: TaskSpec, splits: Mapping[str, Dataset]) -> tuple[str, ...]:
        """Names given, or a letter for each choice of the widest row."""
        if spec.labels:
            return spec.labels
        widest = max((width for split, rows in splits.items() for width in _widths(rows, spec, split)), default=0)
        return tuple(chr(ord("A") + number) if widest <= 26 else str(number + 1) for number in range(widest))

    def read(self, rows: Dataset, values: Sequence[Any], spec: TaskSpec, split: str) -> list[int] | list[float]:
        """Numbers of the right choices, each looked up among those of its own row."""
        widths, keys = _widths(rows, spec, split), spec.choice_keys
        named = column(rows, keys[0], split) if len(keys) == 1 else [keys or range(width) for width in widths]
        answers = []
        for row, (value, known, width) in enumerate(zip(values, named, widths, strict=True)):
            if not 2 <= width <= spec.max_choices or len(known) != width:
                raise DataError(
                    f"Row {row} of split '{split}' has {width} choices and {len(known)} names for them, expected "
                    f"equally many, from 2 to {spec.max_choices}."
                )
            names = [name_of(key) for key in known]
            if name_of(value) not in names:
                raise DataError(
                    f"Row {row} of split '{split}': answer {value!r} in column '{spec.label}' is none of the "
                    f"row's choices {_shown(names)}."
                )
            answers.append(names.index(name_of(value)))
        return answers

    def choices(self, spec: TaskSpec, row: Mapping[str, Any]) -> list[str]:
        """In a list of their own, or in a field each."""
        found = [pick(row, name) for name in spec.choices]
        return [str(choice) for choice in (found[0] if len(spec.choices) == 1 else found)]

    def texts(self, spec: TaskSpec, row: Mapping[str, Any]) -> Texts:
        """The question with each choice, which may fill a blank in it."""
        question, choices = render(spec.text[0], row), self.choices(spec, row)
        if spec.blank is None or spec.blank not in question:
            return [(question, choice) for choice in choices]
        before, _, after = question.partition(spec.blank)
        return [(before.rstrip(), f"{choice}{after}") for choice in choices]

    def render(self, spec: TaskSpec, texts: Texts, label: float | None) -> str:
        """A line for each choice, with a mark at the right one."""
        return "\n".join(
            f"{'*' if number == label else ' '} {question} | {choice}"
            for number, (question, choice) in enumerate(texts)
        )


#: Kinds by name; completions have a file of their own.
KINDS: Registry[Kind] = Registry(
    "kind of task",
    {
        "classification": Classification(),
        "regression": Regression(),
        "multiple-choice": MultipleChoice(),
        "completion": "bayeslora.tasks.completion:COMPLETION",
    },
)


def infer_classes(rows: Dataset, label: str, split: str = "train") -> tuple[str, ...]:
    """Class names that a label column implies; none if no row has a label.

    Raises:
        DataError: whole numbers that do not run from 0, fractions, a single class, or a text of its own for each row.
    """
    if names := getattr(rows.features.get(label), "names", None):
        return tuple(names)
    values = [value for value in _single(rows, label, split) if not _is_missing(value)]
    if not values or {_whole(value) for value in values} == {-1}:
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


def name_of(value: Any) -> str:
    """The one spelling of a class's name."""
    number = None if isinstance(value, bool) else _whole(value)
    return unicodedata.normalize("NFC", str(value)).strip() if number is None else str(number)


def _names(values: Sequence[Any], label: str) -> tuple[str, ...]:
    if all(isinstance(value, bool) for value in values):
        return ("False", "True")
    numbers = {_whole(value) for value in values}
    if None in numbers:
        if all(_is_finite(value) for value in values):
            raise DataError(f"Column '{label}' holds fractions, expected classes, or else kind='regression'.")
        return tuple(sorted({name_of(value) for value in values}))
    found = sorted(number for number in numbers if number is not None)
    classes = [number for number in found if number != -1]
    if classes != list(range(len(classes))):
        names = [str(number) for number in found]
        raise DataError(
            f"The labels in column '{label}' are {_shown(names)}, expected 0, 1, ... without a gap. Name the classes "
            f"in their order: labels={names[:10]}."
        )
    return tuple(str(number) for number in classes)


def _single(rows: Dataset, label: str, split: str) -> list[Any]:
    """Values of a label column, each a single one."""
    values = column(rows, label, split)
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str | int | float | Decimal):
            hint = " Of several labels a row, fit a task each (a column of yes and no), or join them into one: 'a+b'."
            raise DataError(
                f"Row {row} of split '{split}': label {value!r} in column '{label}' is a {type(value).__name__}, "
                f"expected one class or number.{hint if isinstance(value, list) else ''}"
            )
    return values


def _widths(rows: Dataset, spec: TaskSpec, split: str) -> list[int]:
    """Number of choices of each row."""
    if len(spec.choices) > 1:
        return [len(spec.choices)] * len(rows)
    return [len(choices or ()) for choices in column(rows, spec.choices[0], split)]


def _is_missing(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value is None or value != value  # as NaN is


def _is_finite(value: Any) -> bool:
    """Whether a value is or spells a finite number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _whole(value: Any) -> int | None:
    """The whole number that a value is or spells; None if it is something else."""
    if isinstance(value, str):
        return int(value.partition(".")[0]) if WHOLE.fullmatch(value) else None
    if isinstance(value, int | float | Decimal) and _is_finite(value) and value == int(value):
        return int(value)
    return None


def _lines(texts: Texts, label: object) -> str:
    return "\n".join([*(text for text in texts[0] if text is not None), f"-> {label}"])


def _shown(names: Sequence[str], most: int = 12) -> str:
    """The first names of many."""
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")
