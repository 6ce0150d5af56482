"""One verb for every backend: `fit` looks it up by name, builds its settings, runs it and saves what it gives."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora import store
from bayeslora.errors import SettingError
from bayeslora.inference import BACKENDS
from bayeslora.inference.aside import set_aside
from bayeslora.inference.base import Backend, Run, labelled
from bayeslora.inference.loading import check_same, load
from bayeslora.inference.mixture import mixture_of
from bayeslora.inference.softening import soften_whole
from bayeslora.inference.training.process import cost_since, reset_peak
from bayeslora.observations import digest
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.settings import Seed, coerce

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from bayeslora.tasks import Split

__all__ = ["fit", "fitted_in_folder", "independent", "starts"]


def fit(
    program: Program,
    data: Split | Dataset,
    backend: str | Backend = "svi",
    *,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    heldout: Split | Dataset | None = None,
    start: Posterior | None = None,
    chains: int = 1,
    **settings: Any,
) -> Posterior:
    """Infer the posterior of a program's weights given data.

    Args:
        program: prior, network and observation.
        data: training rows of a task, or a tokenised data set with ``labels``.
        backend: name of the inference algorithm (see `BACKENDS`), or the algorithm with its settings, such as
            ``SVI(epochs=3)``.
        seed: of everything random in the fit, from 0 to 2^32 - 1; the global generators are left as they were.
        output_dir: new folder for checkpoints and the posterior; without it, nothing is written.
        resume: go on from the last checkpoint in ``output_dir``, to the same result as without the stop.
        progress: show a bar.
        heldout: rows that the weights are not trained on, for a backend that chooses something on such rows; without
            it, one that trains the weights itself may set some of the training rows aside (see `Laplace`). Where
            nothing is chosen on them they change nothing, so that all backends can be given the same arguments.
        start: posterior of one fit, from whose mean learning starts, or around which `laplace` lays its Gaussian; the
            program's initial weights, if left out. The prior stays where it is.
        chains: number of independent fits, with the seeds from ``seed`` on; the posterior is their mixture. Each has
            its own order of the rows, its own noise and, but for the first, LoRA matrices of its own, drawn as PEFT
            draws them where ``init_lora_weights`` is true or "gaussian" (and a head, where the base network has none).
            Fits that start from ``start``, or of a program around a trained adapter, all start from those weights.
            They are kept in folders ``chain-0``, ... of ``output_dir``.
        **settings: of the backend, by name.

    Returns:
        The posterior, saved in ``output_dir`` if that was given.

    Raises:
        SettingError: ``program`` is none; unknown backend or setting, or a value that it cannot take; ``start`` is of
            several fits; ``output_dir`` holds a fit already or, with ``resume``, one of another program, other data,
            another seed or setting; or another process is writing there.
        DataError: no rows, or labels that cannot be observed.
        AdapterError: ``start`` is a posterior of another network.
        TrainingError: the loss became infinite or not a number.
    """
    if not isinstance(program, Program):
        raise SettingError(
            f"program is {program!r}, expected a Program, such as bl.Program.from_pretrained('demo', task) makes."
        )
    if resume and output_dir is None:
        raise SettingError("resume=True needs the output_dir of the fit that was stopped.")
    seed, chains = coerce(seed, Seed, "seed"), coerce(chains, int, "chains")
    if chains < 1:
        raise SettingError(f"chains must be at least 1, found {chains}.")
    coerce(seed + chains - 1, Seed, "seed")
    algorithm = _algorithm(backend, settings)
    folder = None if output_dir is None else Path(output_dir)
    task = dict(getattr(data, "arguments", {})) or None  # what is tokenised already does not say
    rows = labelled(program, data)
    run = Run(
        seed=seed,
        output_dir=folder,
        resume=resume,
        progress=progress,
        task=task,
        heldout=None if heldout is None else labelled(program, heldout, "choose on"),
        start=None if start is None else _mean(start, program),
    )
    rows, run = set_aside(algorithm, program, rows, run)
    return fitted_in_folder(program, rows, algorithm, replace(run, data=digest(rows)), chains)


def _algorithm(backend: str | Backend, settings: dict[str, Any]) -> Backend:
    if isinstance(backend, str):
        algorithm: Backend = BACKENDS.build(backend, settings)
        return algorithm
    if isinstance(backend, type) or not hasattr(backend, "fit"):
        raise SettingError(f"backend is {backend!r}, expected a name, or an algorithm such as SVI(epochs=3).")
    if settings:
        names = ", ".join(settings)
        raise SettingError(f"{backend} has its settings already: give {names} to it, or the name '{backend.name}'.")
    return backend


def starts(program: Program, runs: Iterable[Run]) -> Iterator[Program]:
    """The programs of independent fits: the first with the initial weights that it has, each other with its own."""
    for number, run in enumerate(runs):
        alike = number == 0 or run.start is not None
        yield program if alike else program.redrawn(run.seed)


def independent(program: Program, rows: Dataset, algorithm: Backend, runs: Sequence[Run]) -> Iterator[Posterior]:
    """Independent fits, one after the other."""
    for member, run in zip(starts(program, runs), runs, strict=True):
        yield fitted_in_folder(member, rows, algorithm, run)


def _mean(start: Posterior, program: Program) -> dict[str, Tensor]:
    """The weights to start from.

    Raises:
        SettingError: it is no posterior, or that of several fits.
        AdapterError: they are not of this program's network.
    """
    if not isinstance(start, Posterior):
        raise SettingError(f"start is {start!r}, expected a posterior, such as load(path) gives.")
    if len(start.chains) > 1:
        raise SettingError(
            f"start is of {len(start.chains)} independent fits, and the average of their weights is near none of them: "
            "give one, such as start.chains[0]."
        )
    mean = start.mean()
    program.weights.check(mean)
    return mean


def fitted_in_folder(program: Program, rows: Dataset, algorithm: Backend, run: Run, chains: int = 1) -> Posterior:
    """What a fit gives, saved in the run's folder; a finished one that is to be resumed is read from there."""
    folder = run.output_dir
    if folder is None:
        return _fitted(program, rows, algorithm, run, chains)
    with store.opened(folder):
        ended = store.begin(folder, run.resume)
        if run.resume:
            begun = {"backend": algorithm.name, "settings": asdict(algorithm), "seed": run.seed, "chains": chains}
            begun |= {"n_data": len(rows), "data": run.data, "start": run.started, "tuned_on": run.tuned_on}
            check_same(folder, begun, program)
            if ended:
                return load(folder, program=program)
        posterior = _fitted(program, rows, algorithm, run, chains)
        posterior.save(folder / store.POSTERIOR)
        return posterior


def _fitted(program: Program, rows: Dataset, algorithm: Backend, run: Run, chains: int) -> Posterior:
    if chains == 1:
        return _alone(program, rows, algorithm, run)
    whole = mixture_of(independent(program, rows, algorithm, [run.chain(number) for number in range(chains)]))
    soften_whole(whole, run)
    return whole


def _alone(program: Program, rows: Dataset, algorithm: Backend, run: Run) -> Posterior:
    """What a backend's own function gives: it is finished, with what it took."""
    reset_peak()
    begun = time.monotonic()
    posterior = algorithm.fit(program, rows, run)
    cost = cost_since(program, begun, before=posterior.record.cost)
    posterior.record = replace(posterior.record, cost=cost, finished=True)
    return posterior
