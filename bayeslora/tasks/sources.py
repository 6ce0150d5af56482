"""Where rows come from, a user's own objects, files, folders of files named by split, or the hub, and their fields.

Local files are read without the cache of `datasets`, so nothing is left behind on the disk. Columns that nobody asks
for are not converted: their values may be of any type. A field is a column or a part of one, such as "choices.text".
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "SUFFIXES",
    "ColumnError",
    "column",
    "fields_of",
    "files_of",
    "from_data",
    "pick",
    "read_files",
    "read_hub",
    "render",
    "tables",
    "text_of",
]

FIELD = re.compile(r"\{([^{}]+)\}")
#: The hub writes large splits as "train-00000-of-00002.parquet".
SHARD = re.compile(r"-\d+-of-\d+$")
#: What spreadsheets write between the cells of a .csv file, which depends on the country.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
#: The largest limit on the characters of a cell that `csv` takes on every platform.
ANY_LENGTH = 2**31 - 1


class ColumnError(DataError):
    """Rows lack a column that is asked for."""


def column(rows: Dataset, path: str, split: str = "data") -> list[Any]:
    """Values of a field in all rows.

    Raises:
        DataError: there is no such column, or it has no such field.
    """
    head = path if path in rows.column_names else path.partition(".")[0]
    if head not in rows.column_names:
        raise ColumnError(f"split '{split}': {unknown('column', head, rows.column_names)}")
    values: list[Any] = rows[head][:]
    tail = path.removeprefix(head).removeprefix(".")
    try:
        return [pick(value, tail) for value in values] if tail else values
    except (KeyError, TypeError) as error:
        raise DataError(f"Column '{head}' of split '{split}' has no field '{tail}'.") from error


def pick(row: Any, path: str) -> Any:
    """Value of a field of a row; "choices.text" is the field `text` of the field `choices`."""
    if isinstance(row, list):
        return [pick(part, path) for part in row]
    if not isinstance(row, dict) or path in row:
        return row[path]
    head, _, tail = path.partition(".")
    return pick(row[head], tail)


def fields_of(text: str) -> list[str]:
    """Fields that a text is made of: those of a template, or the one that it names."""
    return FIELD.findall(text) or [text]


def render(text: str, row: Mapping[str, Any]) -> str:
    """A text of a row: the value of a field, or a template with its fields filled in."""
    if FIELD.search(text):
        return FIELD.sub(lambda match: text_of(pick(row, match[1])), text)
    return text_of(pick(row, text))


def text_of(value: Any) -> str:
    """A value written out; a whole number without a point, which other rows of its column would have given it."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def from_data(
    data: Any, columns: Collection[str], optional: Collection[str] = (), origin: str = "the given rows"
) -> Dataset:
    """Data set of a user's own rows in memory: a pandas DataFrame, a data set, or mappings from column to value.

    Args:
        data: the rows; a field that some mappings lack is null in them.
        columns: to keep, or fields of them such as "choices.text".
        optional: further ones to keep where there are any.
        origin: where the rows come from, for messages.

    Raises:
        DataError: a column is lacking or holds values of several types, or the data are something else.
    """
    import pandas as pd
    from datasets import Dataset

    if isinstance(data, Dataset):
        _wanted(origin, data.column_names, columns, optional)
        return data.with_format(None)
    if isinstance(data, pd.DataFrame):
        data = data.rename(columns=str)
        names = _wanted(origin, list(data.columns), columns, optional)
        return _dataset({name: data[name].tolist() for name in names}, origin)
    if not isinstance(data, str | bytes | Mapping) and isinstance(data, Iterable):
        rows = list(data)
        if all(isinstance(row, Mapping) for row in rows):
            # Of no rows at all nothing is lacking but rows.
            found = list(dict.fromkeys(name for row in rows for name in row))
            names = _wanted(origin, found, columns, optional) if rows else []
            return _dataset({name: [row.get(name) for row in rows] for name in names}, origin)
    raise DataError(
        f"Expected rows, found a {type(data).__name__}: give a DataFrame, a datasets.Dataset, or a list of mappings "
        "from column to value. Columns by name become rows by pd.DataFrame(columns)."
    )


def read_files(paths: Iterable[Path], columns: Collection[str], optional: Collection[str] = ()) -> Dataset:
    """Rows of the files of one split, one after the other; as `tables` otherwise."""
    import pyarrow as pa
    from datasets import Dataset

    parts = [part.data.table for path in paths for part in tables(path, columns, optional)]
    try:
        return Dataset(pa.concat_tables(parts, promote_options="permissive"))
    except pa.ArrowException as error:
        raise DataError(f"The files of a split hold values of more than one type: {error}") from error


