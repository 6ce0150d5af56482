"""Folders of runs and of posteriors: what is where, who may write, and what a process that was killed leaves.

A posterior's folder is written beside its place and renamed into it as a whole::

    RUN/posterior/              adapter, posterior.safetensors, posterior.json: the folder that `Posterior.save` writes
    RUN/config.yaml             written by the command line
    RUN/checkpoints/            of the Trainer
    RUN/chain-0/, ...           runs of their own: the fits that a mixture or a temperature is of
    RUN/.bayeslora-next/        a run that is to replace this one as soon as it has come to its end

Who reads moves, writes and locks nothing, and follows no symbolic link. Who writes holds the folder's lock, and begins
by bringing to an end what a process that was killed had begun: `opened`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from zipfile import is_zipfile

from bayeslora import files
from bayeslora.errors import BayesLoraError, PosteriorError, SettingError
from bayeslora.record import RECORD, Record, read_record, refuse_links

__all__ = [
    "CHAIN",
    "CHECKPOINTS",
    "CONFIG",
    "POSTERIOR",
    "adapter_at",
    "begin",
    "current",
    "holds_fit",
    "is_main_process",
    "last_checkpoint",
    "opened",
    "place",
    "record_at",
    "steady",
    "written",
]

CONFIG, CHECKPOINTS, POSTERIOR = "config.yaml", "checkpoints", "posterior"
#: What the folders of independent fits begin with, within that of their mixture.
CHAIN = "chain-"
LOCK = ".bayeslora-lock"
#: A run that is to replace the one in the folder: while it is fitted, and once it is complete.
NEXT, COMPLETE = ".bayeslora-next", ".bayeslora-complete"
#: Of a checkpoint: what the Trainer writes last, and the states of the generators, one a process.
STATE, GENERATORS = "trainer_state.json", "rng_state*.pth"

T = TypeVar("T")


# A posterior's folder.


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """Give an empty folder, whose files, a description among them, take the place of ``folder`` as a whole.

    Raises:
        PosteriorError: there is something there that no posterior's folder holds.
        SettingError: another process is writing there.
    """
    with files.replaced(folder) as new:
        _check_free(folder)
        new.mkdir()
        yield new


def _check_free(folder: Path) -> None:
    """Make sure that a posterior in the place of ``folder`` replaces a posterior or nothing."""
    if folder.is_symlink():
        raise PosteriorError(f"'{folder}' is a symbolic link, which is not replaced: give the folder that it leads to.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise PosteriorError(f"'{folder}' is a file: a posterior needs a folder.")
    own = {RECORD, *read_record(folder).files} if (folder / RECORD).is_file() else set()
    others = sorted(path.name for path in folder.iterdir() if path.name not in own or path.is_dir())
    if others:
        raise PosteriorError(
            f"'{folder}' holds '{others[0]}', which no posterior of bayeslora does and which would be lost: choose "
            "another folder."
        )


def _posterior_at(path: Path) -> Path:
    """Where the posterior is that a run's or a posterior's folder holds, whatever is being done to it."""
    run = path.resolve()
    own, complete = run / POSTERIOR, run / COMPLETE
    refuse_links(own, complete)
    places = (complete / POSTERIOR, own, files.hidden(own, "old"), run, files.hidden(run, "old"))
    # Twice: between two looks it may have gone from a later place to an earlier one.
    found = next((place for place in places * 2 if (place / RECORD).is_file()), None)
    if found is None:
        raise PosteriorError(f"There is no posterior in '{path}': expected a file {RECORD}, or {POSTERIOR}/{RECORD}.")
    return found


def _warn_of_successor(path: Path) -> None:
    if holds_fit(path / NEXT):
        warnings.warn(
            f"A run that is to replace the one in '{path}' is under way or was stopped (fit --resume goes on with it, "
            "fit --overwrite begins again). What is read is the one that is still there.",
            stacklevel=4,
        )


def adapter_at(path: str | Path) -> str | Path:
    """The folder of a PEFT adapter: that of the posterior, if ``path`` is a run's."""
    run = Path(path)
    if (run / "adapter_config.json").exists() or not (run / POSTERIOR).exists():
        return path
    _warn_of_successor(run)
    return _posterior_at(run)


def steady(path: Path, reader: Callable[[Path], T]) -> T:
    """What a reader makes of the posterior in ``path``; it reads again if that was replaced while it did."""
    _warn_of_successor(path)
    while True:
        seen = _seen(path)
        try:
            found = reader(seen[0])
        except (OSError, BayesLoraError):
            if _seen(path) == seen:
                raise
        else:
            if _seen(path) == seen:
                return found


