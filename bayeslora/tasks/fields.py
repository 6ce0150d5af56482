"""Fields of rows: columns, parts of them such as "choices.text", and the texts that are made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError
from bayeslora.tasks.sources import missing_column

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks.spec import TaskSpec

__all__ = ["check_texts", "column", "fields_of", "pick", "render"]

FIELD = re.compile(r"\{([^{}]+)\}")


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
        raise missing_column(f"split '{split}'", head, rows.column_names)
    values: list[Any] = rows[head][:]
    tail = path.removeprefix(head).removeprefix(".")
    try:
        return [pick(value, tail) for value in values] if tail else values
    except (KeyError, TypeError) as error:
        raise DataError(f"Column '{head}' of split '{split}' has no field '{tail}'.") from error


def fields_of(text: str) -> list[str]:
    """Fields that a text is made of: those of a template, or the one that it names."""
    return FIELD.findall(text) or [text]


def render(text: str, row: Mapping[str, Any]) -> str:
    """A text of a row: the value of a field, or a template with its fields filled in."""
    if FIELD.search(text):
        return FIELD.sub(lambda match: str(pick(row, match[1])), text)
    return str(pick(row, text))


def check_texts(rows: Dataset, spec: TaskSpec, split: str) -> None:
    """Check that every row has something to read.

    A text is a string, or a number or boolean, which is written out. Null, NaN, lists, mappings and bytes are none.
    A text may be blank if another one of the row is not.

    Raises:
        DataError: a row has no text; the message names it, counted from 0.
    """
    blank = set(range(len(rows)))
    for name in spec.columns:
        for row, value in enumerate(column(rows, name, split)):
            is_list = spec.choices == (name,)
            if value is None or (is_list and not isinstance(value, list)):
                _refuse(value, name, row, split, "a list of choices" if is_list else "a text")
            for part in value if is_list else [value]:
                if not isinstance(part, str | int | float) or (isinstance(part, float) and not math.isfinite(part)):
                    _refuse(part, name, row, split, "a text")
                if str(part).strip():
                    blank.discard(row)
    if blank:
        raise DataError(
            f"Row {min(blank)} of split '{split}' has no text in {', '.join(map(repr, spec.columns))}: remove it."
        )


def _refuse(value: Any, name: str, row: int, split: str, wanted: str) -> None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"Row {row} of split '{split}' has no value in column '{name}': remove it.")
    hint = " Join its parts into one text." if isinstance(value, list | dict) else ""
    raise DataError(
        f"Row {row} of split '{split}' has a {type(value).__name__} in column '{name}', expected {wanted}.{hint}"
    )
