"""What the system itself refuses a process, without the audit hook."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from bayeslora.generation import confined
from bayeslora.generation.sandbox import LIMITS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="what is tested are calls of the Linux kernel: namespaces and Landlock"
)
START = f"import os, sys\nsys.path.insert(0, {str(Path(confined.__file__).parent)!r})\nimport confined\n"


def said(source: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", START + source], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@cache
def able(question: str) -> bool:
    """What the system answers another process of this account: what is tested has no say in what it should do here."""
    source = f"import ctypes\nsystem = ctypes.CDLL(None)\nraise SystemExit(not ({question}))"
    return subprocess.run([sys.executable, "-c", source]).returncode == 0


def has_namespaces() -> bool:
    return able("system.unshare(0x40000000) == 0 or system.unshare(0x50000000) == 0")  # of network; of users as well


def has_landlock() -> bool:
    return able("system.syscall(444, None, 0, 1) >= 1")  # landlock_create_ruleset, for its version


def test_the_network_is_gone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"""
import socket
def reach():
    try:
        socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))
        return 'there'
    except OSError:
        return 'gone'
print(reach(), confined.leave_network(), reach())
"""
        found = said(source, tmp_path).split()
    assert found == ["there", *(["True", "gone"] if has_namespaces() else ["False", "there"])]


@pytest.mark.parametrize(
    "act",
    [
        "open('../kept', 'w')",
        "open('../kept')",
        "os.truncate('../kept', 0)",
        "os.remove('../kept')",
        "os.mkdir('../new')",
        "os.mkfifo('../new')",
        "os.symlink('a', '../new')",
        "os.link('own', '../new')",
        "os.rename('own', '../new')",
        "os.execv('/bin/true', ['true'])",
    ],
)
def test_files_elsewhere_are_refused(act: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "own").mkdir()
    source = f"""
print(confined.confine_files(os.getcwd(), sys.path), flush=True)
open("own", "w").write("x")
import colorsys  # a module of the library is read
try:
    {act}
except OSError as error:
    print(type(error).__name__)
"""
    found = said(source, tmp_path / "own").split()
    if not has_landlock():
        assert found == ["False"]  # and done: there the audit hook alone refuses files elsewhere
        return
    assert found[0] == "True"
    assert found[1] in ("PermissionError", "OSError") and os.listdir(tmp_path / "own") == ["own"]
    assert sorted(os.listdir(tmp_path)) == ["kept", "own"] and (tmp_path / "kept").read_text() == "kept"


def test_no_further_process_but_for_root(tmp_path: Path) -> None:
    become = "if os.getuid() == 0: os.setuid(65534)\n"
    source = "confined.limit(9, 2**30, 1000, 20)\ntry:\n    os.fork()\nexcept BlockingIOError: print('refused')"
    assert said(become + source, tmp_path) == "refused"


def test_limits_are_lowered_alone(tmp_path: Path) -> None:
    source = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))
confined.limit(9, 2**30, 1000, 20)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
"""
    assert said(source, tmp_path) == "10"


def test_a_program_is_refused_by_the_system_as_well_as_by_its_guard(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "own").mkdir()
    unrefused = [*([] if has_landlock() else ["open"]), *([] if has_namespaces() else ["create_connection"])]
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
import socket
done = []
for act in (open, {str(tmp_path / "kept")!r}), (socket.create_connection, ("127.0.0.1", {server.getsockname()[1]})):
    try:
        act[0](act[1])
        done.append(act[0].__name__)
    except OSError:
        pass
assert done == {unrefused}, done
"""
        (tmp_path / "own" / "program.py").write_text(program)
        unguarded = "confined.guard = lambda *_: lambda *_: None\n"
        found = said(f"{unguarded}confined.main('program.py', {asdict(LIMITS)})", tmp_path / "own")
    assert json.loads(found) == ["passed", ""]


def test_a_program_ends_though_nobody_is_left_to_stop_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\ntime.sleep(60)")
    limits = json.dumps(asdict(LIMITS) | {"seconds": 0})
    ended = subprocess.run([sys.executable, confined.__file__, "program.py", limits], cwd=tmp_path, timeout=30)
    assert ended.returncode == -signal.SIGALRM
