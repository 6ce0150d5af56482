"""What tells one program's network from another's: plain data that is kept with a posterior and verified at load."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from typing_extensions import NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bayeslora.program import Program

__all__ = [
    "TAKEN_OFF",
    "Identity",
    "adapter_settings",
    "configuration",
    "describe",
    "describe_as",
    "differences",
    "differing",
    "fingerprint",
]

#: What a configuration says of where and how it was loaded, or of its labels, rather than of the network.
VOLATILE = frozenset(
    {
        "_name_or_path", "architectures", "dtype", "id2label", "label2id", "name_or_path", "num_labels", "pad_token_id",
        "problem_type", "torch_dtype", "transformers_version", "use_cache", "gradient_checkpointing",
        "_attn_implementation", "_attn_implementation_internal", "quantization_config",
    }
)  # fmt: skip
#: What an adapter's configuration says of where it came from.
PLACES = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
#: Starts of an adapter by which PEFT takes what it puts beside a frozen weight off it.
TAKEN_OFF = ("pissa", "olora")
#: Part of its length by which what is left may differ, as its last bits do with another number of threads.
ROUNDING = 3e-5
#: Directions that it is looked at along.
DIRECTIONS = 4
#: Values of each frozen tensor that its fingerprint looks at.
SAMPLE = 32


class Identity(TypedDict):
    """What tells a program from others, as plain data: network, LoRA, Pyro model, observation, task, lengths.

    Of frozen weights, ``frozen`` is a digest of those that are read from a file, and ``computed`` has numbers of those
    that the start of an adapter left (`_seen`); the digests of former versions are of both.
    """

    base: dict[str, Any]
    configuration: dict[str, Any]
    frozen: str
    computed: NotRequired[dict[str, list[float]]]
    lora: dict[str, Any]
    model: dict[str, Any]
    observation: dict[str, Any]
    spec: dict[str, Any] | None
    labels: list[str] | None
    max_length: int | None


def describe(program: Program) -> Identity:
    """The identity of a program."""
    weights, encoder = program.weights, program.encoder
    config, left = weights.config, dict(_left(program))
    found = {
        "base": asdict(program.base),
        "configuration": configuration(weights.base),
        "frozen": fingerprint(program, left),
        "computed": left,
        "lora": {
            "method": getattr(config.get("peft_type"), "value", "full"),
            "layers": {site.name: site.layers for site in weights.sites if site.role != "head"},
            **adapter_settings(config),
        },
        "model": {"name": program.model.name, "settings": asdict(program.model)},
        "observation": program.observation.to_dict(),
        "spec": None if encoder is None else asdict(encoder.spec),
        "labels": None if encoder is None else encoder.labels,
        "max_length": None if encoder is None else encoder.max_length,
    }
    plain: Identity = json.loads(json.dumps(found, default=str))
    return plain


def describe_as(program: Program, saved: Identity) -> Identity:
    """The identity of a program, to be compared with a saved one: what differs by rounding alone is as it was saved."""
    found = describe(program)
    if "computed" not in saved:
        found["frozen"] = fingerprint(program)
        del found["computed"]
        return found
    rounding = _rounding(program)
    for name, now in found["computed"].items():
        then = saved["computed"].get(name, [])
        if len(then) == len(now) and math.dist(then, now) <= rounding * now[0]:
            found["computed"][name] = then
    return found


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Entries in which two descriptions differ, each as "name: value and value".

    Of the configurations of network and adapter those are compared that both have: a newer library may know of more.
    """
    there, here = ({name: each[name] for name in names if name in each} for each in (saved, now))
    for name in {"configuration", "lora"}.intersection(names):
        there[name], here[name] = _in_common(there[name], here[name]), _in_common(here[name], there[name])
    return differing(there, here)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Entries in which two nested mappings differ, each as "name: value and value" with dots between nested names."""
    first, second = _flat(one), _flat(other)
    return [
        f"{name}: {first.get(name, 'default')} and {second.get(name, 'default')}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _in_common(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a mapping that another one has, too."""
    nested = {key for key in one if isinstance(one[key], Mapping) and isinstance(other.get(key), Mapping)}
    return {key: _in_common(one[key], other[key]) if key in nested else one[key] for key in one if key in other}


def adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT's configuration says of an adapter, wherever it came from; its lists of names are sets."""
    return {
        key: sorted(set(value)) if isinstance(value, list | set) and all(isinstance(x, str) for x in value) else value
        for key, value in config.items()
        if key not in PLACES
    }


def configuration(network: nn.Module) -> dict[str, Any]:
    """A network's configuration, less what does not tell it from others; empty if it has none."""
    config = getattr(network, "config", None)
    values = {} if config is None else config.to_dict()
    return {key: value for key, value in values.items() if key not in VOLATILE}


def fingerprint(program: Program, but: Collection[str] = ()) -> str:
    """Digest of the frozen weights: names, shapes, types, some values of each, and the sum of all its bits.

    It does not depend on what the weights of the program hold, on devices, or on whether a head that PEFT trains in
    full was drawn before its own copy was made.

    Args:
        program: whose weights.
        but: names of those of which it does not depend on the values either.
    """
    import torch

    found = sha256()
    samples: list[Tensor] = []
    for name, value in _frozen(program):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if name in but:
            continue
        flat = value.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].float())
        found.update(str(_bits(flat)).encode())
    if samples:
        found.update(torch.cat([each.cpu() for each in samples]).numpy().tobytes())
    return found.hexdigest()[:16]


def _left(program: Program) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each frozen weight that is what the start of an adapter left, and what is seen of it."""
    weights = program.weights
    if not str(weights.config.get("init_lora_weights")).startswith(TAKEN_OFF):
        return
    adapted = {f"{layer}.base_layer.weight" for site in weights.sites if site.stacked for layer in site.layers}
    for name, value in _frozen(program):
        if name in adapted:
            yield name, _seen(value.detach().flatten(1).double())


def _seen(matrix: Tensor) -> list[float]:
    """Length of a matrix, and its products with random signs of its rows and columns, which any change of it moves.

    A change of length d moves a product by d on average (root mean square), however many entries the matrix has.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        (torch.randint(0, 2, (DIRECTIONS, size), generator=generator) * 2 - 1).to(matrix) for size in matrix.shape
    )
    return [float(matrix.norm()), *((rows @ matrix) * columns).sum(1).tolist()]


def _rounding(program: Program) -> float:
    """Part of its length by which a weight may differ by rounding alone, also where half precision is kept."""
    import torch

    precision = next(value.dtype for value in program.network.parameters() if value.is_floating_point())
    return max(ROUNDING, torch.finfo(precision).eps / 8)


def _bits(flat: Tensor) -> int:
    """Sum of all bits of a flat tensor, as whole numbers of 64: no order in which a device adds changes it."""
    import torch

    octets = flat.detach().contiguous().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = len(octets) // 8 * 8
    return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())


def _frozen(program: Program) -> Iterator[tuple[str, Tensor]]:
    import torch

    learned = program.weights.parameter_ids
    for name, value in program.network.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and id(value) not in learned and ".original_module." not in name:
            yield name, value
