"""The one place that shows progress; bars are silent where standard error is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["bar", "note", "track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield ``items`` under a progress bar."""
    with bar(description, total, show) as progress:
        for item in items:
            yield item
            progress.update()


def bar(description: str, total: int | None = None, show: bool = True) -> tqdm:
    """A progress bar for work that is no loop: ``update`` it, and ``close`` it at the end."""
    return tqdm(desc=description, total=total, leave=False, disable=None if show else True)


def note(message: str, show: bool = True) -> None:
    """Say what was decided without having been asked for, on standard error."""
    if show:
        tqdm.write(message, file=sys.stderr)
