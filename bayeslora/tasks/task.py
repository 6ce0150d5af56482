"""A task: what the columns of a data set mean, and its rows split for training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError, TaskError, unknown
from bayeslora.settings import Count, Size, coerce
from bayeslora.tasks.sources import column, fields_of, from_data
from bayeslora.tasks.spec import TaskSpec
from bayeslora.tasks.values import numbered

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

__all__ = ["Split", "Splits", "Task", "build_task", "complete"]

#: Names that a validation split goes by in data of a user's own.
VALIDATION = ("validation", "valid", "val", "dev")


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a task that serve one purpose.

    Attributes:
        dataset: the rows, with the columns that the task needs.
        spec: what the columns mean.
        name: of the split, for messages.
        arguments: of `load_task`, from which the task can be loaded again, where they are known.
        first: number of the first row, where these are a part of a file, for messages.
    """

    dataset: Dataset
    spec: TaskSpec
    name: str = "data"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"Split({self.name!r} of {self.spec.name!r}, {len(self):,} rows)"

    @cached_property
    def _labels(self) -> list[int] | list[float] | None:
        return self.spec.rules.labels(self.dataset, self.spec, self.name)

    @property
    def labelled(self) -> bool:
        """Whether the rows have labels."""
        return self._labels is not None

    def labels(self) -> Tensor:
        """Labels (rows,): class numbers or numbers of choices as int64, values as float32.

        Raises:
            DataError: the rows have no labels.
        """
        if self._labels is None:
            raise DataError(f"Split '{self.name}' of task '{self.spec.name}' has no labels to compare with.")
        import torch

        return torch.tensor(self._labels, dtype=torch.float32 if isinstance(self._labels[0], float) else torch.int64)

    def select(self, rows: Sequence[int]) -> Split:
        """The split of these rows, by number, in this order."""
        return replace(self, dataset=self.dataset.select(rows))

    def render(self, row: int) -> str:
        """A row as the network reads it, a line for each text, with its label or a mark at the answer."""
        label = None if self._labels is None else self._labels[row]
        return self.spec.rules.render(self.spec, self.spec.texts(self.dataset[row]), label)

    def divide(self, train_size: int | None, heldout_size: int, seed: int) -> tuple[Split, Split | None]:
        """The first rows of a permutation and the next ones; all in file order if none is left out.

        Raises:
            DataError: there are fewer rows.
        """
        total = len(self)
        if train_size is not None and train_size > total:
            raise DataError(f"train_size is {train_size}, but split '{self.name}' has {total} rows.")
        if heldout_size + (train_size or 1) > total:
            rest = total - (train_size or 1)
            raise DataError(f"heldout_size is {heldout_size}, but split '{self.name}' can spare {rest} rows.")
        if train_size is None and not heldout_size:
            return self, None
        size = total - heldout_size if train_size is None else train_size
        order = self._permutation(seed)
        train, heldout = self.select(order[:size]), self.select(order[size : size + heldout_size])
        return train, replace(heldout, name="heldout") if heldout_size else None

    def set_aside(self, size: int) -> tuple[Split, Split]:
        """The rows that are left in file order, and rows to report on: the same ones for all seeds of a run.

        Raises:
            DataError: that is no number of some of the rows.
        """
        if not 1 <= size < len(self):
            raise DataError(f"test_size is {size}, expected from 1 to {len(self) - 1} rows of split '{self.name}'.")
        order = self._permutation(seed=0)
        return self.select(sorted(order[size:])), replace(self.select(order[:size]), name="test")

    def _permutation(self, seed: int) -> list[int]:
        import torch

        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()

    def check(self) -> Split:
        """This split, if it has rows whose texts are there and whose labels are in range.

        A text is a string, or a number or boolean, which is written out. Null, NaN, lists, mappings and bytes are none.
        A text may be blank if another one of the row is not.

        Raises:
            DataError: otherwise; the message names the row, counted from 0.
        """
        if not len(self):
            raise DataError(f"Split '{self.name}' of task '{self.spec.name}' has no rows.")
        columns = self.spec.columns
        blank = set(range(len(self)))
        for name in columns:
            for row, value in enumerate(column(self.dataset, name, self.name)):
                parts = self.spec.rules.parts(self.spec, name, value)
                if parts is None:
                    self._refuse(value, name, row, self.spec.rules.holds(self.spec, name))
                for part in parts or ():
                    if not isinstance(part, str | int | float) or (isinstance(part, float) and not math.isfinite(part)):
                        self._refuse(part, name, row, "a text")
                    if str(part).strip():
                        blank.discard(row)
        if blank:
            names = ", ".join(map(repr, columns))
            raise DataError(
                f"{len(blank)} of {len(self)} rows of split '{self.name}' have no text in {names}: "
                f"{numbered([self.first + row for row in sorted(blank)])}, counted from 0. Remove them."
            )
        _ = self._labels
        return self

    def _refuse(self, value: Any, name: str, row: int, wanted: str) -> None:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise DataError(
                f"Row {self.first + row} of split '{self.name}' has no value in column '{name}': remove it. Rows are "
                "counted from 0."
            )
        found = f"Row {self.first + row} of split '{self.name}' has a {type(value).__name__} in column '{name}'"
        hint = " Join its parts into one text." if wanted == "a text" and isinstance(value, list | dict) else ""
        if name in self.spec.choices and isinstance(value, dict):
            lists = f"{name}.text"
            hint = f" Name the list in it, such as choices='{lists}' (in a shell --set task.choices={lists})."
        raise DataError(f"{found}, expected {wanted}.{hint}")


