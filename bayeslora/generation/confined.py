"""The process of a program: the limits that it is put under, the program itself, and the report of how it ended.

`bayeslora.generation.sandbox` starts this file by its path, with the standard library alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

__all__ = ["confine_files", "guard", "leave_network", "limit", "run"]

LONGEST = 500  # characters of a report

# Flags and numbers of system calls of Linux, the same on every architecture that Python is built for but Alpha.
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
EXECUTE, READ_FILE, READ_DIR, REFER, TRUNCATE = 1 << 0, 1 << 2, 1 << 3, 1 << 13, 1 << 14
FIRST_RIGHTS = REFER - 1
#: Where shared libraries lie that modules of Python need, and the list of them.
SHARED = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")

#: Events with as many paths to change; as many folders that they are relative to come last.
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1}
LISTS = {"os.listdir", "os.scandir"}
HARMLESS = {"os.fwalk", "os.putenv", "os.unsetenv", "os.walk"}
REFUSED = ("os", "pty", "subprocess", "socket", "ctypes", "signal", "resource", "sqlite3", "fcntl")
#: Modules that reach the memory or files unseen.
UNSEEN = {"ctypes", "_ctypes", "_dbm", "_gdbm", "readline"}


class Refused(PermissionError):
    """A program tried what it may not do."""


class PathBeneath(ctypes.Structure):
    """What may be done with a file or beneath a folder, as Landlock reads it."""

    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("place", ctypes.c_int32)]


def leave_network() -> bool:
    """Move this process to a network of its own, without any interface; whether the system lets it."""
    if sys.platform != "linux":
        return False
    system = ctypes.CDLL(None)
    return system.unshare(CLONE_NEWNET) == 0 or system.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def confine_files(writable: str, readable: Sequence[str]) -> bool:
    """Have Linux refuse other files for good, and the start of any executable; whether it can (Landlock, 5.13)."""
    if sys.platform != "linux":
        return False
    system = ctypes.CDLL(None)
    version = system.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return False
    handled = FIRST_RIGHTS | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rules = system.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(handled)), 8, 0)
    for path, rights in [(writable, handled & ~EXECUTE), *((path, READ_FILE | READ_DIR) for path in readable)]:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            rule = PathBeneath(rights if os.path.isdir(path) else READ_FILE, place)
            system.syscall(LANDLOCK_ADD_RULE, rules, LANDLOCK_PATH_BENEATH, ctypes.byref(rule), 0)
            os.close(place)
    system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = system.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return done


def limit(cpu_seconds: int, memory: int, file_size: int, open_files: int) -> None:
    """Limit processor time, memory, files and processes of this process; macOS bounds no memory."""
    most = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        most[resource.RLIMIT_AS] = memory
    for kind, value in most.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A process that has used its time is told so first, then killed.
        resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU and value != hard else value))


def guard(writable: str, readable: Sequence[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses files elsewhere, and processes, signals, sockets and foreign functions."""

    def within(path: Any, roots: Sequence[str]) -> bool:
        if isinstance(path, int):  # a file that is open
            return True
        real = os.path.realpath(os.curdir if path is None else os.fsdecode(path))
        return any(real == root or real.startswith(root + os.sep) for root in roots)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            allowed = within(arguments[0], [writable] if changes else [writable, *readable])
        elif event in LISTS:
            allowed = within(arguments[0], [writable, *readable])
        elif event in CHANGES:
            count = CHANGES[event]
            paths, folders = arguments[:count], arguments[-count:]
            allowed = all(within(path, [writable]) for path in paths) and all(each == -1 for each in folders)
        elif event == "import":
            allowed = arguments[0] not in UNSEEN
        else:
            allowed = event in HARMLESS or event.partition(".")[0] not in REFUSED
        if not allowed:
            raise Refused(f"{event} of {', '.join(map(repr, arguments[:1]))} is refused")

    return hook


def run(source: str, name: str) -> tuple[str, str]:
    """Run a program to its end.

    Returns:
        "passed", "failed" or "over a limit", and the last line of the error.
    """
    module = ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module  # the module of its guard has no name that it knows
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    except BaseException as error:  # SystemExit as well: the tests behind it did not run
        error.__traceback__ = None  # with the variables of its frames, which may fill the memory
        module.__dict__.clear()
        bounded = isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.EMFILE, errno.EAGAIN)
        status = "over a limit" if bounded or isinstance(error, MemoryError | Refused) else "failed"
        last = traceback.format_exception_only(error)[-1].strip()[:LONGEST]
        return status, last.encode(errors="replace").decode()  # half a character cannot be written into a file
    return "passed", ""


def main(program: str, limits: Mapping[str, int]) -> None:
    """Run the program of this folder under limits, and report by standard output, which is not the program's."""
    with open(program, encoding="utf-8") as file:
        source = file.read()
    scratch, library = os.path.realpath(os.curdir), [os.path.realpath(path) for path in sys.path]
    report = os.dup(1)
    signal.alarm(math.ceil(limits["seconds"]) + 1)  # where nobody is left to stop it
    leave_network()
    null = os.open(os.devnull, os.O_WRONLY)
    confine_files(scratch, [*library, *SHARED, os.path.join(sys.base_prefix, "lib")])
    limit(limits["cpu_seconds"], limits["memory"], limits["file_size"], limits["open_files"])
    for name in UNSEEN & sys.modules.keys():
        del sys.modules[name]
    sys.argv = [program]
    sys.addaudithook(guard(scratch, library))
    for stream in (1, 2):
        os.dup2(null, stream)
    os.write(report, json.dumps(run(source, program)).encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
