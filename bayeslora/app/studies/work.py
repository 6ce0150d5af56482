"""One of several processes that work on the same study: what it is given, and what it does."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Job", "work"]


@dataclass(frozen=True)
class Job:
    """What a process needs to know, as plain data.

    Attributes:
        study: what the file of the study holds.
        folder: of its results.
        place: folder that relative paths are from.
        plugins: files to import before.
        shard: number of the part of its lines, from 1 on, and of parts; all lines, if left out.
    """

    study: Mapping[str, Any]
    folder: str
    place: str
    plugins: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None

    def to_json(self) -> str:
        """Text for a command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` wrote."""
        values = json.loads(text)
        shard = values["shard"]
        return cls(**values | {"plugins": tuple(values["plugins"]), "shard": None if shard is None else tuple(shard)})


def work(job: Job, goes_on: Callable[[], bool] = lambda: True) -> None:
    """Do what is left of a study that no other process is doing, until nothing is.

    Args:
        job: what the process is given.
        goes_on: whether to begin with another line.
    """
    from bayeslora.app.studies.running import settle
    from bayeslora.app.studies.study import Study
    from bayeslora.app.terminal import quiet
    from bayeslora.registry import load_file

    quiet()
    os.chdir(job.place)
    for path in job.plugins:
        load_file(path)
    study = Study(job.study, job.folder)
    settle(study.part(job.shard), study.results, goes_on=goes_on)


def main() -> None:
    """A process of its own, which begins with nothing more once the one that started it is gone.

    It exits with 128 + n on signal n: whoever started it says what there is to say.
    """
    from bayeslora.signals import acted_on

    parent = os.getppid()
    try:
        with acted_on():
            work(Job.from_json(sys.argv[1]), lambda: os.getppid() == parent)
    except KeyboardInterrupt as stop:
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