class Splits(Mapping[str, "Dataset"]):
    """Splits of a task by name, each read when it is first asked for, with the columns that the task needs.

    Args:
        spec: of the task.
        origins: what each split is read from.
        read: reads a split from its origin, by the columns that it needs and those that it may have.
    """

    def __init__(self, spec: TaskSpec, origins: Mapping[str, Any], read: Callable[..., Dataset] = from_data) -> None:
        self._spec, self._origins, self._read = spec, origins, read
        self._tables: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._tables:
            columns = (*self._spec.columns, *(fields_of(self._spec.answer) if name == self._spec.train else ()))
            self._tables[name] = self._read(self._origins[name], columns, self._spec.answer_columns)
        return self._tables[name]

    def holding(self, columns: Collection[str]) -> set[str]:
        """Those of some columns that the first split has, and after a dot the fields of those that are mappings."""
        found = self._read(next(iter(self._origins.values())), (), columns).features
        fields = {f"{name}.{field}" for name, each in found.items() if isinstance(each, dict) for field in each}
        return {*columns} & {*found} | fields

    def of(self, spec: TaskSpec) -> Splits:
        """The same rows with the columns of another task."""
        return Splits(spec, self._origins, self._read)

    @property
    def files(self) -> list[Path]:
        """Local files that splits are read from."""
        origins = [origin for origin in self._origins.values() if isinstance(origin, list)]
        return [path for origin in origins for path in origin if isinstance(path, Path)]

    def __contains__(self, name: object) -> bool:
        return name in self._origins

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)


