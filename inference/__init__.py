"""Inference backends over one program, installed as ``bayeslora.inference``.

`fit` looks a backend up by name, builds its settings and runs it; `load` brings a saved posterior back.
"""

from __future__ import annotations

if __name__ != "bayeslora.inference":
    raise ImportError(f"import bayeslora.inference, not {__name__}: a second copy would break the registry")

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.data import digest
from bayeslora.errors import SettingError, unknown
from bayeslora.inference.base import Backend, Run, is_main_process, labelled
from bayeslora.inference.folders import check_new, check_same
from bayeslora.inference.loading import load
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.settings import build, check_seed

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks import Split

__all__ = ["BACKENDS", "Backend", "Run", "backend", "fit", "load"]

#: Name of each backend and where its class is; the module is imported when it is asked for.
BACKENDS: dict[str, str] = {
    "laplace": "bayeslora.inference.laplace:Laplace",
    "map": "bayeslora.inference.map:MAP",
    "mle": "bayeslora.inference.map:MLE",
    "svi": "bayeslora.inference.svi:SVI",
}


def backend(name: str) -> type[Backend]:
    """The backend's class: a frozen dataclass whose fields are its settings.

    Raises:
        SettingError: no backend has that name.
    """
    if name not in BACKENDS:
        raise SettingError(unknown("backend", name, BACKENDS))
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(import_module(module), attribute)
    return found


def fit(
    program: Program,
    data: Split | Dataset,
    backend: str = "svi",
    *,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    heldout: Split | Dataset | None = None,
    **settings: Any,
) -> Posterior:
    """Infer the posterior of a program's weights given data.

    Args:
        program: prior, network and likelihood.
        data: training rows of a task, or a tokenised data set with ``labels``.
        backend: name of the inference algorithm; see `BACKENDS`.
        seed: of everything random in the fit, from 0 to 2^32 - 1; the global generators are left as they were.
        output_dir: new folder for checkpoints and the posterior; without it, nothing is written.
        resume: go on from the last checkpoint in ``output_dir``, to the same result as without the stop.
        progress: show a bar.
        heldout: rows that the weights are not trained on, for a backend that chooses something on such rows.
        **settings: of the backend, by name.

    Returns:
        The posterior, saved in ``output_dir`` if that was given.

    Raises:
        SettingError: unknown backend or setting, or a value that it cannot take; ``output_dir`` holds a fit already
            or, with ``resume``, one of another program, other data, another seed or setting.
        DataError: no rows, or labels that the likelihood cannot have.
        TrainingError: the loss became infinite or not a number.
    """
    if resume and output_dir is None:
        raise SettingError("resume=True needs the output_dir of the fit that was stopped.")
    check_seed(seed)
    algorithm = build(_class(backend), settings)
    folder = None if output_dir is None else Path(output_dir)
    task = dict(getattr(data, "arguments", {})) or None  # what is tokenised already does not say
    rows = labelled(program, data)
    run = Run(
        seed=seed,
        output_dir=folder,
        resume=resume,
        progress=progress,
        task=task,
        data=digest(rows),
        heldout=None if heldout is None else labelled(program, heldout),
    )
    if folder is not None and resume:
        record = {
            "backend": backend,
            "settings": asdict(algorithm),
            "seed": seed,
            "n_data": len(rows),
            "data": run.data,
        }
        check_same(folder, record, program)
    elif folder is not None:
        check_new(folder)
    posterior = algorithm.fit(program, rows, run)
    if folder is not None and is_main_process():
        posterior.save(folder)
    return posterior


_class = backend
