"""Bayesian low-rank adaptation of Hugging Face transformers as a probabilistic program."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayeslora import diagnostics, errors, generation, inference, models, observations
    from bayeslora.app.config import RunConfig
    from bayeslora.app.plugins import register
    from bayeslora.app.studies import Study
    from bayeslora.generation import Generation
    from bayeslora.inference import fit, load, preset
    from bayeslora.networks import NetworkSettings
    from bayeslora.posterior import Posterior
    from bayeslora.predict import metrics, plots
    from bayeslora.predict.prediction import ClassPrediction, Prediction
    from bayeslora.predict.sequences import SequencePrediction
    from bayeslora.predict.values import ValuePrediction
    from bayeslora.program import Program
    from bayeslora.tasks import Split, Task, TaskSpec, load_task

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # grouped as the README groups them
    # what is fitted
    "Program",
    "Task",
    "TaskSpec",
    "Split",
    "NetworkSettings",
    "load_task",
    "models",
    "observations",
    # fitting, and what it gives
    "fit",
    "load",
    "preset",
    "inference",
    "Posterior",
    "Prediction",
    "ClassPrediction",
    "ValuePrediction",
    "SequencePrediction",
    "Generation",
    "generation",
    "metrics",
    "plots",
    "diagnostics",
    # runs
    "RunConfig",
    "Study",
    # one's own
    "register",
    "errors",
]

#: Where public names are; each is imported when it is first used, so that importing the package is quick.
_HOMES = {
    "bayeslora": ("diagnostics", "errors", "generation", "inference", "models", "observations"),
    "bayeslora.app.config": ("RunConfig",),
    "bayeslora.generation": ("Generation",),
    "bayeslora.inference": ("fit", "load", "preset"),
    "bayeslora.networks": ("NetworkSettings",),
    "bayeslora.app.plugins": ("register",),
    "bayeslora.app.studies": ("Study",),
    "bayeslora.posterior": ("Posterior",),
    "bayeslora.predict": ("metrics", "plots"),
    "bayeslora.predict.prediction": ("ClassPrediction", "Prediction"),
    "bayeslora.predict.sequences": ("SequencePrediction",),
    "bayeslora.predict.values": ("ValuePrediction",),
    "bayeslora.program": ("Program",),
    "bayeslora.tasks": ("Split", "Task", "TaskSpec", "load_task"),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'bayeslora' has no attribute '{name}'")
    if home in ("bayeslora", "bayeslora.predict"):  # a room, not a name in one
        return import_module(f"{home}.{name}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
