"""One run from its configuration: task, program, fit, and the folder that holds all of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bayeslora import files
from bayeslora.app.config import RunConfig, differences, model_of, read_config, resolve
from bayeslora.errors import PosteriorError, SettingError, TaskError
from bayeslora.posterior import RECORD, TENSORS, check_foreign, read_record

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior
    from bayeslora.predict.metrics import Metrics
    from bayeslora.predict.prediction import Prediction
    from bayeslora.program import Program
    from bayeslora.tasks import Split, Task

__all__ = [
    "build_program",
    "check_same",
    "fit",
    "is_finished",
    "measure",
    "remove",
    "saved_config",
    "saved_task",
    "task_of",
    "true_probabilities",
    "write_text",
]

CONFIG, METRICS, PREDICTIVE = "config.yaml", "metrics.json", "predictive.safetensors"
#: Where a run is while the one that replaces it begins.
ASIDE = ".replaced"
HEADER = "# The configuration of this run, written by bayeslora.\n"


def task_of(config: RunConfig) -> Task:
    """Load the task of a run.

    Raises:
        TaskError, DataError: as in `bayeslora.load_task`.
    """
    from bayeslora.tasks import load_task

    return load_task(
        config.task,
        config.data_dir,
        train_size=config.train_size,
        heldout_size=config.heldout_size,
        seed=config.seed,
        **config.task_settings,
    )


def build_program(config: RunConfig, task: Task) -> Program:
    """Load the base network of a run and declare the program over it.

    Raises:
        AdapterError: the LoRA layers do not fit the network.
    """
    from bayeslora.models import build
    from bayeslora.program import Program

    model, settings = model_of(config)
    return Program.from_pretrained(
        config.base,
        task,
        lora=config.lora.to_peft(),
        adapter=config.adapter,
        model=build(model, **settings),
        seed=config.seed,
        max_length=config.max_length,
    )


def fit(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Posterior:
    """Fit what a configuration describes into a folder, which gets the configuration first and the posterior last.

    Args:
        config: of the run.
        folder: of the run.
        resume: go on where a run of the same configuration in this folder was stopped; what is finished is loaded.
        overwrite: remove a run that is in the folder; it comes back if the new one fails before it leaves anything.
        progress: show bars.

    Raises:
        SettingError: the configuration is wrong; the folder holds a run already, with ``resume`` that of another
            configuration, or a ``config.yaml`` that is no run's.
        PosteriorError: the folder holds an adapter that is no run's.
    """
    from bayeslora import inference
    from bayeslora.inference.folders import has_checkpoint, holds_fit

    if resume and overwrite:
        raise SettingError("A run is either resumed or overwritten: give one of both.")
    config, folder = resolve(config), Path(folder)
    if holds_fit(folder) and not overwrite:
        if not resume:
            raise SettingError(f"'{folder}' holds a run already: resume it, overwrite it, or choose another folder.")
        check_same(folder, config)
        if is_finished(folder):
            return inference.load(folder)
    check_foreign(folder)
    if (folder / CONFIG).exists() and not (folder / CONFIG).read_text(encoding="utf-8").startswith(HEADER):
        raise SettingError(f"'{folder / CONFIG}' is no run's and would be replaced: choose another folder.")
    task = task_of(config)
    program = build_program(config, task)
    folder.mkdir(parents=True, exist_ok=True)
    with _set_aside(folder) if overwrite else nullcontext():
        write_text(folder / CONFIG, HEADER + config.to_yaml())
        return inference.fit(
            program,
            task.train,
            config.backend,
            seed=config.seed,
            output_dir=folder,
            resume=resume and has_checkpoint(folder),  # it may have been stopped before its first one
            progress=progress,
            heldout=task.heldout,
            chains=config.chains,
            **config.settings,
        )


def check_same(folder: Path, config: RunConfig) -> None:
    """Make sure that the run in a folder has this resolved configuration.

    Raises:
        SettingError: it differs; the message says in what.
    """
    changed = differences(saved_config(folder), config)
    if changed:
        raise SettingError(
            f"'{folder}' holds a run with other settings (there and now): {'; '.join(changed)}. Choose another folder."
        )


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a posterior whose fit came to its end; one that was stopped has a record, too."""
    try:
        described = read_record(folder)
    except PosteriorError:
        return False
    return bool(described) and bool(described["record"]["finished"])


