"""From the file of a study to the lines of its tables, and the cells that each of them needs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal

from bayeslora.app.config import RunConfig, assign
from bayeslora.app.resolving import canonical, folder, located_task, named, resolve, task_settings
from bayeslora.app.studies.cells import Cell, Entry, Evaluation, is_over
from bayeslora.app.studies.checks import HELDOUT, check_had, check_heldout, check_seeds, check_start, check_varied
from bayeslora.app.studies.file import OWN, Shift, StudyFile
from bayeslora.errors import SettingError

__all__ = ["Candidate", "Target", "expand"]

#: Settings that go to those backends and models alone that have them, unless a method itself has them.
OF_PARTS = ("settings", "model_settings")
Point = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to settle a line.

    Attributes:
        point: settings by name, that differ from candidate to candidate.
        entry: what the line shows if this one is taken.
        trial: what tells whether it is; none where there is no choice.
    """

    point: Point
    entry: Entry
    trial: Entry | None = None


@dataclass(frozen=True)
class Target:
    """A line of the tables.

    Attributes:
        task: its name in the study, as those that follow.
        base: network.
        method: of inference.
        seed: of the run.
        protocol: "same" settings for all methods, those that were "chosen" for this one, or a point of the "grid".
        point: of the grid.
        candidates: that there are to choose from; one, where there is nothing to choose.
    """

    task: str
    base: str
    method: str
    seed: int
    protocol: Literal["same", "chosen", "grid"]
    point: Point
    candidates: tuple[Candidate, ...]

    @property
    def trials(self) -> tuple[Entry, ...]:
        """What is to be done before one is chosen."""
        return tuple(each.trial for each in self.candidates if each.trial is not None)

    @property
    def title(self) -> str:
        """How messages name it."""
        point = "".join(f", {key}={value}" for key, value in self.point.items())
        chosen = ", chosen" if self.protocol == "chosen" else ""
        return f"{self.task}, {self.base}, {self.method}, seed {self.seed}{point}{chosen}"


def expand(study: StudyFile) -> list[Target]:
    """All lines of a study: the seeds outermost, so that a study that is stopped has whole tables of few seeds.

    Raises:
        SettingError: a backend, model, preset or setting is unknown, or has a value that it cannot take.
    """
    expansion = _Expansion(study)
    targets = list(expansion.targets())
    check_had(expansion.asked, expansion.has)
    return targets


class _Expansion:
    """What the entries of a study come to, each configuration made once."""

    def __init__(self, study: StudyFile) -> None:
        self.study = study
        self.cells: dict[str, Cell] = {}
        self.configs: dict[tuple[Any, ...], RunConfig] = {}
        self.parts: dict[tuple[str, str, str], dict[str, dict[str, tuple[str, ...]]]] = {}
        #: Names of settings that methods have, and those that are to go to all that have them.
        self.has: dict[str, set[str]] = {part: set() for part in OF_PARTS}
        self.asked: dict[str, set[str]] = {part: set() for part in OF_PARTS}

    def targets(self) -> Iterator[Target]:
        """The lines, those at the same settings first."""
        study = self.study
        points = _combinations(study.grid)
        for seed, base, task, point, method in product(study.seeds, study.bases, study.tasks, points, study.methods):
            entry = self.entry(task, base, method, seed, point)
            protocol: Literal["same", "grid"] = "grid" if study.grid else "same"
            yield Target(task, base, method, seed, protocol, point, (Candidate({}, entry),))
        if study.tuning is not None:
            for seed, base, task, method in product(study.seeds, study.bases, study.tasks, study.methods):
                candidates = tuple(self.candidates(task, base, method, seed))
                yield Target(task, base, method, seed, "chosen", {}, candidates)

    def candidates(self, task: str, base: str, method: str, seed: int) -> Iterator[Candidate]:
        """Combinations that a method tries with the first seed, and what each would come to with this one."""
        tuning = self.study.tuning
        assert tuning is not None
        points = _combinations(tuning.values | self.own_values(method))
        if len(points) > tuning.trials:
            points = random.Random(tuning.seed).sample(points, tuning.trials)
        for point in points:
            first = self.entry(task, base, method, self.study.seeds[0], point)
            check_heldout(task, first.cell.config, first.evaluations[""].split)
            own = first.evaluations[""]
            trial = replace(own, split=HELDOUT, task=None, data_dir=None, task_settings=(), rows=None)
            yield Candidate(point, self.entry(task, base, method, seed, point), Entry(first.cell, {"": trial}))

    def own_values(self, method: str) -> dict[str, list[Any]]:
        """Candidates of a method's own, over those of the method that it starts from, which has the same settings."""
        entry = self.study.methods[method]
        inherited = self.own_values(entry["start"]) if entry.get("start") is not None else {}
        return inherited | (entry.get("tuning") or {})

    def entry(self, task: str, base: str, method: str, seed: int, point: Point) -> Entry:
        """The fit of a method, and how the study evaluates it."""
        cell = self.cell(task, base, method, seed, point)
        of_task, of_method, shared = self.study.tasks[task], self.study.methods[method], self.study.evaluation
        own = Evaluation(
            of_task.get("split", shared.split),
            of_method.get("draws", shared.draws),
            of_method.get("predict"),
            rows=of_task.get("rows", shared.rows),
        )
        shifts = {name: _shifted(shift, own) for name, shift in of_task["shift"].items()}
        return Entry(cell, {"": own, **shifts})

    def cell(self, task: str, base: str, method: str, seed: int, point: Point) -> Cell:
        """The fit of a method; methods whose fits are equal have one."""
        name = self.study.methods[method].get("start")
        start = None if name is None else self.cell(task, base, name, seed, point)
        key = task, base, method, repr(dict(point))
        if key not in self.configs:
            try:
                config = canonical(self.config(task, base, method, point))
            except SettingError as error:
                raise SettingError(f"Method '{method}' of the study: {error}") from error
            check_seeds(method, config.chains, self.study.seeds)
            if start is not None:
                own = _of_run("methods", self.study.methods[method])
                check_start(method, str(name), own, config, start.config)
                config = _around(config, start.config) if is_over(config) else config
            self.configs[key] = config
        found = Cell(replace(self.configs[key], seed=seed), start)
        return self.cells.setdefault(found.name, found)

    def config(self, task: str, base: str, method: str, point: Point) -> RunConfig:
        """What common, base, task, method and point say, the later over the earlier."""
        own = _of_run("methods", self.study.methods[method])
        if not {"backend", "preset"} & own.keys():
            own |= named(method)
        shared = _of_run("common", self.study.common)
        shared = _merged(shared, _of_run("bases", self.study.bases[base]))
        shared = _merged(shared, _of_run("tasks", self.study.tasks[task]))
        varied = {key: assign({}, [f"{key}={_text(value)}"]) for key, value in point.items()}
        if (task, base, method) not in self.parts:
            alone = {name: value for name, value in shared.items() if name not in OF_PARTS} | own
            self.parts[task, base, method] = _parts(alone)
        has = self.parts[task, base, method]
        for part in OF_PARTS:
            self.has[part] |= has[part].keys()
            self.asked[part] |= {name for each in (shared, *varied.values()) for name in each.get(part, {})}
        merged = _merged(_had(shared, has), own)
        for key, value in varied.items():
            value = _had(value, has)
            if self.study.grid:  # what tuning tries goes over a method's own
                check_varied(key, own, value)
            merged = _merged(merged, value)
        return RunConfig.from_dict(merged)


