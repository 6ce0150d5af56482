"""Learned prompts (soft prompts) before the tokens that a causal language model reads: PEFT's virtual tokens.

PEFT's own pass leaves out the positions of tokens, has no place for a mask of blocks, and puts keys and values of its
own in place of those of tokens before. Here the network gets the same prompts with all of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bayeslora.errors import AdapterError

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["PROMPTS", "behind_prompt", "virtual_tokens"]

#: Learned prompts that are read before tokens, as PEFT names them: Lester et al. 2021, Liu et al. 2021, Li and Liang
#: 2021.
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def virtual_tokens(network: nn.Module) -> int:
    """Places that a learned prompt of PEFT takes before each text; zero without one."""
    config = getattr(network, "active_peft_config", None)
    return getattr(config, "num_virtual_tokens", None) or 0


def behind_prompt(network: Any, inputs: Mapping[str, Tensor], cache: DynamicCache | None = None) -> dict[str, Any]:
    """What the network without PEFT around it is given to read tokens behind its learned prompt.

    Every token sees the whole prompt, and is numbered on from its end.

    Args:
        network: a PEFT model of a causal language model with one of `PROMPTS`.
        inputs: its arguments, of which ``input_ids`` and, if there, ``position_ids`` are (examples, tokens);
            ``attention_mask``, if there, is (examples, tokens) of this pass and those before, or (examples, 1, tokens,
            tokens) to be added.
        cache: transformers' keys and values of the tokens before, behind the prompt; one that is empty gets the prompt.

    Returns:
        Arguments, by which virtual tokens that are embedded come before those of the first pass.

    Raises:
        AdapterError: gradient checkpointing would leave out the keys and values of a prefix.
    """
    given: dict[str, Any] = dict(inputs)
    rows, count = len(inputs["input_ids"]), virtual_tokens(network)
    first = cache is None or not cache.get_seq_length()
    prefix = network.active_peft_config.peft_type == "PREFIX_TUNING"
    own = count if first and not prefix else 0
    if "attention_mask" in given:
        given["attention_mask"] = _attended(given["attention_mask"], count, own)
    if "position_ids" in given:
        places = given["position_ids"]
        before = torch.arange(own, device=places.device).expand(rows, own)
        given["position_ids"] = torch.cat([before, places + count], dim=1)
    if own:
        embedded = network.get_base_model().get_input_embeddings()(given.pop("input_ids"))
        given["inputs_embeds"] = torch.cat([network.get_prompt(rows).to(embedded), embedded], dim=1)
    elif prefix:
        _refuse_checkpointing(network.get_base_model())
        cache = _with_prefix(cache, network.get_prompt(rows)) if first else cache
    return given if cache is None else {**given, "past_key_values": cache}


def _attended(mask: Tensor, count: int, own: int) -> Tensor:
    """A mask with so many virtual tokens that are seen, of which some are in the pass themselves."""
    if mask.dim() == 2:
        return pad(mask, (count, 0), value=1)
    seen = pad(mask, (count, 0))
    later = mask.new_full((own, seen.shape[-1]), torch.finfo(mask.dtype).min).triu(1)
    return torch.cat([later.expand(*seen.shape[:2], -1, -1), seen], dim=2)


def _with_prefix(cache: DynamicCache | None, prefix: DynamicCache) -> DynamicCache:
    """A prefix, in the cache that is to go on with it if there is one."""
    if cache is None:
        return prefix
    for number, layer in enumerate(prefix.layers):
        cache.update(layer.keys, layer.values, number)
    return cache


def _refuse_checkpointing(base: Any) -> None:
    if base.training and base.is_gradient_checkpointing:
        raise AdapterError(
            "PREFIX_TUNING puts keys and values before a text, which transformers leaves out of a "
            f"{type(base).__name__} with gradient checkpointing: switch it off "
            "(network.gradient_checkpointing_disable()), or take another way to fine-tune."
        )
