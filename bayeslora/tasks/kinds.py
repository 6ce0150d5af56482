"""Kinds of tasks: what differs between classes, values and choices stands here, one class each.

A kind is named in `TaskSpec.kind`, so that a task is plain data; `KINDS` knows the names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError, TaskError
from bayeslora.registry import Registry
from bayeslora.tasks.sources import ColumnError, column, fields_of, pick, render, text_of
from bayeslora.tasks.values import infer_classes, is_finite, is_missing, name_of, shown, single, whole

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks.spec import TaskSpec

__all__ = ["KINDS", "Classification", "Kind", "MultipleChoice", "Regression"]

Texts = list[tuple[str, str | None]]

BY_NAME = (
    " If answers are names of choices, say where these names are: choice_keys=COLUMN, or 'choices.label' where it is a "
    "mapping (in a shell --set task.choice_keys=choices.label)."
)


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
            row for row, value in enumerate(values) if is_missing(value) or (minus_one_is_none and whole(value) == -1)
        ]
        if len(missing) == len(values):
            return None
        if not missing:
            return self.read(rows, values, spec, split)
        first = values[missing[0]]
        hint = " If -1 is a class, name the classes in their order: labels=." if whole(first) == -1 else ""
        raise DataError(
            f"{len(missing)} of {len(values)} rows of split '{split}' have no label in '{spec.answer}': "
            f"row {missing[0]} ({first!r}) is the first. Remove them or fill in their labels.{hint}"
        )

    def values(self, rows: Dataset, spec: TaskSpec, split: str) -> list[Any]:
        """What the rows say is right, each a single value.

        Raises:
            ColumnError: nothing says it.
        """
        return single(rows, spec.label, split)

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
        numeric = all(whole(name) is not None for name in spec.labels)
        found = []
        for row, value in enumerate(values):
            number = numbers.get(name_of(value), None if numeric else whole(value))
            if number is None or not 0 <= number < len(spec.labels):
                raise DataError(
                    f"Row {row} of split '{split}': label {value!r} in column '{spec.label}' is none of "
                    + shown(spec.labels)
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
        return all(whole(value) == -1 for value in values)

    def read(self, rows: Dataset, values: Sequence[Any], spec: TaskSpec, split: str) -> list[int] | list[float]:
        """Labels as finite numbers."""
        for row, value in enumerate(values):
            if not is_finite(value):
                raise DataError(
                    f"Row {row} of split '{split}': label {value!r} in column '{spec.label}' is not a finite number."
                )
        return [float(value) for value in values]


class MultipleChoice(Kind):
    """A row has choices of its own, one of which is right."""

    def check(self, spec: TaskSpec) -> None:
        """One text, the question, and its choices, which a prompt shows."""
        if len(spec.text) != 1 or not spec.choices:
            raise TaskError(
                f"Task '{spec.name}': multiple choice needs one text, the question, and its choices: text=COLUMN and "
                "choices=COLUMN, or choices='choices.text' where the column is a mapping (in a shell --set "
                "task.choices=choices.text)."
            )
        if spec.prompt is not None and {"choices", *spec.choices}.isdisjoint(fields_of(spec.prompt)):
            raise TaskError(
                f"Task '{spec.name}': the prompt asks for a choice by its letter and shows none of them: put "
                "{choices} where they are to stand."
            )
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
        hint = "" if keys else BY_NAME
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
                    f"row's choices {shown(names)}.{hint}"
                )
            answers.append(names.index(name_of(value)))
        return answers

    def choices(self, spec: TaskSpec, row: Mapping[str, Any]) -> list[str]:
        """Texts of a row's choices, which are in a list of their own or in a field each."""
        found = [pick(row, name) for name in spec.choices]
        return [text_of(choice) for choice in (found[0] if len(spec.choices) == 1 else found)]

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


def _widths(rows: Dataset, spec: TaskSpec, split: str) -> list[int]:
    """Number of choices of each row."""
    if len(spec.choices) > 1:
        return [len(spec.choices)] * len(rows)
    return [len(choices or ()) for choices in column(rows, spec.choices[0], split)]


def _lines(texts: Texts, label: object) -> str:
    return "\n".join([*(text for text in texts[0] if text is not None), f"-> {label}"])