def saved_config(folder: Path) -> RunConfig:
    """Configuration of the run in a folder.

    Raises:
        SettingError: there is none.
    """
    if not (folder / CONFIG).is_file():
        raise SettingError(f"There is no run in '{folder}': expected a file {CONFIG}.")
    return read_config(folder / CONFIG)


@contextmanager
def _set_aside(folder: Path) -> Iterator[None]:
    """Make room for a new run; the old one comes back if the block fails and has left nothing of worth."""
    from bayeslora.inference.folders import holds_fit

    aside = folder / ASIDE
    if not holds_fit(folder):  # a process was killed here
        _move(aside, folder)
    _move(folder, aside)
    try:
        yield
    except BaseException:
        if not holds_fit(folder):
            remove(folder)
            _move(aside, folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Move what runs write; a name that is in both folders is the source's afterwards."""
    for path in _written(source):
        target.mkdir(exist_ok=True)
        if (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        path.replace(target / path.name)


def remove(folder: Path) -> None:
    """Remove what runs and comparisons write into the folder of a run, and nothing else."""
    for path in _written(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written(folder: Path) -> list[Path]:
    """Files and folders of a run; what shows that there is one comes last."""
    from bayeslora.inference.folders import CHAIN, CHECKPOINTS, holds_fit

    adapter = ("adapter_config.json", "adapter_model.safetensors")
    names = (*adapter, CHECKPOINTS, METRICS, PREDICTIVE, TENSORS, RECORD, CONFIG)
    chains = [path for path in folder.glob(f"{CHAIN}*") if holds_fit(path)]
    return [*chains, *(folder / name for name in names if (folder / name).exists())]


def saved_task(
    posterior: Posterior,
    name: str | None = None,
    data_dir: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Task:
    """The task to evaluate a posterior on.

    Args:
        posterior: fitted with an encoder.
        name: of another task with the same classes, or any multiple-choice task for a posterior of one; the posterior's
            own by default.
        data_dir: folder with the task's files, if they are not where they were.
        settings: further arguments of `bayeslora.load_task`, with ``name``.

    Raises:
        TaskError: the posterior does not know its task, or the other task has other classes.
    """
    from bayeslora.tasks import load_task, reload_task

    encoder = posterior.program.encoder
    if encoder is None or (name is None and posterior.record.task is None):
        raise TaskError("The posterior was fitted without a task by name: say which one to evaluate on.")
    spec = encoder.spec
    if name is None:
        return reload_task({"spec": spec.to_dict(), "arguments": posterior.record.task}, data_dir)
    task = load_task(name, data_dir, **(settings or {}))
    if task.spec.kind == spec.kind == "multiple-choice":
        return task
    if task.spec.kind != spec.kind or task.spec.labels != spec.labels:
        raise TaskError(
            f"Task '{task.spec.name}' is {task.spec.kind} into ({', '.join(task.spec.labels)}), but the posterior was "
            f"fitted to {spec.kind} into ({', '.join(spec.labels)}). If the classes are the same in this order, say so "
            f"by their names: task.labels={','.join(spec.labels)}."
        )
    return task


def measure(prediction: Prediction, split: Split, seed: int = 0) -> Metrics:
    """Metrics of a prediction, and its distance from the true probabilities where the rows say them."""
    from bayeslora.predict.metrics import Metrics, against_truth
    from bayeslora.predict.prediction import ClassPrediction

    found, truth = prediction.metrics(seed=seed), true_probabilities(split)
    if truth is None or not isinstance(prediction, ClassPrediction):
        return found
    distances = against_truth(prediction.log_probabilities, truth, seed=seed)
    return Metrics({**found, **distances}, found.n, found.draws, found.method)


def true_probabilities(split: Split) -> NDArray[np.float64] | None:
    """True class probabilities (rows, classes), if the rows say them in a column "probabilities"."""
    if "probabilities" not in split.dataset.column_names:
        return None
    return np.asarray(split.dataset["probabilities"], dtype=np.float64)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with files.staged(path.parent) as stage:
        (stage / path.name).write_text(text, encoding="utf-8")
