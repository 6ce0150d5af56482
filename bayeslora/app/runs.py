"""One run from its configuration: task, program, fit, and the folder that holds all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora import files, store
from bayeslora.app.config import RunConfig, read_config
from bayeslora.app.resolving import differences, resolve
from bayeslora.app.seen import warn_of_seen
from bayeslora.app.terminal import say
from bayeslora.errors import SettingError, TaskError
from bayeslora.identity import differing
from bayeslora.record import RECORD
from bayeslora.store import CONFIG

if TYPE_CHECKING:
    from bayeslora.observations import Encoder
    from bayeslora.posterior import Posterior
    from bayeslora.program import Program
    from bayeslora.tasks import Split, Task

__all__ = [
    "as_begun",
    "build_program",
    "check_same",
    "fit",
    "opened",
    "saved_config",
    "saved_task",
    "task_of",
]

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
    """Load the base network of a run, whose configuration is resolved, and declare the program over it.

    Raises:
        AdapterError: the LoRA layers do not fit the network.
    """
    from bayeslora.models import MODELS
    from bayeslora.networks import NetworkSettings
    from bayeslora.program import Program

    assert config.model is not None
    return Program.from_pretrained(
        NetworkSettings(config.base, **config.network),
        task,
        lora=config.lora,
        adapter=config.adapter,
        model=MODELS.build(config.model, config.model_settings),
        observation=config.observation,
        observation_settings=config.observation_settings,
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
    start: Posterior | None = None,
    told: Callable[..., None] = say,
) -> Posterior:
    """Fit what a configuration describes into a folder, which gets the configuration first and the posterior last.

    Args:
        config: of the run.
        folder: of the run.
        resume: go on where a run of the same configuration in this folder was stopped; what is finished is loaded.
        overwrite: replace a run that is in the folder; it stays until the new one has come to its end.
        progress: show bars, and what was taken for what, cut, or finished before.
        start: posterior of the same network that the fit starts from or is laid around; see `bayeslora.fit`.
        told: what says, with ``progress``, all but the bars.

    Raises:
        SettingError: the configuration is wrong; the folder holds a run already, with ``resume`` that of another
            configuration, or a ``config.yaml`` that is no run's; or another process is writing there.
        PosteriorError: the folder holds a posterior that is damaged.
    """
    from bayeslora import inference

    if resume and overwrite:
        raise SettingError("A run is either resumed or overwritten: give only one of the two.")
    config, folder = resolve(config), Path(folder)
    with store.opened(folder):
        _check(folder, config, resume, overwrite)
        if resume and (record := store.record_at(store.current(folder))) and record.finished:
            if progress:
                told(f"The run in '{folder}' was finished before: nothing was left to do.")
            return inference.load(folder)
        task = task_of(config)
        if progress:
            told(*task.notes)
        program = build_program(config, task)
        if progress:
            told(*_chosen(config, program, task))
        warn_of_seen(config, task)
        assert config.backend is not None
        with store.place(folder, anew=overwrite) as place:
            if store.is_main_process():
                files.write_text(place / CONFIG, HEADER + config.to_yaml())
            return inference.fit(
                program,
                task.train,
                config.backend,
                seed=config.seed,
                output_dir=place,
                resume=resume and store.holds_fit(place),  # it may have been stopped before its first checkpoint
                progress=progress,
                heldout=task.heldout,
                start=start,
                chains=config.chains,
                **config.settings,
            )


def _chosen(config: RunConfig, program: Program, task: Task) -> list[str]:
    """Which observation and length were chosen, where a causal language model has several; else what is cut."""
    from bayeslora.observations import OBSERVATIONS

    name, said = program.observation.name, []
    if not program.observation.causal:
        return [] if program.encoder is None else _cut(program.encoder, task.train)
    if config.observation is None:
        others = [each for each in OBSERVATIONS if task.spec.kind in OBSERVATIONS[each].kinds and each != name]
        choice = f"; --observation chooses another: {', '.join(others)}" if others else ""
        said.append(f"The observation is '{name}'{choice}.")
    if config.max_length is None and program.encoder is not None:
        said.append(f"Rows have up to {program.encoder.max_length} tokens; --set max_length= says otherwise.")
    return said


def _cut(encoder: Encoder, rows: Split) -> list[str]:
    """How many rows are longer than what is read of them, if any are."""
    count = encoder.cut(rows)
    if not count:
        return []
    remedy = "the network reads no more" if encoder.max_length == encoder.most else "--set max_length= says otherwise"
    return [f"{count:,} of {len(rows):,} training rows are cut to {encoder.max_length} tokens; {remedy}."]


def _check(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Make sure that a run may begin, go on or be replaced in a folder."""
    if store.holds_fit(store.current(folder)) and not overwrite:
        if not resume:
            raise SettingError(f"'{folder}' holds a run already: resume it, overwrite it, or choose another folder.")
        check_same(folder, config)
    path = folder / CONFIG
    if path.exists() and not path.read_text(encoding="utf-8").startswith(HEADER):
        raise SettingError(f"'{path}' is no run's and would be replaced: choose another folder.")


