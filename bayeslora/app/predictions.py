"""Predictions of a file of new rows, some at a time: CSV, JSON lines or Parquet in, and any of them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora import files
from bayeslora.errors import DataError, TaskError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from bayeslora.posterior import Posterior

__all__ = ["check_table", "predict_file"]

#: Rows that are read, predicted and written at a time.
CHUNK = 1000


def predict_file(posterior: Posterior, source: Path, target: Path, keep: Sequence[str] = (), **settings: Any) -> int:
    """Predict the rows of a file, and write a table with a row for each, in their order.

    All rows are predicted under the same draws of the weights, whatever is read at a time.

    Args:
        posterior: fitted with an encoder.
        source: file with the columns of the task's texts (.csv, .tsv, .jsonl, .json, .parquet); labels are not needed.
        target: file to write (.csv, .jsonl, .parquet), in one step once all rows are predicted.
        keep: columns of the source to copy, in front of the predictions.
        **settings: of `Posterior.predict`.

    Returns:
        The number of rows.

    Raises:
        DataError: a file has another ending, there are no rows, they cannot be read, or a column to keep is called as
            one of predictions.
        TaskError: the posterior was fitted to rows that were tokenised already.
    """
    import pandas as pd

    from bayeslora.tasks.loading import rows_of, with_room
    from bayeslora.tasks.sources import tables

    encoder = posterior.program.encoder
    if encoder is None:
        raise TaskError("The posterior was fitted to tokenised rows without a task: it cannot read text.")
    spec, count = encoder.spec, 0
    columns = posterior.program.observation.columns(spec)
    needed = {part for name in columns for part in (name, name.partition(".")[0])}
    if spec.max_choices:  # all parts have the columns of the widest row
        for rows in tables(source, columns, size=CHUNK):
            spec = with_room(spec, rows, str(source))
    with written(target) as write:
        for rows in tables(source, tuple(dict.fromkeys([*columns, *keep])), size=CHUNK):
            if lacking := [name for name in keep if name not in rows.column_names]:
                raise DataError(f"'{source}' has no column '{lacking[0]}' to keep: {', '.join(rows.column_names)}.")
            # A label that is kept is not read: new rows need none.
            read = rows.select_columns([name for name in rows.column_names if name in needed])
            found = posterior.predict(rows_of(spec, read, str(source), count), **settings).to_pandas()
            if twice := sorted({*keep} & {*found}):
                raise DataError(f"Predictions have a column '{twice[0]}', too: rename that of '{source}' to keep it.")
            kept = {name: pd.Series(rows[name][:], dtype=object) for name in keep}  # as numbers, 1 beside none is 1.0
            write(found.assign(**kept)[[*keep, *found]])
            count += len(rows)
        if not count:
            raise DataError(f"'{source}' has no rows.")
    return count


def check_table(path: Path) -> None:
    """Make sure that a table can be written to a path.

    Raises:
        DataError: its ending is none that tables have.
    """
    if path.suffix.lower() not in WRITERS:
        raise DataError(f"Cannot write {path}: expected a file ending in {', '.join(WRITERS)}.")


@contextmanager
def written(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Give what appends a table to a file, which is there once the block has ended without an error.

    Raises:
        DataError: its ending is none that tables have.
    """
    check_table(path)
    with files.replaced(path) as new, WRITERS[path.suffix.lower()](new) as write:
        yield write


@contextmanager
def _csv(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        yield lambda table: table.to_csv(file, index=False, header=file.tell() == 0)


@contextmanager
def _lines(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda table: table.to_json(file, orient="records", lines=True, force_ascii=False, double_precision=15)


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    import pyarrow as pa
    from pyarrow import parquet

    parts: list[pa.Table] = []
    yield lambda table: parts.append(pa.Table.from_pandas(table, preserve_index=False))
    if parts:
        parquet.write_table(_joined(parts), path)


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    """One table of parts whose columns may differ in type: they then have one that holds all, or become texts."""
    import pyarrow as pa

    found = {}
    for name in parts[0].column_names:
        columns = [part.select([name]) for part in parts]
        try:
            found[name] = pa.concat_tables(columns, promote_options="permissive")[name]
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            values = (value for column in columns for value in column[name].to_pylist())
            found[name] = pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.table(found)


WRITERS = {".csv": _csv, ".jsonl": _lines, ".parquet": _parquet}
