"""Templates are filled, cut where they may be, and tokenised as one text that goes on."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bayeslora.errors import DataError
from bayeslora.observations.prompts import continuation, rendered, tokens

CUE = "Read: {passage}\nAsk: {question}\nSay:"
CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """A token for each byte, "<s>" before a text and "</s>" behind it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **settings)


def test_a_text_begins_once_and_does_not_end() -> None:
    read = tokenizer()
    assert read("ab")["input_ids"][::3] == [0, 1]
    assert tokens(read, "ab") == read("ab")["input_ids"][:-1]
    assert tokens(read, "<s>ab") == tokens(read, "ab")


@pytest.mark.parametrize(("passage", "question"), [(90, 9), (9, 90), (90, 70), (0, 90), (3, 3)])
def test_the_longest_field_loses_its_end(passage: int, question: int) -> None:
    read, row = tokenizer(), {"passage": "p" * passage, "question": "q" * question}
    text = rendered(read, CUE, row, 60)
    assert len(tokens(read, text)) == min(60, len(tokens(read, CUE.format(**row))))
    assert text.startswith("Read: p" if passage else "Read: \n") and text.endswith("\nSay:")
    kept = {"passage": text.count("p"), "question": text.count("q")}
    if min(passage, question) > 60:
        assert abs(kept["passage"] - kept["question"]) <= 1
    else:
        assert kept[min(kept, key=lambda name: len(row[name]))] == min(passage, question)


@pytest.mark.parametrize("room", range(3, 18))
def test_characters_of_several_tokens_are_not_parted(room: int) -> None:
    read, text = tokenizer(), "a\N{GRINNING FACE}b\N{GRINNING FACE}\N{HIRAGANA LETTER A}"
    found = rendered(read, "{text}:", {"text": text}, room)
    assert found[:-1] == max((text[:end] for end in range(6) if len(text[:end].encode()) <= room - 2), key=len)


def test_a_whole_number_has_no_point() -> None:
    assert rendered(tokenizer(), "{a} of {b}", {"a": 3.0, "b": 2.5}, 60) == "3 of 2.5"


def test_the_templates_own_words_stay() -> None:
    read, row = tokenizer(), {"passage": "p" * 30, "question": "q" * 90}
    assert rendered(read, CUE, row, 18) == CUE.format(passage="", question="")
    with pytest.raises(DataError, match="What is never cut of the template .* has 18 tokens, .* room for 17"):
        rendered(read, CUE, row, 17)


def test_chat_is_counted() -> None:
    read = tokenizer(chat_template=CHAT)
    text = rendered(read, "{question}", {"question": "q" * 90}, 40, chat=True)
    assert text.startswith("<s>user: qq") and text.endswith("q\nassistant:") and len(tokens(read, text)) == 40
    with pytest.raises(DataError, match="has no chat template"):
        rendered(tokenizer(), "{question}", {"question": "q"}, 40, chat=True)


def test_a_continuation_takes_the_blank_before_it() -> None:
    read = tokenizer()
    for text, more in (("ab:", " c"), ("ab: ", "c")):
        first, second = continuation(read, text, more)
        assert first == tokens(read, "ab:") and second == read(" c", add_special_tokens=False)["input_ids"]
    assert continuation(read, "ab:\n", "  c")[0] == tokens(read, "ab:\n")  # a line that has ended
    with pytest.raises(DataError, match="Nothing follows"):
        continuation(read, "ab", "")
