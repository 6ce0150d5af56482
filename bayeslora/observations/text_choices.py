"""Text choices: which of a row's own texts goes on after its question, by the likelihood of a causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bayeslora.errors import DataError, SettingError, unknown
from bayeslora.observations.base import Causal, Observation
from bayeslora.observations.batches import Collator, Padding
from bayeslora.observations.choices import Choices
from bayeslora.observations.completions import log_likelihoods
from bayeslora.observations.decoder import hidden_states
from bayeslora.observations.packing import (
    ApartCollator,
    PackedCollator,
    check_window,
    packed,
    predictors,
    refuses_packing,
)
from bayeslora.observations.prompts import continuation, rendered
from bayeslora.tasks.sources import render

if TYPE_CHECKING:
    from bayeslora.observations.encoding import Encoder
    from bayeslora.tasks import TaskSpec

__all__ = ["TextChoices"]

#: What the log-likelihood of a choice, a text of some tokens, is divided by.
SIZES = {
    "sum": lambda text, tokens: 1,
    "token": lambda text, tokens: len(tokens),
    "byte": lambda text, tokens: len(text.encode()),
}


@dataclass(frozen=True)
class TextChoices(Causal, Choices):
    """The number of the right choice, with probabilities softmax(scores) over the choices that a row has.

    The score of a choice is the log-likelihood of its tokens after the question, log p(choice | question).

    Attributes:
        likelihood: of a choice: the "sum" over its tokens, or that for each "token" or for each "byte" of its text,
            which does not favour short choices.
        packed: run the question once for all choices of a row, in one sequence with them; else with each of them. The
            scores are the same, up to rounding. A network that cannot be asked the first way is asked the second.
        chat: put the question into the tokenizer's chat template, as what a user says; choices are what is answered.

    Raises:
        SettingError: the likelihood is none of these.
    """

    name: ClassVar[str] = "text-choices"
    apart: ClassVar[frozenset[str]] = frozenset({"choice_mask", "segments", "sizes"})

    likelihood: Literal["sum", "token", "byte"] = "sum"
    packed: bool = True
    chat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.likelihood not in SIZES:
            raise SettingError(unknown("likelihood of a choice", str(self.likelihood), SIZES))

    def for_network(self, network: nn.Module) -> TextChoices:
        """Read choices one by one if the network does not read packed ones as it reads each alone."""
        reason = refuses_packing(network) if self.packed else None
        if reason is None:
            return self
        warnings.warn(
            f"{reason}: each choice is run with its question by itself, which costs the question once for each choice "
            "and changes no score.",
            stacklevel=2,
        )
        return replace(self, packed=False)

    def shown(self, spec: TaskSpec, row: Mapping[str, Any], label: float | None = None) -> str:
        """The question, and a line for each text that may follow, with a mark at the right one."""
        question = render(_template(spec), row)
        if spec.blank is not None:
            question = question.partition(spec.blank)[0].rstrip()
        texts = (str(text).strip() for _, text in spec.texts(row))
        return "\n".join([question, *(f"{'*' if each == label else ' '} {text}" for each, text in enumerate(texts))])

    def tokens(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> dict[str, list[Any]]:
        """Columns of packed rows: token ids, whose they are, and what the likelihood of each choice is divided by.

        Raises:
            DataError: a row has no question, an empty choice, or one that is longer than there is room for; or the
                tokenizer has no chat template to put a question into, or choices fill a blank in it.
        """
        if self.chat and spec.blank is not None:
            raise DataError(
                f"Choices of task '{spec.name}' fill a blank in the question, which is no answer to it: leave out "
                "chat=True."
            )
        columns: dict[str, list[Any]] = {"input_ids": [], "segments": [], "sizes": []}
        size = SIZES[self.likelihood]
        for row in rows:
            texts = [str(text).strip() for _, text in spec.texts(row)]
            question, choices = _parts(encoder, spec, row, texts, self.chat)
            segments = [question, *choices]
            columns["input_ids"].append([token for part in segments for token in part])
            columns["segments"].append([number for number, part in enumerate(segments) for _ in part])
            columns["sizes"].append([size(text, tokens) for text, tokens in zip(texts, choices, strict=True)])
        return columns

    def asked(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> list[list[int]]:
        """The questions, without their choices."""
        columns = self.tokens(encoder, rows, spec)
        return [
            [token for token, segment in zip(ids, segments, strict=True) if segment == 0]
            for ids, segments in zip(columns["input_ids"], columns["segments"], strict=True)
        ]

    def collator(self, padding: Padding) -> Collator:
        """Makes batches of packed rows, or takes these apart."""
        return PackedCollator(padding, self.classes) if self.packed else ApartCollator(padding, self.classes)

    def attended(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Tokens of the packed sequence, or of the choices that a row has."""
        return Observation.attended(self, batch) if self.packed else super().attended(batch)

    def scored(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Examples of the tokens of choices."""
        segments = batch["segments"].flatten(0, -2)
        return predictors(segments)[0] // (len(segments) // len(batch["sizes"]))

    def run(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Scores (examples, choices) in float32, minus infinity for choices that do not exist."""
        if self.packed:
            check_window(network, batch["segments"].shape[1])
        flat = {name: batch[name].flatten(0, -2) for name in ("input_ids", "attention_mask", "segments")}
        hidden = hidden_states(network, packed(network, batch) if self.packed else super().inputs(flat))
        sizes, segments = batch["sizes"], flat["segments"]
        rows, places, before = predictors(segments)
        found = log_likelihoods(network, hidden[rows, before], flat["input_ids"][rows, places])
        choice = self.scored(batch) * sizes.shape[1] + segments[rows, places] - 1
        sums = found.new_zeros(sizes.numel()).index_add(0, choice, found).reshape(sizes.shape)
        return (sums / sizes.clamp(min=1)).masked_fill(sizes == 0, -torch.inf)


def _parts(
    encoder: Encoder, spec: TaskSpec, row: Mapping[str, Any], choices: Sequence[str], chat: bool
) -> tuple[list[int], list[list[int]]]:
    """Tokens of the question that all choices share, and of each choice behind it: together no more than fit."""
    room = encoder.max_length
    while room > 0:
        text = rendered(encoder.tokenizer, _template(spec), row, room, chat)
        if spec.blank is not None:
            text = text.partition(spec.blank)[0].rstrip()
        text = text.rstrip(" ")  # a choice brings the blank before it
        blank = "" if text[-1:].isspace() else " "
        if not all(choices):
            raise DataError(f"A choice of the question {text!r} has no text: remove the row, or give the choice one.")
        pairs = [continuation(encoder.tokenizer, text, f"{blank}{choice}") for choice in choices]
        # A token that reaches over the end of the question counts with its choice, and so does that one of all others.
        question = min((before for before, _ in pairs), key=len)
        if not question:
            raise DataError(f"The question {text!r} has no tokens that choices could follow.")
        behind = [(before + more)[len(question) :] for before, more in pairs]
        left = encoder.max_length - max(len(tokens) for tokens in behind)
        if len(question) <= left:
            return question, behind
        room = min(room - 1, left)  # a text that is cut may be tokenised otherwise than before
    raise DataError(
        f"The choices of the question {text!r} leave no room for it in {encoder.max_length} tokens: raise max_length "
        "if the network has positions for more."
    )


def _template(spec: TaskSpec) -> str:
    """The question with its cue, before which the choice comes unless a blank says where."""
    if spec.question is not None:
        return spec.question
    (text,) = spec.text
    text = text if "{" in text else f"{{{text}}}"
    return text if spec.blank is not None else f"Question: {text}\nAnswer:"
