"""Doing what is left of a study: one process, or one of several that work on the same folder."""

from __future__ import annotations

import ctypes
import gc
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from bayeslora import files
from bayeslora.app import runs
from bayeslora.app.config import OF_ROWS, RunConfig
from bayeslora.app.seen import flattered
from bayeslora.app.studies.cells import Cell, Entry, Evaluation
from bayeslora.app.studies.expansion import Target
from bayeslora.app.studies.inputs import changes_since_begun, fingerprints, fingerprints_of_rows
from bayeslora.app.studies.results import Results
from bayeslora.app.studies.warned import heard
from bayeslora.app.terminal import say
from bayeslora.errors import BayesLoraError, SettingError
from bayeslora.inference import load
from bayeslora.posterior import Posterior
from bayeslora.predict.truth import with_truth
from bayeslora.store import CHAIN, CONFIG, POSTERIOR, holds_fit
from bayeslora.tasks import Task, check_compatible, load_task

__all__ = ["Performer", "check_rows", "settle"]

#: Seconds between two looks at what other processes are doing.
PAUSE = 0.5


def check_rows(targets: Sequence[Target], results: Results) -> None:
    """Make sure, before anything is fitted, that tasks have the splits to predict, with labels to compare with.

    A task that cannot be loaded is left to its lines, which fail, while others go on, unless there are no others. One
    of a shift is asked for by name, and would be missed after all fits.

    Raises:
        TaskError, DataError: one of them has not, or that of a shift has other classes.
        BayesLoraError, OSError: none can be loaded, or that of a shift cannot.
    """
    entries = [each.entry for target in targets if results.settled(target) == "open" for each in target.candidates]
    asked: dict[str, tuple[RunConfig, dict[str, Evaluation]]] = {}
    for entry in entries:
        config = entry.cell.config
        of_task = {name: getattr(config, name) for name in OF_ROWS}
        _, evaluations = asked.setdefault(repr(of_task), (config, {}))
        evaluations |= {repr((_other_task(each), each.split)): each for each in entry.evaluations.values()}
    errors: list[BayesLoraError | OSError] = []
    others: dict[str, Task] = {}
    for config, evaluations in asked.values():
        try:
            task = runs.task_of(config)
        except (BayesLoraError, OSError) as error:
            errors.append(error)
            continue
        for each in evaluations.values():
            found = task if (each.task, each.data_dir) == (None, None) else _compatible(task, config, each, others)
            found.split(each.split).labels()
    if errors and len(errors) == len(asked):
        raise errors[0]


def _other_task(evaluation: Evaluation) -> tuple[Any, ...]:
    return evaluation.task, evaluation.data_dir, evaluation.task_settings


def _compatible(task: Task, config: RunConfig, shift: Evaluation, loaded: dict[str, Task]) -> Task:
    """The task of a shift, or that of a fit in another folder, once it is known that the fit can predict it."""
    settings = config.task_settings if shift.task is None else dict(shift.task_settings)
    key = repr((shift.task or config.task, shift.data_dir, settings))
    if key not in loaded:
        loaded[key] = load_task(shift.task or config.task, shift.data_dir, **settings)
    check_compatible(task.spec, loaded[key].spec)
    return loaded[key]


def settle(
    targets: Sequence[Target],
    results: Results,
    told: Callable[[Target], None] = lambda target: None,
    goes_on: Callable[[], bool] = lambda: True,
    bars: bool = False,
) -> None:
    """Come to the end of every line: a result, or an error that is recorded.

    Several processes may do this with the same lines and folder: each cell is done by the one that holds its lock, and
    who finds nothing that is free waits.

    Args:
        targets: lines.
        results: where they are.
        told: called with each line that this process has come to the end of, or found there.
        goes_on: whether to begin with another line.
        bars: show how far each fit and prediction is, and once what was taken for what in the data.
    """
    left, performer = list(targets), Performer(results, bars)
    while left and goes_on():
        before, waiting = len(left), []
        for target in left:
            if not goes_on():
                return
            if performer.settled(target):
                told(target)
            else:
                waiting.append(target)
        left = waiting
        if len(left) == before:
            time.sleep(PAUSE)


