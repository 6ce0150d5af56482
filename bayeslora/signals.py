"""Signals that ask a process to stop: Ctrl-C, a scheduler's notice, the end of a session."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "acted_on", "noted"]

#: Not every system has the last.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """Another signal than that of Ctrl-C asked the process to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def stop(number: int) -> None:
    """Raise what a signal stands for.

    Raises:
        KeyboardInterrupt: always; `Stopped`, for another signal than that of Ctrl-C.
    """
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


@contextmanager
def acted_on() -> Iterator[None]:
    """Let every such signal raise at once, as Ctrl-C does."""
    with _handled(lambda number, frame: stop(number)):
        yield


@contextmanager
def noted() -> Iterator[Callable[[], int | None]]:
    """Only note the first such signal, whose number is what is given then; the second one acts at once."""
    first: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if first:
            stop(number)
        first.append(number)

    with _handled(note):
        yield lambda: first[0] if first else None


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    try:
        for number in STOPPING:
            now = signal.getsignal(number)
            # A process under nohup ignores the end of its session, and goes on to. What handles a signal without
            # Python, in a program that Python is embedded in, could not be put back.
            if now is not None and (number == signal.SIGINT or now is not signal.SIG_IGN):
                before[number] = signal.signal(number, handler)
    except ValueError:  # only the main thread may set handlers
        pass
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)
