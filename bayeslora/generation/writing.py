"""Texts by a posterior: by draws of the weights, by their mixture, or by the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayeslora.errors import DataError, PosteriorError, SettingError, unknown
from bayeslora.generation.decoding import Decoding, Reader, Weights, decode
from bayeslora.generation.texts import Generation
from bayeslora.observations.batches import Batch, Collator
from bayeslora.observations.completions import positions_at_once
from bayeslora.observations.decoder import hidden_states, logits_at
from bayeslora.observations.prompts import tokens
from bayeslora.observations.soft_prompts import virtual_tokens
from bayeslora.passes import undisturbed
from bayeslora.positions import counts_padding, numbered_from_mask, positions
from bayeslora.progress import track
from bayeslora.tasks import Split, rows_of

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior
    from bayeslora.program import Program

__all__ = ["METHODS", "Said", "generate"]

#: Called with the number of a prompt, that of a sample, and what of its text will stay.
Said = Callable[[int, int, str], None]
#: A text by the numbers of its prompt and its sample.
Place = tuple[int, int]
#: Ways to generate: one draw of the weights a text; token by token from the mixture of draws; at the posterior mean, or
#: by the mixture of those of several fits.
METHODS = ("draw", "mixture", "mean")


class Prompt(NamedTuple):
    """What a network goes on after.

    Attributes:
        text: for a person to read.
        tokens: for the network.
    """

    text: str
    tokens: list[int]


def generate(
    posterior: Posterior,
    prompts: Any,
    samples: int,
    method: str,
    decoding: Decoding,
    *,
    draws: int,
    seed: int,
    batch_size: int,
    progress: bool,
    said: Said | None,
    first: int,
) -> list[Generation]:
    """The texts of `bayeslora.Posterior.generate`, which says what the arguments are."""
    prompts = read(posterior.program, prompts)
    writer = Writer(posterior.program, prompts, decoding, said)
    places = [(prompt, sample) for sample in range(samples) for prompt in range(len(prompts))]
    found: dict[Place, tuple[list[int], Tensor]] = {}
    with undisturbed(posterior.program), torch.no_grad():
        count = min(posterior.differing(draws), posterior.most_draws or draws)
        weights: list[Weights] = list(posterior.draws(count, seed))
        chance = [_Chance.of(each, count, samples, decoding) for each in _seeds(seed, first, len(prompts))]
        written = _written(posterior, weights, places, [each.order for each in chance], method)
        parts = [(authors, part) for authors, group in written for part in writer.parts(group, batch_size, authors)]
        for authors, part in track(parts, "generate", total=len(parts), show=progress):
            uniform = torch.stack([chance[prompt].uniform[sample] for prompt, sample in part])
            texts, log_probs = writer.write(authors, part, uniform, batch_size)
            if authors is not weights:
                log_probs = torch.stack([writer.score(each, part, texts) for each in weights], dim=1)
            found |= dict(zip(part, zip(texts, log_probs, strict=True), strict=True))
    return [
        writer.generation(prompt, [found[prompt, sample] for sample in range(samples)], method)
        for prompt in range(len(prompts))
    ]


class _Chance(NamedTuple):
    """What of the texts after a prompt is left to chance.

    Attributes:
        order: of the draws of the weights by which they are written, one after the other.
        uniform: numbers by which tokens are chosen (samples, tokens).
    """

    order: list[int]
    uniform: Tensor

    @classmethod
    def of(cls, seed: int, draws: int, samples: int, decoding: Decoding) -> _Chance:
        """Chance of one prompt, by a seed of its own."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(draws, generator=generator).tolist()
        return cls(order, torch.rand(samples, decoding.max_new_tokens, generator=generator))