def _seen(path: Path) -> tuple[Path, object]:
    """Where the posterior is now, and what tells it from its successors there; equal to nothing if it has just gone."""
    where = _posterior_at(path)
    with suppress(OSError):
        found = (where / RECORD).stat()
        # A number that a file leaves is given to another, and a copy keeps the time at which its original was written.
        return where, (found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    return where, object()


# A run's folder.


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Hold a run's folder for writing, once what a process that was killed had begun is at its end.

    Of several processes that a launcher started, the main one does that for all.

    Raises:
        SettingError: another process holds it, a link is where a run would write, or there can be no such folder.
    """
    if not is_main_process():
        yield
        return
    made = not folder.exists()
    files.make(folder)
    try:
        with files.locked(folder / LOCK):
            _settle(folder)
            yield
    finally:
        if made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


@contextmanager
def place(folder: Path, anew: bool = False) -> Iterator[Path]:
    """Where to fit the run of an opened folder: beside the run that is there, if it is to be replaced.

    That one stays whole until the new one has come to its end. A new one that fails before it has anything to go on
    from leaves nothing; one that was stopped later is what `current` gives, to be resumed.

    Args:
        folder: of the run.
        anew: replace what is there, and begin again what is to replace it.

    Raises:
        PosteriorError: there is something in the posterior's folder that no posterior's holds.
    """
    successor = folder / NEXT if holds_fit(folder if anew else folder / NEXT) else folder
    if not is_main_process():
        yield successor
        return
    if anew:
        _check_free(folder / POSTERIOR)
        files.remove(folder / NEXT)
    try:
        yield successor
        _settle(folder)
    finally:
        if successor != folder and not holds_fit(successor):
            files.remove(successor)


def is_main_process() -> bool:
    """Whether this process, of those that a launcher started, is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def current(folder: Path) -> Path:
    """Where the run lies that a fit goes on with: that which is to replace the one in the folder, if there is one."""
    return folder / NEXT if holds_fit(folder / NEXT) else folder


def holds_fit(folder: Path) -> bool:
    """Whether there is something in the folder that took time to make."""
    posteriors = (RECORD, f"{POSTERIOR}/{RECORD}", f"{COMPLETE}/{POSTERIOR}/{RECORD}")
    own = any(any(folder.glob(each)) for each in (*posteriors, f"{CHECKPOINTS}/*/{STATE}"))
    return own or any(holds_fit(each) for each in folder.glob(f"{CHAIN}*"))


def record_at(folder: Path) -> Record | None:
    """How the posterior in a run's folder came about, as far as the run has come; None if there is none yet."""
    own = folder / POSTERIOR
    return read_record(own).record if (own / RECORD).is_file() else None


def begin(folder: Path, resume: bool) -> bool:
    """Make sure that a fit may begin in an opened folder, or go on there; whether it has come to its end already.

    Raises:
        SettingError: there is a fit, and it is not to be resumed.
        PosteriorError: there is something that no posterior's folder holds.
    """
    if not resume and holds_fit(folder):
        raise SettingError(
            f"'{folder}' holds a fit already: give resume=True (in a shell --resume) to go on with it, or choose "
            "another folder (output_dir, in a shell --output)."
        )
    found = record_at(folder)
    if found is not None and found.finished:
        return True
    _check_free(folder / POSTERIOR)
    return False


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint from which a fit goes on to the same result; None if none was written to its end.

    Raises:
        PosteriorError: checkpoints were, but every one lacks something now.
    """
    lacking, found = [], (folder / CHECKPOINTS).glob("checkpoint-*[0-9]")
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if not (path / STATE).is_file():
            continue
        parts = {name: [path / name] for name in ("model.safetensors", "optimizer.pt", "scheduler.pt")}
        parts[GENERATORS] = list(path.glob(GENERATORS))
        lacks = [name for name, each in parts.items() if not (each and all(map(_whole, each)))]
        if not lacks:
            return path
        lacking.append(f"'{path}' lacks a whole {', '.join(lacks)}")
    if lacking:
        raise PosteriorError(f"There is no checkpoint to go on from to the same result: {'; '.join(lacking)}.")
    return None


def _whole(part: Path) -> bool:
    """Whether a part of a checkpoint is there to its end."""
    from safetensors import SafetensorError, safe_open

    if part.suffix != ".safetensors":
        return is_zipfile(part)
    try:
        with safe_open(str(part), framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _settle(folder: Path) -> None:
    """End or undo what was begun in a run's folder; for who holds its lock alone."""
    for path in (*_own(folder), *(folder / CHECKPOINTS).rglob("*"), folder / NEXT, folder / COMPLETE):
        if path.is_symlink():
            raise SettingError(f"'{path}' is a symbolic link, through which nothing is written: remove it.")
    for name in (CONFIG, POSTERIOR):
        files.settle(folder / name)
    successor, complete = folder / NEXT, folder / COMPLETE
    if successor.exists() and not complete.exists():
        if not holds_fit(successor):
            files.remove(successor)
        elif (record := record_at(successor)) and record.finished:
            names = {path.name for path in _own(successor)}
            for path in _own(folder):
                if path.name not in names:
                    files.remove(path)
            os.rename(successor, complete)
    if complete.exists():
        for path in _own(complete):
            target = folder / path.name
            if path.name != POSTERIOR:  # a posterior is replaced as a whole
                files.remove(target)
            files.move(path, target)
        files.remove(complete)


def _own(folder: Path) -> list[Path]:
    """What a run writes into its folder, as far as it is there."""
    names = (CONFIG, CHECKPOINTS, POSTERIOR)
    chains = [path for path in folder.glob(f"{CHAIN}*") if re.fullmatch(rf"{CHAIN}\d+", path.name)]
    return [*chains, *(folder / name for name in names if (folder / name).exists() or (folder / name).is_symlink())]
