"""Rows of completions as tokens: what comes before is cut, what follows never, and a text ends once."""

from __future__ import annotations

from typing import Any

import pytest
from causal_scenarios import CHAT, TOKENIZERS, tokenizer_of
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from bayeslora.errors import DataError
from bayeslora.observations import Completions, Encoder, encode
from bayeslora.observations.prompts import tokens
from bayeslora.observations.transcripts import tokens_of, transcript
from bayeslora.tasks import Split, TaskSpec, load_task

SPEC = TaskSpec("own", "completion", ("Question: {question}\nAnswer:",), completion=" {answer}")
CHATS = TaskSpec("own", "completion", messages="messages")
ROW = {"question": "what is this", "answer": "the moon"}
TURNS = [
    {"role": "user", "content": "is it the sun or is it the moon and what is it"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "the moon"},
]


def read(
    tokenizer: PreTrainedTokenizerFast,
    row: dict[str, Any] = ROW,
    spec: TaskSpec = SPEC,
    most: int = 99,
    chat: bool = False,
) -> tuple[list[int], list[int]]:
    return tokens_of(tokenizer, transcript(tokenizer, row, spec, chat), most)


#: A template that writes tools that are called, and a chat with such.
WITH_TOOLS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls %}call "
    "{{ call.function.name }}{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CALLED = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": None}}]},
    {"role": "tool", "content": "the sun"},
    {"role": "assistant", "content": "the sun", "tool_calls": None},
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_begins_and_ends_once(name: str) -> None:
    tokenizer = tokenizer_of(name)
    before, after = read(tokenizer)
    whole = tokens(tokenizer, "Question: what is this\nAnswer: the moon")
    assert before + after == [*whole, tokenizer.eos_token_id]
    assert (before + after).count(tokenizer.eos_token_id) == 1
    assert (before + after).count(1) == int(name != "bytes")  # "<s>"
    assert tokenizer.decode(after, skip_special_tokens=True).strip() == "the moon"
    own = read(tokenizer, {**ROW, "answer": "the moon</s>"})
    assert own == (before, after)


def test_without_a_token_that_ends_texts_there_is_none() -> None:
    tokenizer = tokenizer_of()
    _, ended = read(tokenizer)
    tokenizer.eos_token = None
    assert read(tokenizer)[1] == ended[:-1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_prompt_is_cut_and_the_completion_is_not(name: str) -> None:
    tokenizer = tokenizer_of(name)
    row = {**ROW, "question": "what is this and " * 9 + "the sun"}
    before, after = read(tokenizer, row, most=60)
    assert len(before) + len(after) <= 60 and after == read(tokenizer)[1]
    text = tokenizer.decode(before, skip_special_tokens=True)
    assert text.replace("Question", "", 1).count("what is this") >= 1 and text.endswith("Answer:")
    with pytest.raises(DataError, match="The completion ' the moon the moon .* more than 60, and neither is cut"):
        read(tokenizer, {**ROW, "answer": "the moon " * 30}, most=60)


def test_a_number_is_the_same_text_beside_others_that_are_not_whole() -> None:
    bytewise = tokenizer_of("bytes")
    assert read(bytewise, {"question": 3.0, "answer": 4.0}) == read(bytewise, {"question": "3", "answer": "4"})


def test_chats() -> None:
    tokenizer = tokenizer_of(chat=CHAT)
    before, after = read(tokenizer, {"messages": TURNS}, CHATS, 400)
    text = tokenizer.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(before) == text and tokenizer.decode(after) == "the moon</s>"
    short, same = read(tokenizer, {"messages": TURNS}, CHATS, len(before) + len(after) - 5)
    assert same == after and len(short) == len(before) - 5
    assert "what is it</s>" in tokenizer.decode(short)  # the longest turn lost its end
    first, last = read(tokenizer, chat=True, most=400)
    said = [{"role": "user", "content": "Question: what is this\nAnswer:"}]
    assert tokenizer.decode(first) == tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(last) == " the moon</s>"


def test_what_cannot_be_a_chat_is_refused() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        read(tokenizer_of(), {"messages": TURNS}, CHATS)
    thinking = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}think:{% endif %}"
    with pytest.raises(DataError, match="writes the last turn otherwise"):
        read(tokenizer_of(chat=thinking), {"messages": TURNS}, CHATS, 400)


