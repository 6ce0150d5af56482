"""Transcripts: what a row of completions says, as a text or a chat, cut to a length and tokenised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bayeslora.errors import DataError
from bayeslora.observations.prompts import chatted, continuation, fitted, tokens
from bayeslora.tasks.completion import chat_of, completion_of, template_of, turns_of
from bayeslora.tasks.sources import fields_of, pick, render, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bayeslora.tasks import TaskSpec

__all__ = ["Transcript", "tokens_of", "transcript"]


@dataclass(frozen=True)
class Transcript(ABC):
    """What is said before a completion, made of parts that may be cut, and the completion.

    Attributes:
        parts: by name.
        answer: the completion; None where nothing follows.
    """

    parts: dict[str, str]
    answer: str | None

    @abstractmethod
    def before(self, parts: Mapping[str, str]) -> str:
        """What is said before the completion."""

    @abstractmethod
    def after(self, parts: Mapping[str, str]) -> str:
        """What is said after the completion."""

    def asked(self, parts: Mapping[str, str]) -> str:
        """What is said before a completion that is yet to come, to which blanks before it belong."""
        return self.before(parts).rstrip(" ")

    def tokens(self, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, str]) -> tuple[list[int], list[int]]:
        """Token ids before and of the completion."""
        return continuation(tokenizer, self.before(parts), self.after(parts))


@dataclass(frozen=True)
class _Plain(Transcript):
    """A template with its fields, and the completion as it is."""

    template: str

    def before(self, parts: Mapping[str, str]) -> str:
        return render(self.template, parts)

    def after(self, parts: Mapping[str, str]) -> str:
        return str(self.answer)


@dataclass(frozen=True)
class _Chat(Transcript):
    """Turns of a chat as the tokenizer's template writes them, of which the completion is the assistant's last one."""

    tokenizer: PreTrainedTokenizerBase
    turns: Sequence[Mapping[str, Any]]  # their content is a template of parts
    last: Mapping[str, Any]  # which says the completion, if there is one

    def before(self, parts: Mapping[str, str]) -> str:
        return chatted(self.tokenizer, self._filled(parts))

    def asked(self, parts: Mapping[str, str]) -> str:
        return self.before(parts)

    def after(self, parts: Mapping[str, str]) -> str:
        whole, before = chatted(self.tokenizer, [*self._filled(parts), self.last], answered=True), self.before(parts)
        if not whole.startswith(before):
            raise DataError(
                "The chat template writes the last turn otherwise than as what follows the others, so that it is not "
                "known what is to be learned: give the tokenizer another chat_template."
            )
        return whole.removeprefix(before)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, str]) -> tuple[list[int], list[int]]:
        before = tokens(tokenizer, self.before(parts))
        whole = tokens(tokenizer, self.before(parts) + self.after(parts))
        # Blanks at the end of the cue are the template's: the assistant does not say them.
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return super().tokens(tokenizer, parts)

    def _filled(self, parts: Mapping[str, str]) -> list[dict[str, Any]]:
        return [{**turn, "content": render(turn["content"], parts)} for turn in self.turns]


def transcript(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], spec: TaskSpec, chat: bool) -> Transcript:
    """The transcript of a row.

    Args:
        tokenizer: of the network.
        row: of the task.
        spec: the task.
        chat: put a prompt that is no chat into one, as what a user says.
    """
    answer = completion_of(spec, row)
    if spec.messages is None:
        template = template_of(spec, row)
        parts = {name: text_of(pick(dict(row), name)) for name in fields_of(template)}
        if not chat:
            return _Plain(parts, answer, template)
        last = {"role": "assistant", "content": str(answer)}
        return _Chat(parts, answer, tokenizer, [{"role": "user", "content": template}], last)
    # Whatever a turn says beside its content, such as the tools that it calls, is for the template to write.
    turns = [{**turn, "content": str(turn.get("content", ""))} for turn in chat_of(spec, row)]
    parts = {str(number): turn["content"] for number, turn in enumerate(turns[: len(turns_of(spec, row))])}
    named = [{**turn, "content": name} for name, turn in zip(parts, turns, strict=False)]
    return _Chat(parts, answer, tokenizer, named, turns[-1])


def tokens_of(tokenizer: PreTrainedTokenizerBase, said: Transcript, most: int) -> tuple[list[int], list[int]]:
    """Token ids before and of a completion, in no more than so many tokens: what comes before loses the ends of parts.

    A completion ends with the token that ends a text, if the tokenizer has one, and is never cut.

    Raises:
        DataError: it leaves no room for what comes before.
    """
    if said.answer is None:
        return tokens(tokenizer, said.asked(fitted(tokenizer, said.parts, said.asked, most))), []
    parts = said.parts
    while True:
        before, after = said.tokens(tokenizer, parts)
        after = _ended(tokenizer, after)
        over = len(before) + len(after) - most
        if over <= 0:
            return before, after
        try:
            parts = fitted(tokenizer, parts, said.before, len(tokens(tokenizer, said.before(parts))) - over)
        except DataError as error:
            raise DataError(
                f"The completion {said.answer[:40]!r} has {len(after)} tokens, which with the words that are always "
                f"there are more than {most}, and neither is cut: raise max_length, if the network has positions for "
                "more, or leave the row out."
            ) from error


def _ended(tokenizer: PreTrainedTokenizerBase, found: list[int]) -> list[int]:
    """The tokens with the one that ends a text, once, and nothing behind it."""
    end = tokenizer.eos_token_id
    if end is None:
        return found
    return found[: len(found) - found[::-1].index(end)] if end in found else [*found, end]
