"""Cells of a study: fits and evaluations, each under an address made of all that its result depends on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from bayeslora.app.config import RunConfig

__all__ = ["FORMAT", "Cell", "Entry", "Evaluation", "address", "is_over"]

#: Of what a cell's folder holds; another one gives all cells other addresses.
FORMAT = 1


def address(described: Any) -> str:
    """Digest of plain data: equal data have equal ones, in whatever order their keys are."""
    text = json.dumps({"format": FORMAT, "of": described}, sort_keys=True, ensure_ascii=False)
    return sha256(text.encode()).hexdigest()[:16]


def is_over(config: RunConfig) -> bool:
    """Whether the backend of a run is one over another one."""
    from bayeslora.inference import BACKENDS
    from bayeslora.inference.baselines.nested import Over

    assert config.backend is not None
    return issubclass(BACKENDS[config.backend], Over)


@dataclass(frozen=True)
class Cell:
    """One fit.

    Attributes:
        config: all that it depends on, every setting said.
        start: fit whose posterior it starts from or is laid around, or that it is over.
    """

    config: RunConfig
    start: Cell | None = None

    @cached_property
    def name(self) -> str:
        """Name of the folder: words for people, then the address."""
        own = {key: value for key, value in self.config.to_dict().items() if key not in ("output", "preset")}
        digest = address({"run": own, "start": None if self.start is None else self.start.name})
        path = Path(self.config.task)
        task = re.sub(r"[^\w.-]+", "-", path.stem if path.is_absolute() or "." in str(path) else str(path))
        return f"{task}-{self.config.backend}-seed{self.config.seed}-{digest}"

    @property
    def is_within(self) -> bool:
        """Whether the run that it starts from becomes a part of its own, as that of a member of an ensemble does."""
        return self.start is not None and is_over(self.config)

    @property
    def begin(self) -> Cell | None:
        """The fit from whose posterior this one starts, or that which it is over."""
        return self.start.begin if self.start is not None and self.is_within else self.start

    @property
    def chain(self) -> tuple[Cell, ...]:
        """The fits that it needs, the first one first, and itself."""
        return (*(() if self.start is None else self.start.chain), self)


@dataclass(frozen=True)
class Evaluation:
    """What is predicted, and how.

    Attributes:
        split: rows, by the name of the split.
        draws: number of weight draws.
        method: way to predict; the posterior's own if left out.
        task: another task than that of the fit.
        data_dir: folder with that task's files.
        task_settings: further arguments of `bayeslora.load_task` for it.
        rows: how many of the split, the first of a permutation that is the same for all; all, if left out.
    """

    split: str
    draws: int
    method: str | None = None
    task: str | None = None
    data_dir: str | None = None
    task_settings: tuple[tuple[str, Any], ...] = ()
    rows: int | None = None

    @cached_property
    def name(self) -> str:
        """Name of the files: words for people, then the address, of which ``rows`` is a part if they are not all."""
        described = asdict(self)
        if self.rows is None:
            del described["rows"]
        return f"{re.sub(r'[^-.A-Za-z0-9]+', '-', self.split)}-{address(described)}"


@dataclass(frozen=True)
class Entry:
    """A fit and its evaluations.

    Attributes:
        cell: the fit.
        evaluations: by name; the one on the task's own rows is "".
    """

    cell: Cell
    evaluations: dict[str, Evaluation]
