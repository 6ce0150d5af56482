"""Where rows come from: a user's own objects in memory, files, folders of files named by split, or the hub.

Local files are read without the cache of `datasets`, so nothing is left behind on the disk. Columns that nobody asks
for are not converted: their values may be of any type.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "ColumnError",
    "Splits",
    "chunks",
    "files_of",
    "from_data",
    "from_rows",
    "missing_column",
    "read_file",
    "read_files",
    "read_hub",
]

#: The hub writes large splits as "train-00000-of-00002.parquet".
SHARD = re.compile(r"-\d+-of-\d+$")


class ColumnError(DataError):
    """Rows lack a column that is asked for."""


class Splits(Mapping[str, "Dataset"]):
    """Splits by name, each read when it is first asked for.

    Args:
        origins: what each split is read from.
        read: reads the split of a name from its origin.
    """

    def __init__(self, origins: Mapping[str, Any], read: Callable[[str, Any], Dataset]) -> None:
        self._origins, self._read = origins, read
        self._tables: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._tables:
            self._tables[name] = self._read(name, self._origins[name])
        return self._tables[name]

    def __contains__(self, name: object) -> bool:
        return name in self._origins

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)


def missing_column(origin: str, name: str, found: Iterable[Any], wanted: Iterable[str] = ()) -> ColumnError:
    """The error that rows lack a column, with the columns that they have."""
    expected = f" Expected: {', '.join(wanted)}." if wanted else ""
    return ColumnError(f"{origin}: {unknown('column', name, map(str, found))}{expected}")


def from_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Collection[str] | None = None,
    optional: Collection[str] = (),
    origin: str = "the given rows",
) -> Dataset:
    """Data set of rows; a field that some rows lack is null in them.

    Args:
        rows: mappings from column to value.
        columns: to keep, or fields of them such as "choices.text"; all by default.
        optional: further ones to keep where there are any.
        origin: where the rows come from, for messages.

    Raises:
        DataError: a column is lacking or holds values of several types.
    """
    import pyarrow as pa
    from datasets import Dataset

    rows = list(rows)
    found = list(dict.fromkeys(name for row in rows for name in row))
    table = {}
    # Of no rows at all nothing is lacking but rows.
    for name in (_wanted(origin, found, columns, optional) if rows else None) or found:
        try:
            table[str(name)] = pa.array([row.get(name) for row in rows], from_pandas=True)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise DataError(f"Column '{name}' of {origin} holds values of more than one type: {error}") from error
    return Dataset(pa.table(table))


def from_data(
    data: Any,
    columns: Collection[str] | None = None,
    optional: Collection[str] = (),
    origin: str = "the given rows",
) -> Dataset:
    """Data set of a user's own rows in memory: a pandas DataFrame, a data set, or mappings from column to value.

    Raises:
        DataError: the data are something else; otherwise as in `from_rows`.
    """
    import pandas as pd
    from datasets import Dataset

    if isinstance(data, Dataset):
        _wanted(origin, data.column_names, columns, optional)
        return data.with_format(None)
    if isinstance(data, pd.DataFrame):
        data = data.rename(columns=str)
        data = data[_wanted(origin, list(data.columns), columns, optional) or list(data.columns)]
        return from_rows(data.to_dict("records"), columns, optional, origin)
    if not isinstance(data, str | bytes | Mapping) and isinstance(data, Iterable):
        rows = list(data)
        if all(isinstance(row, Mapping) for row in rows):
            return from_rows(rows, columns, optional, origin)
    raise DataError(
        f"Expected rows, found a {type(data).__name__}: give a DataFrame, a datasets.Dataset, or a list of mappings "
        "from column to value."
    )


def read_file(path: Path, columns: Collection[str] | None = None, optional: Collection[str] = ()) -> Dataset:
    """Rows of a .jsonl, .json, .csv, .tsv or .parquet file.

    Values of CSV and TSV files stay strings, as "NA" or "007" may be a text.

    Args:
        path: of the file.
        columns: to read; all by default.
        optional: further columns to read where the file has them.

    Raises:
        DataError: the file does not exist, has another ending, cannot be read or lacks a column.
    """
    (table,) = _tables(path, columns, optional, None)
    return table


def chunks(path: Path, columns: Collection[str], size: int = 1000) -> Iterator[Dataset]:
    """Rows of a file of any length in the order of the file, at most ``size`` at a time.

    Args:
        path: of a file as in `read_file`; only one of JSON lines, CSV, TSV or Parquet is not read as a whole.
        columns: to read.
        size: number of rows at a time.

    Raises:
        DataError: as in `read_file`.
    """
    return _tables(path, columns, (), size)


def read_files(
    paths: Iterable[Path], columns: Collection[str] | None = None, optional: Collection[str] = ()
) -> Dataset:
    """Rows of the files of one split, one after the other; as `read_file` otherwise."""
    from datasets import concatenate_datasets

    parts = [read_file(path, columns, optional) for path in paths]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


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


def _tables(
    path: Path, columns: Collection[str] | None, optional: Collection[str], size: int | None
) -> Iterator[Dataset]:
    """The rows of a file, ``size`` at a time; all of them as one table, also of no rows, if that is None."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"Cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}.")
    read = _parquet if path.suffix.lower() == PARQUET else _texts
    try:
        yield from read(path, columns, optional, size)
    except (UnicodeDecodeError, csv.Error, OSError, ValueError) as error:  # pyarrow's derive from these
        raise DataError(f"Cannot read {path}: {error}") from error


def _parquet(
    path: Path, columns: Collection[str] | None, optional: Collection[str], size: int | None
) -> Iterator[Dataset]:
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


def _texts(
    path: Path, columns: Collection[str] | None, optional: Collection[str], size: int | None
) -> Iterator[Dataset]:
    rows = READERS[path.suffix.lower()](path)
    for part in [rows] if size is None else iter(lambda: list(islice(rows, size)), []):
        yield from_rows(part, columns, optional, str(path))


def _wanted(
    origin: str, found: Collection[str], fields: Collection[str] | None, optional: Collection[str]
) -> list[str] | None:
    """Those of the columns that hold these fields; None for all."""
    if fields is None:
        return None
    for name in fields:
        if name not in found and name.partition(".")[0] not in found:
            raise missing_column(origin, name.partition(".")[0], found, fields)
        if list(found).count(name) > 1:
            raise DataError(f"Several columns of {origin} are called '{name}': rename all but one.")
    named = {part for name in (*fields, *optional) for part in (name, name.partition(".")[0])}
    return [name for name in found if name in named]


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


def _table(path: Path, **dialect: Any) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, **dialect)
        twice = [name for name, times in Counter(reader.fieldnames).items() if name and times > 1]
        if twice:
            raise ValueError(f"several columns are called '{twice[0]}': rename all but one.")
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header has columns.")
            yield row


def _tabs(path: Path) -> Iterator[dict[str, Any]]:
    # A quotation mark in a tab-separated file is a character like any other.
    return _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _tabs,
}
PARQUET = ".parquet"
#: Endings of the files that can be read.
SUFFIXES = (*READERS, PARQUET)
