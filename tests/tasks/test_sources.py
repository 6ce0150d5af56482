"""Reading rows from files in all formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from bayeslora.errors import DataError
from bayeslora.tasks.sources import from_rows, read_file, read_folder

ROWS = [{"text": "a, b", "label": "0"}, {"text": 'say "c"', "label": "1"}]
FILES = {
    "rows.jsonl": '{"text": "a, b", "label": "0"}\n\n{"text": "say \\"c\\"", "label": "1"}\n',
    "rows.json": '[{"text": "a, b", "label": "0"}, {"text": "say \\"c\\"", "label": "1"}]',
    "lines.json": '{"text": "a, b", "label": "0"}\n{"text": "say \\"c\\"", "label": "1"}',
    "rows.csv": '\ufefftext,label\r\n"a, b",0\r\n"say ""c""",1\r\n',
    "rows.tsv": 'text\tlabel\na, b\t0\nsay "c"\t1\n',
}


@pytest.mark.parametrize("name", FILES)
def test_text_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8", newline="")
    assert read_file(tmp_path / name).to_list() == ROWS


def test_parquet(tmp_path: Path) -> None:
    from_rows(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert read_file(tmp_path / "rows.parquet").to_list() == ROWS


def test_a_folder_joins_the_parts_of_a_split(tmp_path: Path) -> None:
    for part, row in enumerate(ROWS):
        from_rows([row]).to_parquet(tmp_path / f"train-0000{part}-of-00002.parquet")
    (tmp_path / "test.csv").write_text("text,label\na,0\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    splits = read_folder(tmp_path)
    assert sorted(splits) == ["test", "train"]
    assert splits["train"].to_list() == ROWS


def test_a_field_that_a_row_lacks_is_null() -> None:
    assert from_rows([{"a": 1}, {"a": 2, "b": "x"}]).to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(FILES["rows.csv"], encoding="utf-8", newline="")
    read_folder(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["rows.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("rows.jsonl", b'{"a": 1}\n[2]\n', "line 2 holds a list"),
        ("rows.json", b"[1, 2]", "expected a list of objects"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "x"}\n', "more than one type"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has more cells"),
        ("rows.csv", b"a\n\xff\xfe\n", "Cannot read"),
        ("rows.parquet", b"no parquet", "Cannot read"),
        ("rows.txt", b"a", "expected a file ending in .jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_file(tmp_path / name)
    assert name in str(error.value)


def test_one_split_in_two_formats(tmp_path: Path) -> None:
    for name in ("train.csv", "train.tsv"):
        (tmp_path / name).write_text("a\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match="'train' .* in several files"):
        read_folder(tmp_path)
