"""From text to token ids: a tokenizer and the limits that it is used in, and data sets of encoded rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayeslora.errors import DataError, SettingError
from bayeslora.observations.base import LENGTH, Observation
from bayeslora.observations.batches import PADDING, Padding, numbered, transposed
from bayeslora.tasks import Split, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "check_tokens", "digest", "encode", "is_tokenised"]

ROWS_AT_ONCE = 1000


class Encoder:
    """Turns the texts of a task's rows into token ids.

    A pair of texts is joined as the tokenizer joins pairs; for a tokenizer that puts nothing between them, such as
    GPT-2's, the second text starts on a new line.

    Args:
        tokenizer: of the network.
        spec: the task.
        max_length: longest sequence in tokens; longer ones are cut, the longer text of a pair first.
        limit: positions that the network has, if that is less than its tokenizer knows of.
        labels: names of the classes in the order of the network's outputs, if that is not the task's.

    Attributes:
        most: that ``max_length`` can be.

    Raises:
        DataError: the tokenizer has neither a padding token nor an end-of-sequence token to stand in for it.
        SettingError: ``max_length`` leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int = LENGTH,
        limit: int | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no padding token: "
                "set one, such as tokenizer.pad_token = tokenizer.unk_token."
            )
        self.tokenizer = tokenizer
        self.spec = spec
        self.labels = labels or spec.labels
        self.most = min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
        self.max_length = min(max_length, self.most)
        one, two = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        if self.max_length <= two:
            raise SettingError(f"max_length is {self.max_length}, expected more than the {two} tokens around texts.")
        self.separator = "" if two > one else "\n"
        kinds = getattr(tokenizer, "pad_token_type_id", 0)
        self.padding = Padding(
            {"input_ids": pad, "attention_mask": 0, "token_type_ids": kinds},
            "left" if tokenizer.padding_side == "left" else "right",
        )

    def pairs(self, texts: Sequence[tuple[str, str | None]]) -> dict[str, list[Any]]:
        """Columns of token ids of texts or pairs of texts."""
        return self._pairs(texts, self.max_length)

    def _pairs(self, texts: Sequence[tuple[str, str | None]], length: int) -> dict[str, list[Any]]:
        first = [pair[0] for pair in texts]
        second = [self.separator + pair[1] for pair in texts if pair[1] is not None]
        found = self.tokenizer(first, second or None, truncation=True, max_length=length)
        return {name: list(values) for name, values in found.items() if name in PADDING}

    def cut(self, split: Split) -> int:
        """How many rows of a task lose tokens where `pairs` reads them.

        A token stands for a byte or more, so that short texts are known to be whole without being tokenised again.
        """
        # Beside what the tokenizer adds, a token may mark where each text of a pair begins.
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - 2
        count = 0
        for rows in _parts(split):
            texts = [split.spec.texts(row) for row in rows]
            long = [each for each in texts if any(len("".join(filter(None, pair)).encode()) > room for pair in each)]
            if long:
                lengths = map(len, self._pairs([*chain.from_iterable(long)], self.max_length + 1)["input_ids"])
                count += sum(max(islice(lengths, len(each))) > self.max_length for each in long)
        return count

    def names(self, spec: TaskSpec) -> tuple[str, ...]:
        """Names of the classes in the order of the network's outputs, for rows of a task."""
        return self.labels if not spec.labels or sorted(spec.labels) == sorted(self.labels) else spec.labels

    def numbers(self, labels: Tensor, spec: TaskSpec) -> Tensor:
        """Labels of rows of a task as the network numbers them."""
        names = self.names(spec)
        return labels if names == spec.labels else torch.tensor([names.index(name) for name in spec.labels])[labels]


def encode(data: Split | Dataset, observation: Observation, encoder: Encoder | None = None) -> Dataset:
    """Token ids of all rows, in memory.

    Args:
        data: rows of a task, or a data set that is tokenised already (it has ``input_ids``), which passes through.
        observation: how rows are laid out.
        encoder: for rows of a task.

    Returns:
        A data set with ``input_ids`` and ``attention_mask`` (for multiple choice, lists of a sequence for each choice),
        ``token_type_ids`` where the tokenizer gives them, ``labels`` unless the rows have none, ``index``, the row's
        number in ``data``, and ``length``, the number of tokens of its longest sequence.

    Raises:
        DataError: there are no rows, a text has no tokens, or labels are none that can be observed.
    """
    if not isinstance(data, Split):
        return _tokenised(data, observation)
    if encoder is None:
        raise DataError("The rows are not tokenised: expected a column 'input_ids', or an encoder to make it.")
    return _encoded(data, observation, encoder)


