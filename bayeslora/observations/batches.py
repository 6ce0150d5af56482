"""Batches: encoded rows padded into tensors, and passes over all rows, the longest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bayeslora.errors import DataError, SettingError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["PADDING", "Batch", "Collator", "Padding", "batches", "choice_mask", "numbered", "transposed"]

#: Tensors by name: the network's inputs, "labels", "index", and what an observation adds.
Batch = dict[str, Tensor]

#: What pads the columns of a sequence where no tokenizer says otherwise.
PADDING: Mapping[str, int] = MappingProxyType({"input_ids": 0, "attention_mask": 0, "token_type_ids": 0})


@dataclass(frozen=True)
class Padding:
    """How sequences are padded.

    Attributes:
        values: value to pad with, by column; other columns than these are left out of batches.
        side: where padding goes, "right" or "left".
        positions: number the tokens behind the padding, for a network that would count it (``position_ids``).
    """

    values: Mapping[str, int] = field(default_factory=lambda: dict(PADDING))
    side: Literal["right", "left"] = "right"
    positions: bool = False


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows: pads every sequence to the longest of the batch.

    Attributes:
        padding: how.
    """

    padding: Padding = field(default_factory=Padding)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tensors (examples, tokens); labels and index (examples,)."""
        columns = {name: [row[name] for row in rows] for name in self.padding.values if name in rows[0]}
        if "attention_mask" not in columns:
            columns["attention_mask"] = [_ones(row["input_ids"]) for row in rows]
        batch = self.padded(columns)
        for name in ("labels", "index"):
            if name in rows[0]:
                numbers = torch.as_tensor([row[name] for row in rows])
                batch[name] = numbers.float() if numbers.is_floating_point() else numbers.long()
        return batch

    def padded(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        """Sequences as tensors of one length."""
        values = self.padding.values
        batch = {name: self._pad(sequences, values.get(name, 0)) for name, sequences in columns.items()}
        mask = batch["attention_mask"]
        # Rows that are padded already may name another token, and a network looks for this one.
        batch["input_ids"] = batch["input_ids"].masked_fill(mask == 0, values["input_ids"])
        if self.padding.positions:
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return batch

    def _pad(self, sequences: Sequence[Sequence[int]], value: int) -> Tensor:
        lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
        longest = int(lengths.max())
        place = torch.arange(longest)
        kept = place >= longest - lengths if self.padding.side == "left" else place < lengths
        padded = torch.full((len(sequences), longest), value)
        padded[kept] = torch.tensor([number for sequence in sequences for number in sequence])
        return padded


def batches(encoded: Dataset, collator: Collator, batch_size: int) -> Iterator[Batch]:
    """All rows in batches, the longest first, which saves padding and shows at once if memory suffices.

    Args:
        encoded: tokenised rows.
        collator: makes the batches.
        batch_size: rows a batch; the last batch may have fewer.

    Yields:
        Batches whose ``index`` (examples,) says which rows they hold.

    Raises:
        SettingError: ``batch_size`` is no positive number.
    """
    if batch_size < 1:
        raise SettingError(f"batch_size is {batch_size}, expected at least 1.")
    encoded = numbered(encoded)
    lengths = encoded["length"][:]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield collator(transposed(encoded[order[start : start + batch_size]]))


def numbered(data: Dataset, name: str = "tokenised rows") -> Dataset:
    """Tokenised rows with their number, ``index``, and the number of tokens of their longest sequence, ``length``.

    Raises:
        DataError: there are no rows, or one has no tokens.
    """
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import compute

    names = set(data.column_names)
    if not len(data):
        raise DataError("The tokenised data set has no rows.")
    if {"index", "length"} <= names and data["index"][:] == list(range(len(data))):
        return data
    table = data.with_format("arrow")[:]
    table = table.drop_columns([each for each in ("index", "length") if each in names])
    ids = table["input_ids"]
    if pa.types.is_nested(ids.type.value_type):
        lengths = [_longest(sequences) for sequences in ids.to_pylist()]
    else:
        lengths = compute.list_value_length(ids).to_pylist()
    if 0 in lengths:
        raise DataError(f"Row {lengths.index(0)} of split '{name}' has no tokens: its text is empty.")
    table = table.append_column("index", pa.array(range(len(lengths)), pa.int64()))
    return Dataset(table.append_column("length", pa.array(lengths, pa.int64())))


def choice_mask(counts: Sequence[int], most: int) -> Tensor:
    """Which of so many choices there are, of rows with some each: (rows, most).

    Raises:
        DataError: a row has more.
    """
    widths = torch.tensor(counts)
    if int(widths.max()) > most:
        raise DataError(f"A row has {int(widths.max())} choices, expected at most {most}.")
    return torch.arange(most) < widths[:, None]


def transposed(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _ones(tokens: Sequence[Any]) -> list[Any]:
    return [_ones(token) if isinstance(token, list) else 1 for token in tokens]


def _longest(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest sequence; 0 if one has none."""
    lengths = [len(tokens) for tokens in sequences]
    return max(lengths) if min(lengths) else 0
