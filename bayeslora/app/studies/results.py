"""What is on disk of a study: a folder for each cell, which is written by whoever holds its lock.

::

    STUDY/cells/NAME/              the run of a cell: config.yaml, checkpoints/, posterior/, as `bayeslora fit` has it
    STUDY/cells/NAME/begun.json    fingerprints of local files that the fit was begun with
    STUDY/cells/NAME/cell.json     what the fit cost, warned of and read, written when it has ended
    STUDY/cells/NAME/error.json    why there is no result
    STUDY/cells/NAME/evaluations/  metrics (.json, written last) and predictions (.safetensors), or an error
    STUDY/report/                  tables and pictures
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from bayeslora import files
from bayeslora.app.studies.cells import Cell, Entry, Evaluation
from bayeslora.app.studies.expansion import Candidate, Target
from bayeslora.errors import SettingError
from bayeslora.predict.metrics import Metrics
from bayeslora.predict.prediction import Prediction

__all__ = ["Results", "State"]

State = Literal["done", "failed", "open"]
ERROR = "error.json"
#: Seconds between two looks at a lock.
PAUSE = 0.2


class Results:
    """Results of a study, as far as they are there.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def at(self, cell: Cell) -> Path:
        """Folder of a cell."""
        return self.folder / "cells" / cell.name

    def prediction(self, cell: Cell, evaluation: Evaluation) -> Path:
        """File of a prediction."""
        return self._evaluation(cell, evaluation, ".safetensors")

    def evaluation(self, cell: Cell, evaluation: Evaluation) -> Path:
        """File of what came of a prediction."""
        return self._evaluation(cell, evaluation, ".json")

    def _evaluation(self, cell: Cell, evaluation: Evaluation, ending: str) -> Path:
        return self.at(cell) / "evaluations" / f"{evaluation.name}{ending}"

    # What is there.

    def fitted(self, cell: Cell) -> dict[str, Any] | None:
        """What a fit cost, ``cost``, on which ``device``, and what it warned of, ``warnings``; None if not ended.

        Where its data or network are local files, ``files`` has their fingerprints.
        """
        return _read(self.at(cell) / "cell.json")

    def begun(self, cell: Cell) -> dict[str, str] | None:
        """Digests of the local files that a fit was begun with, by their paths; None if it was not begun."""
        return _read(self.at(cell) / "begun.json")

    def evaluated(self, cell: Cell, evaluation: Evaluation) -> dict[str, Any] | None:
        """``metrics`` and ``seconds`` of an evaluation; None if there is none.

        ``files`` has fingerprints of its local files, and ``warnings`` what is to be said of its rows.
        """
        return _read(self.evaluation(cell, evaluation))

    def error(self, entry: Entry) -> dict[str, Any] | None:
        """What went wrong, in the fit, in one that it needs, or after it; None if nothing did.

        ``type``, ``message`` and ``traceback``, and after how many ``seconds``, where that is known.
        """
        if (found := self._error_of_fit(entry)) is not None:
            return found
        for name in entry.evaluations:
            if (found := self._error_of(entry, name)) is not None:
                return found | ({"message": f"{found['message']} (shift '{name}')"} if name else {})
        return None

    def _error_of_fit(self, entry: Entry) -> dict[str, Any] | None:
        places = [self.at(cell) / ERROR for cell in entry.cell.chain]
        return next((found for place in places if (found := _read(place)) is not None), None)

    def _error_of(self, entry: Entry, evaluation: str) -> dict[str, Any] | None:
        return _read(self._evaluation(entry.cell, entry.evaluations[evaluation], f"-{ERROR}"))

    def missing(self, entry: Entry) -> list[str]:
        """Names of the evaluations of which there is no result."""
        return [name for name, each in entry.evaluations.items() if self.evaluated(entry.cell, each) is None]

    def state(self, entry: Entry) -> State:
        """Whether there is something left to do; with a result on the task's own rows, it is done without a shift's."""
        missing = self.missing(entry)
        if self._error_of_fit(entry) is None and any(self._error_of(entry, name) is None for name in missing):
            return "open"
        return "failed" if "" in missing else "done"

    def chosen(self, target: Target) -> Candidate | None:
        """The candidate with the least NLL on held-out rows; None while that is not known, or if all failed."""
        first, *others = target.candidates
        if first.trial is None and not others:
            return first
        judged = [(self._nll(each), number) for number, each in enumerate(target.candidates)]
        if any(self.state(each) == "open" for each in target.trials):
            return None
        least, number = min(judged)
        return None if least == math.inf else target.candidates[number]

    def entry(self, target: Target) -> Entry:
        """What stands for a line that is done: its chosen candidate."""
        chosen = self.chosen(target)
        assert chosen is not None  # of a line that is done there is one
        return chosen.entry

    def evaluations(self, target: Target) -> dict[str, dict[str, Any]]:
        """What came of the evaluations of a line that is done, by name: of those of shifts, as far as they are."""
        entry = self.entry(target)
        found = {name: self.evaluated(entry.cell, each) for name, each in entry.evaluations.items()}
        return {name: each for name, each in found.items() if each is not None}

    def predicted(self, target: Target, evaluation: str = "") -> Prediction:
        """Prediction of a line that is done, of its own rows or of those of a shift by its name."""
        entry = self.entry(target)
        return Prediction.load(self.prediction(entry.cell, entry.evaluations[evaluation]))

    def _nll(self, candidate: Candidate) -> float:
        assert candidate.trial is not None
        found = self.evaluated(candidate.trial.cell, candidate.trial.evaluations[""])
        nll = math.inf if found is None else Metrics.from_dict(found["metrics"])["nll"].value
        return math.inf if math.isnan(nll) else nll

    def settled(self, target: Target) -> State:
        """Whether a line is done, has failed, or waits."""
        if any(self.state(each) == "open" for each in target.trials):
            return "open"
        chosen = self.chosen(target)
        return "failed" if chosen is None else self.state(chosen.entry)

    # What is written, by whoever holds the cell.

    @contextmanager
    def reporting(self) -> Iterator[Path]:
        """Give the folder of the report, once no other process is writing there."""
        folder = self.folder / "report"
        while True:
            with _held(folder) as held:
                if held:
                    yield folder
                    return
            time.sleep(PAUSE)

    @contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell while the block runs, unless another process does; yields whether it is held."""
        with _held(self.at(cell)) as held:
            yield held

    @contextmanager
    def left(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell while the block runs, if a process was killed while it had it; yields whether it is held."""
        if files.left(files.hidden(self.at(cell), "lock")):
            with self.claimed(cell) as held:
                yield held
        else:
            yield False

    def write_begun(self, cell: Cell, files_read: Mapping[str, str]) -> None:
        """Say that a fit begins, with local files of such fingerprints."""
        files.write_json(self.at(cell) / "begun.json", dict(files_read))

    def write_fit(
        self,
        cell: Cell,
        cost: Mapping[str, float],
        device: str = "",
        warnings: Sequence[str] = (),
        files_read: Mapping[str, str] | None = None,
    ) -> None:
        """Say that a fit has ended, where, since seconds are those of that device, and what it warned of and read.

        Args:
            cell: the fit.
            cost: of the fit.
            device: what it ran on.
            warnings: what it warned of.
            files_read: fingerprints of local files by their paths.
        """
        found = {"cost": dict(cost), "device": device, "warnings": list(warnings), "files": dict(files_read or {})}
        files.write_json(self.at(cell) / "cell.json", found)

    def write_evaluation(
        self,
        cell: Cell,
        evaluation: Evaluation,
        metrics: Metrics,
        seconds: float,
        warnings: Sequence[str] = (),
        files_read: Mapping[str, str] | None = None,
    ) -> None:
        """Say what came of an evaluation.

        Args:
            cell: the fit.
            evaluation: of it.
            metrics: that came of it.
            seconds: that the prediction took.
            warnings: what is to be said of its rows.
            files_read: fingerprints of the local files that these are from, by their paths.
        """
        found = {"metrics": metrics.to_dict(), "seconds": seconds}
        found |= {"warnings": list(warnings), "files": dict(files_read or {})}
        files.write_json(self.evaluation(cell, evaluation), found)

    @contextmanager
    def recorded(self, cell: Cell, evaluation: Evaluation | None = None) -> Iterator[None]:
        """Record what goes wrong within the block, of a fit or of an evaluation, and go on after it."""
        place = self.at(cell) / ERROR if evaluation is None else self._evaluation(cell, evaluation, f"-{ERROR}")
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            lines = "".join(traceback.format_exception(error))
            found = {"type": type(error).__name__, "message": str(error), "traceback": lines}
            files.write_json(place, found | {"seconds": time.monotonic() - begun})

    def write_end(self, cell: Cell, message: str) -> None:
        """Say that the process ended that had a cell, as one does that the system has no memory for."""
        files.write_json(self.at(cell) / ERROR, {"type": "", "message": message, "traceback": ""})

    def forget_errors(self) -> None:
        """Let everything that failed be tried again."""
        for pattern in (f"cells/*/{ERROR}", f"cells/*/evaluations/*-{ERROR}"):
            for place in self.folder.glob(pattern):
                files.remove(place)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder while the block runs, unless another process does."""
    files.make(folder.parent)
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(files.hidden(folder, "lock")))
            held = True
        except SettingError:
            held = False
        yield held


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found