def test_a_chat_without_anything_to_answer_is_refused() -> None:
    with pytest.raises(DataError, match="Nothing is said before the assistant's turn"):
        read(tokenizer_of(chat=CHAT), {"messages": TURNS[1:2]}, CHATS, 400)


def test_tools_that_are_called_are_written_as_the_template_does() -> None:
    tokenizer = tokenizer_of(chat=WITH_TOOLS)
    before, after = read(tokenizer, {"messages": CALLED}, CHATS, 400)
    assert tokenizer.decode(before) == "user: what is it</s>assistant: call find</s>tool: the sun</s>assistant:"
    assert tokenizer.decode(after) == " the sun</s>"
    before, after = read(tokenizer, {"messages": CALLED[:2]}, CHATS, 400)
    assert tokenizer.decode(before + after) == "user: what is it</s>assistant: call find</s>"
    assert tokenizer.decode(after) == " call find</s>"
    short, same = read(tokenizer, {"messages": CALLED[:2]}, CHATS, len(before) + len(after) - 2)
    assert same == after and len(short) == len(before) - 2


def test_a_template_that_leaves_out_tool_calls_is_refused() -> None:
    for messages in (CALLED, CALLED[:2]):
        with pytest.raises(DataError, match="has a chat template that leaves out tool calls"):
            read(tokenizer_of(chat=CHAT), {"messages": messages}, CHATS, 400)


def test_turns_that_a_template_refuses_are_named() -> None:
    strict = "{% for m in messages %}{{ raise_exception('no tools') if m.role == 'tool' else m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not take the turns user, assistant, tool: no tools"):
        read(tokenizer_of(chat=strict), {"messages": CALLED}, CHATS, 400)
    careless = "{% for m in messages %}{{ m.name + m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not take the turns user: "):
        read(tokenizer_of(chat=careless), {"messages": TURNS[:2]}, CHATS, 400)


def test_no_input_is_not_cut_nor_written() -> None:
    (spec,) = {load_task([{"instruction": "is it", "input": nothing, "output": "yes"}]).spec for nothing in (None, "")}
    row = {"instruction": "what is it " * 9, "input": None, "output": "the moon"}
    tokenizer = tokenizer_of()
    before, after = read(tokenizer, row, spec, 60)
    assert 50 < len(before) + len(after) <= 60 and "None" not in tokenizer.decode(before)
    assert tokenizer.decode(before).startswith("### Instruction:\nwhat") and "Input" not in tokenizer.decode(before)


def test_rows_of_a_task_become_columns() -> None:
    encoder = Encoder(tokenizer_of("bytes-bos"), SPEC, 99)
    rows = Split(Dataset.from_dict({"question": ["what", "is it"], "answer": ["the moon", "yes"]}), SPEC)
    found = encode(rows, Completions(), encoder)
    assert found["labels"][:] == [len(read(encoder.tokenizer, row)[1]) for row in rows.dataset]
    assert [sum(each) for each in found["attention_mask"]] == found["length"][:]
    prompts = encode(Split(rows.dataset.remove_columns("answer"), SPEC), Completions(), encoder)
    assert "labels" not in prompts.column_names
    assert prompts["input_ids"][0] == tokens(encoder.tokenizer, "Question: what\nAnswer:")


def test_what_is_asked_is_never_cut() -> None:
    spec = TaskSpec("program", "completion", ("prompt",), completion="completion")
    prompt = "def f():\n    " + "is it not " * 9 + "\n"
    tokenizer = tokenizer_of()
    (found,) = Completions().asked(Encoder(tokenizer, spec, 20), [{"prompt": prompt, "completion": "    return"}], spec)
    assert len(found) > 20 and tokenizer.decode(found) == prompt


@pytest.mark.parametrize("cue", ["Answer:", "Answer: ", "Answer:\n"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_is_the_same_whether_its_completion_is_known(cue: str, chat: bool) -> None:
    spec = TaskSpec("own", "completion", (f"Question: {{question}}\n{cue}",), completion="answer")
    encoder = Encoder(tokenizer_of(chat=CHAT), spec, 99)
    known, unknown = Completions(chat=chat).asked(encoder, [ROW, {"question": ROW["question"]}], spec)
    assert known == unknown
    if not chat:
        before, after = read(encoder.tokenizer, spec=spec)
        assert before == known  # what was learned from
        assert known == tokens(encoder.tokenizer, f"Question: what is this\n{cue}".rstrip(" "))
