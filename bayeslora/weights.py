"""LoRA matrices of a PEFT model as a handful of stacked tensors that can be swapped for sampled values.

Injection, target selection, merging and the file format are PEFT's. This room finds the LoRA matrices of the active
adapter, stacks those of equal shape into one `Site` each, and puts values in place of PEFT's parameters. A value stays
in place until the next one is set, so that a forward pass that gradient checkpointing repeats sees the same weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bayeslora.errors import AdapterError
from bayeslora.rng import seeded

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Site", "Slot", "Weights"]

#: PEFT's LoRA layers whose two matrices act as ``scaling * B A x``, whatever the base weight is stored as.
SUPPORTED_LAYERS = ("Linear", "Embedding", "Linear8bitLt", "Linear4bit")


@dataclass(frozen=True)
class Slot:
    """The place of one parameter in the network: ``module.name``, transposed if its rank dimension comes first."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    transposed: bool = False

    def stored(self) -> Tensor:
        """PEFT's own parameter in the layout of the site: the rank last."""
        value = self.parameter.detach()
        return value.mT if self.transposed else value

    def install(self, value: Tensor) -> None:
        """Let the network read ``value`` (in the layout of the parameter) in place of the parameter."""
        self.module._parameters.pop(self.name, None)
        self.module.__dict__[self.name] = value

    def restore(self) -> None:
        """Let the network read PEFT's parameter again."""
        self.module.__dict__.pop(self.name, None)
        self.module._parameters[self.name] = self.parameter


@dataclass(frozen=True)
class Site:
    """One Pyro site: the LoRA matrices of equal shape and role, stacked; or one tensor of the head.

    Attributes:
        name: name of the Pyro site, for example ``linear_384x1536.A`` or ``head.classifier.weight``.
        role: ``"A"``, ``"B"`` or ``"head"``.
        group: what the name begins with: the layers' kind and shape, or ``head``.
        initial: float32 value when the program was made, around which a prior may be; A: (layers, columns, rank), B:
            (layers, outputs, rank), head: the tensor's own shape.
        layers: names of the layers, in stacking order.
        scaling: by which each layer multiplies the product B A; empty for the head.
        given: value from which learning starts, if that is another than `initial`.
    """

    name: str
    role: str
    group: str
    initial: Tensor
    layers: tuple[str, ...]
    scaling: tuple[float, ...] = ()
    given: Tensor | None = None

    @property
    def start(self) -> Tensor:
        """Value from which learning starts."""
        return self.initial if self.given is None else self.given


