"""Counts what a command runs through: files of the package, and calls from one of them into another.

    python scripts/walk.py fit --backend laplace --base demo --task demo --train-size 48 --output RUN

A cross-file call is a pair of functions in different files of the package, the first of which called the second: it
counts once, however often it was made. What runs while a module is imported does not count.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = tuple(str(ROOT / name) + "/" for name in ("bayeslora", "models", "inference"))


class Walk:
    """A profiler that notes who calls whom, in the files of the package alone."""

    def __init__(self) -> None:
        self.calls: set[tuple[CodeType, CodeType]] = set()
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a call of a function, if it comes straight from another file of the package."""
        called = frame.f_code
        if event != "call" or not called.co_filename.startswith(ROOMS) or not called.co_flags & CO_OPTIMIZED:
            return  # modules and bodies of classes run while something is imported
        self.files.add(called.co_filename)
        caller = frame.f_back
        if caller is not None and caller.f_code.co_filename.startswith(ROOMS):
            if caller.f_code.co_filename != called.co_filename and caller.f_code.co_flags & CO_OPTIMIZED:
                self.calls.add((caller.f_code, called))


def main() -> None:
    """Run the command that is given, and print the counts, file by file."""
    from bayeslora.app import cli

    walk = Walk()
    threading.setprofile(walk)
    sys.setprofile(walk)
    try:
        cli.main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    finally:
        sys.setprofile(None)
    into = Counter(called.co_filename for _, called in walk.calls)
    for name in sorted(walk.files, key=lambda name: -into[name]):
        print(f"{into[name]:4d}  {Path(name).relative_to(ROOT)}", file=sys.stderr)
    print(f"{len(walk.files)} files, {len(walk.calls)} cross-file calls", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
