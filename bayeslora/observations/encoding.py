"""From text to batches: tokenisation, dynamic padding, and batches that come back in any order.

The steps are `encode` (rows to token ids), `Collator` (rows to tensors) and `batches` (a pass over all rows,
the longest first). A batch says by ``index`` which rows it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bayeslora.errors import DataError, SettingError
from bayeslora.tasks import Split, Task, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "Collator", "Encoder", "batches", "digest", "encode"]

#: Tensors by name: the network's inputs, "labels", "index" and, for multiple choice, "choice_mask".
Batch = dict[str, Tensor]

#: What pads the columns of a sequence where no tokenizer says otherwise.
PADDING: Mapping[str, int] = MappingProxyType({"input_ids": 0, "attention_mask": 0, "token_type_ids": 0})
ROWS_AT_ONCE = 1000


class Encoder:
    """Turns the texts of a task's rows into token ids.

    A pair of texts is joined as the tokenizer joins pairs; for a tokenizer that puts nothing between them,
    such as GPT-2's, the second text starts on a new line.

    Args:
        tokenizer: of the network.
        spec: the task.
        max_length: longest sequence in tokens; longer ones are cut, the longer text of a pair first.
        limit: positions that the network has, if that is less than its tokenizer knows of.

    Raises:
        DataError: the tokenizer has neither a padding token nor an end-of-sequence token to stand in for it.
        SettingError: ``max_length`` leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int = 256,
        limit: int | None = None,
    ) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no padding token: "
                "set one, such as tokenizer.pad_token = tokenizer.unk_token."
            )
        self.tokenizer = tokenizer
        self.spec = spec
        self.pad_token_id: int = pad
        self.max_length = min(max_length, tokenizer.model_max_length, limit or max_length)
        one, two = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        if self.max_length <= two:
            raise SettingError(f"max_length is {self.max_length}, expected more than the {two} tokens around texts.")
        self.separator = "" if two > one else "\n"

    def encode(self, data: Split | Dataset) -> Dataset:
        """Token ids of all rows; see `encode`."""
        return encode(data, self)

    def collator(self, multiple_of: int = 1) -> Collator:
        """The collator that pads as the tokenizer does.

        Args:
            multiple_of: pad lengths to a multiple of this.
        """
        return Collator(
            pad={
                "input_ids": self.pad_token_id,
                "attention_mask": 0,
                "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0),
            },
            side="left" if self.tokenizer.padding_side == "left" else "right",
            choices=self.spec.max_choices or None,
            multiple_of=multiple_of,
        )

    def tokens(self, rows: Sequence[Mapping[str, Any]], spec: TaskSpec | None = None) -> dict[str, list[Any]]:
        """Columns of token ids of some rows; for multiple choice a list for each choice.

        Args:
            rows: of the task.
            spec: what their columns mean, if they are of another task than the encoder's.
        """
        spec = spec or self.spec
        pairs = [spec.texts(row) for row in rows]
        first = [pair[0] for choices in pairs for pair in choices]
        second = [self.separator + pair[1] for choices in pairs for pair in choices if pair[1] is not None]
        found = self.tokenizer(first, second or None, truncation=True, max_length=self.max_length)
        columns = {name: list(values) for name, values in found.items() if name in PADDING}
        if spec.kind != "multiple-choice":
            return columns
        ends = torch.tensor([len(choices) for choices in pairs]).cumsum(0).tolist()
        return {
            name: [values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
            for name, values in columns.items()
        }


def encode(data: Split | Dataset, encoder: Encoder | None = None) -> Dataset:
    """Token ids of all rows, in memory.

    Args:
        data: rows of a task, or a data set that is tokenised already (it has ``input_ids``), which passes
            through.
        encoder: for rows of a task.

    Returns:
        A data set with ``input_ids`` and ``attention_mask`` (for multiple choice, lists of a sequence for
        each choice), ``token_type_ids`` where the tokenizer gives them, ``labels`` unless the rows have none,
        ``index``, the row's number in ``data``, and ``length``, the number of tokens of its longest sequence.

    Raises:
        DataError: the data are neither, a text has no tokens, or labels are no numbers of the task's classes.
    """
    if isinstance(data, Task):
        raise DataError("Expected rows, found a whole task: give one of its splits, such as task.train.")
    if not isinstance(data, Split) and "input_ids" in data.column_names:
        return _tokenised(data, encoder.spec if encoder else None)
    if encoder is None:
        raise DataError("The rows are not tokenised: expected a column 'input_ids', or an encoder to make it.")
    return _encode(data if isinstance(data, Split) else Split(data, encoder.spec).check(), encoder)


def digest(encoded: Dataset) -> str:
    """What tells tokenised rows from others: a digest of token ids and labels."""
    found = sha256()
    for part in encoded.select_columns(["input_ids", "labels"]).iter(ROWS_AT_ONCE):
        found.update(json.dumps(part).encode())
    return found.hexdigest()[:16]


def _encode(split: Split, encoder: Encoder) -> Dataset:
    import pyarrow as pa

    ids: Any = pa.list_(pa.int32())
    kind = pa.list_(ids) if split.spec.kind == "multiple-choice" else ids
    tables = []
    for start in range(0, len(split), ROWS_AT_ONCE):
        columns = encoder.tokens(_rows(split.dataset[start : start + ROWS_AT_ONCE]), split.spec)
        tables.append(pa.table({name: pa.array(values, kind) for name, values in columns.items()}))
    table = pa.concat_tables(tables)
    if split.labelled:
        table = table.append_column("labels", pa.array(split.labels().numpy()))
    return _numbered(table, split.name)


def _tokenised(data: Dataset, spec: TaskSpec | None = None) -> Dataset:
    """A user's own tokenised rows with the columns that a pass over them needs."""
    names = set(data.column_names)
    if not len(data):
        raise DataError("The tokenised data set has no rows.")
    if "labels" not in names and "label" in names:
        data = data.rename_column("label", "labels")
    data = data.with_format(None)
    if "labels" in data.column_names:
        _check_labels(data["labels"][:], spec)
    if {"index", "length"} <= names and data["index"][:] == list(range(len(data))):
        return data
    table = data.with_format("arrow")[:]
    return _numbered(table.drop_columns([name for name in ("index", "length") if name in names]), "tokenised rows")


def _check_labels(labels: Sequence[Any], spec: TaskSpec | None) -> None:
    for row, label in enumerate(labels):
        if not isinstance(label, int | float):
            raise DataError(f"Row {row} of the tokenised rows: label {label!r}, expected one number.")
        if spec is not None and spec.kind != "regression" and label not in range(len(spec.labels)):
            raise DataError(
                f"Row {row} of the tokenised rows: label {label!r}, expected a number from 0 to {len(spec.labels) - 1}."
            )


def _numbered(table: Any, name: str) -> Dataset:
    """A data set of a table of token ids, with the number and the length of each row."""
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import compute

    ids = table["input_ids"]
    if pa.types.is_nested(ids.type.value_type):
        lengths = [_length(tokens) for tokens in ids.to_pylist()]
    else:
        lengths = compute.list_value_length(ids).to_pylist()
    if 0 in lengths:
        raise DataError(f"Row {lengths.index(0)} of split '{name}' has no tokens: its text is empty.")
    table = table.append_column("index", pa.array(range(len(lengths)), pa.int64()))
    return Dataset(table.append_column("length", pa.array(lengths, pa.int64())))


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows: pads every sequence to the longest of the batch.

    Attributes:
        pad: value to pad with, by column; other columns than these, ``labels`` and ``index`` are left out.
        side: where padding goes, "right" or "left".
        choices: for multiple choice, number of choices to pad every row to; by default the most in the batch.
        multiple_of: pad lengths to a multiple of this.
    """

    pad: Mapping[str, int] = field(default_factory=lambda: dict(PADDING))
    side: Literal["right", "left"] = "right"
    choices: int | None = None
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tensors (batch, tokens), for multiple choice (batch, choices, tokens); labels, index (batch,).

        A multiple-choice batch has a boolean ``choice_mask`` (batch, choices), false where a row has no such
        choice. That place holds a sequence of one padding token that is attended to, since a row without any
        is NaN in some attention kernels; its logit means nothing and must be masked.
        """
        columns = {name: [row[name] for row in rows] for name in self.pad if name in rows[0]}
        if "attention_mask" not in columns:
            columns["attention_mask"] = [_ones(row["input_ids"]) for row in rows]
        nested = _is_nested(columns["input_ids"])
        batch: Batch = {}
        if nested:
            widths = torch.tensor([len(row) for row in columns["input_ids"]])
            wide = self.choices or int(widths.max())
            if int(widths.max()) > wide:
                raise DataError(f"A row has {int(widths.max())} choices, expected at most {wide}.")
            batch["choice_mask"] = torch.arange(wide) < widths[:, None]
            columns = {name: self._fill(name, values, wide) for name, values in columns.items()}
        for name, values in columns.items():
            padded = self._pad(values, self.pad.get(name, 0))
            batch[name] = padded.unflatten(0, (len(rows), -1)) if nested else padded
        for name in ("labels", "index"):
            if name in rows[0]:
                numbers = torch.as_tensor([row[name] for row in rows])
                batch[name] = numbers.float() if numbers.is_floating_point() else numbers.long()
        return batch

    def _fill(self, name: str, rows: Sequence[Sequence[Sequence[int]]], wide: int) -> list[Sequence[int]]:
        """Sequences of all choices of all rows, those that do not exist in place."""
        filler = [1 if name == "attention_mask" else self.pad[name]]
        return [choice for row in rows for choice in (*row, *[filler] * (wide - len(row)))]

    def _pad(self, sequences: Sequence[Sequence[int]], value: int) -> Tensor:
        lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
        longest = int(lengths.max())
        longest += -longest % self.multiple_of
        place = torch.arange(longest)
        kept = place >= longest - lengths if self.side == "left" else place < lengths
        padded = torch.full((len(sequences), longest), value)
        padded[kept] = torch.tensor([number for sequence in sequences for number in sequence])
        return padded


def batches(encoded: Dataset, collator: Collator, batch_size: int) -> Iterator[Batch]:
    """All rows in batches, the longest first, which saves padding and shows at once if memory suffices.

    Args:
        encoded: what `encode` returns.
        collator: makes the batches.
        batch_size: rows a batch; the last batch may have fewer.

    Yields:
        Batches whose ``index`` (batch,) says which rows they hold.

    Raises:
        SettingError: ``batch_size`` is no positive number.
    """
    if batch_size < 1:
        raise SettingError(f"batch_size is {batch_size}, expected at least 1.")
    encoded = _tokenised(encoded)
    lengths = encoded["length"][:]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield collator(_rows(encoded[order[start : start + batch_size]]))


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _is_nested(sequences: Sequence[Any]) -> bool:
    return isinstance(sequences[0][0], list)


def _length(choices: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest choice; 0 if one has none."""
    lengths = [len(choice) for choice in choices]
    return max(lengths) if min(lengths) else 0


def _ones(tokens: Sequence[Any]) -> list[Any]:
    return [_ones(token) if isinstance(token, list) else 1 for token in tokens]
