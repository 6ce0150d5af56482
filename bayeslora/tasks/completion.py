"""Completions: a prompt and the text that follows it, or a chat of which the last turn is the assistant's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bayeslora.errors import TaskError
from bayeslora.tasks.kinds import Kind, Texts
from bayeslora.tasks.sources import column, fields_of, pick, render

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks.spec import TaskSpec

__all__ = ["COMPLETION", "USUAL", "Completion", "completion_of", "turns_of", "usual"]

INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n{instruction}\n\n", "### Input:\n{input}\n\n", "### Response:\n"
#: What columns of the usual names mean: pairs, chats, and instructions as in Alpaca.
FORMATS: tuple[dict[str, str], ...] = (
    {"text": "prompt", "completion": "completion"},
    {"messages": "messages"},
    {"text": INSTRUCTION + INPUT + RESPONSE, "completion": "output"},
    {"text": INSTRUCTION + RESPONSE, "completion": "output"},
)
#: Columns that tell of one of them, or that none is meant.
USUAL = ("text", "label", "prompt", "completion", "messages", "instruction", "input", "output")


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
        chat = "a chat: a list of turns with a role and content each"
        return chat if name == spec.messages else super().holds(spec, name)

    def parts(self, spec: TaskSpec, name: str, value: Any) -> list[Any] | None:
        """What the turns of a chat say."""
        if name != spec.messages:
            return super().parts(spec, name, value)
        turns = value if isinstance(value, list) else []
        if not turns or not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            return None
        return [turn["content"] for turn in turns]

    def texts(self, spec: TaskSpec, row: Mapping[str, Any]) -> Texts:
        """Prompt, a line for each turn of a chat, and completion."""
        if spec.messages is None:
            prompt = render(spec.text[0], row)
        else:
            prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns_of(spec, row))
        return [(prompt, completion_of(spec, row))]

    def render(self, spec: TaskSpec, texts: Texts, label: float | None) -> str:
        """The prompt, and an arrow at what follows."""
        prompt, answer = texts[0]
        return f"{prompt}\n-> {answer}"


COMPLETION = Completion()


def completion_of(spec: TaskSpec, row: Mapping[str, Any]) -> str | None:
    """What follows in a row; None if nothing does."""
    if spec.messages is not None:
        last = pick(dict(row), spec.messages)[-1]
        return str(last["content"]) if last["role"] == "assistant" else None
    fields = fields_of(spec.answer)
    if not all(name.partition(".")[0] in row for name in fields):
        return None
    # Words of the template alone are no completion.
    there = any(value is not None and str(value).strip() for value in (pick(dict(row), name) for name in fields))
    return render(spec.answer, row) if there else None


def turns_of(spec: TaskSpec, row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns of a chat but for the completion."""
    turns: list[dict[str, str]] = pick(dict(row), str(spec.messages))
    return turns if completion_of(spec, row) is None else turns[:-1]


def usual(columns: Collection[str]) -> dict[str, str]:
    """What columns mean by their names, if they are those of completions; nothing if there are a text and a label."""
    if {"text", "label"} <= {*columns}:
        return {}
    return next((each for each in FORMATS if _fields(each) <= {*columns}), {})


def _fields(meaning: Mapping[str, str]) -> set[str]:
    return {name for text in meaning.values() for name in fields_of(text)}
