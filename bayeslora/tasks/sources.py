"""Where rows come from: files of a user, folders of files named by split, or the hub.

Local files are read into memory without the cache of `datasets`, so nothing is left behind on the disk.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["from_rows", "read_file", "read_folder", "read_hub"]

#: The hub writes large splits as "train-00000-of-00002.parquet".
SHARD = re.compile(r"-\d+-of-\d+$")


def from_rows(rows: Iterable[Mapping[str, Any]], origin: str = "the given rows") -> Dataset:
    """Data set of rows; a field that some rows lack is null in them.

    Args:
        rows: mappings from column to value.
        origin: where they come from, for the error's message.

    Raises:
        DataError: a column holds values of several types.
    """
    from datasets import Dataset

    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError) as error:  # what pyarrow raises derives from these
        raise DataError(f"A column of {origin} holds values of more than one type: {error}") from error


def read_file(path: Path) -> Dataset:
    """Rows of a .jsonl, .json, .csv, .tsv or .parquet file.

    Values of CSV and TSV files stay strings, as "NA" or "007" may be a text.

    Raises:
        DataError: the file does not exist, has another ending or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.suffix.lower() not in READERS:
        raise DataError(f"Cannot read {path}: expected a file ending in {', '.join(READERS)}.")
    try:
        return READERS[path.suffix.lower()](path)
    except (UnicodeDecodeError, csv.Error, OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error


def read_folder(folder: Path) -> dict[str, Dataset]:
    """Splits of a folder of data files named by split; other files are ignored.

    Raises:
        DataError: a file cannot be read, or a split is in two formats.
    """
    from datasets import concatenate_datasets

    shards: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS):
        shards.setdefault(SHARD.sub("", path.stem), []).append(path)
    splits = {}
    for split, paths in shards.items():
        in_parts = all(SHARD.search(path.stem) for path in paths) and len({path.suffix for path in paths}) == 1
        if len(paths) > 1 and not in_parts:
            names = ", ".join(path.name for path in paths)
            raise DataError(f"Split '{split}' of {folder} is in several files ({names}): keep one of them.")
        parts = [read_file(path) for path in paths]
        splits[split] = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return splits


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


def _read_lines(path: Path) -> Dataset:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_object(line, f"line {number}"))
    return from_rows(rows, str(path))


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} holds a {type(row).__name__}, expected an object with named fields.")
    return row


def _read_json(path: Path) -> Dataset:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_lines(path)
    rows = json.loads(text)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects with named fields.")
    return from_rows(rows, str(path))


def _read_table(path: Path, **dialect: Any) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, **dialect)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header has columns.")
            rows.append(row)
    return from_rows(rows, str(path))


def _read_csv(path: Path) -> Dataset:
    return _read_table(path)


def _read_tsv(path: Path) -> Dataset:
    # A quotation mark in a tab-separated file is a character like any other.
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path) -> Dataset:
    from datasets import Dataset
    from pyarrow import parquet

    return Dataset(parquet.read_table(path))


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
