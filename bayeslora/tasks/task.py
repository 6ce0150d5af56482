"""A task: what the columns of a data set mean, and its rows split for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError, TaskError, unknown
from bayeslora.tasks.fields import check_texts
from bayeslora.tasks.labels import read_labels
from bayeslora.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

__all__ = ["Split", "Task"]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a task that serve one purpose.

    Attributes:
        dataset: the rows, with the columns that the task needs.
        spec: what the columns mean.
        name: of the split, for messages.
        arguments: of `load_task`, from which the task can be loaded again, where they are known.
    """

    dataset: Dataset
    spec: TaskSpec
    name: str = "data"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def _labels(self) -> list[int] | list[float] | None:
        return read_labels(self.dataset, self.spec, self.name)

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

        return torch.tensor(self._labels, dtype=getattr(torch, self.spec.rules.dtype))

    def select(self, rows: Sequence[int]) -> Split:
        """The split of these rows, by number, in this order."""
        return replace(self, dataset=self.dataset.select(rows))

    def render(self, row: int) -> str:
        """A row as the network reads it, a line for each text, with its label or a mark at the answer."""
        label = None if self._labels is None else self._labels[row]
        return self.spec.rules.render(self.spec, self.spec.texts(self.dataset[row]), label)

    def check(self) -> Split:
        """This split, if it has rows whose texts are there and whose labels are in range.

        Raises:
            DataError: otherwise.
        """
        if not len(self):
            raise DataError(f"Split '{self.name}' of task '{self.spec.name}' has no rows.")
        check_texts(self.dataset, self.spec, self.name)
        _ = self._labels
        return self


@dataclass(frozen=True, eq=False)
class Task:
    """Rows to train on and to evaluate on, and what they mean.

    Attributes:
        spec: what the columns mean.
        train: rows to train on; no rows, if the training split is not there.
        heldout: rows cut off the training split to choose settings on, if asked for.
        validation: rows to report on.
        test: rows of the test split, if their labels are public.
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

    @property
    def roles(self) -> dict[str, Split]:
        """The splits train, heldout, validation and test, as far as the task has them."""
        splits = {
            "train": self.train,
            "heldout": self.heldout,
            "validation": self.validation,
            "test": self.test,
        }
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