class Weights:
    """The stochastic weights of a PEFT model: its LoRA matrices and the modules that PEFT trains in full (the head).

    Args:
        network: a `peft.PeftModel` with one active LoRA adapter. Its parameters are frozen: values are learned by
            whoever installs them here, and reach PEFT's parameters by `write`.

    Attributes:
        name: of the adapter.
        sites: what a program is about, in order.
        random: names of head sites that were drawn at random, since the base network lacks them.

    Raises:
        AdapterError: there is no LoRA layer, more than one active adapter, or a trainable weight that cannot be
            made stochastic (the message names it).
    """

    def __init__(self, network: PeftModel) -> None:
        self.name = adapter = _active_adapter(network)
        self.random: frozenset[str] = frozenset()
        self._network = network
        self._config = network.peft_config[adapter]
        self._slots: dict[str, tuple[Slot, ...]] = {}
        self.sites: tuple[Site, ...] = ()
        for group, members in _grouped(network, adapter).items():
            for role in ("A", "B"):
                slots = tuple(_lora_slot(layer, adapter, role) for _, layer in members)
                layers = tuple(path for path, _ in members)
                scaling = tuple(float(cast("Any", layer).scaling[adapter]) for _, layer in members)
                self._add(f"{group}.{role}", role, group, slots, layers, scaling)
        for name, slot in _head_slots(network, adapter):
            self._add(f"head.{name}", "head", "head", (slot,), (name,))
        self._refuse_leftovers(network)
        network.requires_grad_(False)

    def _add(
        self,
        name: str,
        role: str,
        group: str,
        slots: tuple[Slot, ...],
        layers: tuple[str, ...],
        scaling: tuple[float, ...] = (),
    ) -> None:
        self._slots[name] = slots
        # A copy in any case: the prior's centre must not follow the parameters when `write` changes them.
        self.sites += (Site(name, role, group, self._stored(name), layers, scaling),)

    def _refuse_leftovers(self, network: nn.Module) -> None:
        known = {id(slot.parameter) for slots in self._slots.values() for slot in slots}
        left = [name for name, value in network.named_parameters() if value.requires_grad and id(value) not in known]
        if left:
            raise AdapterError(
                f"'{left[0]}' is trainable but is neither a LoRA matrix nor part of modules_to_save, so it would be "
                f"left out of the posterior ({len(left)} such parameters). Freeze it, or name its module in "
                "LoraConfig(modules_to_save=...)."
            )

    def described(self) -> dict[str, Any]:
        """Which layers the LoRA matrices are of, as plain data."""
        return {"layers": {site.name: list(site.layers) for site in self.sites if site.role != "head"}}

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The places of a site's values in the network, in stacking order."""
        return self._slots[name]

    def to(self, device: torch.device) -> None:
        """Move the initial values (the prior's centre) to ``device``; the network moves by itself."""
        self.sites = tuple(replace(site, initial=site.initial.to(device)) for site in self.sites)

    @property
    def fresh(self) -> bool:
        """Whether no layer's LoRA product changed the network that the sites were found in: A or B was zero in each."""
        zero = {site.name: ~site.initial.flatten(1).any(1) for site in self.sites if site.role in ("A", "B")}
        return all(bool((zero[name] | zero[f"{name[:-2]}.B"]).all()) for name in zero if name.endswith(".A"))

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
        other = copy(self)
        other.sites = tuple(replace(site, initial=values[site.name].to(site.initial)) for site in self.sites)
        return other

    def redrawn(self, seed: int) -> dict[str, Tensor]:
        """Initial values by another seed: LoRA matrices of a fresh adapter as PEFT draws them, and heads in `random`.

        All other sites keep theirs, as those of an adapter that was trained before do.
        """
        values = {site.name: site.initial for site in self.sites}
        drawn = {site.name for site in self.sites if site.role in ("A", "B")} if self.fresh else set()
        drawn |= self.random
        # On the CPU, so that a member is the same wherever the others were fitted.
        with self.holding({name: value.cpu() for name, value in values.items()}):
            for _ in seeded(1, seed, torch.device("cpu")):
                self._draw(drawn)
            return values | {name: self._stored(name).to(values[name]) for name in drawn}

    def _draw(self, drawn: set[str]) -> None:
        """Draw what the parameters of some sites hold."""
        base: Any = self._network.get_base_model()
        how = self._config.init_lora_weights
        for site in self.sites:
            if site.name not in drawn:
                continue
            if site.role == "head":
                base._init_weights(self._slots[site.name][0].module)
            elif site.role == "A" and how in (True, "gaussian"):
                for layer in site.layers:
                    cast("Any", self._network.get_submodule(layer)).reset_lora_parameters(self.name, how)

    def install(self, values: Mapping[str, Tensor]) -> None:
        """Put ``values`` (by site, in the shape of its `Site.initial`) in place until the next call."""
        for name, slots in self._slots.items():
            # Setting attributes is all that happens layer by layer: no tensor is touched.
            for slot, row in zip(slots, self._rows(name, values), strict=True):
                slot.install(row)

    def restore(self) -> None:
        """Give the network its own parameters back: it is plain PEFT again."""
        for slots in self._slots.values():
            for slot in slots:
                slot.restore()

    def _stored(self, name: str) -> Tensor:
        """What PEFT's parameters hold now of a site, in float32."""
        slots = self._slots[name]
        value = slots[0].stored() if name.startswith("head.") else torch.stack([slot.stored() for slot in slots])
        return value.to(torch.float32, copy=True).contiguous()

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let PEFT's own parameters hold ``values`` inside, and what they held before after."""
        self.restore()
        parameters = [slot.parameter for slots in self._slots.values() for slot in slots]
        before = [parameter.data for parameter in parameters]
        try:
            for name, slots in self._slots.items():
                for slot, row in zip(slots, self._rows(name, values), strict=True):
                    slot.parameter.data = row.detach().to(slot.parameter.dtype, copy=True)
            yield
        finally:
            for parameter, data in zip(parameters, before, strict=True):
                parameter.data = data

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into PEFT's parameters and restore them: the network is a plain LoRA model with these."""
        self.restore()
        for name, slots in self._slots.items():
            for slot, row in zip(slots, self._rows(name, values), strict=True):
                slot.parameter.copy_(row)

    def _rows(self, name: str, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The value of a site, slot by slot, in the layout of the parameters."""
        if not name.startswith("head."):
            value = values[name]
            # One copy of the stack: the gradient of a transposed view is a slower product in every layer.
            return (value.mT.contiguous() if self._slots[name][0].transposed else value).unbind(0)
        # PEFT casts the input of LoRA matrices to their type; a head has to be of the type of the layers before it.
        return (values[name].to(self._slots[name][0].parameter.dtype),)


def _active_adapter(network: nn.Module) -> str:
    if not hasattr(network, "peft_config"):
        raise AdapterError(
            f"Expected a peft.PeftModel with LoRA layers, found {type(network).__name__}. "
            "Wrap the network by peft.get_peft_model(network, LoraConfig(...))."
        )
    active = list(getattr(network, "active_adapters", ()))
    if len(active) != 1:
        raise AdapterError(f"Expected one active adapter, found {active}. Choose one by network.set_adapter(name).")
    return active[0]


def _lora_layers(network: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.lora import LoraLayer

    for path, module in network.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            yield path, module


def _grouped(network: nn.Module, adapter: str) -> dict[str, list[tuple[str, nn.Module]]]:
    """Layers by kind, shape and rank, under the names of the sites; the rank is named only where it distinguishes."""
    members: dict[tuple[str, int, int, int], list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, layer in _lora_layers(network, adapter):
        _refuse_unsupported(path, layer, adapter)
        kind = "embedding" if type(layer).__name__ == "Embedding" else "linear"
        a, b = (_lora_slot(layer, adapter, role).stored() for role in ("A", "B"))
        members[kind, a.shape[0], b.shape[0], a.shape[1]].append((path, layer))
    if not members:
        raise AdapterError(
            f"The adapter '{adapter}' has no LoRA layers. Check target_modules of its LoraConfig against "
            "the names in network.named_modules()."
        )
    shapes = [key[:3] for key in members]
    return {
        f"{kind}_{n}x{d}" + (f"_r{rank}" if shapes.count((kind, n, d)) > 1 else ""): layers
        for (kind, n, d, rank), layers in members.items()
    }


def _refuse_unsupported(path: str, layer: Any, adapter: str) -> None:
    found = None
    if type(layer).__name__ not in SUPPORTED_LAYERS:
        found = f"a {type(layer).__module__}.{type(layer).__name__} layer"
    elif adapter in getattr(layer, "lora_variant", {}):
        found = f"the LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    elif layer.lora_bias.get(adapter):
        found = "a LoRA layer with lora_bias=True"
    elif layer.merged:
        found = "a LoRA layer that is merged into its base weight"
    if found:
        raise AdapterError(
            f"'{path}' cannot be made stochastic: it is {found}. Supported are plain LoRA on Linear, Conv1D and "
            "Embedding layers (quantised by bitsandbytes or not), unmerged. Leave it out of target_modules."
        )


def _lora_slot(layer: nn.Module, adapter: str, role: str) -> Slot:
    if type(layer).__name__ == "Embedding":
        holder = getattr(layer, f"lora_embedding_{role}")
        return Slot(holder, adapter, holder[adapter], transposed=role == "A")
    module = getattr(layer, f"lora_{role}")[adapter]
    return Slot(module, "weight", module.weight, transposed=role == "A")


def _head_slots(network: nn.Module, adapter: str) -> Iterator[tuple[str, Slot]]:
    from peft.utils import ModulesToSaveWrapper

    for path, wrapper in network.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            trained = wrapper.modules_to_save[adapter]
            short = path.removeprefix("base_model.model.")
            for name, parameter in trained.named_parameters():
                owner, _, leaf = name.rpartition(".")
                yield f"{short}.{name}", Slot(trained.get_submodule(owner), leaf, parameter)
