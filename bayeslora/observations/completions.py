"""Completions: the likelihood of every token of an answer, given its prompt and the tokens before it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bayeslora.errors import DataError
from bayeslora.observations.base import Causal, Drawn, Sampled, refuse
from bayeslora.observations.batches import Batch, Collator, Padding
from bayeslora.observations.decoder import head_of, hidden_states, logits_at
from bayeslora.observations.transcripts import tokens_of, transcript
from bayeslora.predict.sequences import Scored, SequencePrediction
from bayeslora.tasks.sources import fields_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bayeslora.observations.encoding import Encoder
    from bayeslora.tasks import Task, TaskSpec

__all__ = ["CompletionCollator", "Completions", "log_likelihoods", "positions_at_once", "spread"]

#: Logits that are held at once: positions times vocabulary.
LOGITS = 2**24


@dataclass(frozen=True)
class Completions(Causal, Sampled):
    """The tokens of a row's completion, each with the probability that the network gives it after all those before.

    The one output of a row is the summed log-likelihood of its completion, and its label the number of tokens that it
    has: the last ones of the row. Both together say which tokens are scored, so that rows which are tokenised already
    need no mask.

    Attributes:
        chat: put the prompt into the tokenizer's chat template, as what a user says.
    """

    name: ClassVar[str] = "completions"
    kinds: ClassVar[tuple[str, ...]] = ("completion",)
    apart: ClassVar[frozenset[str]] = frozenset({"target"})

    chat: bool = False

    @classmethod
    def of(cls, spec: TaskSpec) -> Completions:
        """Nothing depends on the task."""
        return cls()

    @property
    def outputs(self) -> int:
        """One: the log-likelihood of a completion."""
        return 1

    def length(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
        """The usual number of tokens, doubled until the longest row of the task fits: completions are never cut."""
        most = super().length(tokenizer, task)
        for split in task.roles.values():
            for row in split.dataset:
                before, after = tokens_of(tokenizer, transcript(tokenizer, row, split.spec, self.chat), sys.maxsize)
                while len(before) + len(after) > most:
                    most *= 2
        return most

    def columns(self, spec: TaskSpec) -> tuple[str, ...]:
        """Columns of the prompt, and those of the completion, whose likelihood is predicted."""
        return tuple(dict.fromkeys([*spec.columns, *fields_of(spec.answer)]))

    def tokens(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> dict[str, list[Any]]:
        """Columns of token ids of prompts with their completions, the end of a text after them; or prompts alone.

        Raises:
            DataError: a completion leaves no room for its prompt, or there is no chat template where one is needed.
        """
        tokenizer = encoder.tokenizer
        found = [tokens_of(tokenizer, transcript(tokenizer, row, spec, self.chat), encoder.max_length) for row in rows]
        columns: dict[str, list[Any]] = {
            "input_ids": [before + after for before, after in found],
            "attention_mask": [[1] * len(before + after) for before, after in found],
        }
        return columns | ({"labels": [len(after) for _, after in found]} if all(after for _, after in found) else {})

    def asked(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> list[list[int]]:
        """The prompts as a whole, which are the same whether a row says its completion or not."""
        read = encoder.tokenizer
        prompts = [replace(transcript(read, row, spec, self.chat), answer=None) for row in rows]
        return [tokens_of(read, prompt, sys.maxsize)[0] for prompt in prompts]

    def collator(self, padding: Padding) -> Collator:
        """Marks the tokens of completions as well."""
        return CompletionCollator(padding)

    def scored(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Examples of the tokens of completions."""
        return batch["target"][:, 1:].nonzero(as_tuple=True)[0]

    def run(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihoods (examples, 1) of the completions."""
        hidden, expected = self.places(network, batch)
        return spread(log_likelihoods(network, hidden, expected), batch).sum(1, keepdim=True)

    def places(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the head is given where it is to predict a token of a completion, and which token comes.

        Returns:
            Hidden states (positions, width) and tokens (positions,), row after row.
        """
        target = batch["target"][:, 1:]
        hidden = hidden_states(network, self.inputs(batch))
        return hidden[:, :-1][target], batch["input_ids"][:, 1:][target]

    def drawn(self, network: nn.Module, batch: Mapping[str, Tensor], sample: bool) -> Drawn:
        """Every token drawn by itself, from what the network says after the data's own tokens before it."""
        target = batch["target"]
        hidden, expected = self.places(network, batch)
        with torch.no_grad():
            own, tokens = _sampled(network, hidden, expected)
            tokens = tokens if sample else expected
            picked = torch.rand(target.shape, device=target.device).masked_fill(~target, -1).argmax(1, keepdim=True)
            every = spread(own, batch)
            one = every.gather(1, picked).squeeze(1)
            same = spread((tokens == expected).to(own), batch).gather(1, picked).squeeze(1)
        drawn = spread(log_likelihoods(network, hidden, tokens), batch)
        both = torch.cat([drawn.sum(1, keepdim=True), drawn.gather(1, picked)], dim=1)
        # What is drawn is never too improbable for a quotient; what the data say may be.
        return Drawn(every.sum(1), both, one, torch.where(same > 0, (-one).exp(), 0.0) - 1 if sample else same)

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """The completions with the log-likelihoods that were computed."""
        return Scored(outputs.squeeze(-1))

    def check(self, labels: Sequence[Any]) -> None:
        """Make sure that labels are numbers of tokens.

        Raises:
            DataError: one is none (the message names the row).
        """
        for row, label in enumerate(labels):
            if not isinstance(label, int) or label < 1:
                raise refuse(row, label, "the number of tokens, at the end of the row, that are its completion")

    def predicted(
        self, outputs: Tensor, labels: Tensor | None = None, names: tuple[str, ...] = (), **made: Any
    ) -> SequencePrediction:
        """A prediction of sequences, which have no names."""
        return SequencePrediction(outputs, labels, **made)


@dataclass(frozen=True)
class CompletionCollator(Collator):
    """Makes batches with a mask ``target`` (examples, tokens), true for tokens of a completion."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tensors (examples, tokens); labels and index (examples,).

        Raises:
            DataError: a row has no completion, or nothing that comes before it.
        """
        batch = super().__call__(rows)
        if "labels" not in batch:
            raise DataError(
                "The rows have no completions, of which this is the likelihood: give them, or let the posterior "
                "write some (generate)."
            )
        mask, labels = batch["attention_mask"].long(), batch["labels"].unsqueeze(1)
        short = (mask.sum(1) <= labels[:, 0]).nonzero()
        if len(short):
            found = int(mask[short[0, 0]].sum())
            raise DataError(
                f"A row has {found} tokens, of which {int(labels[short[0, 0]])} are its completion: at least one has "
                "to come before it, which predicts its first token."
            )
        batch["target"] = mask.bool() & (mask.flip(1).cumsum(1).flip(1) <= labels)
        return batch


def log_likelihoods(network: nn.Module, hidden: Tensor, expected: Tensor) -> Tensor:
    """Log probability of the token that comes at each position, in the memory of a part of them.

    Logits are computed again where a gradient needs them: what is kept does not grow with positions times vocabulary.

    Args:
        network: a causal language model.
        hidden: what its head is given (positions, width).
        expected: the tokens (positions,).

    Returns:
        Log probabilities (positions,).
    """
    step = positions_at_once(network)
    if len(hidden) <= step:
        return _log_likelihoods(network, hidden, expected)
    again = partial(_same_values, head_of(network))
    parts = [
        checkpoint(_log_likelihoods, network, *part, use_reentrant=False, context_fn=again)
        for part in zip(hidden.split(step), expected.split(step), strict=True)
    ]
    return torch.cat(parts)


def spread(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Values (positions,) for all tokens of completions, in their places (examples, tokens), and zero elsewhere."""
    target = batch["target"]
    return values.new_zeros(target.shape).masked_scatter(target, values)


def _sampled(network: nn.Module, hidden: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of the token that comes at each position (positions,), and one that is drawn there."""
    own, tokens = [], []
    step = positions_at_once(network)
    for states, known in zip(hidden.split(step), expected.split(step), strict=True):
        logs = logits_at(network, states).log_softmax(-1)
        own.append(logs.gather(-1, known.unsqueeze(-1)).squeeze(-1))
        tokens.append(torch.multinomial(logs.exp(), 1).squeeze(-1))
    return torch.cat(own), torch.cat(tokens)


def _log_likelihoods(network: nn.Module, hidden: Tensor, expected: Tensor) -> Tensor:
    logits = logits_at(network, hidden)
    return logits.gather(-1, expected.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def positions_at_once(network: nn.Module, size: int = 1) -> int:
    """How many positions' logits are held at once.

    Args:
        network: with an output head.
        size: of each number that is held, in multiples of single precision's.
    """
    return max(1, LOGITS // (size * int(head_of(network).out_features)))


def _same_values(head: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a pass and of its repetition, which sees the weights that are in the head's places now.

    By then those of another draw may be there: a bound of several particles has one backward pass for all.
    """
    return nullcontext(), _Places(head.modules())


class _Places:
    """What some modules hold now, held again inside: a context that may be entered as often as one likes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places = [vars(module) for module in modules]
        self._others = [dict(each) for each in self._places]

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *exception: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        now = [dict(each) for each in self._places]
        for places, others in zip(self._places, self._others, strict=True):
            places.clear()
            places.update(others)
        self._others = now
