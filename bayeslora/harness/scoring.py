"""Log-likelihoods of continuations at draws of the weights, and whether the mixture of draws would say them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayeslora.observations.batches import Batch, Collator
from bayeslora.observations.completions import positions_at_once
from bayeslora.observations.decoder import hidden_states, logits_at
from bayeslora.progress import track

if TYPE_CHECKING:
    from bayeslora.program import Program

__all__ = ["Pair", "Scores", "scored"]

Weights = Mapping[str, Tensor]
#: Tokens that are read, at least one, and tokens that come after them, at least one.
Pair = tuple[list[int], list[int]]


class Scores(NamedTuple):
    """What draws say of continuations.

    Attributes:
        log_probs: of each under each draw of the weights (pairs, draws), in nats, in double precision.
        greedy: whether each of its tokens is the most probable one of the mixture of draws (pairs,).
    """

    log_probs: Tensor
    greedy: Tensor


def scored(
    program: Program, draws: Sequence[Weights], pairs: Sequence[Pair], batch_size: int = 8, progress: bool = False
) -> Scores:
    """Scores of continuations.

    All draws see one batch before the next batch comes: which token is the most probable one of their mixture is known
    only where the distributions of all are at hand. What is read alike, such as a question whose answers are one token
    each, is read once.

    Args:
        program: whose network it is, without dropout.
        draws: sets of weights, by site.
        pairs: tokens before and tokens after.
        batch_size: texts a pass; it does not change the result.
        progress: show a bar.
    """
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (before, after) in enumerate(pairs):
        asked.setdefault((*before, *after[:-1]), []).append(number)
    texts = sorted(asked, key=len, reverse=True)
    found = Scores(torch.empty(len(pairs), len(draws), dtype=torch.float64), torch.empty(len(pairs), dtype=torch.bool))
    for start in track(range(0, len(texts), batch_size), "score", show=progress):
        part = texts[start : start + batch_size]
        numbers = [number for text in part for number in asked[text]]
        rows = [row for row, text in enumerate(part) for _ in asked[text]]
        places = _Places.of(part, rows, [pairs[number][1] for number in numbers])
        with torch.no_grad():
            found.log_probs[numbers], found.greedy[numbers] = _scored(program, draws, _batch(program, part), places)
    return found


class _Places(NamedTuple):
    """The tokens of continuations in a batch, one after another.

    Attributes:
        rows: of the batch (tokens,).
        before: place in its row at which each is predicted (tokens,).
        tokens: which they are (tokens,).
        owner: number of the continuation of each (tokens,).
        first: the place in this list of that continuation's first one (tokens,).
    """

    rows: Tensor
    before: Tensor
    tokens: Tensor
    owner: Tensor
    first: Tensor

    @classmethod
    def of(cls, texts: Sequence[tuple[int, ...]], rows: Sequence[int], said: Sequence[list[int]]) -> _Places:
        """Places of continuations, each of the text in one of the rows."""
        sizes = torch.tensor([len(tokens) for tokens in said])
        starts = torch.tensor([len(texts[row]) for row in rows]) - sizes
        owner = torch.arange(len(said)).repeat_interleave(sizes)
        first = (sizes.cumsum(0) - sizes)[owner]
        within = torch.arange(len(owner)) - first
        tokens = torch.tensor([token for each in said for token in each])
        return cls(torch.tensor(rows)[owner], starts[owner] + within, tokens, owner, first)


def _batch(program: Program, texts: Sequence[tuple[int, ...]]) -> Batch:
    """Texts with padding on the right, where nothing that comes before it sees it: so there need not be a mask."""
    collate = Collator(replace(program.padding, side="right", positions=False))
    return {"input_ids": collate([{"input_ids": text} for text in texts])["input_ids"].to(program.device)}


def _scored(program: Program, draws: Sequence[Weights], batch: Batch, places: _Places) -> Scores:
    """Scores of the continuations in a batch."""
    network = program.network
    hidden = []
    for weights in draws:
        program.weights.install(weights)
        hidden.append(hidden_states(network, batch)[places.rows, places.before])
    tokens, first = places.tokens.to(program.device), places.first.to(program.device)
    each = hidden[0].new_zeros(len(draws), len(tokens), dtype=torch.float64)  # of each token given those before it
    best = torch.empty_like(tokens)
    step = positions_at_once(network, size=2)  # in double precision
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        mixed: Tensor | None = None
        for draw, weights in enumerate(draws):
            program.weights.install(weights)  # there may be LoRA on the head
            log_probs = logits_at(network, hidden[draw][part]).double().log_softmax(-1)
            each[draw, part] = log_probs.gather(-1, tokens[part].unsqueeze(-1)).squeeze(-1)
            # A draw counts as much as it made probable what was said so far.
            until = each[draw].cumsum(0) - each[draw]
            log_probs += (until - until[first])[part].unsqueeze(-1)
            mixed = log_probs if mixed is None else torch.logaddexp(mixed, log_probs)
        assert mixed is not None
        best[part] = mixed.argmax(-1)
    sums = torch.zeros(int(places.owner[-1]) + 1, len(draws), dtype=torch.float64).index_add(
        0, places.owner, each.cpu().T
    )
    wrong = torch.zeros(len(sums), dtype=torch.long).index_add(0, places.owner, (best != tokens).long().cpu())
    return Scores(sums, wrong == 0)