@dataclass(frozen=True, eq=False)
class Task:
    """Rows to train on and to evaluate on, and what they mean.

    Attributes:
        spec: what the columns mean.
        train: rows to train on; no rows, if the training split is not there.
        heldout: rows cut off the training split to choose settings on, if asked for.
        validation: rows to report on.
        test: rows of the test split, if their labels are public, or rows cut off the training split.
        data: all splits of the source by name, as they are there.
        arguments: of `load_task`, from which the task can be loaded again.
        notes: sentences on what was taken for what without having been asked for.
    """

    spec: TaskSpec
    train: Split
    heldout: Split | None = None
    validation: Split | None = None
    test: Split | None = None
    data: Mapping[str, Dataset] = field(default_factory=dict, repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sizes = "".join(f", {role}={len(split)}" for role, split in self.roles.items())
        return f"Task({self.spec.name!r}, {self.spec.kind}{sizes})"

    @property
    def roles(self) -> dict[str, Split]:
        """The splits train, heldout, validation and test, as far as the task has them."""
        splits = {name: getattr(self, name) for name in ("train", "heldout", "validation", "test")}
        return {name: split for name, split in splits.items() if split is not None and len(split)}

    def split(self, name: str) -> Split:
        """Rows by name: train, heldout, validation, test, or a split of the source such as "validation_ood".

        Raises:
            TaskError: there is no such split.
        """
        if name in self.roles:
            return self.roles[name]
        if name in self.data:
            return Split(self.data[name], self.spec, name, self.arguments).check()
        hint = " Cut rows off the training split with heldout_size=." if name in ("heldout", "validation") else ""
        if name == "test":
            hint = " Cut rows off the training split with test_size= (in a shell --set task.test_size=, with fit)."
        if name == "validation" and self.heldout is not None:
            hint = " Rows that were cut off the training split are 'heldout'."
        raise TaskError(unknown(f"split of task '{self.spec.name}'", name, {*self.roles, *self.data}) + hint)

    def summary(self) -> str:
        """Kind, classes and numbers of rows, on one line, and a line for each note."""
        sizes = ", ".join(f"{role} {len(split):,}" for role, split in self.roles.items())
        return "\n".join([f"{self.spec.name}: {self.spec.rules.describe(self.spec)}; {sizes} rows", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what the columns mean and how the rows were loaded."""
        return {"spec": self.spec.to_dict(), "arguments": dict(self.arguments)}


def build_task(
    spec: TaskSpec,
    data: Mapping[str, Any],
    *,
    train_size: int | None = None,
    heldout_size: int = 0,
    test_size: int = 0,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> Task:
    """The task of some splits: rows to train on, to choose settings on, and to report on.

    Args:
        spec: what the columns mean.
        data: by the name of the split, a data set, a DataFrame or a list of rows.
        train_size: number of training rows; all that are not held out by default.
        heldout_size: number of rows to cut off the training split.
        test_size: number of rows to cut off it before, where there is no test split; they do not depend on the seed.
        seed: of the choice of rows.
        arguments: kept with the task.
        notes: kept with the task.

    Raises:
        DataError: there are no splits or too few rows, or columns, texts or labels are missing or out of range.
        SettingError: a size is no number of rows.
    """
    data = data if isinstance(data, Splits) else Splits(spec, data)
    arguments = arguments or {}
    train_size = coerce(train_size, Count | None, "train_size, a number of rows,")
    heldout_size = coerce(heldout_size, Size, "heldout_size, a number of rows,")
    test_size = coerce(test_size, Size, "test_size, a number of rows,")

    def split(name: str) -> Split:
        return Split(data[name], spec, name, arguments).check()

    def reported(name: str | None) -> Split | None:
        # The test labels of a benchmark are hidden: there is nothing to measure on.
        return found if name and name in data and (found := split(name)).labelled else None

    if not data:
        raise DataError(f"Task '{spec.name}' has no splits.")
    if test_size and spec.test in data:
        raise DataError(f"Task '{spec.name}' has a test split, '{spec.test}': leave out test_size, found {test_size}.")
    heldout, test = None, reported(spec.test)
    if spec.train in data:
        source = split(spec.train)
        if not source.labelled:
            raise DataError(f"No row of the training split '{spec.train}' has a label in column '{spec.answer}'.")
        if test_size:
            source, test = source.set_aside(test_size)
        train, heldout = source.divide(train_size, heldout_size, seed)
    else:
        if test_size:
            raise DataError(f"test_size cuts rows off the split '{spec.train}', which is none of {', '.join(data)}.")
        train = Split(data[next(iter(data))].select([]), spec, spec.train, arguments)
        ending = f", or call its file {spec.train}{data.files[0].suffix}" if data.files else ""
        notes += (
            f"There is no split '{spec.train}' to train on, only {', '.join(data)}: the rows serve to predict alone. "
            f"To train on another split, name it, train=SPLIT (in a shell --set task.train=SPLIT){ending}.",
        )
    validation = reported(spec.validation)
    if validation is not None and spec.validation == spec.test:
        notes += (f"The rows of split '{spec.test}' stand in for a validation split.",)
    if validation is None and test_size:
        validation = test
        notes += ("The rows that test_size cuts off stand in for a validation split.",)
    return Task(spec, train, heldout, validation, test, data, arguments, notes)


def complete(spec: TaskSpec, data: Mapping[str, Dataset], given: Mapping[str, Any]) -> TaskSpec:
    """Fill in what only the data say: classes and the name of the validation split."""
    for role in ("train", "validation", "test"):
        if role in given and given[role] not in data:
            raise TaskError(unknown(f"split of task '{spec.name}'", given[role], data))
    if spec.validation not in data:
        others = (name for name in (*VALIDATION, spec.test) if name in data and name != spec.train)
        spec = replace(spec, validation=next(others, None))
    if "labels" not in given:
        named = (spec.train, spec.validation, spec.test)
        rows = {name: data[name] for name in named if name and name in data and len(data[name])}
        return replace(spec, labels=spec.rules.classes(spec, rows))
    return spec
