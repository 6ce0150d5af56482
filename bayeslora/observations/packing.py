"""Packed rows: a question and all its choices as one sequence, in which no choice sees another.

The question is run once. Behind it stand the choices, each numbered as if it alone came after the question, and a mask
of blocks keeps them apart, so that every choice is read as it would be in a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.errors import AdapterError, DataError
from bayeslora.observations.batches import Batch, Collator, choice_mask
from bayeslora.observations.choices import ChoiceCollator
from bayeslora.observations.decoder import evaluated, hidden_states
from bayeslora.observations.soft_prompts import virtual_tokens

__all__ = ["ApartCollator", "PackedCollator", "check_window", "packed", "predictors", "refuses_packing"]

#: Attention that takes a mask of one's own, as transformers names it.
KERNELS = ("eager", "sdpa")
#: Layers whose state goes on from token to token, as transformers names them.
STATES = frozenset({"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba"})
#: How far what a network makes of a packed choice may be from what it makes of the choice alone, in parts of it.
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class PackedCollator(Collator):
    """Makes batches of packed rows: of each the column ``input_ids``, and two more.

    ``segments`` says of each token whose it is: 0 of the question, k of the k-th choice. ``sizes`` has a positive
    number for each choice; a batch pads it with zeros, which stand for choices that a row lacks.

    Attributes:
        choices: number of choices to pad every row to.
    """

    choices: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tensors (examples, tokens), with positions; sizes (examples, choices); labels and index (examples,).

        Raises:
            DataError: a row has too many choices, or the rows are not packed.
        """
        sizes = _sizes(rows, self.choices)
        values = {"input_ids": self.padding.values["input_ids"], "attention_mask": 0, "segments": 0}
        batch = Collator(replace(self.padding, values=values))(rows)
        batch["position_ids"] = _positions(batch["segments"], batch["attention_mask"])
        return {**batch, "sizes": sizes}


@dataclass(frozen=True)
class ApartCollator(ChoiceCollator):
    """Makes batches of packed rows that are taken apart again: a sequence of the question with each of its choices."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tensors (examples, choices, tokens), ``segments`` among them; sizes (examples, choices); labels and index.

        Raises:
            DataError: a row has too many choices, or the rows are not packed.
        """
        sizes = _sizes(rows, self.choices)
        values = {"input_ids": self.padding.values["input_ids"], "attention_mask": 0, "segments": 0}
        # To the right it moves no token of a text, whatever counts them.
        padding = replace(self.padding, values=values, side="right", positions=False)
        batch = ChoiceCollator(padding, self.choices)([{**row, **_apart(row)} for row in rows])
        return {**batch, "sizes": sizes}


def packed(network: nn.Module, batch: Mapping[str, Tensor]) -> Batch:
    """A network's arguments: the batch's tokens and positions, and a mask (examples, 1, tokens, tokens) to be added.

    Args:
        network: a causal language model.
        batch: with ``input_ids``, ``attention_mask``, ``segments`` and ``position_ids`` (examples, tokens).
    """
    given: Any = network
    dtype = given.get_input_embeddings().weight.dtype  # which kernels of attention want of a mask
    segments = batch["segments"]
    whose, of_whom = segments.unsqueeze(2), segments.unsqueeze(1)
    tokens = segments.shape[1]
    # A token that sees none, not even itself, is NaN in some kernels.
    itself = torch.eye(tokens, dtype=torch.bool, device=segments.device)
    before = itself.new_ones(tokens, tokens).tril()
    seen = itself | (before & batch["attention_mask"].bool().unsqueeze(1) & ((of_whom == 0) | (whose == of_whom)))
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": mask.unsqueeze(1),
    }


def check_window(network: nn.Module, tokens: int) -> None:
    """Make sure that the window of a network's attention, if it has one, reaches over all packed tokens.

    Raises:
        AdapterError: it does not, and a mask of one's own would do without the window.
    """
    config: Any = network.config
    windows = [getattr(config, each, None) for each in ("sliding_window", "attention_chunk_size", "window_size")]
    tokens += virtual_tokens(network)
    window = min((each for each in windows if isinstance(each, int)), default=tokens)
    if tokens > window:
        raise AdapterError(
            f"A question with its choices (and a learned prompt before it) has {tokens} tokens, and the attention of "
            f"this {config.model_type} network has a window of {window}: lower max_length, or read choices one by one, "
            "with the observation's setting packed=False (in a shell --set observation.packed=false)."
        )


