"""Loading a task: by its name, from data of a user's own, from rows in memory, or as it is recorded with a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayeslora.errors import DataError, TaskError, unknown
from bayeslora.tasks import sources
from bayeslora.tasks.labels import column, infer_labels
from bayeslora.tasks.spec import Kind, TaskSpec, aliases, find_task, plain, task_names
from bayeslora.tasks.task import Split, Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["build_task", "load_task", "reload_task"]

#: Names that a validation split goes by in data of a user's own.
VALIDATION = ("validation", "valid", "val", "dev")


def load_task(
    name: str | Path,
    data_dir: str | Path | None = None,
    *,
    train_size: int | None = None,
    heldout_size: int = 0,
    seed: int = 0,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    kind: Kind | None = None,
    choices: str | Sequence[str] | None = None,
    choice_keys: str | Sequence[str] | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Task:
    """Load a task: one that is known by name, or data of your own with named columns.

    Rows come from the hub, or from files if ``data_dir`` is given or ``name`` is a path. The order in which
    training rows are chosen depends on the seed alone, so subsets of growing size are nested.

    Args:
        name: a known task (`task_names`), a .jsonl, .json, .csv, .tsv or .parquet file, a folder of such
            files named by split, or a data set on the hub; the last three with ``text`` and ``label``.
        data_dir: folder with the task's files, or one that has a folder of the task's name in it.
        train_size: number of training rows; all that are not held out by default.
        heldout_size: number of rows to cut off the training split, to choose settings on.
        seed: of the choice of rows.
        text: one or two columns, or templates of columns such as "{title}: {body}".
        label: column of the class, the value or the answer.
        labels: class names in the order of their numbers; by default those found in the training split,
            strings in the order of their first appearance.
        kind: "classification" (default), "regression" or "multiple-choice" (implied by ``choices``).
        choices: column with the list of choices, or one column for each choice.
        choice_keys: column with the names of a row's choices, or the names themselves, if the answer is a
            name.
        train: name of the training split.
        validation: name of the validation split.
        test: name of the test split.
        config: configuration of a data set on the hub.
        revision: of a data set on the hub.

    Raises:
        TaskError: the task or a split is unknown, or it is not said what the columns mean.
        DataError: the data cannot be found or read, lack a column, have labels out of range or too few rows.
    """
    given: dict[str, Any] = {
        "text": _words(text),
        "label": label,
        "labels": _words(labels),
        "kind": kind or ("multiple-choice" if choices else None),
        "choices": _words(choices),
        "choice_keys": _words(choice_keys),
        "train": train,
        "validation": validation,
        "test": test,
        "config": config,
        "revision": revision,
    }
    given = {key: value for key, value in given.items() if value is not None}
    sizes: dict[str, Any] = {"train_size": train_size, "heldout_size": heldout_size, "seed": seed}
    if str(name) == "demo" and data_dir is None:
        from bayeslora.demo import load_demo_task

        task: Task = load_demo_task()
        spec = replace(task.spec, **given)
        return build_task(spec, task.data, **sizes, arguments={"name": "demo", **sizes, **plain(given)})
    spec = _resolve(str(name), data_dir, given)
    folder = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
    data = _read(spec, folder, str(name))
    spec = _complete(spec, data, given)
    name = spec.path if spec.path and Path(spec.path).is_absolute() else str(name)
    arguments = {"name": name, "data_dir": folder, **sizes, **plain(given)}
    return build_task(spec, data, **sizes, arguments=arguments)


def reload_task(record: Mapping[str, Any], data_dir: str | Path | None = None) -> Task:
    """Load the rows again that `Task.to_dict` describes, with the classes in their recorded order.

    Args:
        record: what `Task.to_dict` gave.
        data_dir: where the data are now, if they have moved.

    Raises:
        TaskError, DataError: as in `load_task`.
    """
    spec = TaskSpec.from_dict(record["spec"])
    arguments = dict(record["arguments"])
    if data_dir is not None:
        arguments["data_dir"] = str(Path(data_dir).expanduser().resolve())
    if spec.name == "demo":
        return load_task(**arguments)
    if spec.path is None and arguments.get("data_dir") is None:
        raise TaskError(f"The rows of task '{spec.name}' were given in memory: say where they are, data_dir=.")
    sizes = {key: arguments[key] for key in ("train_size", "heldout_size", "seed") if key in arguments}
    data = _read(spec, arguments.get("data_dir"), arguments.get("name", spec.name))
    if spec.train not in data:
        # To predict takes no training rows: all that they would tell is in the record.
        none = Split(next(iter(data.values())).select([]), spec, spec.train, arguments)
        return _with_roles(spec, data, none, None, arguments)
    return build_task(spec, data, **sizes, arguments=arguments)


def build_task(
    spec: TaskSpec,
    data: Mapping[str, Dataset | Sequence[Mapping[str, Any]]],
    *,
    train_size: int | None = None,
    heldout_size: int = 0,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Task:
    """A task of rows in memory.

    Args:
        spec: what the columns mean.
        data: split name to data set or list of rows.
        train_size: number of training rows; all that are not held out by default.
        heldout_size: number of rows to cut off the training split.
        seed: of the choice of rows.
        arguments: kept with the task.

    Raises:
        TaskError: there is no training split.
        DataError: rows, columns or labels are missing or out of range.
    """
    tables = {
        name: sources.from_rows(rows) if isinstance(rows, Sequence) else rows.with_format(None)
        for name, rows in data.items()
    }
    if spec.train not in tables:
        raise TaskError(unknown(f"split of task '{spec.name}'", spec.train, tables) + " Name it with train=.")
    arguments = arguments or {}
    source = Split(tables[spec.train], spec, spec.train, arguments).check()
    column(source.dataset, spec.label, spec.train)
    if not source.labelled:
        raise DataError(f"No row of the training split '{spec.train}' has a label in column '{spec.label}'.")
    train, heldout = _divide(source, train_size, heldout_size, seed)
    return _with_roles(spec, tables, train, heldout, arguments)


def _with_roles(
    spec: TaskSpec, tables: Mapping[str, Dataset], train: Split, heldout: Split | None, arguments: Mapping[str, Any]
) -> Task:
    """A task whose validation and test rows are those of the splits that its spec names."""
    roles: dict[str, Split | None] = {}
    for role, name in (("validation", spec.validation), ("test", spec.test)):
        split = Split(tables[name], spec, name, arguments).check() if name and name in tables else None
        # The test labels of a benchmark are hidden: there is nothing to measure on.
        roles[role] = split if split is not None and split.labelled else None
    return Task(spec, train, heldout, roles["validation"], roles["test"], tables, arguments)


def _resolve(name: str, data_dir: str | Path | None, given: Mapping[str, Any]) -> TaskSpec:
    """The task of a name, as far as it is known before the data are read."""
    if name == "demo" and "text" not in given:
        raise TaskError("The rows of the demo ship with the package: leave data_dir out.")
    path = Path(name).expanduser()
    is_file = path.suffix.lower() in sources.READERS
    known = None if is_file else find_task(name)
    if known is not None:
        return replace(known, **given)
    if "text" not in given or "label" not in given:
        if is_file and not path.is_file():
            raise DataError(f"There is no file {path}.")
        if path.exists():
            raise TaskError(f"Say what the columns of '{name}' mean: text= and label=.")
        raise TaskError(unknown("task", name, task_names()) + " For data of your own, give text= and label=.")
    here = is_file or path.exists()
    source = str(path.resolve()) if here else None if data_dir is not None else name
    return TaskSpec.from_dict({"name": path.stem if here else name, "path": source, **given})


def _read(spec: TaskSpec, data_dir: str | None, asked: str) -> dict[str, Dataset]:
    """All splits of a task, asked for by this name: from ``data_dir``, the path of the data or the hub."""
    if data_dir is None and spec.path is not None:
        # Paths of a user's own data are kept absolute, so that a folder named like a hub data set is not
        # taken for it.
        if not Path(spec.path).is_absolute():
            return sources.read_hub(spec.path, spec.config, spec.revision)
        return _read(replace(spec, path=None), spec.path, asked)
    root = Path(data_dir or ".")
    if root.is_file() or root.suffix.lower() in sources.READERS:
        return {spec.train: sources.read_file(root)}
    if not root.exists():
        raise DataError(f"There is no folder {root}.")
    own = [] if Path(asked).is_absolute() else [asked]
    for name in (*own, spec.name, spec.name.replace("/", "_"), *aliases(spec.name), "."):
        if (root / name).is_dir() and (data := sources.read_folder(root / name)):
            return data
    raise DataError(
        f"No data of task '{spec.name}' in {root}: expected files such as {spec.train}.jsonl there or in "
        f"a folder '{spec.name}', ending in {', '.join(sources.READERS)}."
    )


def _complete(spec: TaskSpec, data: Mapping[str, Dataset], given: Mapping[str, Any]) -> TaskSpec:
    """Fill in what only the data say: classes and the name of the validation split."""
    for role in ("validation", "test"):
        if role in given and given[role] not in data:
            raise TaskError(unknown(f"split of task '{spec.name}'", given[role], data))
    if spec.validation not in data:
        others = (name for name in VALIDATION if name in data and name != spec.train)
        spec = replace(spec, validation=next(others, None))
    if "labels" in given or spec.kind == "regression" or spec.train not in data or not len(data[spec.train]):
        return spec
    rows = data[spec.train]
    # Class names that come with the data stand for its numbers, whatever the registry says.
    if spec.kind == "classification" and (not spec.labels or hasattr(rows.features.get(spec.label), "names")):
        return replace(spec, labels=infer_labels(rows, spec.label, spec.train))
    if spec.labels:
        return spec
    wide = len(spec.choices)
    if wide == 1:
        wide = max(len(choices) for table in data.values() for choices in column(table, spec.choices[0]))
    return replace(spec, labels=tuple(chr(ord("A") + number) for number in range(wide)))


def _divide(source: Split, train_size: int | None, heldout_size: int, seed: int) -> tuple[Split, Split | None]:
    """The first rows of a permutation and the next ones; all in file order if none is left out."""
    total = len(source)
    if heldout_size < 0 or (train_size is not None and train_size < 1):
        raise DataError(f"train_size is {train_size}, heldout_size {heldout_size}: expected at least 1 and 0.")
    if train_size is not None and train_size > total:
        raise DataError(f"train_size is {train_size}, but split '{source.name}' has {total} rows.")
    if heldout_size + (train_size or 1) > total:
        rest = total - (train_size or 1)
        raise DataError(f"heldout_size is {heldout_size}, but split '{source.name}' can spare {rest} rows.")
    if train_size is None and not heldout_size:
        return source, None
    size = total - heldout_size if train_size is None else train_size
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    train, rest_rows = source.select(order[:size]), order[size : size + heldout_size]
    return train, replace(source.select(rest_rows), name="heldout") if rest_rows else None


def _words(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(str(part) for part in value)
