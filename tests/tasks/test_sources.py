"""Reading rows from files in all formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from bayeslora.errors import DataError
from bayeslora.tasks.sources import files_of, from_data, read_files, tables

COLUMNS = ("text", "label")
ROWS = [{"text": "a, b", "label": "0"}, {"text": 'say "c"', "label": "1"}]
FILES = {
    "rows.jsonl": '{"text": "a, b", "label": "0"}\n\n{"text": "say \\"c\\"", "label": "1"}\n',
    "rows.json": '[{"text": "a, b", "label": "0"}, {"text": "say \\"c\\"", "label": "1"}]',
    "lines.json": '{"text": "a, b", "label": "0"}\n{"text": "say \\"c\\"", "label": "1"}',
    "rows.csv": '\ufefftext,label\r\n"a, b",0\r\n"say ""c""",1\r\n',
    "semicolons.csv": '\ufefftext;label\r\na, b;0\r\n"say ""c""";1\r\n',
    "several.csv": 'text;label;note, or so\na, b;0;\n"say ""c""";1;\n',
    "tabs.csv": 'text\tlabel\na, b\t0\n"say ""c"""\t1\n',
    "rows.tsv": 'text\tlabel\na, b\t0\nsay "c"\t1\n',
}


@pytest.mark.parametrize("name", FILES)
def test_text_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8", newline="")
    assert read_files([tmp_path / name], COLUMNS).to_list() == ROWS


def test_parquet(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert read_files([tmp_path / "rows.parquet"], COLUMNS).to_list() == ROWS


def test_a_folder_joins_the_parts_of_a_split(tmp_path: Path) -> None:
    for part, row in enumerate(ROWS):
        Dataset.from_list([row]).to_parquet(tmp_path / f"train-0000{part}-of-00002.parquet")
    (tmp_path / "test.csv").write_text("text,label\na,0\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    splits = files_of(tmp_path)
    assert sorted(splits) == ["test", "train"]
    assert read_files(splits["train"], COLUMNS).to_list() == ROWS


def test_values_of_a_split_in_parts_are_of_one_type(tmp_path: Path) -> None:
    paths = [tmp_path / f"train-{part}-of-2.jsonl" for part in range(2)]
    for value, path in zip((1, 2.5), paths, strict=True):
        path.write_text(json.dumps({"text": "a", "label": value}), encoding="utf-8")
    assert read_files(paths, COLUMNS)["label"][:] == [1.0, 2.5]
    paths[0].write_text('{"text": "a", "label": "one"}', encoding="utf-8")
    with pytest.raises(DataError, match="more than one type: .* label .*string vs double"):
        read_files(paths, COLUMNS)


def test_a_field_that_a_row_lacks_is_null() -> None:
    assert from_data([{"a": 1}, {"a": 2, "b": "x"}], ["a", "b"]).to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(FILES["rows.csv"], encoding="utf-8", newline="")
    read_files(files_of(tmp_path)["rows"], COLUMNS)
    assert [path.name for path in tmp_path.rglob("*")] == ["rows.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("rows.jsonl", b'{"a": 1}\n[2]\n', "line 2 holds a list"),
        ("rows.json", b"[1, 2]", "expected a list of objects"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "x"}\n', "more than one type"),
        ("rows.jsonl", b'{"a": "x"}\n{"a": "x \\ud83d"}\n', r"Row 1 of .* half of a character in column 'a'.*ud83d"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has more cells .*: quote texts that contain commas"),
        ("rows.csv", b"a;b\n1;2\n1;2;3\n", "line 3 has more cells .*: quote texts that contain semicolons"),
        ("rows.tsv", b"a\tb\n1\t2\n1\t2\t3\n", "line 3 has more cells .*: replace tabs in texts"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "several columns are called .a."),
        ("rows.csv", b"a\n\xff\xfe\n", "Cannot read .*: line 2 is not UTF-8. Save it as UTF-8"),
        ("rows.csv", "a\nx".encode("utf-16"), "line 1 is not UTF-8"),
        ("rows.jsonl", '{"a": "x"}\n\n{"a": "caf\u00e9"}'.encode("latin-1"), "line 3 is not UTF-8"),
        ("rows.json", '[{"a": "caf\u00e9"}]'.encode("latin-1"), "line 1 is not UTF-8"),
        ("rows.parquet", b"no parquet", "Cannot read"),
        ("rows.txt", b"a", "expected a file ending in .jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_files([tmp_path / name], ["a"])
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ("a\nx; y\n", {"a": "x; y"}),
        ('"a;b"\nx\n', {"a;b": "x"}),
        ('a,"b; c"\nx; y,z\n', {"a": "x; y", "b; c": "z"}),
        ('"a, b";c\n"x;y";z\n', {"a, b": "x;y", "c": "z"}),
    ],
)
def test_what_divides_the_header_divides_the_rows(tmp_path: Path, content: str, row: dict[str, str]) -> None:
    (tmp_path / "rows.csv").write_text(content, encoding="utf-8")
    assert read_files([tmp_path / "rows.csv"], list(row)).to_list() == [row]


@pytest.mark.parametrize("size", [None, 1])
def test_a_cell_of_any_length(tmp_path: Path, size: int | None) -> None:
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    (tmp_path / "rows.csv").write_text(f"text,label\na,0\n{long},1\n", encoding="utf-8")
    rows = []
    for part in tables(tmp_path / "rows.csv", ["text"], size=size):
        assert csv.field_size_limit() == limit
        rows += part["text"][:]
    assert rows == ["a", long]


def test_one_split_in_two_formats(tmp_path: Path) -> None:
    for name in ("train.csv", "train.tsv"):
        (tmp_path / name).write_text("a\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match="'train' .* in several files"):
        files_of(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet"])
def test_a_long_file_in_chunks(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"t{row}", "other": f"o{row}"} for row in range(7)]
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(tmp_path / name)
    elif name.endswith("jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        comma = "," if name.endswith("csv") else "\t"
        lines = [comma.join(cells) for cells in (rows[0].keys(), *(row.values() for row in rows))]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    parts = list(tables(tmp_path / name, ["text"], size=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [row for part in parts for row in part.to_list()] == [{"text": f"t{row}"} for row in range(7)]
    with pytest.raises(DataError, match="Unknown column 'texts'. Did you mean 'text'"):
        next(tables(tmp_path / name, ["texts"]))


def test_columns_that_nobody_asks_for_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "x": 1}\n{"text": "b", "x": [1]}\n', encoding="utf-8")
    maps = pa.array([[("key", 1)]], pa.map_(pa.string(), pa.int64()))
    parquet.write_table(pa.table({"text": ["a"], "x": maps}), tmp_path / "rows.parquet")
    assert read_files([tmp_path / "rows.jsonl"], ["text"], ["label"]).to_list() == [{"text": "a"}, {"text": "b"}]
    assert read_files([tmp_path / "rows.parquet"], ["text"]).to_list() == [{"text": "a"}]
