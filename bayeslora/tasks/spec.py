"""What the columns of a data set mean, and the tasks that are known by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

from bayeslora.errors import TaskError, unknown
from bayeslora.registry import Registry
from bayeslora.tasks.kinds import KINDS, Kind
from bayeslora.tasks.sources import fields_of

__all__ = ["DEMO", "TASKS", "TaskSpec", "aliases", "check_compatible", "find_task", "task_names"]

#: Path of the rows that ship with the package, wherever that is.
DEMO = "demo"


@dataclass(frozen=True)
class TaskSpec:
    """What the columns of a data set mean: plain data, kept with every posterior.

    A field is a column or, as in "choices.text", a part of one. Of several names one alone may be given as it is.

    Attributes:
        name: of the task.
        kind: name of its kind: "classification", "regression", "multiple-choice" or "completion".
        text: one or two texts of a row, each a field or a template such as "{context} {question}".
        label: field of the class (its number or name), the value, or the answer.
        labels: class names in the order of their numbers; for multiple choice, names of the choices; else
            empty.
        choices: field with the list of choices, or one field for each choice.
        choice_keys: field with the names of a row's choices, or the names themselves; an answer is looked up
            among them. Empty where the answer is the number of a choice, from 0.
        blank: mark in the text that a choice fills.
        prompt: template by which a causal language model is asked for a class or a lettered choice, with a cue at its
            end; ``{choices}`` stands for the choices. By default all texts, the choices and "Answer:", a line each.
        words: what answers the prompt for each class, one token each; by default the labels, or letters of choices.
        question: template of the question with its cue, after which a causal language model reads each choice; by
            default "Question: " and the text, then on a new line "Answer:"; with a blank, the text up to the blank.
        completion: what follows the text, a field or a template.
        messages: field with a chat, a list of turns with ``role`` and ``content``, in place of text and completion: the
            latter is what the assistant says in the last turn.
        extra: fields that no network reads, kept where rows have them for what scores answers.
        path: of the data: a data set on the hub, a file or a folder, or "demo"; None for rows given in memory.
        config: configuration of the data set on the hub.
        revision: of the data set on the hub.
        train: name of the training split.
        validation: name of the validation split.
        test: name of the test split.
    """

    name: str
    kind: str = "classification"
    text: tuple[str, ...] = ("text",)
    label: str = "label"
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    choice_keys: tuple[str, ...] = ()
    blank: str | None = None
    prompt: str | None = None
    words: tuple[str, ...] = ()
    question: str | None = None
    completion: str | None = None
    messages: str | None = None
    extra: tuple[str, ...] = ()
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = "test"

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            several = name in ("text", "labels", "choices", "choice_keys", "words", "extra")
            if several and isinstance(value, Iterable):
                parts = (value,) if isinstance(value, str) else tuple(str(part) for part in value)
                object.__setattr__(self, name, parts)
            elif several or not isinstance(value, str | None):
                raise TaskError(
                    f"Task '{self.name}': {name} is {value!r}, expected {'names' if several else 'a text'}."
                )
        if self.kind not in KINDS:
            raise TaskError(unknown("kind of task", str(self.kind), KINDS))
        self.rules.check(self)

    @property
    def rules(self) -> Kind:
        """What the task's kind says of labels and texts."""
        return KINDS[self.kind]

    @property
    def max_choices(self) -> int:
        """Most choices that a row of a multiple-choice task may have; 0 for other tasks."""
        return len(self.labels) if self.choices else 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields that the texts of a row are made of."""
        if self.messages is not None:
            return (self.messages,)
        texts = (*self.text, *(each for each in (self.prompt, self.question) if each is not None))
        named = [name for text in texts for name in fields_of(text)]
        if self.choices:  # which "choices" stands for in a prompt
            named = [name for name in named if name != "choices"]
        return tuple(dict.fromkeys([*named, *self.choices]))

    @property
    def answer(self) -> str:
        """What says what is right: a field, or a template of some."""
        return self.completion or self.messages or self.label

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Fields that say what is right: label or completion, names of choices, true probabilities, and extra ones."""
        keys = self.choice_keys if len(self.choice_keys) == 1 else ()
        return (*fields_of(self.answer), *keys, "probabilities", *self.extra)

    def texts(self, row: Mapping[str, Any]) -> list[tuple[str, str | None]]:
        """What a network reads of a row: one text or pair; for multiple choice, a pair for each choice."""
        return self.rules.texts(self, row)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """The task that `to_dict` or an entry of the registry describes.

        Raises:
            TaskError: a name is unknown.
        """
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                raise TaskError(unknown("property of a task", key, known))
        return cls(**values)


#: Tasks of a user's own, beside those that are known.
TASKS: Registry[TaskSpec] = Registry("task", {}, lambda name: _is_known(name))


def check_compatible(spec: TaskSpec, other: TaskSpec) -> None:
    """Check that what was fitted to one task answers the question of another.

    The classes have to be the same, in the same order. The number of choices may differ, and rows without labels
    may leave the classes open.

    Args:
        spec: of the task that a posterior was fitted to.
        other: of the rows that it is to predict.

    Raises:
        TaskError: the tasks are of different kinds or have different classes.
    """
    hint = ""
    if other.kind == spec.kind:
        if spec.rules.fits(spec, other):
            return
        flag = quote(f"task.labels={','.join(spec.labels)}")
        hint = (
            " If the classes are the same in this order, say so by their names: "
            f"labels={list(spec.labels)} (in a shell --set {flag})."
        )
    raise TaskError(
        f"Task '{other.name}' is {other.kind} into ({', '.join(other.labels)}), but the posterior was fitted to "
        f"{spec.kind} into ({', '.join(spec.labels)}).{hint}"
    )


def task_names() -> tuple[str, ...]:
    """Names of the known tasks; "*" stands for any configuration."""
    return (*_registry(), *TASKS)


def find_task(name: str) -> TaskSpec | None:
    """The known task of a name, written "glue/mrpc", "glue_mrpc" or "mrpc"; None if there is none.

    Raises:
        TaskError: the name is that of several tasks.
    """
    if name in TASKS:
        return TASKS[name]
    names, spelling = _names(), _spelling(name)
    if "*" not in names.get(spelling, "*"):
        return _entry(names[spelling])
    for start, task in names.items():
        if "*" in task and f"{spelling}_".startswith(start):
            word = spelling.removeprefix(start.rstrip("_")).strip("_") or _registry()[task].get("default")
            if not word:
                raise TaskError(f"'{name}' is several tasks: put the name of one in place of the asterisk in '{task}'.")
            return _entry(task, word)
    return None


def aliases(task: str) -> list[str]:
    """Other names of a known task, with underscores for all that is no letter or digit."""
    return [alias for alias, name in _names().items() if name == task]


@cache
def _registry() -> dict[str, dict[str, Any]]:
    import yaml

    text = Path(__file__).with_name("known.yaml").read_text("utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return entries


@cache
def _names() -> dict[str, str]:
    """Every name that a task goes by, in one spelling, and its name in the registry."""
    return {_spelling(name): task for task, entry in _registry().items() for name in (task, *entry.get("aliases", []))}


def _is_known(name: str) -> bool:
    return _spelling(name) in _names()


def _entry(task: str, word: str = "") -> TaskSpec:
    """The task of an entry whose asterisks stand for ``word``."""
    entry = {key: value for key, value in _registry()[task].items() if key not in ("aliases", "default")}
    if "config" in entry:
        entry["config"] = entry["config"].replace("*", word)
    return TaskSpec.from_dict({"name": task.replace("*", word), **entry})


def _spelling(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.lower().replace("*", ""))
