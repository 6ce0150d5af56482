"""Completions: a prompt and the text that follows it, or a chat of which the last turn is the assistant's."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bayeslora.errors import TaskError
from bayeslora.tasks.kinds import Kind, Texts
from bayeslora.tasks.sources import column, fields_of, pick, render

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks.spec import TaskSpec

__all__ = ["COMPLETION", "USUAL", "Completion", "chat_of", "completion_of", "template_of", "turns_of", "usual"]

INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n{instruction}\n\n", "### Input:\n{input}\n\n", "### Response:\n"
#: What columns of the usual names mean: pairs, chats, instructions as in Alpaca, and multiple choice as in ARC.
FORMATS: tuple[dict[str, str], ...] = (
    {"text": "prompt", "completion": "completion"},
    {"messages": "messages"},
    {"text": INSTRUCTION + INPUT + RESPONSE, "completion": "output"},
    {"text": INSTRUCTION + RESPONSE, "completion": "output"},
    {"text": "question", "label": "answerKey", "choices": "choices.text", "choice_keys": "choices.label"},
)
#: Columns of rows whose kind their labels tell.
PLAIN = frozenset({"text", "label"})
#: Columns that tell of one of the formats, or that none is meant.
USUAL = PLAIN.union(name.split(".")[0] for each in FORMATS for text in each.values() for name in fields_of(text))


class Completion(Kind):
    """A row has a text to go on from, and the text that follows."""

    def check(self, spec: TaskSpec) -> None:
        """One text and its completion, or messages."""
        pair = len(spec.text) == 1 and spec.completion is not None
        if pair == (spec.messages is not None):
            raise TaskError(
                f"Task '{spec.name}': completions need one text, the prompt, and completion=, what follows it; or else "
                "messages=, the field of a chat."
            )

    def values(self, rows: Dataset, spec: TaskSpec, split: str) -> list[Any]:
        """The completions."""
        for name in fields_of(spec.answer):
            column(rows, name, split)
        return [completion_of(spec, row) for row in rows]

    def minus_one_is_none(self, spec: TaskSpec, values: Sequence[Any]) -> bool:
        """Never: it is a text like any other."""
        return False

    def read(self, rows: Dataset, values: Sequence[Any], spec: TaskSpec, split: str) -> list[int] | list[float]:
        """A one for each completion: how many tokens it has a tokenizer will say."""
        return [1] * len(values)

    def holds(self, spec: TaskSpec, name: str) -> str:
        """A chat, or a text."""
        chat = "a chat: a list of turns, each with a role, and with content or tool calls"
        return chat if name == spec.messages else super().holds(spec, name)

    def parts(self, spec: TaskSpec, name: str, value: Any) -> list[Any] | None:
        """What the turns of a chat say; of instructions nothing is an input like any other."""
        if value is None and name == "input" and INPUT in spec.text[0]:
            return [""]
        if name != spec.messages:
            return super().parts(spec, name, value)
        turns = value if isinstance(value, list) else []
        if not turns or not all(isinstance(turn, dict) and turn.get("role") for turn in turns):
            return None
        said = [_said(turn) for turn in turns]
        return None if None in said else said

    def texts(self, spec: TaskSpec, row: Mapping[str, Any]) -> Texts:
        """Prompt, a line for each turn of a chat, and completion."""
        if spec.messages is None:
            prompt = render(template_of(spec, row), row)
        else:
            prompt = "\n".join(f"{turn['role']}: {_said(turn)}" for turn in turns_of(spec, row))
        return [(prompt, completion_of(spec, row))]

    def render(self, spec: TaskSpec, texts: Texts, label: float | None) -> str:
        """The prompt, and an arrow at what follows."""
        prompt, answer = texts[0]
        return f"{prompt}\n-> {answer}"


COMPLETION = Completion()


def completion_of(spec: TaskSpec, row: Mapping[str, Any]) -> str | None:
    """What follows in a row; None if nothing does."""
    if spec.messages is not None:
        last = chat_of(spec, row)[-1]
        return str(_said(last)) if last["role"] == "assistant" else None
    fields = fields_of(spec.answer)
    if not all(name.partition(".")[0] in row for name in fields):
        return None
    # Words of the template alone are no completion.
    there = any(value is not None and str(value).strip() for value in (pick(dict(row), name) for name in fields))
    return render(spec.answer, row) if there else None


def template_of(spec: TaskSpec, row: Mapping[str, Any]) -> str:
    """The template of a row's prompt: the usual one of instructions has a part for the input, where there is one."""
    template = spec.text[0]
    if INPUT not in template:
        return template
    given = pick(dict(row), "input")
    return template if given is not None and str(given).strip() else template.replace(INPUT, "")


def chat_of(spec: TaskSpec, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a chat, without the nulls that a table has for what other turns say."""
    found: list[dict[str, Any]] = _present(pick(dict(row), str(spec.messages)))
    return found


def turns_of(spec: TaskSpec, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a chat but for the completion."""
    turns = chat_of(spec, row)
    return turns if completion_of(spec, row) is None else turns[:-1]


def usual(columns: Collection[str]) -> dict[str, str]:
    """What columns mean by their names, if they are those of a format; nothing if there are a text and a label."""
    if {*columns} >= PLAIN:
        return {}
    for each in FORMATS:
        if {name for text in each.values() for name in fields_of(text)} <= {*columns}:
            return {"kind": "multiple-choice" if "choices" in each else "completion", **each}
    return {}


def _said(turn: Mapping[str, Any]) -> Any:
    """What a turn says, for the eye: its content, or else the tools that it calls; None if it has neither."""
    content, calls = turn.get("content"), turn.get("tool_calls")
    return json.dumps(_present(calls), ensure_ascii=False) if calls and not str(content or "").strip() else content


def _present(value: Any) -> Any:
    """What there is of nested lists and mappings, without nulls."""
    if isinstance(value, Mapping):
        return {key: _present(each) for key, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value
