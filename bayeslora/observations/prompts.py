"""What a causal language model reads: templates with the fields of a row, cut to a length, and their tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from bayeslora.errors import DataError
from bayeslora.tasks.sources import fields_of, pick, render, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chatted", "continuation", "fitted", "rendered", "tokens"]

#: How chat templates refuse turns: by what they raise themselves, or by what they did not think of.
REFUSALS = (TemplateError, TypeError)


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    row: Mapping[str, Any],
    room: int,
    chat: bool = False,
) -> str:
    """A template with the fields of a row, in no more than so many tokens.

    What is too long loses the end of its longest field, of several long ones of each: the template's own words, such as
    the cue after which a model answers, always stay.

    Args:
        tokenizer: of the network.
        template: with fields in braces, or the name of one field.
        row: the fields by name.
        room: most tokens that the text may have.
        chat: put it into the tokenizer's chat template, as what a user says.

    Raises:
        DataError: the template's own words alone are longer, or the tokenizer has no chat template.
    """
    said = partial(_said, tokenizer, template, chat=chat)
    values = {name: text_of(pick(dict(row), name)) for name in fields_of(template)}
    return said(fitted(tokenizer, values, said, room))


def fitted(
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, str],
    said: Callable[[Mapping[str, str]], str],
    room: int,
) -> dict[str, str]:
    """Texts by name, cut so that what is made of them has no more than so many tokens.

    Args:
        tokenizer: of the network.
        values: the texts.
        said: what is made of them.
        room: most tokens that it may have.

    Raises:
        DataError: what is said around them alone is longer.
    """
    found = dict(values)
    # What is cut may be tokenised otherwise than before, so that it may take more than one cut.
    while (over := len(tokens(tokenizer, said(found))) - room) > 0:
        lengths = {name: len(_plain(tokenizer, value)) for name, value in found.items()}
        if not any(lengths.values()):
            words = said({name: f"{{{name}}}" for name in found})
            raise DataError(
                f"What is never cut of the template {words!r} has {room + over} tokens, and there is room for "
                f"{room}: shorten it, or raise max_length if the network has positions for more."
            )
        most = _most(lengths.values(), over)
        found |= {name: _start(tokenizer, found[name], most) for name, length in lengths.items() if length > most}
    return found


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on: the one that begins a text, if there is one, once, and none that ends it."""
    found = _plain(tokenizer, text)
    begin = _begin(tokenizer)
    return found if found[: len(begin)] == begin else begin + found


def continuation(tokenizer: PreTrainedTokenizerBase, text: str, more: str) -> tuple[list[int], list[int]]:
    """Token ids of a text and of what follows it: together those of both as one text.

    Blanks at the end of the text count with what follows, and so does a token that reaches over the border: both are
    how the tokenizer writes the word that comes. The end of a line is the text's own.

    Raises:
        DataError: nothing follows.
    """
    bare = text.rstrip(" ")
    whole, before = tokens(tokenizer, text + more), tokens(tokenizer, bare)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, before, strict=False)))
    if shared == len(whole):
        raise DataError(f"Nothing follows the text {bare[-40:]!r}: {more!r} has no tokens of its own.")
    return whole[:shared], whole[shared:]


def chatted(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, Any]], answered: bool = False) -> str:
    """A chat as the tokenizer's template writes it.

    Args:
        tokenizer: of the network.
        turns: with ``role`` and ``content``, and what else the template knows of, such as ``tool_calls``.
        answered: whether the assistant has spoken last; else it is its turn.

    Raises:
        DataError: there are no turns, or the tokenizer has no chat template, or one that does not take these turns.
    """
    if not turns:
        raise DataError("Nothing is said before the assistant's turn of a chat: remove the row, or give it a question.")
    name = f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
    if not tokenizer.chat_template:
        raise DataError(
            f"{name} has no chat template: choose a base that was trained on chats, or leave out chat=True."
        )
    try:
        found = _written(tokenizer, turns, answered)
    except REFUSALS as error:
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise DataError(f"{name} has a chat template that does not take the turns {roles}: {error}") from error
    if any("tool_calls" in turn for turn in turns):
        silent = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
        with suppress(*REFUSALS):
            if found == _written(tokenizer, silent, answered):
                raise DataError(
                    f"{name} has a chat template that leaves out tool calls, of which a chat has some: choose a base "
                    "that was trained on them, or give the tokenizer another chat_template."
                )
    return found


def _written(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, Any]], answered: bool) -> str:
    said = [dict(turn) for turn in turns]
    return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=not answered))


@lru_cache(maxsize=16)
def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a tokenizer puts before a text, if it does."""
    alone: list[int] = tokenizer("")["input_ids"]
    return [token for token in alone[:1] if token == tokenizer.bos_token_id]


def _most(lengths: Collection[int], over: int) -> int:
    """How long the longest may be for all together to lose so many tokens, or all that they have."""
    most = max(lengths)
    while most and sum(max(length - most, 0) for length in lengths) < over:
        most -= 1
    return most


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _said(tokenizer: PreTrainedTokenizerBase, template: str, values: Mapping[str, str], chat: bool) -> str:
    text = render(template, values)
    return chatted(tokenizer, [{"role": "user", "content": text}]) if chat else text


def _start(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """The part of a text that its first tokens stand for, of which there are more; it is shorter in any case."""
    if not count:
        return ""
    if not tokenizer.is_fast:
        found = str(tokenizer.decode(_plain(tokenizer, text)[:count])).rstrip("\N{REPLACEMENT CHARACTER}")
        return found[: len(text) - 1]
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A character of several tokens stays as a whole or goes: a part of one is none.
    return text[: min(spans[count - 1][1], spans[count][0], len(text) - 1)]
