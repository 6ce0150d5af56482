"""The weights of a network as a handful of stacked tensors that can be swapped for sampled values.

Injection, target selection, merging and the file format are PEFT's. This room finds what PEFT trains, stacks LoRA
matrices of equal shape into one `Site` each, and puts values in place of the parameters. A value stays in place until
the next one is set, so that a forward pass that gradient checkpointing repeats sees the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayeslora.errors import AdapterError
from bayeslora.finding import active_adapter, find
from bayeslora.joined import Joined
from bayeslora.rng import seeded
from bayeslora.sites import Map, Site, Slot, Value, pairs
from bayeslora.switches import Switches

__all__ = ["Weights"]

#: Where a network says whose values are in its places now.
HOLDER = "_bayeslora_weights"


class Weights:
    """The weights that are learned of a network: what PEFT trains in it, or all that requires gradients without PEFT.

    Args:
        network: a `peft.PeftModel` with one active adapter, or a network of transformers. Its parameters are frozen:
            values are learned by whoever installs them here, and reach the parameters by `write` or, while the network
            is saved, by `holding`. Several programs may share a network, one after the other.
        new: whether nothing was trained, as of an adapter that was just made; None: not known.
        drawn: names of parameters of the base network that were drawn at random.

    Attributes:
        name: of the adapter; None without PEFT.
        base: the network without PEFT around it.
        sites: what a program is about, in order.
        random: names of head sites of which all was drawn at random, and not trained.

    Raises:
        AdapterError: nothing is trained, more than one adapter is active, or something that cannot be stochastic is
            trained (the message names it).
    """

    def __init__(self, network: nn.Module, new: bool | None = None, drawn: Iterable[str] = ()) -> None:
        self.name = active_adapter(network)
        if HOLDER in network.__dict__:
            network.__dict__[HOLDER].release(self.name)
        self._new = new
        self._network: Any = network
        self.base: Any = network if self.name is None else cast("Any", network).get_base_model()
        places = find(network, self.name)
        self._slots = {name: place.slots for name, place in places.items()}
        device = next(network.parameters()).device
        self.sites = tuple(
            Site(name, place.role, place.group, _stored(place.role, place.slots, device), place.layers, place.scaling)
            for name, place in places.items()
        )
        heads = [site for site in self.sites if new and not site.stacked]
        self.random = frozenset(site.name for site in heads if {*site.layers} <= {*drawn})
        self._trained = [value for value in network.parameters() if value.requires_grad]
        self._switches = Switches(network, self.name)
        self._elsewhere = self._on_other_devices()
        network.requires_grad_(False)
        network.__dict__[HOLDER] = self

    def release(self, adapter: str | None) -> None:
        """Give the network its own parameters back, for another program; those of its adapter are to train again."""
        self.restore()
        if adapter == self.name:  # PEFT itself readies those of an adapter that it is told to use
            for value in self._trained:
                value.requires_grad_(True)

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration of the adapter; empty without PEFT."""
        found: dict[str, Any] = {} if self.name is None else self._network.peft_config[self.name].to_dict()
        return found

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The places of a site's values in the network, in stacking order."""
        return self._slots[name]

    def not_linear(self, sites: Iterable[Site]) -> Iterator[str]:
        """Yield the names of layers of LoRA matrices for which no function can stand, as it can in linear layers."""
        for site in sites:
            for layer, slot in zip(site.layers, self._slots[site.name], strict=True):
                if not slot.linear:
                    yield layer

    @property
    def parameter_ids(self) -> frozenset[int]:
        """Identities of the parameters in whose place values are put."""
        return frozenset(id(slot.parameter) for slots in self._slots.values() for slot in slots)

    def to(self, device: torch.device) -> None:
        """Move the initial values (the prior's centre) to ``device``; the network moves by itself."""
        self.sites = tuple(replace(site, initial=site.initial.to(device)) for site in self.sites)
        self._elsewhere = self._on_other_devices()

    @property
    def fresh(self) -> bool:
        """Whether no layer's LoRA product changes the network, as of an adapter that was not trained.

        A or B is zero in each, or the frozen weight is less by the product that was put beside it (PiSSA). What has no
        such products, as IA3, is taken for new unless it is known not to be.
        """
        if self._new:
            return True
        zero = [bool((_zero(a) | _zero(b)).all()) for a, b in pairs(self.sites)]
        return all(zero) if zero else self._new is None

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Make sure that there is a value for each site, and of its shape.

        Raises:
            AdapterError: there is not.
        """
        found = {name: tuple(value.shape) for name, value in values.items()}
        expected = {site.name: tuple(site.initial.shape) for site in self.sites}
        if found != expected:
            raise AdapterError(f"The weights do not fit the network: found {found}, expected {expected}.")

    def around(self, values: Mapping[str, Tensor]) -> Weights:
        """The same places in the network, with other initial values.

        Raises:
            AdapterError: names or shapes are not those of `sites`.
        """
        self.check(values)
        return self._with(values, new=False)

    def _with(self, values: Mapping[str, Tensor], new: bool | None) -> Weights:
        other = copy(self)
        other._new = new
        other.sites = tuple(replace(site, initial=values[site.name].to(site.initial)) for site in self.sites)
        return other

    def redrawn(self, seed: int) -> Weights:
        """The same with initial values by another seed: LoRA matrices of a fresh adapter, and heads in `random`.

        Matrices are drawn as PEFT does. All other sites keep their values, as those of a trained adapter do.
        """
        values = {site.name: site.initial for site in self.sites}
        drawn = [site for site in self.sites if site.name in self.random or (site.stacked and self.fresh)]
        cpu = torch.device("cpu")  # so that a member is the same wherever the others were fitted
        with self.holding({name: value.to(cpu) for name, value in values.items()}):
            for _ in seeded(1, seed, cpu):
                for site in drawn:
                    self._draw(site)
            found = {site.name: _stored(site.role, self._slots[site.name], cpu) for site in drawn}
        return self._with(values | found, self._new)

    def _draw(self, site: Site) -> None:
        """Draw what the parameters of a site hold."""
        if not site.stacked:
            self.base._init_weights(self._slots[site.name][0].module)
            return
        how = self._network.peft_config[self.name].init_lora_weights
        if site.role == "A" and how in (True, "gaussian"):
            for layer in site.layers:
                self._network.get_submodule(layer).reset_lora_parameters(self.name, how)

    def install(self, values: Mapping[str, Value]) -> None:
        """Put ``values`` in place until the next call.

        Args:
            values: by site, a tensor in the shape of its `Site.initial`; or a function for each layer, x -> x W^T.

        Raises:
            AdapterError: PEFT was told to use another adapter or none, or has merged this one, so that the network
                would not use the values; or there is a function where there can be none.
        """
        self._switches.check()
        for site in self.sites:
            # Setting attributes is all that happens layer by layer: no tensor is touched.
            for slot, row in zip(self._slots[site.name], self._rows(site, values[site.name]), strict=True):
                slot.install(row)

    @property
    def joinable(self) -> bool:
        """Whether a network can be run at several draws at once: all that is learned is in linear LoRA layers.

        With some of it `on_head` this has to be given one place of each row, as all other layers are given rows.
        """
        return all(site.stacked and slot.linear for site in self.sites for slot in self._slots[site.name])

    @property
    def stackable(self) -> bool:
        """Whether several sets of weights can each have a part of a batch, if one vector a sequence is a part as well.

        Linear layers that are trained in full may then be among what is learned, an output head not.
        """
        slots = [slot for site in self.sites for slot in self._slots[site.name]]
        return not self.on_head and all(
            slot.linear or (type(slot.module) is nn.Linear and slot.name == "bias") for slot in slots
        )

    @property
    def on_head(self) -> bool:
        """Whether something is learned in an output head, which may be given the tokens that matter alone."""
        head = getattr(self.base, "get_output_embeddings", lambda: None)()
        apart = set() if head is None else set(head.modules())
        return any(slot.module in apart for slots in self._slots.values() for slot in slots)

    def joined(self, draws: Sequence[Mapping[str, Tensor]], rows: int, flat: bool = False) -> dict[str, Value]:
        """Values for `install` by which a batch that is repeated for each draw sees each draw once.

        Args:
            draws: some sets of weights, by site. The first part of a batch, in as many equal ones as there are draws,
                is passed through the layers of the first, and so on. A layer that is given anything else says `Apart`.
            rows: sequences in each part.
            flat: whether a layer may be given one vector a sequence.
        """
        found: dict[str, Value] = {}
        biases = {self._slots[site.name][0].module: site.name for site in self.sites if self._is_bias(site)}
        for site in self.sites:
            slots = self._slots[site.name]
            if self._is_bias(site):  # the function of the module's weight adds it
                found[site.name] = torch.zeros_like(draws[0][site.name])
                continue
            each = torch.stack([draw[site.name] for draw in draws], dim=1 if site.stacked else 0)
            each = each if site.stacked else each.unsqueeze(0)  # (layers, draws, columns, rank)
            each = each if slots[0].transposed else each.mT
            bias = biases.get(slots[0].module)
            added = None if bias is None else torch.stack([draw[bias] for draw in draws]).unsqueeze(1)
            found[site.name] = [
                Joined(matrices.to(slot.parameter.device), rows * len(draws), flat, added)
                for slot, matrices in zip(slots, each, strict=True)
            ]
        return found

    def _is_bias(self, site: Site) -> bool:
        """Whether it is added to the product with a module's weight."""
        return not site.stacked and self._slots[site.name][0].name == "bias"

    def restore(self) -> None:
        """Give the network its own parameters back."""
        for slots in self._slots.values():
            for slot in slots:
                slot.restore()

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the network's own parameters hold ``values`` inside, and what they held before after."""
        self.restore()
        before = [(slot.parameter, slot.parameter.data) for slots in self._slots.values() for slot in slots]
        try:
            for site in self.sites:
                rows = self._rows(site, values[site.name], place=False)
                for slot, row in zip(self._slots[site.name], rows, strict=True):
                    slot.parameter.data = cast("Tensor", row).detach().to(slot.parameter.dtype, copy=True)
            yield
        finally:
            for parameter, data in before:
                parameter.data = data

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into the network's parameters and restore them: it is a plain PEFT model with these."""
        self.restore()
        for site in self.sites:
            for slot, row in zip(self._slots[site.name], self._rows(site, values[site.name]), strict=True):
                slot.parameter.copy_(cast("Tensor", row))

    def _rows(self, site: Site, value: Value, place: bool = True) -> tuple[Tensor | Map, ...]:
        """The value of a site, slot by slot, in the layout of the parameters and, if it is to be, where they are."""
        slots = self._slots[site.name]
        if not isinstance(value, Tensor):
            return tuple(value)
        if not site.stacked:
            # PEFT casts the input of LoRA matrices to their type; others have to be of the type of the layers before.
            return tuple(value.to(slot.parameter if place else slot.parameter.dtype) for slot in slots)
        # One copy of the stack: the gradient of a transposed view is a slower product in every layer.
        rows = (value.mT.contiguous() if slots[0].transposed else value).unbind(0)
        if not place or site.name not in self._elsewhere:
            return rows
        return tuple(row.to(slot.parameter.device) for slot, row in zip(slots, rows, strict=True))

    def _on_other_devices(self) -> frozenset[str]:
        """Sites of which a layer is on another device than the stack."""
        return frozenset(
            site.name
            for site in self.sites
            if any(slot.parameter.device != site.initial.device for slot in self._slots[site.name])
        )

    def __repr__(self) -> str:
        return f"Weights({', '.join(site.name for site in self.sites)})"


def _stored(role: str, slots: tuple[Slot, ...], device: torch.device) -> Tensor:
    """What the parameters of a site hold now, in float32: a copy, which does not follow them."""
    values = [slot.stored().to(device) for slot in slots]
    value = torch.stack(values) if role in ("A", "B") else values[0]
    return value.to(torch.float32, copy=True).contiguous()


def _zero(site: Site) -> Tensor:
    """Whether the initial matrix of each layer (layers,) has no other entry than zero."""
    return ~site.initial.flatten(1).any(1)
