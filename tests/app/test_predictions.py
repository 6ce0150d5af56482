from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import choice_scenarios
import numpy as np
import pandas as pd
import pytest
from command_line import call
from pyarrow import parquet
from scenarios import saved_base, text_program, text_rows

from bayeslora.app import predictions
from bayeslora.inference import fit, load

TEXTS = ["w3 w9 w5", "w30 w31", "w4 w4 w5 w6", "w12", "w20 w7 w21"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    program = text_program(saved_base(folder / "base"))
    fit(program, text_rows(), "svi", output_dir=folder / "run", epochs=1, progress=False, cpu=True)
    return folder / "run"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_file_of_new_rows_is_predicted_as_rows_in_memory_are(
    folder: Path, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.DataFrame({"note": range(5), "text": TEXTS})
    source, target = tmp_path / f"new.{ending}", tmp_path / "out" / f"found.{ending}"
    writers = {
        "csv": lambda: table.to_csv(source, index=False),
        "jsonl": lambda: table.to_json(source, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(source),
    }
    writers[ending]()
    monkeypatch.setattr(predictions, "CHUNK", 2)
    assert call("predict", folder, "--file", source, "--output", target, "--draws", 3, "--seed", 5) == 0
    readers = {"csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True), "parquet": pd.read_parquet}
    found, expected = readers[ending](target), load(folder).predict(TEXTS, draws=3, seed=5, progress=False).to_pandas()
    assert list(found) == ["class", "p(none)", "p(one)", "p(more)", "entropy", "mutual_information"]
    assert found["class"].tolist() == expected["class"].tolist()
    # A batch of other rows is padded to another length: single precision.
    np.testing.assert_allclose(found.iloc[:, 1:], expected.iloc[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_columns_of_the_file_are_kept_in_front(
    folder: Path, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "new.csv", tmp_path / f"out.{ending}"
    source.write_text("label,text,id,other\n" + "".join(f"?,{text},0{row},x\n" for row, text in enumerate(TEXTS)))
    monkeypatch.setattr(predictions, "CHUNK", 2)
    flags = ("--keep", "id", "--keep", "text", "--keep", "label", "--draws", 2)
    assert call("predict", folder, "--file", source, "--output", target, *flags) == 0
    readers = {
        "csv": lambda path: pd.read_csv(path, dtype={"id": str}),
        "jsonl": lambda path: pd.read_json(path, lines=True, dtype={"id": str}),
        "parquet": pd.read_parquet,
    }
    found = readers[ending](target)
    assert list(found)[:4] == ["id", "text", "label", "class"] and found["text"].tolist() == TEXTS
    assert found["id"].tolist() == ["00", "01", "02", "03", "04"] and set(found["label"]) == {"?"}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_whole_numbers_stay_what_they_are_beside_missing_ones(
    folder: Path, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, numbers = tmp_path / "new.jsonl", tmp_path / f"out.{ending}", [10, 11, 2**53 + 1, None, 14]
    rows = ({"id": number, "text": text} for number, text in zip(numbers, TEXTS, strict=True))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(predictions, "CHUNK", 2)
    assert call("predict", folder, "--file", source, "--output", target, "--keep", "id", "--draws", 2) == 0
    if ending == "parquet":
        found = parquet.read_table(target)["id"].to_pylist()
    elif ending == "jsonl":
        found = [json.loads(line)["id"] for line in target.read_text().splitlines()]
    else:
        found = [int(line.split(",")[0] or 0) or None for line in target.read_text().splitlines()[1:]]
    assert found == numbers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2.5, 3, 4.5], [0, 1, 2.5, 3, 4.5]),
        ([None, None, "x", None, "y"], [None, None, "x", None, "y"]),
        ([1, 2, "x", None, "y"], ["1", "2", "x", None, "y"]),
        ([2**60 + 1, 2, 2.5, None, 4.5], [str(2**60 + 1), "2", "2.5", None, "4.5"]),
        ([[], [], [1, 2], None, [3]], [[], [], [1, 2], None, [3]]),
    ],
)
def test_a_column_of_a_later_part_may_be_of_another_type(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], expected: list[Any]
) -> None:
    source, target = tmp_path / "new.jsonl", tmp_path / "out.parquet"
    rows = ({"own": value, "text": text} for value, text in zip(values, TEXTS, strict=True))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(predictions, "CHUNK", 2)
    assert call("predict", folder, "--file", source, "--output", target, "--keep", "own", "--draws", 2) == 0
    assert parquet.read_table(target)["own"].to_pylist() == expected


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("widths", [(2, 3, 5, 2), (5, 3, 2, 2)])
def test_all_rows_have_the_columns_of_the_one_with_most_choices(
    ending: str, widths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = choice_scenarios.program()
    posterior = fit(program, choice_scenarios.rows(), "mle", epochs=1, progress=False, cpu=True)
    rows = [{"ask": "Which", "choices": [f"stone {number}" for number in range(width)]} for width in widths]
    source, target = tmp_path / "new.jsonl", tmp_path / f"out.{ending}"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(predictions, "CHUNK", 2)
    assert predictions.predict_file(posterior, source, target, progress=False) == 4
    readers = {"csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True), "parquet": pd.read_parquet}
    found, expected = readers[ending](target), posterior.predict(rows, progress=False).to_pandas()
    assert list(found) == list(expected) and "p(E)" in found
    np.testing.assert_allclose(found.iloc[:, 1:], expected.iloc[:, 1:], rtol=0, atol=1e-5)


def test_a_column_that_cannot_be_kept_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("text,class\nw1,a\n")
    for name, said in (
        ("text.id", "has no"),
        ("name", "Unknown column 'name'"),
        ("class", "Predictions have a column 'class', too: rename"),
    ):
        flags = ("--file", tmp_path / "new.csv", "--output", tmp_path / "out.csv", "--keep", name)
        assert call("predict", folder, *flags) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.csv").exists()


def test_rows_without_text_are_numbered_as_in_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predictions, "CHUNK", 3)
    Path("new.csv").write_text("id,text\n" + "".join(f"{row},{text}\n" for row, text in enumerate([*TEXTS, "", ""])))
    assert call("predict", folder, "--file", "new.csv", "--output", "out.csv") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 rows of split 'new.csv' have no text in 'text': row 5, counted from 0. Remove them." in said
    Path("new.csv").write_text("id,text\n1,\n2,w1\n3,\n")
    assert call("predict", folder, "--file", "new.csv", "--output", "out.csv") == 2
    assert "2 of 3 rows of split 'new.csv' have no text in 'text': rows 0, 2, counted" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_cannot_be_written_is_said_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("predict", folder, "--file", tmp_path / "new.csv", "--output", tmp_path / "out.xlsx") == 2
    assert "expected a file ending in .csv, .jsonl, .parquet" in capsys.readouterr().err


def test_a_row_that_cannot_be_read_leaves_no_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("title\nw1\n")
    assert call("predict", folder, "--file", tmp_path / "new.csv", "--output", tmp_path / "out.csv") == 2
    assert "text" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["new.csv"]


def test_the_file_that_is_read_is_not_written_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("text\nw1\n")
    assert call("predict", folder, "--file", tmp_path / "new.csv", "--output", tmp_path / "new.csv") == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert (tmp_path / "new.csv").read_text() == "text\nw1\n"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_file_without_rows_is_refused(
    folder: Path, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("text\n")
    assert call("predict", folder, "--file", tmp_path / "new.csv", "--output", tmp_path / f"out.{ending}") == 2
    assert "has no rows" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["new.csv"]
