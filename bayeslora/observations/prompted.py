"""Prompted classes: a causal language model is asked in words, and each label is the one token that answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bayeslora.errors import DataError, SettingError
from bayeslora.observations.base import Causal
from bayeslora.observations.batches import Batch, Collator, Padding, choice_mask
from bayeslora.observations.classes import Classes
from bayeslora.observations.decoder import hidden_states, logits_at
from bayeslora.observations.prompts import rendered, tokens
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.tasks.sources import FIELD, fields_of, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bayeslora.observations.encoding import Encoder
    from bayeslora.tasks import TaskSpec

__all__ = ["Prompted"]

#: What a task without a template of its own is asked by, behind its texts.
CUE = "Answer:"
#: Name of all answers that are no label's.
OTHER = "(other)"


@dataclass(frozen=True)
class Prompted(Causal, Classes):
    """The label's token after a prompt, of a causal language model; each class or lettered choice has one.

    Attributes:
        classes: number of classes, or most choices of a row.
        words: what answers for each class; by default the task's, which are the names of classes and letters of
            choices. There may be more letters than choices, for rows of another task.
        label_tokens: the token of each word, which only the tokenizer knows.
        likelihood: "restricted" to the labels' tokens, or of the label's token among the whole "vocabulary".
        chat: put the prompt into the tokenizer's chat template.

    Raises:
        SettingError: fewer than two classes, or another likelihood.
    """

    name: ClassVar[str] = "prompted"
    kinds: ClassVar[tuple[str, ...]] = ("classification", "multiple-choice")
    apart: ClassVar[frozenset[str]] = frozenset({"choice_mask"})

    words: tuple[str, ...] = ()
    label_tokens: tuple[int, ...] = ()
    likelihood: Literal["restricted", "vocabulary"] = "restricted"
    chat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.likelihood not in ("restricted", "vocabulary"):
            raise SettingError(f"likelihood is {self.likelihood!r}, expected 'restricted' or 'vocabulary'.")
        for name in ("words", "label_tokens"):  # lists, when they are read from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec) -> Prompted:
        """With the token of each label.

        Raises:
            DataError: a label has no token of its own, or the tokenizer has no chat template to put a prompt into.
        """
        words = self.words or _words(spec)
        if len(words) < self.classes:
            raise DataError(
                f"Task '{spec.name}' has {self.classes} classes or choices and {len(words)} words to answer by "
                f"({', '.join(words)}): name as many, words=[...] (in a shell --set task.words=...)."
            )
        template = _template(spec, words[: self.classes])
        filled = dict.fromkeys(fields_of(template), "text")
        prompt = _open(rendered(tokenizer, template, filled, sys.maxsize, self.chat))
        answers = [_answer(tokenizer, prompt, word) for word in words]
        if wrong := _wrong(tokenizer, words[: self.classes], answers):
            raise DataError(
                f"Task '{spec.name}' cannot be answered by one token after {prompt[-20:]!r}: {'; '.join(wrong)}. "
                "Name words of one token each: words=[...] (in a shell --set task.words=...)."
            )
        usable = max(
            count for count in range(self.classes, len(words) + 1) if not _wrong(tokenizer, words[:count], answers)
        )
        found = tuple(tokens[0] for tokens in answers[:usable])
        return replace(self, words=words[:usable], label_tokens=found)

    def for_rows(self, spec: TaskSpec) -> Prompted:
        """Rows of another task may have another number of choices.

        Raises:
            DataError: there are not so many letters.
        """
        if not spec.max_choices:
            return self
        if self.label_tokens and spec.max_choices > len(self.label_tokens):
            raise DataError(
                f"Rows of task '{spec.name}' have up to {spec.max_choices} choices, and there are tokens of "
                f"{len(self.words)} letters: {', '.join(self.words)}."
            )
        return replace(self, classes=spec.max_choices)

    def for_network(self, network: nn.Module) -> Prompted:
        """Itself, if the token of every label is known.

        Raises:
            SettingError: it is not.
        """
        if len(self.label_tokens) < self.classes:
            raise SettingError(
                f"Of {self.classes} labels {len(self.label_tokens)} have a token: give Prompted(label_tokens=...), or "
                "make the program by Program.from_pretrained, which asks the tokenizer."
            )
        return self

    @property
    def outputs(self) -> int:
        """One of each label; with the whole vocabulary one more, of all other tokens together."""
        return self.classes + (self.likelihood == "vocabulary")

    def shown(self, spec: TaskSpec, row: Mapping[str, Any], label: float | None = None) -> str:
        """The prompt, and the word that answers it."""
        words = self.words or _words(spec)
        return f"{render(*_asked(spec, row, words))}\n-> {None if label is None else words[int(label)]}"

    def tokens(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> dict[str, list[Any]]:
        """Columns of the prompts' token ids, and of how many choices a row has."""
        tokenizer, found = encoder.tokenizer, []
        for row in rows:
            text = rendered(tokenizer, *_asked(spec, row, self.words), encoder.max_length, self.chat)
            found.append(tokens(tokenizer, _open(text)))
        columns: dict[str, list[Any]] = {"input_ids": found, "attention_mask": [[1] * len(ids) for ids in found]}
        return columns | ({"choices": [len(spec.texts(row)) for row in rows]} if spec.choices else {})

    def asked(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> list[list[int]]:
        """The prompts."""
        return self.tokens(encoder, rows, spec)["input_ids"]

    def collator(self, padding: Padding) -> Collator:
        """Says which choices a row has as well."""
        return PromptCollator(padding, self.classes)

    def run(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the labels' tokens behind the prompt, (examples, outputs); minus infinity where a row has none."""
        hidden, mask = hidden_states(network, self.inputs(batch)), batch["attention_mask"]
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * places).argmax(-1, keepdim=True)
        # One position an example: (examples, 1, width).
        hidden = hidden.take_along_dim(last.unsqueeze(-1), 1)
        width = batch["choice_mask"].shape[1] if "choice_mask" in batch else self.classes
        labels = torch.tensor(self.label_tokens[:width], device=mask.device)
        absent = ~batch["choice_mask"] if "choice_mask" in batch else mask.new_zeros(len(mask), width).bool()
        if self.likelihood == "restricted":
            return logits_at(network, hidden, labels).squeeze(1).masked_fill(absent, -torch.inf)
        every = logits_at(network, hidden).squeeze(1)
        own = every[:, labels]
        others = every.index_copy(1, labels, torch.where(absent, own, -torch.inf)).logsumexp(-1, keepdim=True)
        return torch.cat([own.masked_fill(absent, -torch.inf), others], dim=-1)

    def chance(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Log density for one who guesses among the labels that a row has.

        How much of the vocabulary goes to them all is as the network has it, since it does not say which is right.
        """
        if self.likelihood == "restricted":
            return super().chance(outputs, labels)
        own = outputs[..., :-1]
        return own.logsumexp(-1) - outputs.logsumexp(-1) - own.isfinite().sum(-1).log()

    def predicted(
        self, outputs: Tensor, labels: Tensor | None = None, names: tuple[str, ...] = (), **made: Any
    ) -> ClassPrediction:
        """A prediction of classes; all other answers are one more, with the whole vocabulary."""
        more = (OTHER,) if names and self.likelihood == "vocabulary" else ()
        return super().predicted(outputs, labels, (*names, *more), **made)


@dataclass(frozen=True)
class PromptCollator(Collator):
    """Makes batches of prompts, with a boolean ``choice_mask`` (examples, choices) where rows have choices.

    Attributes:
        choices: most choices of a row.
    """

    choices: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tensors of a batch.

        Raises:
            DataError: a row has too many choices.
        """
        batch = super().__call__(rows)
        if "choices" in rows[0]:
            batch["choice_mask"] = choice_mask([row["choices"] for row in rows], self.choices)
        return batch


def _words(spec: TaskSpec) -> tuple[str, ...]:
    """What stands for each class, or letters for choices."""
    return spec.words or (tuple(ascii_uppercase) if spec.choices else spec.labels)


def _template(spec: TaskSpec, letters: Sequence[str]) -> str:
    """A task's template, in which each choice has a field of its own, so that none is cut for another."""
    texts = [text if FIELD.search(text) else f"{{{text}}}" for text in spec.text]
    template = spec.prompt or "\n".join([*texts, *(["{choices}"] if spec.choices else []), CUE])
    if not spec.choices:
        return template
    return template.replace("{choices}", "\n".join(f"{each}. {{choice {n}}}" for n, each in enumerate(letters)))


def _asked(spec: TaskSpec, row: Mapping[str, Any], words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The template of a row, and its fields."""
    choices = spec.rules.choices(spec, row)
    return _template(spec, words[: len(choices)]), {**row, **{f"choice {n}": text for n, text in enumerate(choices)}}


def _open(text: str) -> str:
    """A prompt that waits for a word, to which blanks before it belong."""
    return text.rstrip(" ")


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> list[int]:
    """The tokens that a word adds to a prompt; none if the prompt before it is tokenised otherwise."""
    blank = "" if prompt[-1:].isspace() else " "
    before, whole = tokens(tokenizer, prompt), tokens(tokenizer, f"{prompt}{blank}{word.strip(' ')}")
    return whole[len(before) :] if whole[: len(before)] == before else []


def _wrong(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], answers: Sequence[Sequence[int]]) -> list[str]:
    """What keeps words from standing for a label each."""
    found, owners = [], dict[tuple[int, ...], int]()
    for number, (word, answer) in enumerate(zip(words, answers, strict=False)):
        if tokenizer.unk_token_id in answer:
            found.append(f"'{word}' is unknown to the tokenizer")
        elif not answer:
            found.append(f"'{word}' changes the tokens before it")
        elif len(answer) != 1:
            pieces = ", ".join(repr(tokenizer.decode([token])) for token in answer)
            found.append(f"'{word}' takes {len(answer)} tokens ({pieces})")
        elif (owner := owners.setdefault(tuple(answer), number)) != number:
            found.append(f"'{word}' has the token of '{words[owner]}'")
    return found
