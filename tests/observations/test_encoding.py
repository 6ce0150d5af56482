"""Tokenisation, padding and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bayeslora.errors import DataError, SettingError
from bayeslora.observations import (
    Classes,
    Collator,
    Encoder,
    Observation,
    Padding,
    Value,
    batches,
    digest,
    encode,
    of_task,
)
from bayeslora.observations.choices import ChoiceCollator
from bayeslora.tasks import Split, Task, TaskSpec, build_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "q", *"abcdefgh"]


def make_tokenizer(pairs: bool = True, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if pairs:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(pad_token="[PAD]")


SENTENCES = TaskSpec("sentences", labels=("no", "yes"))
QUIZ = TaskSpec("quiz", "multiple-choice", ("question",), "answer", ("A", "B", "C"), choices=("choices",))


def sentences(lengths: list[int]) -> Split:
    rows = [{"text": " ".join("a" * length), "label": row % 2} for row, length in enumerate(lengths)]
    return build_task(SENTENCES, {"train": rows}).train


def quiz() -> Task:
    rows = [
        {"question": "q a", "choices": ["b", "c d e", "f"], "answer": 1},
        {"question": "q", "choices": ["g", "h"], "answer": 0},
    ]
    return build_task(QUIZ, {"train": rows})


def tokens(encoder: Encoder, data: Any) -> Dataset:
    return encode(data, of_task(encoder.spec), encoder)


def collator(encoder: Encoder) -> Collator:
    return of_task(encoder.spec).collator(encoder.padding)


def words(ids: Any) -> str:
    return " ".join(WORDS[number] for number in ids)


def test_encoded_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokens(Encoder(tokenizer, SENTENCES), sentences([1, 3]))
    assert [words(row) for row in encoded["input_ids"]] == ["[CLS] a [SEP]", "[CLS] a a a [SEP]"]
    assert (encoded["labels"][:], encoded["index"][:], encoded["length"][:]) == ([0, 1], [0, 1], [3, 5])
    assert "text" not in encoded.column_names


def test_a_pair_of_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = TaskSpec("pairs", text=("one", "two"), labels=("no", "yes"))
    split = build_task(spec, {"train": [{"one": "a b", "two": "c", "label": 1}]}).train
    row = tokens(Encoder(tokenizer, spec), split)[0]
    assert words(row["input_ids"]) == "[CLS] a b [SEP] c [SEP]"
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_a_tokenizer_that_does_not_part_a_pair_gets_a_new_line() -> None:
    plain = make_tokenizer(pairs=False, pad_token="[PAD]")
    assert Encoder(plain, SENTENCES).separator == "\n"
    assert Encoder(make_tokenizer(pad_token="[PAD]"), SENTENCES).separator == ""


def test_more_rows_than_are_encoded_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [1 + row % 5 for row in range(2345)]
    encoded = tokens(Encoder(tokenizer, SENTENCES), sentences(lengths))
    assert [length - 2 for length in encoded["length"]] == lengths
    assert encoded["index"][:] == list(range(2345))


@pytest.mark.parametrize(
    ("max_length", "model_limit", "limit", "expected"),
    [(6, 512, None, 6), (256, 5, None, 5), (256, 512, 4, 4), (256, 512, None, 256)],
)
def test_long_texts_are_cut(max_length: int, model_limit: int, limit: int | None, expected: int) -> None:
    short = make_tokenizer(pad_token="[PAD]", model_max_length=model_limit)
    encoder = Encoder(short, SENTENCES, max_length=max_length, limit=limit)
    encoded = tokens(encoder, sentences([300]))
    assert encoded["length"][:] == [expected]
    assert encoded["input_ids"][0][-1] == WORDS.index("[SEP]")
    assert encoder.most == min(model_limit, limit or model_limit)


def test_rows_that_are_cut_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(make_tokenizer(pad_token="[PAD]"), SENTENCES, max_length=9)
    read: list[Any] = []
    pairs = encoder._pairs
    monkeypatch.setattr(encoder, "_pairs", lambda texts, length: read.extend(texts) or pairs(texts, length))
    assert encoder.cut(sentences([1, 7, 8, 40])) == 2
    assert len(read) == 3  # the shortest is known to be whole
    assert [Encoder(make_tokenizer(pad_token="[PAD]"), QUIZ, length).cut(quiz().train) for length in (7, 8)] == [1, 0]


def test_choices_of_a_row_are_pairs_with_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokens(Encoder(tokenizer, QUIZ), quiz().train)
    assert [words(choice) for choice in encoded["input_ids"][0]] == [
        "[CLS] q a [SEP] b [SEP]",
        "[CLS] q a [SEP] c d e [SEP]",
        "[CLS] q a [SEP] f [SEP]",
    ]
    assert [words(choice) for choice in encoded["input_ids"][1]] == [f"[CLS] q [SEP] {x} [SEP]" for x in "gh"]
    assert (encoded["length"][:], encoded["labels"][:]) == ([8, 5], [1, 0])


def test_a_multiple_choice_batch_marks_the_choices_that_exist(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, QUIZ)
    (batch,) = batches(tokens(encoder, quiz().train), collator(encoder), 2)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 3, 8)
    assert batch["choice_mask"].dtype == torch.bool
    assert batch["choice_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["attention_mask"].sum(-1).tolist() == [[6, 8, 6], [5, 5, 1]]
    assert words(batch["input_ids"][1, 1, :5]) == "[CLS] q [SEP] h [SEP]"


def test_every_multiple_choice_batch_is_as_wide_as_the_task(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, QUIZ)
    widths = {batch["input_ids"].shape[1] for batch in batches(tokens(encoder, quiz().train), collator(encoder), 1)}
    assert widths == {QUIZ.max_choices} == {3}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side: Any) -> None:
    collate = Collator(Padding({"input_ids": 9, "attention_mask": 0}, side))
    batch = collate([{"input_ids": [1, 2, 3, 4, 5], "labels": 1}, {"input_ids": [6], "labels": 0}])
    last = [6] + [9] * 4 if side == "right" else [9] * 4 + [6]
    assert batch["input_ids"][1].tolist() == last
    assert batch["attention_mask"].sum(-1).tolist() == [5, 1]
    assert batch["attention_mask"][1].bool().tolist() == [number == 6 for number in last]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(("values", "kind"), [([0, 1], torch.int64), ([0.5, 2.0], torch.float32)])
def test_types_of_labels(values: list[Any], kind: torch.dtype) -> None:
    batch = Collator()([{"input_ids": [1], "labels": value} for value in values])
    assert batch["labels"].dtype == kind
    assert batch["labels"].tolist() == values


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_hold_every_row_once_whatever_their_size(tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    lengths = [4, 1, 7, 2, 2, 9, 3, 1, 5, 6]
    split = sentences(lengths)
    encoder = Encoder(tokenizer, SENTENCES)
    found, labels = torch.zeros(10, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)
    longest = []
    for batch in batches(tokens(encoder, split), collator(encoder), batch_size):
        found[batch["index"]] += batch["attention_mask"].sum(-1)
        labels[batch["index"]] = batch["labels"]
        longest.append(batch["input_ids"].shape[1])
    assert (found - 2).tolist() == lengths
    assert labels.equal(split.labels())
    assert longest == sorted(longest, reverse=True)


def test_rows_without_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    split = Split(Dataset.from_dict({"text": ["a", "b"]}), SENTENCES)
    encoder = Encoder(tokenizer, SENTENCES)
    (batch,) = batches(tokens(encoder, split), collator(encoder), 2)
    assert "labels" not in batch


def test_a_users_own_tokenised_rows_pass_through() -> None:
    own = Dataset.from_dict({"input_ids": [[5, 6], [7]], "label": [1, 0], "note": ["x", "y"]})
    encoded = encode(own, Classes(2))
    assert (encoded["input_ids"][:], encoded["labels"][:]) == ([[5, 6], [7]], [1, 0])
    assert (encoded["index"][:], encoded["length"][:]) == ([0, 1], [2, 1])
    (batch,) = batches(encoded, Collator(), 2)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}


def test_rows_of_a_subset_are_numbered_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, SENTENCES)
    subset = tokens(encoder, sentences([1, 2, 3, 4])).select([3, 1])
    (batch,) = batches(subset, collator(encoder), 4)
    assert batch["index"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(-1).tolist() == [6, 4]


def test_the_end_token_stands_in_for_padding() -> None:
    assert Encoder(make_tokenizer(eos_token="[SEP]"), SENTENCES).padding.values["input_ids"] == WORDS.index("[SEP]")


def test_nothing_is_left_behind(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = Encoder(tokenizer, SENTENCES)
    encoded = tokens(encoder, sentences([1, 2]).select([1]))
    assert len(list(batches(encoded, collator(encoder), 1))) == 1
    assert encoded.cache_files == []
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_pad() -> None:
    with pytest.raises(DataError, match="no padding token: set one"):
        Encoder(make_tokenizer(), SENTENCES)


def test_rows_without_an_encoder() -> None:
    with pytest.raises(DataError, match="expected a column 'input_ids', or an encoder"):
        encode(sentences([1]), Classes(2))


def test_a_split_without_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="Split 'train' of task 'sentences' has no rows"):
        tokens(Encoder(tokenizer, SENTENCES), sentences([1]).select([]))


def test_a_text_without_tokens() -> None:
    plain = make_tokenizer(pairs=False, pad_token="[PAD]")
    split = Split(Dataset.from_dict({"text": ["a", ""], "label": [0, 1]}), SENTENCES, "train")
    with pytest.raises(DataError, match="Row 1 of split 'train' has no tokens"):
        tokens(Encoder(plain, SENTENCES), split)


@pytest.mark.parametrize(
    ("label", "message"),
    [(2, "label 2; expected a class number from 0 to 1"), ([1], "Row 0 has label .1.; expected a class number")],
)
def test_tokenised_rows_with_other_labels(tokenizer: PreTrainedTokenizerFast, label: Any, message: str) -> None:
    own = Dataset.from_dict({"input_ids": [[5]], "labels": [label]})
    with pytest.raises(DataError, match=message):
        tokens(Encoder(tokenizer, SENTENCES), own)


@pytest.mark.parametrize(
    ("observation", "labels", "expected"),
    [
        (Value(), [1, 5, 3], [1.0, 5.0, 3.0]),
        (Classes(3), [2.0, 0.0, 1.0], [2, 0, 1]),
        (Classes(2), [True, False], [1, 0]),
    ],
)
def test_labels_of_tokenised_rows_have_the_type_of_what_is_observed(
    observation: Observation, labels: list[Any], expected: list[Any]
) -> None:
    own = Dataset.from_dict({"input_ids": [[5]] * len(labels), "labels": labels})
    encoded = encode(own, observation, None)
    assert encoded["labels"][:] == expected and {type(label) for label in encoded["labels"]} == {type(expected[0])}
    plain = Dataset.from_dict({"input_ids": [[5]] * len(labels), "labels": expected})
    assert digest(encoded) == digest(encode(plain, observation, None))


def test_tokenised_data_without_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        encode(Dataset.from_dict({"input_ids": []}), Classes(2))


def test_more_choices_than_the_task_has() -> None:
    with pytest.raises(DataError, match="3 choices, expected at most 2"):
        ChoiceCollator(choices=2)([{"input_ids": [[1], [2], [3]]}])


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_no_sizes(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    with pytest.raises(SettingError, match=f"max_length is {size}"):
        Encoder(tokenizer, SENTENCES, max_length=size)
    with pytest.raises(SettingError, match=f"batch_size is {size}"):
        next(batches(Dataset.from_dict({"input_ids": [[1]]}), Collator(), size))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1.0, 2.0]], "'input_ids', have to be whole numbers, and among them are double"),
        ([["a"]], "among them are string"),
        ([[1, None]], "among them are missing ones"),
        ([[1], None], "among them are missing ones"),
        ([[[1], [2, None]]], "among them are missing ones"),
    ],
)
def test_token_ids_that_are_none(ids: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(Dataset.from_dict({"input_ids": ids}), Classes(2))