def _seeds(seed: int, first: int, count: int) -> list[int]:
    """A seed for each of some prompts, that of the first of which depends on its number alone."""
    found: list[int] = torch.randint(2**62, (first + count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found[first:]


def read(program: Program, prompts: Any) -> list[Prompt]:
    """What a program's network reads of prompts: texts as they are, rows of a task as its template says.

    Raises:
        PosteriorError: the network is no causal language model, or there is no tokenizer.
        DataError: a prompt is neither text nor row, or has no tokens.
    """
    encoder = program.encoder
    if not program.observation.causal or encoder is None:
        lacking = "no tokenizer" if program.observation.causal else "no language model's head"
        raise PosteriorError(
            f"'{program.base.name}' cannot generate text: its program ({program.observation.name}) has {lacking}. "
            "Fit a causal language model to prompts, choices or completions."
        )
    spec = prompts.spec if isinstance(prompts, Split) else encoder.spec
    given = list(prompts.dataset) if isinstance(prompts, Split) else prompts
    found = []
    for number, prompt in enumerate([given] if isinstance(given, str | Mapping) else given):
        if isinstance(prompt, str):
            made = Prompt(prompt, tokens(encoder.tokenizer, prompt))
        elif isinstance(prompt, Mapping):
            row = rows_of(spec, prompt, "prompts")
            (ids,) = program.observation.asked(encoder, list(row.dataset), row.spec)
            made = Prompt(_decoded(encoder.tokenizer, ids), ids)
        else:
            raise DataError(f"Prompt {number} is a {type(prompt).__name__}: expected a text, or a row of the task.")
        if not made.tokens:
            raise DataError(f"Prompt {number} has no tokens: its text is empty.")
        found.append(made)
    return found


def _decoded(tokenizer: Any, read: Sequence[int]) -> str:
    """A text as it is, with its blanks, without what begins and ends it."""
    return str(tokenizer.decode(read, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _written(
    posterior: Posterior, weights: list[Weights], places: list[Place], orders: Sequence[Sequence[int]], method: str
) -> list[tuple[list[Weights], list[Place]]]:
    """The weights that write texts, and at which places."""
    if method == "draw":
        groups: list[list[Place]] = [[] for _ in weights]
        for prompt, sample in places:
            groups[orders[prompt][sample % len(weights)]].append((prompt, sample))
        return [([each], group) for each, group in zip(weights, groups, strict=True)]
    if method == "mixture":
        return [(weights, places)]
    if method == "mean":
        return [(list(posterior.means()), places)]
    raise PosteriorError(unknown("method of generation", method, METHODS))


class Writer:
    """Prompts that a program's network goes on with.

    Args:
        program: whose network and tokenizer.
        prompts: what the network reads.
        decoding: how it goes on.
        said: called whenever a text has one more token, with what of it will stay.

    Raises:
        SettingError: a prompt and its text have more tokens than the network has positions.
    """

    def __init__(
        self, program: Program, prompts: Sequence[Prompt], decoding: Decoding, said: Said | None = None
    ) -> None:
        self._program, self._prompts, self._decoding, self._said = program, prompts, decoding, said
        self._tokenizer: Any = program.encoder and program.encoder.tokenizer
        limit, longest = positions(program.network), max((len(each.tokens) for each in prompts), default=0)
        if limit is not None and longest + decoding.max_new_tokens > limit:
            raise SettingError(
                f"A prompt has {longest} tokens and its text up to {decoding.max_new_tokens}: '{program.base.name}' "
                f"has positions for {limit}. Shorten the prompt, or lower max_new_tokens."
            )

    def parts(self, places: Sequence[Place], batch_size: int, authors: Sequence[Weights]) -> Iterator[list[Place]]:
        """Places whose texts are written at once.

        They are after prompts of one length where a network counts padding, or padding would part a prompt that is
        learned from a text.
        """
        step = max(1, batch_size // len(authors))  # each author reads the texts
        groups: dict[int, list[Place]] = {}
        alike = counts_padding(self._program.weights.base) or virtual_tokens(self._program.network)
        for prompt, sample in places:
            groups.setdefault(len(self._prompts[prompt].tokens) if alike else 0, []).append((prompt, sample))
        for group in groups.values():
            for start in range(0, len(group), step):
                yield group[start : start + step]

    def write(
        self, authors: Sequence[Weights], places: Sequence[Place], uniform: Tensor, at_once: int
    ) -> tuple[list[list[int]], Tensor]:
        """Tokens of the texts at some places by the mixture of weights, and log-probabilities (places, weights)."""

        def said(row: int, text: list[int]) -> None:
            if self._said is not None:
                prompt, sample = places[row]
                self._said(prompt, sample, self._heard(prompt, text))

        reader = Reader(self._program, authors, at_once)
        batch = self._batch([self._prompts[prompt].tokens for prompt, _ in places], "left")
        return decode(reader, len(authors), batch, self._decoding, uniform, self._ended, said)

    def score(self, weights: Weights, places: Sequence[Place], texts: Sequence[list[int]]) -> Tensor:
        """Log-probabilities (places,) of texts at some weights, in double precision."""
        self._program.weights.install(weights)
        before = [self._prompts[prompt].tokens for prompt, _ in places]
        batch = self._batch([asked + text for asked, text in zip(before, texts, strict=True)], "right")
        hidden = hidden_states(self._program.network, batch)
        begins = torch.tensor([len(asked) for asked in before]).unsqueeze(-1)
        ends = begins + torch.tensor([len(text) for text in texts]).unsqueeze(-1)
        place = torch.arange(1, hidden.shape[1])
        own = (begins <= place) & (place < ends)
        mine = own.to(hidden.device)
        states, expected = hidden[:, :-1][mine], batch["input_ids"][:, 1:][mine]
        log_probs, step = [], positions_at_once(self._program.network, size=2)
        for part, said in zip(states.split(step), expected.split(step), strict=True):
            every = logits_at(self._program.network, part).double().log_softmax(-1)
            log_probs.append(every.gather(-1, said.unsqueeze(-1)).squeeze(-1))
        each = torch.cat(log_probs).cpu()
        return each.new_zeros(own.shape).masked_scatter(own, each).sum(-1)

    def text(self, prompt: int, written: Sequence[int]) -> str:
        """The text of tokens after a prompt, without what ends it."""
        # What is decoded by itself may lose the blank before its first word, and programs are told by their blanks.
        before = self._prompts[prompt].tokens[-1:]
        text = _decoded(self._tokenizer, [*before, *written]).removeprefix(_decoded(self._tokenizer, before))
        ends = [place for stop in self._decoding.stop if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _heard(self, prompt: int, written: list[int]) -> str:
        """The text of tokens after a prompt, but for what of its end may become something else with one more token.

        Such are bytes of a character that is not whole yet, and what a text at which it ends begins with.
        """
        text, stops = self.text(prompt, written), self._decoding.stop
        if self._ended(written) or len(written) == self._decoding.max_new_tokens:
            return text
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        begun = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        return text[: len(text) - max(begun, default=0)]

    def generation(self, prompt: int, made: Sequence[tuple[list[int], Tensor]], method: str) -> Generation:
        """The texts after one prompt."""
        written = tuple(tuple(text) for text, _ in made)
        log_probs = torch.stack([each for _, each in made])
        texts = tuple(self.text(prompt, text) for text in written)
        sampled = method != "mean" and self._decoding.samples
        return Generation(self._prompts[prompt].text, texts, written, log_probs, method, sampled)

    @cached_property
    def _last(self) -> set[int]:
        """Tokens that end a text."""
        said: Any = getattr(self._program.weights.base.generation_config, "eos_token_id", None)
        found = said if isinstance(said, list) else [said]
        return {token for token in (*found, self._tokenizer.eos_token_id) if token is not None}

    def _ended(self, text: list[int]) -> bool:
        if text[-1] in self._last:
            return True
        return bool(self._decoding.stop) and any(stop in self._tokenizer.decode(text) for stop in self._decoding.stop)

    def _batch(self, texts: Sequence[list[int]], side: Literal["left", "right"]) -> Batch:
        """Texts with padding: on the left it separates none from what follows, on the right it moves no token."""
        numbered = side == "left" and numbered_from_mask(self._program.weights.base)
        collate = Collator(replace(self._program.padding, side=side, positions=numbered))
        batch = collate([{"input_ids": text} for text in texts])
        return {name: value.to(self._program.device) for name, value in batch.items()}
