"""What a network has for tokens: how many positions and embeddings, and how it counts the former."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from bayeslora.observations.soft_prompts import virtual_tokens

__all__ = ["counts_padding", "learned_positions", "numbered_from_mask", "positions", "vocabulary"]


def positions(network: nn.Module) -> int | None:
    """How many tokens a network has positions for, behind a prompt that is learned; None if there is no limit."""
    found = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:  # XLNet says -1
        return None
    return found - _offset(network) - virtual_tokens(network)


def learned_positions(network: nn.Module) -> int | None:
    """The same for a network that looks positions up in a table; None for one that works them out, as by rotations."""
    tables = ("position_embeddings", "embed_positions", "wpe")
    known = any(name.endswith(tables) and isinstance(each, nn.Embedding) for name, each in network.named_modules())
    return positions(network) if known else None


def vocabulary(network: nn.Module) -> int | None:
    """Number of tokens that a network has an embedding for, where that can be known."""
    ask: Any = getattr(network, "get_input_embeddings", None)
    if ask is None:  # no network of transformers
        return None
    try:
        table = ask()
    except NotImplementedError:
        # How transformers answers for a network of theirs that embeds no tokens, and the only way to ask. The check of
        # token ids is then left out, since it has no bound.
        return None
    weight = getattr(table, "weight", None)  # an embedding may be more than one table
    return None if weight is None else int(weight.shape[0])


def numbered_from_mask(network: nn.Module) -> bool:
    """Whether a network has to be told the positions of tokens that padding precedes, since it counts padding."""
    return _takes_positions(network) and not _offset(network)


def counts_padding(network: nn.Module) -> bool:
    """Whether padding moves the tokens behind it, as in Bart: a network counts it, and cannot be told positions."""
    return not _takes_positions(network) and not _offset(network)


def _takes_positions(network: nn.Module) -> bool:
    return "position_ids" in inspect.signature(network.forward).parameters


def _offset(network: nn.Module) -> int:
    """Positions that come before the first token's: RoBERTa's count from behind the padding's, and pass padding by."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0