def tables(
    path: Path, columns: Collection[str], optional: Collection[str] = (), size: int | None = None
) -> Iterator[Dataset]:
    """Rows of a .jsonl, .json, .csv, .tsv or .parquet file, in the order of the file.

    A .csv file has commas between its cells, or semicolons or tabs if these divide its header into more. Values
    of CSV and TSV files stay strings, as "NA" or "007" may be a text.

    Args:
        path: of the file, which may be of any length if rows are read a few at a time; .json alone is read as a whole.
        columns: to read.
        optional: further columns to read where the file has them.
        size: number of rows at a time; None for all of them as one table, also of no rows.

    Raises:
        DataError: the file does not exist, has another ending, cannot be read or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"Cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}.")
    read = _parquet if path.suffix.lower() == PARQUET else _texts
    try:
        yield from read(path, columns, optional, size)
    except UnicodeDecodeError as error:
        raise DataError(f"Cannot read {path}: line {_undecodable(path)} is not UTF-8. Save it as UTF-8.") from error
    except (csv.Error, OSError, ValueError) as error:  # pyarrow's derive from these
        raise DataError(f"Cannot read {path}: {error}") from error


def files_of(folder: Path) -> dict[str, list[Path]]:
    """Files of each split of a folder whose data files are named by split; other files are ignored.

    Raises:
        DataError: a split is in two formats.
    """
    shards: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        shards.setdefault(SHARD.sub("", path.stem), []).append(path)
    for split, paths in shards.items():
        in_parts = all(SHARD.search(path.stem) for path in paths) and len({path.suffix for path in paths}) == 1
        if len(paths) > 1 and not in_parts:
            names = ", ".join(path.name for path in paths)
            raise DataError(f"Split '{split}' of {folder} is in several files ({names}): keep one of them.")
    return shards


def read_hub(path: str, config: str | None = None, revision: str | None = None) -> dict[str, Dataset]:
    """Splits of a data set on the hub, downloaded unless they are in the cache of `datasets`.

    Raises:
        DataError: the data set cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return dict(load_dataset(path, config, revision=revision))
    except Exception as error:  # the hub, the network and the disk each raise their own
        name = path if config is None else f"{path} ({config})"
        raise DataError(
            f"Cannot load {name} from the hub: {error} To use a local copy, give data_dir=, a folder of "
            "files named by split."
        ) from error


def _parquet(path: Path, columns: Collection[str], optional: Collection[str], size: int | None) -> Iterator[Dataset]:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        wanted = _wanted(str(path), file.schema_arrow.names, columns, optional)
        if size is None:
            yield Dataset(file.read(wanted))
        else:
            for batch in file.iter_batches(size, columns=wanted):
                yield Dataset(pa.Table.from_batches([batch]))


def _texts(path: Path, columns: Collection[str], optional: Collection[str], size: int | None) -> Iterator[Dataset]:
    rows = READERS[path.suffix.lower()](path)
    for part in [_next(rows, None)] if size is None else iter(lambda: _next(rows, size), []):
        yield from_data(part, columns, optional, str(path))


def _next(rows: Iterator[dict[str, Any]], size: int | None) -> list[dict[str, Any]]:
    """The next rows, so many or all that are left."""
    with _cells_of_any_length():
        return list(islice(rows, size))


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Read long texts with `csv`, whose limit holds for the whole process and is put back."""
    limit = csv.field_size_limit(ANY_LENGTH)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _undecodable(path: Path) -> int:
    """Number of the first line that is not UTF-8."""
    with path.open("rb") as lines:
        return next(
            number for number, line in enumerate(lines, start=1) if line.decode(errors="replace").encode() != line
        )


def _wanted(origin: str, found: Collection[str], fields: Collection[str], optional: Collection[str]) -> list[str]:
    """Those of the columns that hold these fields."""
    for name in fields:
        head = name.partition(".")[0]
        if name not in found and head not in found:
            expected = f" Expected: {', '.join(fields)}."
            raise ColumnError(f"{origin}: {unknown('column', head, map(str, found))}{expected}")
    named = {part for name in (*fields, *optional) for part in (name, name.partition(".")[0])}
    wanted = [name for name in found if name in named]
    for name, times in Counter(wanted).items():
        if times > 1:
            raise DataError(f"Several columns of {origin} are called '{name}': rename all but one.")
    return wanted


def _dataset(columns: Mapping[str, list[Any]], origin: str) -> Dataset:
    """Data set of columns; what pandas takes for a missing value is null."""
    import pyarrow as pa
    from datasets import Dataset

    table = {}
    for name, values in columns.items():
        try:
            table[name] = pa.array(values, from_pandas=True)
        except UnicodeEncodeError as error:
            row = next(number for number, value in enumerate(values) if not _encodes(value))
            raise DataError(
                f"Row {row} of {origin} holds half of a character in column '{name}', as a text that was cut in two "
                f"does ({error.object[error.start]!a}): take it out. Rows are counted from 0."
            ) from error
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise DataError(f"Column '{name}' of {origin} holds values of more than one type: {error}") from error
    return Dataset(pa.table(table))


def _encodes(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds a {type(row).__name__}, expected an object with named fields.")
            yield row


def _json(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _lines(path)
    rows = json.loads(text)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects with named fields.")
    return iter(rows)


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that is separated by what divides its header into the most columns."""
    with path.open(encoding="utf-8-sig", newline="") as lines, _cells_of_any_length():
        header = lines.readline()
        columns = {each: len(next(csv.reader([header], delimiter=each), ())) for each in SEPARATORS}
    separator = max(columns, key=columns.__getitem__)  # of equally good ones the comma
    return _table(path, f"quote texts that contain {SEPARATORS[separator]}", delimiter=separator)


def _table(path: Path, advice: str, **dialect: Any) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, **dialect)
        twice = [name for name, times in Counter(reader.fieldnames).items() if name and times > 1]
        if twice:
            raise ValueError(f"several columns are called '{twice[0]}': rename all but one.")
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header has columns: {advice}.")
            yield row


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": _csv,
    # A quotation mark in a tab-separated file is a character like any other.
    ".tsv": partial(_table, advice="replace tabs in texts", delimiter="\t", quoting=csv.QUOTE_NONE),
}
PARQUET = ".parquet"
#: Endings of the files that can be read.
SUFFIXES = (*READERS, PARQUET)
