"""How rows become a question and the texts of its choices, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from causal_scenarios import CHAT, POSITIONS
from choice_scenarios import ROWS, SPEC, program, rows, scores
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import bayeslora as bl
from bayeslora.errors import DataError, SettingError
from bayeslora.observations import Encoder, TextChoices, build, of_task
from bayeslora.passes import Rows
from bayeslora.tasks import Split, TaskSpec


def test_what_is_too_long_loses_the_end_of_its_question() -> None:
    found = program(max_length=40)
    long = rows(ask=["moon " * 60, *ROWS["ask"][1:]])
    encoded = Rows.of(found, long).dataset
    tokenizer: Any = found.encoder.tokenizer
    parts = [tokenizer.decode(part) for part in parts_of(encoded[0])]
    assert parts[0].startswith("Question: moon moon") and parts[0].endswith("moon\nAnswer:")
    assert parts[1:] == [" yes", " it is not good"]
    lengths = [len(part) for part in parts_of(encoded[0])]
    assert lengths[0] + max(lengths[1:]) == 40
    assert encoded[1]["input_ids"] == Rows.of(program(), rows()).dataset[1]["input_ids"]


def parts_of(row: dict[str, Any]) -> list[list[int]]:
    pairs = list(zip(row["segments"], row["input_ids"], strict=True))
    return [[token for number, token in pairs if number == part] for part in range(1 + len(row["sizes"]))]


def test_a_token_over_the_end_of_the_question_is_the_choices() -> None:
    pairs = [(" ", "y"), (":", " y")]
    vocabulary = {token: number for number, token in enumerate(["a", ":", " ", "y", "n", " y", ": y"])}
    read = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, pairs)), pad_token="a")
    encoder = Encoder(read, TaskSpec(**{**SPEC.to_dict(), "question": "{ask}:"}), 8)
    found = TextChoices(3).tokens(encoder, [{"ask": "a", "choices": ["n", "y"]}], encoder.spec)
    parts = parts_of({name: values[0] for name, values in found.items()})
    assert [read.convert_ids_to_tokens(part) for part in parts] == [["a"], [":", " ", "n"], [": y"]]


def test_a_choice_fills_the_blank() -> None:
    spec = TaskSpec("blanks", "multiple-choice", ("ask",), "label", ("A", "B"), choices=("one", "two"), blank="_")
    columns = {"ask": ["Is the _ dull", "The moon _"], "one": ["sun", "no"], "two": ["dull moon", "A"], "label": [0, 1]}
    found = program()
    found.encoder.spec = spec
    encoded = Rows.of(found, Split(Dataset.from_dict(columns), spec)).dataset
    tokenizer: Any = found.encoder.tokenizer
    assert [tokenizer.decode(part) for part in parts_of(encoded[0])] == ["Is the", " sun dull", " dull moon dull"]
    assert [tokenizer.decode(part) for part in parts_of(encoded[1])] == ["The moon", " no", " A"]
    with pytest.raises(DataError, match="The question '' has no tokens that choices could follow"):
        Rows.of(found, Split(Dataset.from_dict(columns | {"ask": ["_ is dull", "The moon _"]}), spec))


def test_a_task_has_a_template_of_its_own() -> None:
    spec = TaskSpec(**{**SPEC.to_dict(), "question": "{hint} {ask}?"})
    split = Split(Dataset.from_dict(ROWS | {"hint": ["A stone"] * 4}), spec)
    found = program()
    found.encoder.spec = spec
    tokenizer: Any = found.encoder.tokenizer
    encoded = Rows.of(found, split).dataset
    assert tokenizer.decode(parts_of(encoded[0])[0]) == "A stone Is the film good?"
    given = {"text": "ask", "choices": "choices"}
    task = bl.load_task(Dataset.from_dict(ROWS), question="Q: {ask}", **given)
    assert task.spec.question == "Q: {ask}"
    with pytest.raises(DataError, match="hint"):
        bl.load_task(Dataset.from_dict(ROWS), question="{hint} {ask}?", **given)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"choices": [["yes", " "], *ROWS["choices"][1:]]}, "choice of the question 'Question: Is the film good"),
        ({"choices": [["yes", "moon " * 70], *ROWS["choices"][1:]]}, "leave no room for it in 64 tokens"),
        ({"choices": [["yes", "moon " * 60], *ROWS["choices"][1:]]}, "What is never cut of the template"),
    ],
)
def test_choices_that_cannot_be_read(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Rows.of(program(), rows(**columns))


def test_rows_that_are_tokenised_have_to_be_packed() -> None:
    found = program()
    encoded = Rows.of(found, rows()).dataset
    assert torch.equal(scores(found, encoded), scores(found, rows()))
    with pytest.raises(DataError, match="no column 'segments'"):
        scores(found, encoded.remove_columns("segments"))
    with pytest.raises(DataError, match="A row has 4 choices, expected at most 3"):
        scores(found, encoded.map(lambda row: {"sizes": [1, 1, 1, 1]}))


def test_settings() -> None:
    assert of_task(SPEC, causal=True) == TextChoices(3)
    assert of_task(SPEC, "text-choices", settings={"likelihood": "byte"}) == TextChoices(3, "byte")
    assert build(TextChoices(3, "byte").to_dict()) == TextChoices(3, "byte")
    with pytest.raises(SettingError, match="'bytes'. Did you mean 'byte'"):
        build({"name": "text-choices", "classes": 3, "likelihood": "bytes"})


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_question_may_be_what_a_user_says_in_a_chat(side: str) -> None:
    found = program(side=side, chat=CHAT, max_length=POSITIONS, observation_settings={"chat": True})
    tokenizer: Any = found.encoder.tokenizer
    scored = scores(found, rows())
    for number, row in enumerate(rows().dataset):
        asked = [{"role": "user", "content": f"Question: {row['ask']}\nAnswer:"}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        for place, choice in enumerate(row["choices"]):
            # The assistant's line begins with its answer, without a blank.
            one, two = (tokenizer(each)["input_ids"] for each in (text, f"{text}{choice}"))
            with torch.no_grad():
                logits = found.network(input_ids=torch.tensor([two])).logits[0, len(one) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(two[len(one) :])[:, None]).sum()
            torch.testing.assert_close(scored[number, place], expected, rtol=1e-4, atol=1e-4)
    (asked_of,) = found.observation.asked(found.encoder, [rows().dataset[0]], SPEC)
    assert tokenizer.decode(asked_of).endswith("Answer:</s>\n<|assistant|>\n")


def test_chats_that_text_choices_cannot_be_asked_in() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        scores(program(observation_settings={"chat": True}), rows())
    found = program(chat=CHAT, observation_settings={"chat": True})
    spec = TaskSpec("blanks", "multiple-choice", ("ask",), choices=("choices",), labels=SPEC.labels, blank="_")
    with pytest.raises(DataError, match="fill a blank in the question.*leave out chat=True"):
        scores(found, Split(rows(ask=["The _ is dull"] * 4).dataset, spec))


def test_a_choice_at_the_beginning_of_a_line_has_no_blank() -> None:
    encoder = program().encoder
    assert encoder is not None
    found = TextChoices(3).tokens(encoder, [rows().dataset[0]], replace(SPEC, question="{ask}?\n"))
    parts = parts_of({name: values[0] for name, values in found.items()})
    assert [encoder.tokenizer.decode(part) for part in parts] == ["Is the film good?\n", "yes", "it is not good"]


def test_blanks_at_the_end_of_a_question_are_those_of_its_choices() -> None:
    encoder = program().encoder
    assert encoder is not None
    found = [
        TextChoices(3).tokens(encoder, [rows().dataset[0]], replace(SPEC, question=f"{{ask}}?{blanks}"))
        for blanks in ("", " ", "  ")
    ]
    assert found[0] == found[1] == found[2]
