"""Bayesian low-rank adaptation of Hugging Face transformers as a probabilistic program."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayeslora import diagnostics, inference, models
    from bayeslora.app.comparison import compare
    from bayeslora.app.config import RunConfig
    from bayeslora.app.plugins import register
    from bayeslora.inference import fit, load
    from bayeslora.networks import NetworkSettings
    from bayeslora.posterior import Posterior
    from bayeslora.predict.prediction import Prediction
    from bayeslora.program import Program
    from bayeslora.tasks import Task, load_task

__version__ = "0.1.0"

#: Public names and where they are; each is imported when it is first used, so that importing the package is quick.
_HOMES = {
    "NetworkSettings": "bayeslora.networks",
    "Posterior": "bayeslora.posterior",
    "Prediction": "bayeslora.predict.prediction",
    "Program": "bayeslora.program",
    "RunConfig": "bayeslora.app.config",
    "Task": "bayeslora.tasks",
    "compare": "bayeslora.app.comparison",
    "diagnostics": "",
    "fit": "bayeslora.inference",
    "inference": "",
    "load": "bayeslora.inference",
    "load_task": "bayeslora.tasks",
    "models": "",
    "register": "bayeslora.app.plugins",
}

__all__ = [
    "NetworkSettings",
    "Posterior",
    "Prediction",
    "Program",
    "RunConfig",
    "Task",
    "compare",
    "diagnostics",
    "fit",
    "inference",
    "load",
    "load_task",
    "models",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bayeslora' has no attribute '{name}'")
    home = _HOMES[name]
    return getattr(import_module(home), name) if home else import_module(f"bayeslora.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