@dataclass
class Performer:
    """Does what is left of lines, as far as no other process is at it.

    Attributes:
        results: where they are.
        progress: show how far each fit and prediction is, and once what was taken for what in the data.
        said: what was.
    """

    results: Results
    progress: bool = False
    said: set[str] = field(default_factory=set)

    def settled(self, target: Target) -> bool:
        """Do what is left of a line; whether nothing is, rather than with another process."""
        if not all([self.perform(each) for each in target.trials]):
            return False
        chosen = self.results.chosen(target)
        return chosen is None or self.perform(chosen.entry)

    def perform(self, entry: Entry) -> bool:
        """Fit and evaluate, as far as that is not done; false if another process is at it."""
        for cell in entry.cell.chain:
            with self.results.claimed(cell) as held:
                if not held:
                    return False
                if self.results.state(entry) == "open":
                    self._work(cell, entry.evaluations if cell is entry.cell else {})
        return True

    def _work(self, cell: Cell, evaluations: Mapping[str, Evaluation]) -> None:
        """Do what is left of a cell that is held; what goes wrong is recorded."""
        with self.results.recorded(cell):
            posterior = self._fit(cell)
            for each in evaluations.values():
                if self.results.evaluated(cell, each) is None:
                    with self.results.recorded(cell, each):
                        self._evaluate(cell, posterior, each)
        _free_memory()

    def _fit(self, cell: Cell) -> Posterior:
        folder = self.results.at(cell)
        if self.results.fitted(cell) is not None:
            return load(folder)
        files_read = self._begun(cell)
        if cell.is_within:
            _begin_with(cell, self.results)
        start = None if cell.begin is None else load(self.results.at(cell.begin))
        try:
            with heard() as warned:
                posterior = runs.fit(
                    cell.config, folder, resume=True, progress=self.progress, start=start, told=self._say_once
                )
        except SettingError as error:  # such as that there is another fit, which does not say what to do in a study
            if changed := changes_since_begun(files_read, cell.config, folder):
                raise SettingError(changed) from error
            raise
        self.results.write_fit(cell, posterior.cost, _device(posterior), warned, files_read)
        return posterior

    def _begun(self, cell: Cell) -> dict[str, str]:
        """Fingerprints of a fit's local files when it was begun: now, unless there is something to go on from."""
        then = self.results.begun(cell)
        if then is None or not holds_fit(self.results.at(cell)):
            then = fingerprints(cell.config)
            self.results.write_begun(cell, then)
        return then

    def _say_once(self, *notes: str) -> None:
        say(*(note for note in notes if note not in self.said))
        self.said.update(notes)

    def _evaluate(self, cell: Cell, posterior: Posterior, evaluation: Evaluation) -> None:
        task = runs.saved_task(posterior, evaluation.task, evaluation.data_dir, dict(evaluation.task_settings))
        data_dir = evaluation.data_dir or (cell.config.data_dir if evaluation.task is None else None)
        files_read = fingerprints_of_rows(task, evaluation.task or cell.config.task, data_dir)
        rows = task.split(evaluation.split)
        warned = flattered(posterior, rows, evaluation.split)  # before some of them are left out
        if evaluation.rows is not None and evaluation.rows < len(rows):
            rows, _ = rows.divide(evaluation.rows, 0, seed=0)
        begun = time.monotonic()
        seed = cell.config.seed
        prediction = posterior.predict(rows, evaluation.draws, evaluation.method, seed=seed, progress=self.progress)
        seconds = time.monotonic() - begun
        prediction = with_truth(prediction, rows)
        prediction.save(self.results.prediction(cell, evaluation))
        metrics = prediction.metrics(seed=seed)
        self.results.write_evaluation(cell, evaluation, metrics, seconds, warned, files_read)


def _device(posterior: Posterior) -> str:
    """What a fit ran on: the name of a GPU, or the sort of processor and the number of threads."""
    device = posterior.program.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _begin_with(cell: Cell, results: Results) -> None:
    """Let the run that a fit is over be the first of those that it is made of, as if it had been stopped after that."""
    assert cell.start is not None
    files.write_text(results.at(cell) / CONFIG, runs.HEADER + cell.config.to_yaml())
    target = results.at(cell) / f"{CHAIN}0" / POSTERIOR
    if not target.exists():
        with files.replaced(target) as new:
            shutil.copytree(results.at(cell.start) / POSTERIOR, new)


def _free_memory() -> None:
    """Leave nothing of a cell to the next one, in whose peak it would be counted.

    After some errors a process cannot use its device any more: it ends here, before it records all that is left as
    failed.
    """
    gc.collect()
    with suppress(AttributeError):  # glibc's alone: it keeps what was freed for itself, gigabytes after a large network
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
