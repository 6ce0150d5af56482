"""The file of a study: what it holds, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from bayeslora.app.config import RunConfig
from bayeslora.errors import SettingError, unknown
from bayeslora.settings import Count, Seed, Settings, build

__all__ = ["EvaluationSettings", "Shift", "StudyFile", "Tuning"]

#: What an entry says beside fields of `RunConfig`.
OWN = {
    "tasks": {"split", "rows", "shift"}, "bases": set(), "methods": {"start", "predict", "draws", "tuning"},
    "common": set(),
}  # fmt: skip
#: Fields of `RunConfig` that no entry says: seeds are the study's, and folders its cells'.
OF_STUDY = {"seed", "output"}
#: Fields that do not vary from point to point: those, and what makes a method.
FIXED = OF_STUDY | {"backend", "preset"}
#: Fields that are mappings of settings, each of which varies by its own name.
MAPPINGS = ("settings", "model_settings")


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
class Shift(Settings):
    """Further rows that the fits of a task predict.

    Attributes:
        split: rows, by the name of the split.
        task: another task than that of the fits, a name or a path.
        data_dir: folder with that task's files.
        task_settings: further arguments of `bayeslora.load_task` for it.
    """

    name: ClassVar[str] = "a shift"

    split: str = "validation"
    task: str | None = None
    data_dir: str | None = None
    task_settings: dict[str, Any] = field(default_factory=dict)


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
            further rows to predict by name: fields of `Shift`, or the name of another task.
        bases: base networks by their names in the table: a folder or hub name, or fields such as ``network``.
        methods: by their names in the table. One that names no ``backend`` or ``preset`` is that of its own name.
            ``start`` is the method whose posterior it is laid around, with the same task, base, seed and settings;
            ``predict`` the way to predict, the posterior's own if left out; ``tuning`` its own candidates.
        seeds: of the runs.
        common: fields of every run.
        grid: values by the name of a setting, which no method says itself; every method is run with all combinations.
        tuning: how methods come to settings of their own, whose candidates replace what a method says itself; the
            table of these stands beside that of all at the same.
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
        given["tasks"] = {name: _task(name, entry) for name, entry in given["tasks"].items()}
        given["methods"] = {name: _evaluated(entry, "draws") for name, entry in given["methods"].items()}
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
            if method.get("tuning") is not None:
                self._check_tuning(name, method["tuning"])
        if self.reference is not None and self.reference not in self.methods:
            raise SettingError(unknown("reference of a study", self.reference, self.methods))
        if self.grid and self.tuning:
            raise SettingError("A study has a grid, which all methods run through, or tuning: give only one.")
        _check_varied("The grid of a study", self.grid)
        if self.tuning:
            _check_varied("The tuning of a study", self.tuning.values)
            if not self.tuning.values:
                raise SettingError("tuning needs values to choose among, such as {learning_rate: [5.0e-4, 2.0e-3]}.")

    def _check_tuning(self, name: str, values: Any) -> None:
        if self.tuning is None:
            raise SettingError(
                f"Method '{name}' has values of its own to choose among, and the study chooses none: give it tuning, "
                "such as tuning: {values: {learning_rate: [5.0e-4, 2.0e-3]}}."
            )
        _check_varied(f"The tuning of method '{name}'", values)

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


def _evaluated(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """An entry with what it says of its evaluation in the types that this has."""
    own = {name: entry[name] for name in names if name in entry}
    return {**entry, **{name: getattr(build(EvaluationSettings, own), name) for name in own}}


def _task(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A task whose evaluation and shifts are known to be right."""
    found = _evaluated(entry, "split", "rows")
    shifts = entry.get("shift") or {}
    if not isinstance(shifts, Mapping):
        raise SettingError(f"The shift of task '{name}' is {shifts!r}, expected name: rows lines.")
    if not all(map(str, shifts)):
        raise SettingError(f"A shift of task '{name}' has no name, which is what its tables call it by.")
    return found | {"shift": {str(key): _shift(str(key), rows) for key, rows in shifts.items()}}


def _shift(name: str, rows: Any) -> Shift:
    given = {"task": rows} if isinstance(rows, str) else rows
    if not isinstance(given, Mapping):
        raise SettingError(f"The shift '{name}' is {rows!r}, expected a task, or key: value lines such as split: test.")
    found = build(Shift, given)
    if found.task_settings and found.task is None:
        raise SettingError(f"The shift '{name}' has task_settings, which are of another task: name it (task: ...).")
    return found


def _check_varied(of: str, values: Any) -> None:
    """Make sure that there are values to run with, each once, of settings that can vary."""
    if not isinstance(values, Mapping):
        raise SettingError(f"{of} is {values!r}, expected lists of values by the names of settings.")
    for key, candidates in values.items():
        if key in FIXED or key in MAPPINGS:
            raise SettingError(
                f"{of} varies '{key}': seeds are the study's own (seeds: [0, 1]), backends are methods, folders those "
                "of cells, and settings vary by their own names (learning_rate: [...])."
            )
        if not isinstance(candidates, list) or not candidates:
            raise SettingError(f"{of} has {candidates!r} for '{key}', expected a list of values to run with.")
        if len(set(map(str, candidates))) < len(candidates):
            raise SettingError(f"{of} has a value of '{key}' twice: {', '.join(map(str, candidates))}.")


def _check_entry(sort: str, name: str, entry: Mapping[str, Any]) -> None:
    known = OWN[sort] | set(RunConfig.__dataclass_fields__) - OF_STUDY
    for field_name in entry:
        if field_name not in known:
            raise SettingError(unknown(f"field of '{name}' in a study's {sort}", str(field_name), known))
        if field_name in MAPPINGS and not isinstance(entry[field_name], Mapping):
            raise SettingError(
                f"'{field_name}' of '{name}' in a study's {sort} is {entry[field_name]!r}, expected key: value lines."
            )
