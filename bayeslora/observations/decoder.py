"""Causal language models in two halves: their body, and the output head over the places that matter.

Logits of every token over the whole vocabulary are the largest tensor of a pass, and all but a few of them are not
looked at. Both halves run the network's own forward pass, with the other half out of the way, so that whatever an
architecture does around its head (scales, soft caps) is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.observations.soft_prompts import behind_prompt, virtual_tokens

__all__ = ["evaluated", "head_of", "hidden_states", "logits_at"]


def head_of(network: nn.Module) -> Any:
    """The output head of a causal language model."""
    return _bare(network).get_output_embeddings()


@contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """Let a network be asked as one that is not trained; each module is as before then."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def hidden_states(network: nn.Module, inputs: Mapping[str, Tensor], cache: Any = None) -> Tensor:
    """What the body of a causal language model makes of its tokens: (examples, tokens, width).

    A learned prompt is read before them, and what is made of it is left out.

    Args:
        network: a causal language model.
        inputs: its arguments, ``input_ids`` (examples, tokens) among them.
        cache: transformers' keys and values of the tokens before, to which those of these tokens are added.
    """
    base, head = _bare(network), head_of(network)
    body = _body(base)
    kept: list[Tensor] = []
    if virtual_tokens(network):
        network, given = base, behind_prompt(network, inputs, cache)
    else:
        given = dict(inputs) if cache is None else {**inputs, "past_key_values": cache}
    with _replaced(base, body, _Kept(body, kept)), _replaced(base, head, _Left(head)):
        network(**given, use_cache="past_key_values" in given)
    before = kept[-1].shape[1] - inputs["input_ids"].shape[1]
    return kept[-1][:, before:]  # from 0 on it is not cut, so that no gradient is copied


def logits_at(network: nn.Module, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logits of the next token.

    Args:
        network: a causal language model.
        hidden: what its body makes of them, (..., positions, width).
        tokens: whose logits are wanted, by number; all by default. Only their rows of the head are multiplied, and of
            plain LoRA around it, where neither is quantised, has hooks, or has a function in its place.

    Returns:
        Logits in float32, (..., positions, tokens).
    """
    base = _bare(network)
    body, head = _body(base), base.get_output_embeddings()
    states = hidden.flatten(0, -3) if hidden.dim() > 2 else hidden.unsqueeze(0)
    with ExitStack() as places:
        places.enter_context(_replaced(base, body, _Given(states)))
        if tokens is not None:
            for part in _parts(head):
                places.enter_context(_replaced(base, part, _Rows(part, tokens)))
        # Some networks ask their inputs how many rows there are.
        found: Tensor = base(input_ids=states.new_zeros(states.shape[:2], dtype=torch.long), use_cache=False).logits
    return found.float().reshape(*hidden.shape[:-1], found.shape[-1])


class _Head(nn.Module):
    """A stand-in for the head, which some networks ask for the type of its weight."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head: list[Any] = [head]  # in a list, so that it is not a part of this one

    @property
    def head(self) -> Any:
        """The head itself."""
        return self._head[0]

    @property
    def weight(self) -> Tensor:
        """Weight of the head that it stands for."""
        weight: Tensor = self.head.weight
        return weight


class _Left(_Head):
    """Leaves what the head would be given as it is."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _Kept(nn.Module):
    """In place of the body: itself, of which the hidden states are kept."""

    def __init__(self, body: Any, kept: list[Tensor]) -> None:
        super().__init__()
        self._body: list[Any] = [body]  # in a list, so that it is not a part of this one
        self._kept = kept

    @property
    def decoder(self) -> _Kept:
        """What OPT has within its body."""
        return _Kept(self._body[0].decoder, self._kept)

    def forward(self, *given: Any, **named: Any) -> Any:
        found = self._body[0](*given, **named)
        self._kept.append(found[0])
        return found


class _Output(tuple[Tensor]):
    """What a body returns, of any architecture: the hidden states, and nothing of all else."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """In place of the body: gives what it was made with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> _Given:
        """What OPT has within its body."""
        return self

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output([self.hidden])


class _Rows(_Head):
    """Some of the head's outputs."""

    def __init__(self, head: nn.Module, tokens: Tensor) -> None:
        super().__init__(head)
        self._tokens = tokens

    def forward(self, hidden: Tensor) -> Tensor:
        head, tokens = self.head, self._tokens
        if not _plain(head):
            every: Tensor = head(hidden)
            return every[..., tokens]
        bias = None if head.bias is None else head.bias[tokens]
        return nn.functional.linear(hidden, head.weight[tokens], bias)


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is a product with its matrix and nothing else: no function in its place, no hook on it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not any(hooks)


def _parts(head: Any) -> list[nn.Module]:
    """The layers of a head whose outputs are summed to the head's own: it alone, or with plain LoRA around it."""
    from peft.tuners.lora import Linear

    if type(head) is Linear and not head.lora_variant:
        return [head.base_layer, *(head.lora_B[name] for name in head.active_adapters if name in head.lora_B)]
    return [head]


def _bare(network: Any) -> Any:
    """The network without PEFT around it; its layers have their LoRA matrices all the same."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _body(base: Any) -> Any:
    """All that comes before the head, and before what a network does to it there."""
    found = getattr(base, base.base_model_prefix, None)
    return base.model if found is None else found  # Llama 4 has none of the name that it says


@contextmanager
def _replaced(base: nn.Module, module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let a network use another module in place of one of its own."""
    path = next(name for name, each in base.named_modules() if each is module)
    owner, _, leaf = path.rpartition(".")
    places: Any = base.get_submodule(owner)._modules
    places[leaf] = other
    try:
        yield
    finally:
        places[leaf] = module
