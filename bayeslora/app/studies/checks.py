"""What entries of a study must not say, each with what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from bayeslora.app.config import OF_ROWS, RunConfig
from bayeslora.app.studies.cells import is_over
from bayeslora.errors import SettingError, unknown
from bayeslora.identity import differing

__all__ = ["HELDOUT", "check_had", "check_heldout", "check_seeds", "check_start", "check_varied"]

#: Split of the rows that trials are judged on.
HELDOUT = "heldout"


def check_heldout(task: str, config: RunConfig, split: str) -> None:
    """Refuse to choose settings where there are no rows to choose by, or where these are what is reported.

    Raises:
        SettingError: there are none, or the split to predict is theirs.
    """
    if split == HELDOUT:
        raise SettingError(
            f"tuning chooses by the rows that are held out, and those of task '{task}' are to be predicted as well: "
            "what they chose looks better on them than it is. Predict another split, such as evaluation: "
            "{split: validation}."
        )
    if not config.heldout_size:
        raise SettingError(
            f"tuning chooses by rows that are held out, and task '{task}' has none: give it a heldout_size, "
            "such as common: {heldout_size: 300}."
        )


def check_seeds(method: str, chains: int, seeds: Sequence[int]) -> None:
    """Refuse runs whose chains have seeds in common: intervals over seeds would be of fits that are counted twice.

    Raises:
        SettingError: there are some.
    """
    ordered = sorted(seeds)
    if any(later - earlier < chains for earlier, later in pairwise(ordered)):
        apart = ", ".join(str(ordered[0] + chains * place) for place in range(len(ordered)))
        raise SettingError(
            f"The {chains} chains of '{method}' have the seeds from its own on, and the study's seeds are "
            f"{', '.join(map(str, seeds))}: runs would share fits. Give seeds that are further apart, "
            f"such as [{apart}], or take the backend 'ensemble', whose members have seeds of their own."
        )


def check_start(method: str, start: str, own: Mapping[str, Any], config: RunConfig, of_start: RunConfig) -> None:
    """Refuse what is said of a method and not heeded, since its start is what it is, or is of other rows.

    What is not over the start's whole posterior begins at its weights, which are then those of one fit.

    Args:
        method: its name.
        start: name of the method that it starts from.
        own: what the study says of the method itself.
        config: of its run.
        of_start: configuration of the run that it starts from.

    Raises:
        SettingError: there is such a thing.
    """
    over = is_over(config)
    if not over and (fits := _fits(of_start)) > 1:
        raise SettingError(
            f"'{method}' starts from '{start}', which is {fits} independent fits, and the average of their weights is "
            "near none of them: start from a method of one fit."
        )
    # What is laid around a start must not be tuned on rows that the start has seen.
    named_fields = own.keys() - {"backend", "preset", "settings"} if over else OF_ROWS
    one = {name: getattr(config, name) for name in sorted(named_fields)}
    other = {name: getattr(of_start, name) for name in one}
    if over:
        said = own.get("settings", {})
        inner = {name: config.settings["of_settings"][name] for name in said.get("of_settings", {})}
        one |= {f"of.{name}": value for name, value in inner.items()}
        other |= {f"of.{name}": of_start.settings.get(name) for name in inner}
        if "of" in said:
            one["of"], other["of"] = config.settings["of"], of_start.backend
    changed = differing(one, other)
    if changed:
        raise SettingError(
            f"'{method}' starts from '{start}', and differs from it in what both must share ({method} and {start}): "
            f"{'; '.join(changed)}. Say it of '{start}' or of both, or leave out the start."
        )


def _fits(config: RunConfig) -> int:
    """How many independent fits a run makes."""
    from bayeslora.inference import BACKENDS
    from bayeslora.inference.base import fits_of

    return config.chains * fits_of(BACKENDS.build(str(config.backend), config.settings))


def check_had(asked: Mapping[str, Collection[str]], has: Mapping[str, Collection[str]]) -> None:
    """Make sure that what goes to those methods that have it is had by one.

    Args:
        asked: names of settings of each part of a run.
        has: names of those that methods have.

    Raises:
        SettingError: none has it.
    """
    for part, names in asked.items():
        for name in sorted(set(names).difference(has[part])):
            raise SettingError(unknown("setting of any method of the study", name, has[part]))


def check_varied(key: str, own: Mapping[str, Any], varied: Mapping[str, Any]) -> None:
    """Refuse a grid over what a method says itself: its value would be none of those that the method runs with.

    Args:
        key: name of what the grid varies.
        own: what the study says of the method itself, fields of a run.
        varied: the same of a point of the grid, of that key alone.

    Raises:
        SettingError: both say it.
    """
    if _both_say(own, varied):
        raise SettingError(f"{key} is its own, and the grid varies it: give only one of the two.")


def _both_say(one: Any, other: Any) -> bool:
    """Whether nested mappings have a value at the same place."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return True
    return any(_both_say(one[name], other[name]) for name in one.keys() & other.keys())
