"""Programs that a network wrote, each run in a process of its own and under limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bayeslora.errors import SettingError

__all__ = ["LIMITS", "Limits", "Outcome", "check_consent", "run_program"]

#: No environment of the user's, no packages, nothing written beside the library's files.
ISOLATED = ("-I", "-S", "-B")
#: What runs a program, in a process where nothing of this package is imported, and the program's name there.
RUNNER, PROGRAM = Path(__file__).with_name("confined.py"), "program.py"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of a processor.
        memory: bytes of its address space; macOS does not bound them.
        file_size: bytes of a file that it writes.
        open_files: at a time.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory: int = 2**30
    file_size: int = 2**20
    open_files: int = 16


LIMITS = Limits()


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
        status: "passed", "failed", "timed out" or "over a limit".
        error: last line of its error; empty where it passed.
    """

    status: str
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether it came to its end."""
        return self.status == "passed"


def check_consent(unsafe_code: bool) -> None:
    """Make sure that programs may be run, and can be.

    Raises:
        SettingError: nobody asked for it, or the system has none of the limits.
    """
    if not unsafe_code:
        raise SettingError(
            "Programs that a network wrote run on this machine only if that is asked for by name: unsafe_code=True "
            "(in a shell --run-programs). Limits keep off what they do by mistake, not what is meant to break out."
        )
    if sys.platform not in ("linux", "darwin"):
        raise SettingError(f"Programs run under limits of Linux and macOS, and this is {sys.platform}.")


def run_program(source: str, limits: Limits = LIMITS, *, unsafe_code: bool = False) -> Outcome:
    """Run a program of Python's standard library in a folder of its own that is removed afterwards.

    It has no standard input, no environment, no network and no further processes, reads the standard library and
    its folder, and writes into its folder alone. Linux itself refuses the network (a namespace of its own) and
    other files (Landlock) where it can, and further processes of any account but root's. Everywhere an audit hook of
    Python refuses them as well; a hook is no wall against a program that is made to get around it, and neither is the
    report that a program passed. What is more hostile than a language model's mistakes belongs into a virtual machine.

    Args:
        source: of the program.
        limits: what it may use.
        unsafe_code: run it, though it may be harmful.

    Raises:
        SettingError: ``unsafe_code`` is not given, or the system cannot put a program under limits.
    """
    check_consent(unsafe_code)
    with TemporaryDirectory(prefix="bayeslora-", ignore_cleanup_errors=True) as scratch:
        Path(scratch, PROGRAM).write_text(source, encoding="utf-8", errors="replace")
        with subprocess.Popen(
            [sys.executable, *ISOLATED, RUNNER, PROGRAM, json.dumps(asdict(limits))],
            cwd=scratch, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                report, trouble = process.communicate(timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                return Outcome("timed out", f"more than {limits.seconds:g} seconds")
            finally:
                with suppress(ProcessLookupError, PermissionError):  # nothing of its session is left
                    os.killpg(process.pid, signal.SIGKILL)
    if trouble:
        last = trouble.decode(errors="replace").strip().splitlines()[-1]
        raise SettingError(f"The system cannot put a program under limits: {last}")
    if process.returncode == -signal.SIGXCPU:
        return Outcome("timed out", f"more than {limits.cpu_seconds} seconds of a processor")
    if process.returncode < 0:
        return Outcome("failed", f"ended by {signal.Signals(-process.returncode).name}")
    with suppress(ValueError, TypeError, RecursionError):  # there is no report, or the program has written into it
        return Outcome(*json.loads(report))
    return Outcome("failed", "ended before its tests")
