"""Where the weights are that PEFT trains: LoRA matrices, modules trained in full, and all other tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from bayeslora.errors import AdapterError
from bayeslora.sites import Slot, short

__all__ = ["Place", "active_adapter", "find"]

#: PEFT's LoRA layers that use their two matrices as such, whatever the base weight is stored as.
SUPPORTED_LAYERS = ("Linear", "Embedding", "Linear8bitLt", "Linear4bit")


class Place(NamedTuple):
    """A site that is found: its role, its group, its slots and what `bayeslora.sites.Site` says of their layers."""

    role: str
    group: str
    slots: tuple[Slot, ...]
    layers: tuple[str, ...]
    scaling: tuple[float, ...] = ()


def active_adapter(network: nn.Module) -> str | None:
    """Name of the one adapter that a PEFT model uses; None for a network without PEFT.

    Raises:
        AdapterError: there are several, or one that cannot be loaded again, or it is neither a PEFT model nor one that
            can save itself.
    """
    from peft import PeftModel

    if isinstance(network, PeftModel):
        active = list(network.active_adapters)
        if len(active) != 1:
            raise AdapterError(f"Expected one active adapter, found {active}. Choose one by network.set_adapter(name).")
        _check_start(getattr(network.peft_config[active[0]], "init_lora_weights", None))
        return active[0]
    if hasattr(network, "peft_config") or not hasattr(network, "save_pretrained"):
        raise AdapterError(
            f"Expected a peft.PeftModel or a network of transformers to train in full, found {type(network).__name__}. "
            "Wrap the network by peft.get_peft_model(network, LoraConfig(...))."
        )
    return None


def _check_start(how: object) -> None:
    """Make sure that what PEFT took off the frozen weights can be taken off again when the adapter is loaded."""
    if str(how).startswith("pissa_niter"):
        raise AdapterError(
            f"init_lora_weights={how!r} takes matrices off the frozen weights that are found by chance, and whoever "
            "loads the adapter takes off others: take 'pissa', which has no chance in it."
        )


def find(network: nn.Module, adapter: str | None) -> dict[str, Place]:
    """Every site by its name: LoRA matrices first, then heads, then all other tensors that are trained.

    Raises:
        AdapterError: nothing is trained, or something that cannot be (the message names it).
    """
    found: dict[str, Place] = {}
    if adapter is not None:
        found |= _matrices(network, adapter)
        found |= _named("head", _head_slots(network, adapter))
    known = {id(slot.parameter) for place in found.values() for slot in place.slots}
    found |= _named("tensor", _tensor_slots(network, adapter, known))
    if not found:
        raise AdapterError(
            f"Nothing is trained in this {type(network).__name__}: no LoRA layers of the adapter '{adapter}', and no "
            "parameter that requires gradients. Check target_modules of its configuration against the names in "
            "network.named_modules(), and load an adapter by PeftModel.from_pretrained(..., is_trainable=True)."
        )
    return found


def _named(role: str, slots: Iterable[tuple[str, Slot]]) -> dict[str, Place]:
    """Tensors under their names; one that the network has in several places (tied) is one site."""
    places: dict[int, list[tuple[str, Slot]]] = defaultdict(list)
    for name, slot in slots:
        places[id(slot.parameter)].append((name, slot))
    return {
        f"{role}.{each[0][0]}": Place(role, role, tuple(slot for _, slot in each), (each[0][0],))
        for each in places.values()
    }


def _matrices(network: nn.Module, adapter: str) -> dict[str, Place]:
    """LoRA matrices by kind, shape and rank; the rank is named only where it distinguishes."""
    members: dict[tuple[str, int, int, int], list[tuple[str, Any]]] = defaultdict(list)
    owners: dict[int, str] = {}
    for path, layer in _lora_layers(network, adapter):
        a, b = (_lora_slot(layer, adapter, role) for role in ("A", "B"))
        for slot in (a, b):
            if id(slot.parameter) in owners:
                raise AdapterError(
                    f"'{path}' shares its LoRA matrices with '{owners[id(slot.parameter)]}' (ensure_weight_tying), and "
                    "they would be two different draws. Leave one of the two out of target_modules."
                )
            owners[id(slot.parameter)] = path
        kind = "embedding" if type(layer).__name__ == "Embedding" else "linear"
        kind = kind if a.own else f"dora_{kind}"
        members[kind, a.stored().shape[0], b.stored().shape[0], a.stored().shape[1]].append((path, layer))
    shapes = [key[:3] for key in members]
    places = {}
    for (kind, columns, outputs, rank), layers in members.items():
        group = f"{kind}_{columns}x{outputs}"
        group += f"_r{rank}" if shapes.count((kind, columns, outputs)) > 1 else ""
        paths = tuple(path for path, _ in layers)
        plain = not kind.startswith("dora")
        scaling = tuple(float(layer.scaling[adapter]) for _, layer in layers) if plain else ()
        for role in ("A", "B"):
            slots = tuple(_lora_slot(layer, adapter, role) for _, layer in layers)
            places[f"{group}.{role}"] = Place(role, group, slots, paths, scaling)
    return places


def _lora_layers(network: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """LoRA layers whose matrices are A and B as they stand; what else PEFT makes of LoRA is for `_tensor_slots`."""
    from peft.tuners.lora import LoraLayer

    for path, module in network.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            _refuse_unsupported(path, module, adapter)
            if type(module).__name__ in SUPPORTED_LAYERS:
                yield path, module


def _refuse_unsupported(path: str, layer: Any, adapter: str) -> None:
    found = None
    if type(layer).__name__ == "MultiheadAttention":  # it merges its matrices for every pass
        found = f"a {type(layer).__module__}.{type(layer).__name__} layer"
    elif layer.merged:
        found = "a LoRA layer that is merged into its base weight"
    elif adapter in getattr(layer, "lora_variant", {}) and not _is_dora(layer, adapter):
        found = f"the LoRA variant {type(layer.lora_variant[adapter]).__name__}"
    if found:
        raise AdapterError(
            f"'{path}' cannot be made stochastic: it is {found}. Supported are LoRA and DoRA, unmerged. Leave it out "
            "of target_modules."
        )


def _is_dora(layer: Any, adapter: str) -> bool:
    variant = getattr(layer, "lora_variant", {})
    return adapter in variant and "Dora" in type(variant[adapter]).__name__


def _lora_slot(layer: Any, adapter: str, role: str) -> Slot:
    own = not _is_dora(layer, adapter)
    if type(layer).__name__ == "Embedding":
        holder = getattr(layer, f"lora_embedding_{role}")
        return Slot(holder, adapter, holder[adapter], transposed=role == "A", own=own)
    module = getattr(layer, f"lora_{role}")[adapter]
    return Slot(module, "weight", module.weight, transposed=role == "A", own=own)


def _head_slots(network: nn.Module, adapter: str) -> Iterator[tuple[str, Slot]]:
    from peft.utils import ModulesToSaveWrapper

    for path, wrapper in network.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            trained = wrapper.modules_to_save[adapter]
            for name, slot in _slots_of(trained):
                yield f"{short(path)}.{name}", slot


def _tensor_slots(network: Any, adapter: str | None, known: set[int]) -> Iterator[tuple[str, Slot]]:
    """Whatever else is trained; of an adapter that was loaded for inference, whatever else it holds."""
    saved = None if adapter is None else _saved(network, adapter)
    loaded = adapter is not None and network.peft_config[adapter].inference_mode
    for name, slot in _slots_of(network):
        number = id(slot.parameter)
        held = saved is None or number in saved
        if number in known or not (slot.parameter.requires_grad or (loaded and held)):
            continue
        if not held:
            raise AdapterError(
                f"'{name}' is trainable but PEFT does not save it with the adapter '{adapter}'. Freeze it, or name its "
                "module in modules_to_save of the configuration."
            )
        parts = short(name).split(".")
        yield ".".join(part for part in parts if part != adapter), slot


def _saved(network: Any, adapter: str) -> set[int]:
    """Parameters that are part of the adapter's file, or of what makes its prompts."""
    from peft import get_peft_model_state_dict

    if network.peft_config[adapter].is_prompt_learning:
        return {id(value) for value in network.prompt_encoder[adapter].parameters()}
    whole: Mapping[str, Any] = network.state_dict(keep_vars=True)
    held = get_peft_model_state_dict(network, dict(whole), adapter_name=adapter, save_embedding_layers=False)
    return {id(value) for value in held.values()}


def _slots_of(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Every parameter in every place, those of tied modules too."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        yield name, Slot(module.get_submodule(owner), leaf, parameter)
