from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import gethostname

import pytest
import torch
from safetensors.torch import load_file

from bayeslora import files, store
from bayeslora.errors import SettingError


def test_a_file_or_a_folder_takes_its_place_as_a_whole(tmp_path: Path) -> None:
    for what in ("first", "second"):
        with files.replaced(tmp_path / "folder") as new:
            new.mkdir()
            (new / f"{what}.txt").write_text(what)
        with files.replaced(tmp_path / "deep" / "file.txt") as new:
            new.write_text(what)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second.txt"]
    assert (tmp_path / "deep" / "file.txt").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_a_failed_block_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), files.replaced(tmp_path / "a.txt") as new:
        new.write_text("new")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match="a.txt"), files.replaced(tmp_path / "a.txt") as new:
        new.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").is_dir()


def test_a_place_within_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for way in (files.replaced(tmp_path / "file" / "a.txt"), store.opened(tmp_path / "file")):
        with pytest.raises(SettingError, match=f"There can be no folder '{tmp_path / 'file'}': File exists"), way:
            pass


HOLD = """
import sys, time
from pathlib import Path
from bayeslora import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_process_is_told_who_holds_the_lock_until_that_one_is_gone(tmp_path: Path) -> None:
    lock = files.hidden(tmp_path / "run", "lock")
    root = str(Path(files.__file__).parents[1])
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        match = rf"'{tmp_path / 'run'}' is being written by process {process.pid} on {gethostname()}, since \d{{4}}-"
        with pytest.raises(SettingError, match=match), files.locked(lock):
            pass
        process.kill()
    with files.locked(lock), files.locked(lock):
        assert f"process {os.getpid()} on" in lock.read_text()
    assert list(tmp_path.iterdir()) == []


def test_another_thread_that_writes_in_the_same_place_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with ThreadPoolExecutor(1) as pool, files.replaced(path) as new:
        new.write_text("first")
        with pytest.raises(SettingError, match=f"'{path}' is being written by process {os.getpid()}"):
            pool.submit(files.write_text, path, "second").result()
    assert path.read_text() == "first"


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = fcntl.flock

    def too_late(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        (tmp_path / "lock").unlink()
        take(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with files.locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError), files.locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


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
    found = load_file(tmp_path / "x.safetensors")
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


def test_parts_of_a_large_file_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE", 100)
    monkeypatch.setattr(files, "PART", 2)
    path = tmp_path / "model.safetensors"
    seen = set()
    for place in (0, 199, None):
        changed = bytearray(200)
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        seen.add(files._of_parts(path, 200, -1 if place is None else place))
    assert len(seen) == 3