def _combinations(values: Mapping[str, Sequence[Any]]) -> list[Point]:
    """All combinations of values, the last name running fastest; one without values, if there are no names."""
    return [dict(zip(values, each, strict=True)) for each in product(*values.values())]


def _text(value: Any) -> str:
    """A value as an assignment has it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _of_run(sort: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says of a run."""
    return assign({name: value for name, value in entry.items() if name not in OWN[sort]}, ())


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Fields put over others, mappings within them as well."""
    found = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found


def _parts(values: Mapping[str, Any]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Where the settings are that backend and model of a run have, by name: of a backend over another one, its too."""
    from bayeslora.inference import BACKENDS
    from bayeslora.models import MODELS

    config = resolve(RunConfig.from_dict(values))
    assert config.backend is not None and config.model is not None
    algorithm: Any = BACKENDS.build(config.backend, config.settings)
    found: dict[str, tuple[str, ...]] = {}
    path: tuple[str, ...] = ()
    while algorithm is not None:
        found = {name: (*path, name) for name in _settings(algorithm)} | found
        algorithm, path = getattr(algorithm, "inner", None), (*path, "of_settings")
    model: Any = MODELS[config.model]
    return {"settings": found, "model_settings": {name: (name,) for name in _settings(model)}}


def _settings(part: Any) -> Iterator[str]:
    """Names of the settings of a backend or model."""
    return (each.name for each in fields(part))


def _had(values: Mapping[str, Any], has: Mapping[str, Mapping[str, tuple[str, ...]]]) -> dict[str, Any]:
    """Fields without the settings that backend and model do not have, the others where they are."""
    found = {name: value for name, value in values.items() if name not in has}
    for part, places in has.items():
        for name, value in values.get(part, {}).items():
            for inner in reversed(places.get(name, ())):
                value = {inner: value}
            found = _merged(found, {part: value} if name in places else {})
    return found


def _around(config: RunConfig, start: RunConfig) -> RunConfig:
    """A run over another one, which is to be the run that is there already: of its settings and its network."""
    own = {name: value for name, value in config.settings.items() if name not in ("of", "of_settings")}
    settings = own | {"of": start.backend, "of_settings": start.settings}
    return canonical(replace(start, backend=config.backend, settings=settings))


def _shifted(shift: Shift, own: Evaluation) -> Evaluation:
    """The same evaluation on other rows than the task's own."""
    return replace(
        own,
        split=shift.split,
        task=None if shift.task is None else located_task(shift.task, shift.data_dir),
        data_dir=None if shift.data_dir is None else folder(shift.data_dir, "data"),
        task_settings=tuple(sorted(task_settings(shift.task_settings).items())),
    )
