"""The file of a study: what it holds, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from bayeslora.app.config import RunConfig
from bayeslora.errors import SettingError, unknown
from bayeslora.settings import Count, Seed, Settings, build

__all__ = ["EvaluationSettings", "StudyFile", "Tuning"]

#: What an entry says beside fields of `RunConfig`.
OWN = {
    "tasks": {"split", "rows", "shift"}, "bases": set(), "methods": {"start", "predict", "draws", "tuning"},
    "common": set(),
}  # fmt: skip
#: Fields of `RunConfig` that no entry says: seeds are the study's, and folders its cells'.
OF_STUDY = {"seed", "output"}


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """How every method is evaluated.

    Attributes:
        split: rows to predict; a task may name its own.
        draws: number of weight draws; a method may have its own.
        rows: how many rows of a split at most, the same for all methods; all, if left out. A task may have its own.
    """

    name: ClassVar[str] = "evaluation"

    split: str = "validation"
    draws: Count = 10
    rows: Count | None = None


@dataclass(frozen=True)
class Tuning(Settings):
    """How each method comes to settings of its own: by the NLL on the rows that are held out, with the first seed.

    Attributes:
        values: candidates by the name of the setting; all their combinations are tried.
        trials: combinations that each method may try on a task and base, the same number for all; of more than that,
            so many are drawn.
        seed: of that choice.
    """

    name: ClassVar[str] = "tuning"

    values: dict[str, list[Any]] = field(default_factory=dict)
    trials: Count = 6
    seed: Seed = 0


@dataclass(frozen=True)
class StudyFile(Settings):
    """What a study compares.

    Entries are fields of `RunConfig`, later ones over earlier ones: ``common``, base, task, method. Settings of a
    backend or model that do not stand at a method itself go to all methods that have them.

    Attributes:
        tasks: by their names in the table: ``task`` (that name, if left out), ``split``, ``rows``, and ``shift``,
            further rows to predict by name: each with ``split`` and, for those of another task, ``task``, ``data_dir``
            and ``task_settings``.
        bases: base networks by their names in the table: a folder or hub name, or fields such as ``network``.
        methods: by their names in the table. One that names no ``backend`` or ``preset`` is that of its own name.
            ``start`` is the method whose posterior it is laid around, with the same task, base, seed and settings;
            ``predict`` the way to predict, the posterior's own if left out; ``tuning`` its own candidates.
        seeds: of the runs.
        common: fields of every run.
        grid: values by the name of a setting; every method is run with all combinations.
        tuning: how methods come to settings of their own; the table of these stands beside that of all at the same.
        evaluation: how methods are evaluated.
        reference: method that the others are compared with, the first if left out.
    """

    name: ClassVar[str] = "a study"

    tasks: dict[str, dict[str, Any]]
    bases: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    common: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    tuning: Tuning | None = None
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    reference: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudyFile:
        """A study from plain data, as YAML gives it; entries may be a list of names where the names say all.

        Raises:
            SettingError: something is missing, unknown or of another type.
        """
        given = dict(values)
        for sort in ("tasks", "bases", "methods"):
            given[sort] = _entries(sort, given.get(sort))
        given["tasks"] = {name: _with_rows(entry) for name, entry in given["tasks"].items()}
        found = build(cls, given)
        found._check()
        return found

    def _check(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise SettingError(f"A seed is given twice: {', '.join(map(str, self.seeds))}.")
        named: list[tuple[str, Mapping[str, Mapping[str, Any]]]] = [
            ("tasks", self.tasks), ("bases", self.bases), ("methods", self.methods), ("common", {"common": self.common})
        ]  # fmt: skip
        for sort, entries in named:
            for name, entry in entries.items():
                _check_entry(sort, name, entry)
        for name, method in self.methods.items():
            self._check_start(name, method)
        if self.reference is not None and self.reference not in self.methods:
            raise SettingError(unknown("reference of a study", self.reference, self.methods))
        if self.grid and self.tuning:
            raise SettingError("A study has either a grid, which all methods run through, or tuning: give one of both.")
        for key, candidates in {**self.grid, **(self.tuning.values if self.tuning else {})}.items():
            if not candidates:
                raise SettingError(f"'{key}' of a study has no values to run with.")
        if self.tuning and not self.tuning.values:
            raise SettingError("tuning needs values to choose among, such as {learning_rate: [5.0e-4, 2.0e-3]}.")

    def _check_start(self, name: str, method: Mapping[str, Any]) -> None:
        seen = [name]
        while (start := method.get("start")) is not None:
            if start not in self.methods:
                raise SettingError(unknown(f"start of method '{seen[-1]}'", str(start), self.methods))
            if start in seen:
                raise SettingError(f"Methods start from each other: {' from '.join([*seen, start])}.")
            seen.append(start)
            method = self.methods[start]


def _entries(sort: str, given: Any) -> dict[str, dict[str, Any]]:
    """Entries by name, from a mapping, a list of names or one name."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Sequence):
        given = {name: {} for name in given}
    if not isinstance(given, Mapping) or not given:
        example = {"tasks": "[demo]", "bases": "[demo]", "methods": "[mle, svi]"}[sort]
        raise SettingError(f"A study needs {sort}, as a list such as {example} or as a mapping; found {given!r}.")
    key = {"tasks": "task", "bases": "base"}.get(sort)
    found: dict[str, dict[str, Any]] = {}
    for name, entry in given.items():
        entry = {} if entry is None else {key: entry} if key and isinstance(entry, str) else entry
        if not isinstance(entry, Mapping):
            raise SettingError(f"'{name}' among the {sort} of a study is {entry!r}, expected key: value lines.")
        default = {key: str(name)} if key else {}
        found[str(name)] = {**default, **entry}
    return found


def _with_rows(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A task whose number of rows, if it has one, is known to be right."""
    own = {name: value for name, value in entry.items() if name == "rows"}
    return {**entry, **{name: getattr(build(EvaluationSettings, own), name) for name in own}}


def _check_entry(sort: str, name: str, entry: Mapping[str, Any]) -> None:
    known = OWN[sort] | set(RunConfig.__dataclass_fields__) - OF_STUDY
    for field_name in entry:
        if field_name not in known:
            raise SettingError(unknown(f"field of '{name}' in a study's {sort}", str(field_name), known))
