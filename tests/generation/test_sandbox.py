"""Each limit that programs run under, at work."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from bayeslora.errors import SettingError
from bayeslora.generation import sandbox
from bayeslora.generation.sandbox import Limits, Outcome, run_program

pytestmark = pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="programs are run on Linux and macOS alone, and refused elsewhere"
)
SMALL = Limits(seconds=20, memory=2**28, file_size=1000, open_files=12)


def ended(source: str, limits: Limits = SMALL) -> Outcome:
    return run_program(source, limits, unsafe_code=True)


def test_programs_end_as_they_end() -> None:
    assert ended("assert 1 + 1 == 2").passed
    assert ended("x = 1\nraise ValueError('no\\nmore')") == ("failed", "ValueError: no\nmore")
    assert ended("def f(:") == ("failed", "SyntaxError: invalid syntax")
    assert ended("raise SystemExit(0)").status == "failed"
    assert ended("import os\nos._exit(0)") == ("failed", "ended before its tests")
    assert ended("print('passed' * 10**6)\nimport sys\nsys.stderr.write('x')").passed
    assert ended("raise ValueError('\\ud800')") == ("failed", "ValueError: ?")


@pytest.mark.parametrize("said", ["x", "[1, 2, 3]", "[" * 10**4, "\\xff"])
def test_a_program_that_writes_into_its_report_has_failed(said: str) -> None:
    source = f"""
import os
for number in range(3, 12):
    try:
        os.write(number, b"{said}")
    except OSError:
        pass
"""
    assert ended(source).status == "failed"


def test_what_guards_a_program_goes_by_no_name() -> None:
    found = ended("import __main__\n__main__.REFUSED = ()\nimport os\nos.kill(os.getppid(), 0)")
    assert found.status == "over a limit" and "Refused" in found.error


def test_nothing_runs_without_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="unsafe_code=True .in a shell --run-programs"):
        run_program("")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SettingError, match="this is win32"):
        ended("")


def test_what_cannot_be_limited_does_not_run() -> None:
    with pytest.raises(SettingError, match="cannot put a program under limits"):
        ended("", Limits(open_files=-5))


def test_time_by_the_clock() -> None:
    start = time.monotonic()
    assert ended("import time\ntime.sleep(60)", Limits(seconds=0.5)) == ("timed out", "more than 0.5 seconds")
    assert time.monotonic() - start < 20


def test_time_of_a_processor() -> None:
    found = ended("while True: pass", Limits(seconds=60, cpu_seconds=1))
    assert found == ("timed out", "more than 1 seconds of a processor")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS takes RLIMIT_AS and does not keep to it")
@pytest.mark.parametrize("source", ["x = bytearray(2**29)", "x = []\nwhile True: x.append([0] * 9999)"])
def test_memory(source: str) -> None:
    assert ended(source) == ("over a limit", "MemoryError")


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 0)",
        "import ctypes",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_processes(source: str) -> None:
    found = ended(source)
    assert found.status == "over a limit" and "Refused" in found.error


def test_no_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A child that got round all that refuses it, and outlives its parent.
    runner = tmp_path / "runner.py"
    runner.write_text(
        f"""
import os, time
if child := os.fork():
    open({str(tmp_path / "child")!r}, "w").write(str(child))
    os.write(1, b'["passed", ""]')
else:
    os.closerange(0, 3)
    time.sleep(60)
"""
    )
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    assert ended("").passed
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_size_and_number_of_files() -> None:
    assert ended("open('a', 'w').write('x' * 900)").passed
    found = ended("with open('a', 'w') as file: file.write('x' * 2000)")
    assert found.status == "over a limit" and "File too large" in found.error
    found = ended("files = [open(str(n), 'w') for n in range(20)]")
    assert found.status == "over a limit" and "Too many open files" in found.error


def test_files_of_its_own_folder() -> None:
    source = """
import os, tempfile
assert os.listdir() == ["program.py"]
os.mkdir("a")
with open("a/b", "w") as file:
    file.write("c")
os.rename("a/b", "a/d")
assert open("a/d").read() == "c" and os.listdir("a") == ["d"]
os.remove("a/d")
os.rmdir("a")
with tempfile.TemporaryFile() as file:
    file.write(b"c")
print(os.getcwd())
"""
    before = {each for each in os.listdir(tempfile.gettempdir()) if each.startswith("bayeslora-")}
    assert ended(source) == ("passed", "")
    assert {each for each in os.listdir(tempfile.gettempdir()) if each.startswith("bayeslora-")} <= before


@pytest.mark.parametrize(
    "act",
    [
        "open(PATH)",
        "open(PATH, 'w')",
        "os.open(PATH, os.O_WRONLY)",
        "os.open(NEW, os.O_CREAT | os.O_WRONLY)",
        "os.remove(PATH)",
        "os.rename(PATH, NEW)",
        "os.rename(PATH, 'mine')",
        "os.rename('program.py', NEW)",
        "os.mkdir(NEW)",
        "os.rmdir(FOLDER)",
        "os.listdir(FOLDER)",
        "os.chmod(PATH, 0)",
        "os.truncate(PATH, 0)",
        "os.utime(PATH, (0, 0))",
        "os.symlink(PATH, 'link')",
        "os.link(PATH, 'link')",
        "os.chdir(FOLDER)",
        "open('../../' + PATH, 'w')",
        "sqlite3.connect(NEW)",
    ],
)
def test_files_elsewhere(act: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("kept")
    new, stamp = tmp_path / "new", path.stat().st_mtime
    names = f"import os\nimport sqlite3\nPATH, NEW, FOLDER = {str(path)!r}, {str(new)!r}, {str(tmp_path)!r}\n"
    found = ended(names + act)
    assert found.status == "over a limit" and "Refused" in found.error, found
    assert path.read_text() == "kept" and path.stat().st_mtime == stamp and os.listdir(tmp_path) == ["kept"]


def test_no_network() -> None:
    found = ended("import socket\nsocket.create_connection(('127.0.0.1', 9))")
    assert found.status == "over a limit" and found.error.startswith("Refused: socket.")


def test_no_environment_no_input_no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert ended("import os\nassert not {*os.environ} - {'LC_CTYPE', '__CF_USER_TEXT_ENCODING'}, os.environ").passed
    assert ended("input()").error.startswith("EOFError")
    assert ended("import torch").error == "ModuleNotFoundError: No module named 'torch'"
    assert ended("import sys\nassert sys.argv == ['program.py']").passed
