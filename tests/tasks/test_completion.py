"""Completions as a kind of task: pairs, chats and instructions, by their usual names or as they are described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scenarios import write_rows

from bayeslora.errors import DataError, TaskError
from bayeslora.tasks import TaskSpec, load_task, reload_task, rows_of
from bayeslora.tasks.completion import chat_of, completion_of

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ALPACA = {"instruction": "add", "output": "3"}
CALLS = [{"type": "function", "function": {"name": "find", "arguments": {"what": "sun"}}}]
TOOLS = [
    {"role": "user", "content": "sun"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "content": "up"},
]


@pytest.mark.parametrize(
    ("row", "note", "rendered"),
    [
        ({"prompt": "a", "completion": "b"}, "columns 'prompt' and 'completion' are read as prompts", "a\n-> b"),
        ({"messages": CHAT}, "column 'messages' is read as chats", "user: hi\n-> hello"),
        (ALPACA, "'instruction' and 'output'", "### Instruction:\nadd\n\n### Response:\n\n-> 3"),
        (
            {**ALPACA, "input": "1 2"},
            "'instruction' and 'input' and 'output'",
            "### Instruction:\nadd\n\n### Input:\n1 2",
        ),
    ],
)
def test_usual_columns_are_recognised_and_said(tmp_path: Path, row: dict[str, Any], note: str, rendered: str) -> None:
    write_rows(tmp_path / "own.jsonl", [row] * 3)
    for task in (load_task([row] * 3), load_task(tmp_path / "own.jsonl")):
        assert task.spec.kind == "completion" and note in task.summary() and "Unasked" in task.summary()
        assert task.train.render(0).startswith(rendered) and task.train.labelled
    assert reload_task(task.to_dict()).spec == task.spec


def test_multiple_choice_as_in_arc_is_recognised(tmp_path: Path) -> None:
    choices = {"text": ["sun", "moon", "sea"], "label": ["1", "2", "3"]}
    rows = [{"id": "a", "question": "What shines?", "choices": choices, "answerKey": key} for key in "13"]
    write_rows(tmp_path / "own.jsonl", rows)
    for task in (load_task(rows), load_task(tmp_path / "own.jsonl")):
        assert "Unasked, columns 'question', 'choices' and 'answerKey' are read as multiple" in task.summary()
        assert task.train.labels().tolist() == [0, 2] and task.spec.labels == ("A", "B", "C")
        assert task.train.render(0).startswith("* What shines? | sun\n  What")
    assert reload_task(task.to_dict()).train.labels().tolist() == [0, 2]
    lists = [{**row, "choices": ["sun", "moon"]} for row in rows]
    with pytest.raises(DataError, match="give choices=COLUMN, too"):
        load_task(lists)
    plain = [{**row, "text": "a", "label": number} for number, row in enumerate(rows)]
    assert load_task(plain).spec.kind == "classification"


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_instructions_without_an_input_have_no_part_for_it(nothing: str | None, tmp_path: Path) -> None:
    rows = [{**ALPACA, "input": "1 2"}, {**ALPACA, "input": nothing}]
    write_rows(tmp_path / "own.jsonl", rows)
    for task in (load_task(rows), load_task(tmp_path / "own.jsonl"), load_task(pd.DataFrame(rows))):
        assert task.train.render(0) == "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n\n-> 3"
        assert task.train.render(1) == "### Instruction:\nadd\n\n### Response:\n\n-> 3"
    assert not rows_of(task.spec, [{"instruction": "add", "input": nothing}]).labelled


def test_what_a_turn_calls_is_what_it_says(tmp_path: Path) -> None:
    rows = [{"messages": [*TOOLS, *CHAT]}, {"messages": TOOLS[:2]}]
    write_rows(tmp_path / "own.jsonl", rows)
    for task in (load_task(rows), load_task(tmp_path / "own.jsonl")):
        spec, train = task.spec, task.train.dataset
        assert chat_of(spec, train[0]) == [
            {key: value for key, value in turn.items() if value is not None} for turn in rows[0]["messages"]
        ]
        assert completion_of(spec, train[0]) == "hello" and json.loads(str(completion_of(spec, train[1]))) == CALLS
        assert task.train.render(1) == f"user: sun\n-> {json.dumps(CALLS)}" and task.train.labelled


def test_text_and_label_come_first() -> None:
    rows = [{"text": "a", "label": number, "prompt": "c", "completion": "d"} for number in (0, 1)]
    assert load_task(rows).spec.kind == "classification"


def test_what_is_said_is_done() -> None:
    rows = [{"q": "a", "a": 1}, {"q": "b", "a": 2}]
    task = load_task(rows, text="Q: {q}", completion=" {a}")
    assert task.spec.kind == "completion" and task.train.render(1) == "Q: b\n->  2" and task.notes == ()
    assert load_task([{"talk": CHAT}], messages="talk").train.labelled
    with pytest.raises(DataError, match="1 of 2 rows .* have no label in 'A: {a}': row 1"):  # but the template's words
        load_task([{"q": "a", "a": "1"}, {"q": "b", "a": " "}], text="q", completion="A: {a}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": "hi"}], "Row 0 .* a str in column 'messages', expected a chat"),
        ([{"messages": [{"role": "user"}]}], "expected a chat"),
        (
            [{"messages": [{"role": "user", "content": None}, *CHAT]}],
            "Row 0 .* expected a chat: a list of turns, each with a role, and with content or tool calls[.]$",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], "no value in column 'prompt'"),
        ([{"instruction": None, "input": "a", "output": "b"}], "no value in column 'instruction'"),
        ([{"instruction": " ", "input": None, "output": "b"}], "1 of 1 rows .* have no text .* row 0"),
        ([{"messages": CHAT}, {"messages": CHAT[:1]}], "1 of 2 rows .* have no label in 'messages': row 1"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], "'completion': row 1"),
        ([{"prompt": "a", "completion": ""}], "No row of the training split"),
        ([{"prompt": " ", "completion": "b"}], "1 of 1 rows .* have no text .* row 0"),
    ],
)
def test_rows_without_what_is_needed_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(rows)


def test_a_completion_may_be_minus_one() -> None:
    assert load_task([{"prompt": "0-1=", "completion": "-1"}]).train.labelled


def test_rows_to_go_on_from_have_no_completion() -> None:
    spec = TaskSpec("own", "completion", ("prompt",), completion=" {completion}")
    assert not rows_of(spec, ["a", "b"]).labelled
    assert not rows_of(TaskSpec("own", "completion", messages="messages"), [{"messages": CHAT[:1]}]).labelled


@pytest.mark.parametrize(
    "given", [{}, {"completion": "a", "messages": "b"}, {"text": ("a", "b"), "completion": "c"}, {"text": ("a",)}]
)
def test_a_task_of_completions_says_what_they_are(given: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="completions need one text"):
        TaskSpec("own", "completion", **given)
