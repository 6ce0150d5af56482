"""The weights of a network as sites of a Pyro model, and the slots through which values reach the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayeslora.errors import AdapterError

__all__ = ["Map", "Site", "Slot", "Value", "check_sequences", "pairs", "short"]

#: What a layer makes of its input by one matrix: x -> x W^T.
Map = Callable[[Tensor], Tensor]
#: The value of a site: a tensor, or a function for each of its layers, in stacking order.
Value = Tensor | Sequence[Map]
#: What names begin with in a network that PEFT is around.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Site:
    """One Pyro site: the LoRA matrices of equal shape and role, stacked; or one tensor that is trained in full.

    Attributes:
        name: name of the Pyro site, for example ``linear_384x1536.A`` or ``head.classifier.weight``.
        role: ``"A"``, ``"B"``, ``"head"`` (modules_to_save) or ``"tensor"`` (whatever else is trained: DoRA's
            magnitudes, vectors of IA3, prompts, or the whole of a network without PEFT).
        group: what the name begins with: the layers' kind and shape, or the role.
        initial: float32 value when the program was made, around which a prior may be; A: (layers, columns, rank), B:
            (layers, outputs, rank), else the tensor's own shape.
        layers: names of the layers, in stacking order; of a head or tensor its own name.
        scaling: by which each layer multiplies the product B A; empty where a layer does more than that with its
            matrices (DoRA), and for heads and tensors.
        given: value from which learning starts, if that is another than `initial`.
        centre: prior mean of a random matrix where that is learned, in place of the model's.
    """

    name: str
    role: str
    group: str
    initial: Tensor
    layers: tuple[str, ...]
    scaling: tuple[float, ...] = ()
    given: Tensor | None = None
    centre: Tensor | None = None

    @property
    def start(self) -> Tensor:
        """Value from which learning starts."""
        return self.initial if self.given is None else self.given

    @cached_property
    def size(self) -> Tensor:
        """Root mean square of the entries of `initial`, (layers, 1, 1) of LoRA matrices: each layer's own."""
        with torch.inference_mode(False):  # a tensor of that mode could be in no graph later
            return self.initial.detach().square().mean((-2, -1), keepdim=True).sqrt()

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values (layers, rank) of LoRA matrices in `initial`, the largest first."""
        with torch.inference_mode(False):
            return torch.linalg.svdvals(self.initial.detach())

    @property
    def stacked(self) -> bool:
        """Whether it holds LoRA matrices, layer by layer."""
        return self.role in ("A", "B")

    def __repr__(self) -> str:
        return f"Site({self.name}, {'x'.join(map(str, self.initial.shape)) or 'scalar'})"


@dataclass(frozen=True)
class Slot:
    """The place of one parameter in the network: ``module.name``, transposed if its rank dimension comes first.

    Attributes:
        module: that has the parameter.
        name: of the parameter there.
        parameter: PEFT's own, or the network's.
        transposed: whether the rank is its first dimension.
        own: whether the layer uses the matrix in the forward pass of ``module`` alone, as DoRA does not.
    """

    module: nn.Module = field(repr=False)
    name: str
    parameter: nn.Parameter = field(repr=False)
    transposed: bool = False
    own: bool = True

    @property
    def linear(self) -> bool:
        """Whether it is the matrix of a linear layer that is used as such, so that a function can stand for it."""
        return isinstance(self.module, nn.Linear) and self.name == "weight" and self.own

    def stored(self) -> Tensor:
        """PEFT's own parameter in the layout of the site: the rank last."""
        value = self.parameter.detach()
        return value.mT if self.transposed else value

    def install(self, value: Tensor | Map) -> None:
        """Let the network use ``value`` in place of the parameter.

        Args:
            value: a tensor in the layout of the parameter, or the function x -> x W^T that the module is then.

        Raises:
            AdapterError: a function for what is not the matrix of a linear layer.
        """
        if isinstance(value, Tensor):
            self._step_down()
            self.module._parameters.pop(self.name, None)
            self.module.__dict__[self.name] = value  # past nn.Module, which takes parameters alone
            return
        if not self.linear:
            raise AdapterError(
                f"A function cannot stand for '{self.name}' of a {type(self.module).__name__}: only for the matrix of "
                "a linear layer that is used as such. Give a tensor."
            )
        self.restore()
        before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = _StandIn(cast("nn.Linear", self.module), value, before, self.transposed)

    def restore(self) -> None:
        """Let the network use the parameter again."""
        self._step_down()
        self.module.__dict__.pop(self.name, None)
        self.module._parameters[self.name] = self.parameter

    def _step_down(self) -> None:
        found = self.module.__dict__.get("forward")
        if type(found) is not _StandIn or self.name != "weight":
            return
        if found.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = found.before


def pairs(sites: Iterable[Site]) -> list[tuple[Site, Site]]:
    """The sites of matrices A, in order, each with that of the matrices B of the same layers."""
    stacked = {(site.group, site.role): site for site in sites if site.stacked}
    return [(a, stacked[group, "B"]) for (group, role), a in stacked.items() if role == "A"]


def short(name: str) -> str:
    """Name of a layer or parameter in the network without PEFT around it."""
    return name.removeprefix(PREFIX)


def check_sequences(layer: str, inputs: Tensor, sequences: int, own: str, remedy: str) -> None:
    """Make sure that a layer is given the sequences of a batch one after another.

    Args:
        layer: its name.
        inputs: that it is given.
        sequences: in the batch.
        own: what each row is to have of its own, for the message.
        remedy: what to do beside leaving the layer out.

    Raises:
        AdapterError: it is not.
    """
    if inputs.dim() < 2 or len(inputs) != sequences:
        raise AdapterError(
            f"Layer '{layer}' is given inputs of shape {tuple(inputs.shape)}, and a batch has {sequences} sequences: "
            f"whose they are is not known, so that no row can have {own} of its own. Leave the layer out "
            f"(target_modules){remedy}."
        )


class _StandIn:
    """The forward pass of a linear layer by a function in place of its matrix; its bias is added as ever.

    PEFT casts what a matrix A is given to the type of that in its place. Beside a function it sees its own, which may
    not be in single precision, as values are.
    """

    def __init__(self, module: nn.Linear, function: Map, before: Any, single: bool) -> None:
        self.module, self.function, self.before, self.single = module, function, before, single

    def __call__(self, inputs: Tensor) -> Tensor:
        found = self.function(inputs.float() if self.single else inputs)
        return found if self.module.bias is None else found + self.module.bias
