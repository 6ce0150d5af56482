"""What a posterior's folder says of itself is what was written, or is refused by the name of the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayeslora.errors import PosteriorError
from bayeslora.record import Record, read_record, whole_record, write_record

PROGRAM: dict[str, Any] = {
    "base": {"name": "demo"}, "configuration": {}, "frozen": "1f", "lora": {"r": 8}, "model": {}, "observation": {},
    "spec": None, "labels": None, "max_length": None,
}  # fmt: skip
RECORD = Record("svi", {"guide": "full", "width": (1, 2)}, 5, cost={"seconds": 1}, history=[{"loss": math.nan}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors", "posterior.safetensors", "words.txt"):
        (tmp_path / name).write_text(f"content of {name}")
    write_record(tmp_path, kind="guide", record=RECORD, program=PROGRAM, versions={"torch": "2"})
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    found = whole_record(folder)
    assert (found.kind, found.program, found.versions) == ("guide", PROGRAM, {"torch": "2"})
    assert found.record.settings == {"guide": "full", "width": [1, 2]} and math.isnan(found.record.history[0]["loss"])
    assert set(found.files) == {path.name for path in folder.iterdir()} - {"posterior.json"}


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda content: [content], "an object"),
    "a number": (lambda content: 3, "an object"),
    "no kind": (lambda content: content.pop("kind") and content, "kind: Field required"),
    "no record": (lambda content: content.pop("record") and content, "record: Field required"),
    "no format": (lambda content: content.pop("format") and content, "format: Field required"),
    "no backend": (lambda content: content["record"].pop("backend") and content, "record.backend: Field required"),
    "another key": (lambda content: content | {"mood": 1}, "mood: Extra inputs are not permitted"),
    "another entry": (lambda content: content | {"record": content["record"] | {"mood": 1}}, r"record.*mood: "),
    "a word as seed": (lambda content: content | {"record": content["record"] | {"seed": "0"}}, r"record.*seed: .*int"),
    "a word as record": (lambda content: content | {"record": "svi"}, "record: "),
    "a word as network": (lambda content: content | {"program": PROGRAM | {"lora": "full"}}, "program.lora: "),
    "no configuration": (lambda content: content["program"].pop("configuration") or content, "program.configuration: "),
    "a word as files": (lambda content: content | {"files": "all"}, "files: "),
    "a number as digest": (lambda content: content | {"files": {"words.txt": 1}}, "files.words.txt: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused_with_what_is_wrong(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    path = folder / "posterior.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(PosteriorError, match=rf"posterior.json' is damaged: .*{message}"):
        read_record(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04\x95", b"null", b"\x00" * 100])
def test_a_file_that_is_no_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "posterior.json").write_bytes(content)
    with pytest.raises(PosteriorError, match="posterior.json' is damaged"):
        read_record(folder)


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused(folder: Path, number: int) -> None:
    (folder / "posterior.json").write_text(json.dumps({"format": number}))
    with pytest.raises(PosteriorError, match=f"has format {number}; this version of bayeslora reads format 2"):
        read_record(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "posterior.safetensors", "words.txt"])
def test_a_file_that_is_gone_or_another_one_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("other")
    with pytest.raises(PosteriorError, match=f"is damaged: {name} is not what was written"):
        whole_record(folder)
    (folder / name).unlink()
    with pytest.raises(PosteriorError, match=f"is damaged: {name} is missing"):
        whole_record(folder)


def test_a_part_that_the_record_does_not_know_is_refused(folder: Path) -> None:
    content = json.loads((folder / "posterior.json").read_text())
    del content["files"]["adapter_config.json"]
    (folder / "posterior.json").write_text(json.dumps(content))
    with pytest.raises(PosteriorError, match="adapter_config.json is not what was written"):
        whole_record(folder)


def test_files_of_other_folders_are_not_looked_at(folder: Path) -> None:
    content = json.loads((folder / "posterior.json").read_text())
    content["files"]["../words.txt"] = ""
    (folder / "posterior.json").write_text(json.dumps(content))
    with pytest.raises(PosteriorError, match="words.txt is missing"):
        whole_record(folder)


@pytest.mark.parametrize("name", ["posterior.json", "words.txt", "more.txt"])
def test_no_link_is_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    target = tmp_path_factory.mktemp("home") / name
    target.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(PosteriorError, match=f"{name}' is a symbolic link, which is not followed"):
        whole_record(folder)
