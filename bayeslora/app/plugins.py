"""What a user adds to the library: each class goes where those of its sort are looked up."""

from __future__ import annotations

from typing import Any, TypeVar

from bayeslora.errors import SettingError
from bayeslora.registry import Registry

__all__ = ["register"]

T = TypeVar("T")


def register(thing: T) -> T:
    """Let something of a user's own go by its name, in Python and in the shell (``--plugin FILE``).

    Args:
        thing: a class that extends `WeightModel`, `Guide`, `Observation` (each with a ``name``) or `Posterior` (with a
            ``kind``); a backend: a dataclass with ``name``, ``paper`` and ``fit``; a `Preset`; or a `TaskSpec`.

    Returns:
        The same, so that it decorates a class.

    Raises:
        SettingError: it is none of these, or its name is taken.
    """
    registry, name = _place(thing)
    if not isinstance(name, str) or not name:
        raise SettingError(f"{thing!r} has no name: a {registry.sort} needs one that is text.")
    registry.add(name, thing)
    return thing


def _place(thing: Any) -> tuple[Registry[Any], Any]:
    from bayeslora.inference import BACKENDS, POSTERIORS
    from bayeslora.inference.presets import PRESETS, Preset
    from bayeslora.models import MODELS, WeightModel
    from bayeslora.models.guides import GUIDES, Guide
    from bayeslora.observations import OBSERVATIONS, Observation
    from bayeslora.posterior import Posterior
    from bayeslora.tasks import TaskSpec
    from bayeslora.tasks.spec import TASKS

    if isinstance(thing, TaskSpec):
        return TASKS, thing.name
    if isinstance(thing, Preset):
        return PRESETS, thing.name
    if isinstance(thing, type):
        if issubclass(thing, Posterior):
            return POSTERIORS, getattr(thing, "kind", None)
        sorts: list[tuple[type, Registry[Any]]] = [
            (WeightModel, MODELS), (Guide, GUIDES), (Observation, OBSERVATIONS)
        ]  # fmt: skip
        for base, registry in sorts:
            if issubclass(thing, base):
                return registry, getattr(thing, "name", None)
        if callable(getattr(thing, "fit", None)) and hasattr(thing, "paper"):
            return BACKENDS, getattr(thing, "name", None)
    raise SettingError(
        f"Nothing of its sort can be registered: {thing!r}. Expected a class that extends WeightModel, Guide, "
        "Observation or Posterior, a backend with name, paper and fit, a Preset, or a TaskSpec."
    )