def predictors(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of choices, and those that predict them: the one before, or the question's last for the first of each.

    Args:
        segments: (examples, tokens).

    Returns:
        Numbers of examples, of tokens, and of the tokens that predict them, each (scored tokens,).
    """
    scored = segments > 0
    rows, places = scored.nonzero(as_tuple=True)
    last = scored.int().argmax(1) - 1  # of the question, which comes first
    begins = segments[rows, places] != segments[rows, places - 1]
    return rows, places, torch.where(begins, last[rows], places - 1)


def refuses_packing(network: nn.Module) -> str | None:
    """Why a network does not read a packed choice as it reads the choice alone, if it does not: it is asked to, once.

    So it is with states that go on from token to token (Mamba), with attention that counts tokens itself (ALiBi), and
    where the kernel of attention takes no mask of one's own.

    Args:
        network: a causal language model.
    """
    given: Any = network
    base: Any = given.get_base_model() if hasattr(given, "get_base_model") else given
    kind, kernel = base.config.model_type, getattr(base.config, "_attn_implementation", None)
    if kernel not in (None, *KERNELS):
        return (
            f"Choices can share a question by attention with a mask of its own, which '{kernel}' does not take "
            "(attention='sdpa' does; in a shell --set network.attention=sdpa)"
        )
    if STATES & set(getattr(base.config, "layer_types", None) or ()) or not _reads_packed(network):
        return (
            f"A {kind} network does not read choices that share a question as it reads each alone (its state goes on "
            "from token to token, or it counts tokens itself)"
        )
    return None


@torch.no_grad()
def _reads_packed(network: Any) -> bool:
    """Whether the last of two packed choices is to a network what it is alone."""
    device, length, size = network.get_input_embeddings().weight.device, 4, network.config.vocab_size
    ids = (torch.arange(3 * length, device=device) + size // 2) % size
    segments = torch.arange(3, device=device).repeat_interleave(length)
    rows = {"input_ids": ids[None], "segments": segments[None], "attention_mask": torch.ones_like(ids)[None]}
    rows["position_ids"] = _positions(rows["segments"], rows["attention_mask"])
    alone = ids[segments != 1][None]
    try:
        with evaluated(network), torch.autocast(device.type, enabled=False):
            given = {"input_ids": alone, "attention_mask": torch.ones_like(alone)}
            expected = hidden_states(network, given)[0, -length:]
            found = hidden_states(network, packed(network, rows))[0, -length:]
    except (RuntimeError, ValueError, TypeError, IndexError):  # what networks make of a mask that they do not know
        return False
    differ = (found - expected).float().norm() / expected.float().norm()
    return bool(differ < ROUNDING[found.dtype])


def _sizes(rows: Sequence[Mapping[str, Any]], most: int) -> Tensor:
    """What the likelihood of each choice is divided by (rows, most), zero for those that a row lacks."""
    for name in ("segments", "sizes"):
        if name not in rows[0]:
            raise DataError(f"The tokenised rows have no column '{name}': expected 'input_ids', 'segments', 'sizes'.")
    there = choice_mask([len(row["sizes"]) for row in rows], most)
    return there.long().masked_scatter(there, torch.tensor([size for row in rows for size in row["sizes"]]))


def _apart(row: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Token ids and segments of the question with each choice."""
    tokens = list(zip(row["input_ids"], row["segments"], strict=True))
    each = [[pair for pair in tokens if pair[1] in (0, choice)] for choice in range(1, len(row["sizes"]) + 1)]
    ids, segments = ([[pair[part] for pair in sequence] for sequence in each] for part in (0, 1))
    return {"input_ids": ids, "segments": segments, "attention_mask": [[1] * len(sequence) for sequence in ids]}


def _positions(segments: Tensor, attended: Tensor) -> Tensor:
    """Positions (examples, tokens): of the question from 0, of a choice from where the question ends, of padding 0."""
    place = attended.cumsum(1) - 1
    begins = segments != segments.roll(1, 1)
    start = torch.where(begins, place, 0).cummax(1).values
    question = (attended.bool() & (segments == 0)).sum(1, keepdim=True)
    # Behind the packed tokens, which may be more than a network has positions for, padding would have none.
    return torch.where(segments > 0, place - start + question, place).masked_fill(attended == 0, 0)
