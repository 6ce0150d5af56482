"""Choices: which of a row's own texts is right, each scored by one pass of an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayeslora.observations.batches import Batch, Collator, Padding, choice_mask
from bayeslora.observations.classes import Classes

if TYPE_CHECKING:
    from bayeslora.observations.encoding import Encoder
    from bayeslora.tasks import TaskSpec

__all__ = ["ChoiceCollator", "Choices"]


@dataclass(frozen=True)
class Choices(Classes):
    """The number of the right choice, with probabilities softmax(scores) over the choices that a row has.

    Attributes:
        classes: most choices of a row; of those that a row lacks the score is minus infinity.
    """

    name: ClassVar[str] = "choices"
    kinds: ClassVar[tuple[str, ...]] = ("multiple-choice",)
    network: ClassVar[str] = "AutoModelForMultipleChoice"
    peft_task: ClassVar[str | None] = None
    apart: ClassVar[frozenset[str]] = frozenset({"choice_mask"})

    @classmethod
    def of(cls, spec: TaskSpec) -> Choices:
        """As many choices as a row may have."""
        return cls(spec.max_choices)

    def for_rows(self, spec: TaskSpec) -> Choices:
        """Rows of another task may have another number of choices."""
        return replace(self, classes=spec.max_choices)

    def head(self, spec: TaskSpec) -> dict[str, Any]:
        """One score a text: nothing to say."""
        return {}

    def tokens(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> dict[str, list[Any]]:
        """Columns of lists of a sequence for each choice."""
        texts = [spec.texts(row) for row in rows]
        flat = encoder.pairs([pair for each in texts for pair in each])
        ends = [0, *torch.tensor([len(each) for each in texts]).cumsum(0).tolist()]
        return {name: [values[start:end] for start, end in pairwise(ends)] for name, values in flat.items()}

    def collator(self, padding: Padding) -> Collator:
        """Pads rows to the same number of choices as well."""
        return ChoiceCollator(padding, self.classes)

    def attended(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Tokens of the choices that a row has."""
        return batch["attention_mask"].bool() & batch["choice_mask"].unsqueeze(-1)

    def read(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Scores (examples, choices), minus infinity for choices that do not exist."""
        return super().read(output, batch).masked_fill(~batch["choice_mask"], -torch.inf)


@dataclass(frozen=True)
class ChoiceCollator(Collator):
    """Makes batches (examples, choices, tokens) of rows with a sequence for each choice.

    A batch has a boolean ``choice_mask`` (examples, choices), false where a row has no such choice. That place holds a
    sequence of one padding token that is attended to, since a row without any is NaN in some attention kernels; its
    score means nothing and must be masked.

    Attributes:
        choices: number of choices to pad every row to.
    """

    choices: int = 0

    def padded(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        """Tensors (examples, choices, tokens), and the mask of choices.

        Raises:
            DataError: a row has too many choices.
        """
        there = choice_mask([len(row) for row in columns["input_ids"]], self.choices)
        flat = {name: self._filled(name, values) for name, values in columns.items()}
        batch = {name: value.unflatten(0, there.shape) for name, value in super().padded(flat).items()}
        return {"choice_mask": there, **batch}

    def _filled(self, name: str, rows: Sequence[Sequence[Sequence[int]]]) -> list[Sequence[int]]:
        """Sequences of all choices of all rows, those that do not exist in place."""
        filler = [1 if name == "attention_mask" else self.padding.values[name]]
        return [choice for row in rows for choice in (*row, *[filler] * (self.choices - len(row)))]
