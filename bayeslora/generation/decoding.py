"""Decoding token by token: what a network says next at some weights, a mixture of such, and the choice of a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.joined import Apart
from bayeslora.observations.batches import Batch
from bayeslora.observations.decoder import hidden_states, logits_at
from bayeslora.settings import Count, NotNegative, Settings

if TYPE_CHECKING:
    from transformers import DynamicCache

    from bayeslora.program import Program

__all__ = ["Decoding", "Reader", "decode"]

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Decoding(Settings):
    """How a token is chosen, and where a text ends.

    Attributes:
        max_new_tokens: most tokens of a text.
        temperature: by which log-probabilities are divided; 1 samples from the posterior predictive, 0 takes the most
            probable token (greedy).
        top_p: probability of the most probable tokens among which one is chosen.
        stop: texts at which it ends, beside the network's own token of the end.
    """

    name: ClassVar[str] = "decoding"

    max_new_tokens: Count = 64
    temperature: NotNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: tuple[str, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether tokens are chosen with the very probabilities that they have."""
        return self.temperature == 1 and self.top_p == 1

    def choose(self, log_probs: Tensor, uniform: Tensor) -> Tensor:
        """Tokens (rows,) by log-probabilities (rows, vocabulary), each with a uniform number (rows,) of its own."""
        if not self.temperature:
            return log_probs.argmax(-1)
        scores = log_probs.double() / self.temperature
        if self.top_p < 1:
            from transformers import TopPLogitsWarper

            nothing: Any = None
            scores = TopPLogitsWarper(self.top_p)(nothing, scores)
        reached = scores.softmax(-1).cumsum(-1)
        wanted = uniform.double().to(reached.device) * reached[:, -1]
        return torch.searchsorted(reached, wanted.unsqueeze(-1), right=True).squeeze(-1).clamp(max=reached.shape[1] - 1)


class _Part(NamedTuple):
    """Values that are installed at once, how many draws they are, and what was read at these."""

    values: Mapping[str, Any]
    draws: int
    cache: DynamicCache


class Reader:
    """A network at some draws of the weights that reads texts, token by token, and remembers keys and values.

    Args:
        program: whose network it is.
        draws: sets of weights, by site. Their passes are one where the layers allow it.
        at_once: rows that a pass may have at most, each counted for every draw at which it is read.
    """

    def __init__(self, program: Program, draws: Sequence[Weights], at_once: int = 64) -> None:
        self._program, self._draws, self._at_once = program, draws, at_once
        self._parts: list[_Part] = []

    def __call__(self, batch: Batch) -> Tensor:
        """Log-probabilities of the next token after tokens that continue what was read before.

        Returns:
            In double precision on the CPU, (rows, draws, vocabulary).

        Raises:
            PosteriorError: the network keeps no keys and values.
        """
        weights = self._program.weights
        if not self._parts and weights.joinable:
            rows, left = len(batch["input_ids"]), iter(self._draws)
            while some := list(islice(left, max(1, self._at_once // rows))):
                self._parts.append(_Part(weights.joined(some, rows), len(some), self._cache()))
            with suppress(Apart):
                return self._read(batch)
            self._parts = []
        self._parts = self._parts or [_Part(each, 1, self._cache()) for each in self._draws]
        return self._read(batch)

    def _read(self, batch: Batch) -> Tensor:
        found = []
        for values, draws, cache in self._parts:
            self._program.weights.install(values)
            repeated = {name: value.repeat(draws, 1) for name, value in batch.items()}
            hidden = hidden_states(self._program.network, repeated, cache=cache)
            logits = logits_at(self._program.network, hidden[:, -1:]).squeeze(1)
            found.append(logits.double().log_softmax(-1).cpu().unflatten(0, (draws, -1)))
        return torch.cat(found).transpose(0, 1)

    def _cache(self) -> DynamicCache:
        from transformers import DynamicCache

        base: Any = self._program.weights.base
        if "past_key_values" not in signature(base.forward).parameters:
            raise PosteriorError(
                f"A {base.config.model_type} network keeps no keys and values of the tokens that it has read, which "
                "texts are written by: let another base write."
            )
        return DynamicCache(config=base.config)


def decode(
    read: Callable[[Batch], Tensor],
    draws: int,
    batch: Batch,
    decoding: Decoding,
    uniform: Tensor,
    ended: Callable[[list[int]], bool],
    said: Callable[[int, list[int]], None] | None = None,
) -> tuple[list[list[int]], Tensor]:
    """Continue prompts by the mixture of draws, exactly.

    The next token's distribution is the average of the draws' with each weighed by the probability that it gave to what
    was said so far: a product of such conditionals is the average of the draws' probabilities of the whole text.

    Args:
        read: log-probabilities (rows, draws, vocabulary) of what comes after a batch, such as a `Reader`.
        draws: how many draws it reads at.
        batch: prompts with padding on the left; ``input_ids`` and ``attention_mask`` (rows, tokens), and
            ``position_ids`` where the network is to be told them.
        decoding: how tokens are chosen.
        uniform: numbers in [0, 1) (rows, max_new_tokens), by which they are.
        ended: whether tokens are a whole text.
        said: called with a row and its tokens whenever it has one more.

    Returns:
        Tokens of each row, and their log-probability under each draw (rows, draws).

    Raises:
        PosteriorError: a logit is NaN.
    """
    rows = len(batch["input_ids"])
    texts: list[list[int]] = [[] for _ in range(rows)]
    log_probs = torch.zeros(rows, draws, dtype=torch.float64)
    running = torch.ones(rows, dtype=torch.bool)
    for step in range(decoding.max_new_tokens):
        each = read(batch)
        if each.isnan().any():
            raise PosteriorError("The network's logits are NaN: it, the posterior, or their precision is not enough.")
        mixed = (log_probs.log_softmax(1).unsqueeze(-1) + each).logsumexp(1)
        chosen = decoding.choose(mixed, uniform[:, step])
        seen = each.gather(-1, chosen[:, None, None].expand(-1, draws, 1)).squeeze(-1)
        log_probs = torch.where(running.unsqueeze(-1), log_probs + seen, log_probs)
        for row in running.nonzero().squeeze(-1).tolist():
            texts[row].append(int(chosen[row]))
            running[row] = not ended(texts[row])
            if said is not None:
                said(row, texts[row])
        if not running.any():
            break
        batch = _next(batch, chosen)
    return texts, log_probs


def _next(batch: Batch, chosen: Tensor) -> Batch:
    """The batch of one more token for each row."""
    mask = batch["attention_mask"]
    found = {
        "input_ids": chosen.unsqueeze(-1).to(mask.device),
        "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
    }
    if "position_ids" in batch:
        found["position_ids"] = batch["position_ids"][:, -1:] + 1
    return found