def check_same(folder: Path, config: RunConfig) -> None:
    """Make sure that the run in a folder has this resolved configuration, and that its posterior is of it.

    Raises:
        SettingError: it differs; the message says in what.
    """
    changed = differences(saved_config(folder), config)
    record = store.record_at(store.current(folder))
    if record is not None:
        names = ("backend", "seed", "chains")
        changed += differing(
            {f"{name} of {RECORD}": getattr(record, name) for name in names},
            {f"{name} of {RECORD}": getattr(config, name) for name in names},
        )
    if changed:
        raise SettingError(
            f"'{folder}' holds a run with other settings (there and now): {'; '.join(changed)}. Choose another folder."
        )


def saved_config(folder: Path) -> RunConfig:
    """Configuration of the run in a folder, or of that which was stopped while it was to replace it.

    Raises:
        SettingError: there is none.
    """
    path = store.current(folder) / CONFIG
    if not path.is_file():
        raise SettingError(f"There is no run in '{folder}': expected a file {CONFIG}.")
    return read_config(path)


def as_begun(folder: Path, flags: Mapping[str, Any], lora: str | None) -> dict[str, Any]:
    """The configuration of the run in a folder, over which flags go.

    Raises:
        SettingError: there is none, or it is of another backend, preset or way to fine-tune, whose settings are others.
    """
    saved = saved_config(folder).to_dict()
    was = {"backend": saved["backend"], "preset": saved["preset"], "lora": saved["lora"].get("method")}
    for name, asked in {"backend": flags["backend"], "preset": flags["preset"], "lora": lora}.items():
        if asked not in (None, was[name]):
            raise SettingError(
                f"The run in '{folder}' was begun with {name} {was[name] or 'unsaid'}, and --{name} says {asked}: "
                "leave it out, or choose another --output."
            )
    return saved | {name: each for name, each in flags.items() if each is not None}


def opened(folder: Path, base: str | None = None) -> Posterior:
    """The posterior of the run in a folder; that its fit was stopped is said.

    Args:
        folder: of the run.
        base: where the base network is now, if it has moved.
    """
    from bayeslora.inference import load

    posterior = load(folder, base)
    if not posterior.record.finished:
        say(f"The fit in {folder} was stopped: what is shown is how far it had come.")
    return posterior


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
    from bayeslora.tasks import check_compatible, load_task, reload_task

    encoder = posterior.program.encoder
    if encoder is None or (name is None and posterior.record.task is None):
        raise TaskError("The posterior was fitted without a task by name: say which one to evaluate on.")
    spec = encoder.spec
    if name is None:
        return reload_task({"spec": spec.to_dict(), "arguments": posterior.record.task}, data_dir)
    task = load_task(name, data_dir, **(settings or {}))
    check_compatible(spec, task.spec)
    return task
