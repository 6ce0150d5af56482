"""Errors that a user can act on: each message says what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AdapterError",
    "BayesLoraError",
    "DataError",
    "PosteriorError",
    "SettingError",
    "TaskError",
    "TrainingError",
    "unknown",
]


class BayesLoraError(Exception):
    """Base of every error that the library raises on purpose."""


class TaskError(BayesLoraError):
    """A task cannot be found or does not say what is needed."""


class DataError(BayesLoraError):
    """The rows of a data set cannot be used: missing columns, labels out of range, no rows at all."""


class AdapterError(BayesLoraError):
    """A network has no LoRA layers, or a layer that cannot be made stochastic."""


class SettingError(BayesLoraError):
    """A setting has an unknown name or a value that it cannot take."""


class PosteriorError(BayesLoraError):
    """A posterior cannot be saved, loaded or asked for what it does not have."""


class TrainingError(BayesLoraError):
    """Training cannot go on: the loss is not finite, for example."""


def unknown(kind: str, found: str, known: Iterable[str]) -> str:
    """Message for a name that nothing bears, with the nearest right spelling and all the known names."""
    names = sorted(known)
    near = get_close_matches(found.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    hint = next((f" Did you mean '{name}'?" for name in names if near and name.lower() == near[0]), "")
    return f"Unknown {kind} '{found}'.{hint} Known: {', '.join(names)}."
