"""New rows to predict, as a user has them: texts, pairs, mappings, a DataFrame or a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bayeslora.errors import DataError
from bayeslora.tasks import sources
from bayeslora.tasks.fields import fields_of
from bayeslora.tasks.spec import TaskSpec
from bayeslora.tasks.task import Split

__all__ = ["rows_of"]


def rows_of(spec: TaskSpec, data: Any, name: str = "new rows") -> Split:
    """Rows of a task, which need no labels.

    Args:
        spec: the task.
        data: one row or many: for a task of one text a text each, for a task of two a pair (a tuple) each, for any task
            a mapping from column to value each; or a DataFrame or a data set with the task's columns.
        name: of these rows, for messages.

    Raises:
        DataError: the data are something else, lack a column or a text, or have labels that are none of the task's.
    """
    if isinstance(data, str | Mapping) or (isinstance(data, tuple) and len(spec.text) == 2 and _are_texts(data)):
        data = [data]
    if isinstance(data, Iterable) and not hasattr(data, "columns") and not hasattr(data, "column_names"):
        data = [_row(spec, row, number, name) for number, row in enumerate(data)]
    table = sources.from_data(data, spec.columns, spec.answer_columns, f"the {name}")
    if spec.max_choices and len(table):
        # Rows to predict may have more choices than those that were fitted.
        names = spec.rules.classes(replace(spec, labels=()), {name: table})
        spec = max(spec, replace(spec, labels=names), key=lambda each: each.max_choices)
    return Split(table, spec, name).check()


def _row(spec: TaskSpec, row: Any, number: int, name: str) -> Mapping[str, Any]:
    """A row as a mapping, from a text or a pair of texts where these are all that the task reads."""
    if isinstance(row, Mapping):
        return row
    texts = (row,) if isinstance(row, str) else row
    fields = [fields_of(text) for text in spec.text]
    plain = not spec.choices and all(len(found) == 1 for found in fields)
    if plain and isinstance(texts, tuple | list) and _are_texts(texts) and len(texts) == len(fields):
        return {found[0]: text for found, text in zip(fields, texts, strict=True)}
    wanted = f"a mapping with {', '.join(spec.columns)}"
    if plain:
        wanted = f"{'a text' if len(fields) == 1 else 'a pair of texts'}, or {wanted}"
    raise DataError(f"Row {number} of the {name} is {_shown(row)}, expected {wanted}.")


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _shown(value: Any, most: int = 40) -> str:
    text = repr(value)
    return f"a {type(value).__name__}, " + (text if len(text) <= most else f"{text[:most]} ...")
