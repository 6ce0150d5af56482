"""The order in which training goes through its rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

__all__ = ["Order", "Ordered"]


class Ordered(Sampler[int]):
    """An order of rows that depends on the epoch."""

    epoch: int


class Order(Ordered):
    """Rows in an order that seed and epoch alone decide: the same in every process, and in a run that is resumed.

    Args:
        data: tokenised rows with their ``length``.
        rows_a_step: rows a step of one process.
        seed: of the order.
        group_by_length: put rows of like length into the same step.
    """

    def __init__(self, data: Dataset, rows_a_step: int, seed: int, group_by_length: bool) -> None:
        self.size = len(data)
        # A list: a column of a data set is read from the table at each access.
        self.lengths = list(data["length"]) if group_by_length else None
        self.rows_a_step = rows_a_step
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        rows: list[int] = torch.randperm(self.size, generator=generator).tolist()
        if self.lengths is None:
            return iter(rows)
        # A row of an incomplete step weighs more than others. Grouping would always leave it short rows.
        whole = self.size - self.size % self.rows_a_step
        grouped, rest = rows[:whole], rows[whole:]
        if grouped:
            lengths = [self.lengths[row] for row in grouped]
            grouped = [grouped[i] for i in get_length_grouped_indices(lengths, self.rows_a_step, generator=generator)]
        return iter(grouped + rest)
