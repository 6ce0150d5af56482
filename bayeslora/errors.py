"""Errors that a user can act on: each message says what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = [
    "AdapterError",
    "BayesLoraError",
    "DataError",
    "PosteriorError",
    "SettingError",
    "TaskError",
    "TrainingError",
    "renamed",
    "unknown",
]

P = ParamSpec("P")
T = TypeVar("T")


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


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that says what an argument is called now, if it is given by its former name.

    Args:
        **names: of today, by the former ones.
    """

    def around(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in names.keys() & kwargs.keys():
                raise SettingError(f"'{name}' of {function.__name__} is now '{names[name]}'.")
            return function(*args, **kwargs)

        return called

    return around
