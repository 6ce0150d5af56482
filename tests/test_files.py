from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bayeslora import files


def test_staged_files_arrive_together_and_leave_no_trace(tmp_path: Path) -> None:
    with files.staged(tmp_path) as stage:
        (stage / "a.txt").write_text("new")
        (stage / "deep").mkdir()
        (stage / "deep" / "b.txt").write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.txt", "deep"]


def test_a_failed_block_leaves_the_old_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), files.staged(tmp_path) as stage:
        (stage / "a.txt").write_text("new")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_target_that_cannot_be_replaced_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match="a.txt"), files.staged(tmp_path) as stage:
        (stage / "a.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_was_begun_survives_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, calls = os.replace, iter(range(100))

    def failing(source: Path, target: Path) -> None:
        if next(calls):
            raise PermissionError
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises(PermissionError), files.staged(tmp_path) as stage:
            (stage / "a.txt").write_text("new")
            (stage / "b.txt").write_text("new")
        with pytest.raises(PermissionError):
            files.recover(tmp_path)
    files.recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_what_was_begun_to_be_moved_is_moved_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt), files.staged(tmp_path) as stage:
            (stage / "a.txt").write_text("first")
            (stage / "b.txt").write_text("first")
    assert not (tmp_path / "a.txt").exists()
    with files.staged(tmp_path) as stage:
        (stage / "a.txt").write_text("second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "second", "b.txt": "first"}


def test_json_is_written_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    files.write_json(path, {"a": [1, 2.5]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5]}
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2.5]}
    assert [found.name for found in path.parent.iterdir()] == ["value.json"]


def test_tensors_come_back(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    tensors = {"a": base, "view": base.T, "shared": base[:2], "leaf": torch.zeros(2, requires_grad=True)}
    files.write_tensors(tmp_path / "x.safetensors", tensors)
    found = files.read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].detach()) for name in tensors)


def test_a_digest_changes_with_one_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write_tensors(path, {"a": torch.zeros(3)})
    before = files.digests(tmp_path)
    assert list(before) == ["x.safetensors"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert files.digests(tmp_path) != before


def test_a_fingerprint_knows_the_network_and_not_its_place() -> None:
    config = {"hidden_size": 16, "layers": 2, "_name_or_path": "here", "torch_dtype": "float32"}
    moved = {**config, "_name_or_path": "there", "torch_dtype": "bfloat16", "num_labels": 5}
    assert files.fingerprint(config) == files.fingerprint(dict(reversed(moved.items())))
    assert files.fingerprint(config) != files.fingerprint({**config, "hidden_size": 17})