def is_tokenised(data: Any) -> bool:
    """Whether data are a data set of token ids."""
    return "input_ids" in getattr(data, "column_names", ())


def check_tokens(encoded: Dataset, known: int | None, positions: int | None = None) -> None:
    """Make sure that a network knows every token and its place, which would be an index out of range deep inside.

    Args:
        encoded: the rows.
        known: number of tokens that the network has an embedding for, if that can be said.
        positions: number of places that it has one for, if there is an end of them.

    Raises:
        DataError: it does not.
    """
    import pyarrow as pa
    from pyarrow import compute

    flat = encoded.data.column("input_ids").combine_chunks()
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    low, high = (value.as_py() for value in compute.min_max(flat).values())
    if known is not None and not 0 <= low <= high < known:
        raise DataError(
            f"The rows have token ids from {low} to {high}, and the network knows those from 0 to {known - 1}: they "
            "are of another tokenizer, or its vocabulary has grown (network.resize_token_embeddings)."
        )
    longest = compute.max(encoded.data.column("length")).as_py()
    # Choices that share a question are numbered from its end on: they may be more than there are places.
    if positions is not None and longest > positions and "segments" not in encoded.column_names:
        row = encoded["length"][:].index(longest)
        raise DataError(
            f"Row {row} has {longest} tokens, and the network has positions for {positions}: cut the rows "
            f"(tokenizer(..., truncation=True, max_length={positions}))."
        )


def digest(encoded: Dataset) -> str:
    """What tells tokenised rows from others: a digest of token ids and labels."""
    found = sha256()
    for part in encoded.select_columns(["input_ids", "labels"]).iter(ROWS_AT_ONCE):
        found.update(json.dumps(part).encode())
    return found.hexdigest()[:16]


def _encoded(split: Split, observation: Observation, encoder: Encoder) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    if not len(split):
        raise DataError(f"Split '{split.name}' of task '{split.spec.name}' has no rows.")
    tables = []
    for rows in _parts(split):
        columns = observation.tokens(encoder, rows, split.spec)
        tables.append(pa.table({name: pa.array(values, _numbers(values)) for name, values in columns.items()}))
    table = pa.concat_tables(tables)
    if split.labelled and "labels" not in table.column_names:
        table = table.append_column("labels", pa.array(encoder.numbers(split.labels(), split.spec).numpy()))
    return numbered(Dataset(table), split.name)


def _parts(split: Split) -> Iterator[list[dict[str, Any]]]:
    """Some rows after the other."""
    for start in range(0, len(split), ROWS_AT_ONCE):
        yield transposed(split.dataset[start : start + ROWS_AT_ONCE])


def _tokenised(data: Dataset, observation: Observation) -> Dataset:
    """A user's own tokenised rows with the columns that a pass over them needs."""
    names = set(data.column_names)
    if "labels" not in names and "label" in names:
        data = data.rename_column("label", "labels")
    data = data.with_format(None)
    _check_ids(data)
    if "labels" in data.column_names:
        labels = data["labels"][:]
        observation.check(labels)
        if observation.label is not None and {type(label) for label in labels} != {observation.label}:
            # Stars from 1 to 5 are real labels, and 1.0 and True are class numbers.
            data = _with_labels(data, [observation.label(label) for label in labels])
    return numbered(data)


def _with_labels(data: Dataset, labels: list[Any]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    table = data.with_format("arrow")[:]
    return Dataset(table.set_column(table.column_names.index("labels"), "labels", pa.array(labels)))


def _check_ids(data: Dataset) -> None:
    """Make sure that token ids are whole numbers, one for each token.

    Raises:
        DataError: they are not, or one is missing.
    """
    import pyarrow as pa

    flat = data.data.column("input_ids").combine_chunks()
    missing = flat.null_count
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
        missing += flat.null_count
    if len(data) and (missing or not pa.types.is_integer(flat.type)):
        found = "missing ones (null)" if missing else f"{flat.type}"
        raise DataError(f"Token ids, 'input_ids', have to be whole numbers, and among them are {found}.")


def _numbers(values: Any) -> Any:
    """Arrow's type of token ids in lists as deep as these, in 32 bits."""
    import pyarrow as pa

    depth, first = 0, values
    while isinstance(first, list):
        first, depth = first[0] if first else None, depth + 1
    kind = pa.int32()
    for _ in range(depth - 1):
        kind = pa.list_(kind)
    return kind
