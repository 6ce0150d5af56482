"""The one place that shows progress; silent where standard error is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield ``items`` under a progress bar."""
    yield from tqdm(items, desc=description, total=total, leave=False, disable=None if show else True)
