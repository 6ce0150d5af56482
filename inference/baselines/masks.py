"""Dropout of what LoRA layers are given, as functions or values in place of their matrices A."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayeslora.rng import derived_seed
from bayeslora.sites import Site, Value, check_sequences

__all__ = ["Columns", "Kept", "RowMasks", "Tokens"]

#: Whether entries of a layer's inputs are kept, by the number of the layer and the inputs.
Kept = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Columns:
    """Each column of each A is dropped, or divided by the part that is kept: a draw of the weights, one for a pass.

    Attributes:
        sites: of the matrices A.
        rate: part of the columns that is dropped.
    """

    sites: Sequence[Site]
    rate: float

    def __call__(self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights with masks by the global generators of torch."""
        found = dict(weights)
        for site in self.sites:
            matrices = weights[site.name]  # (layers, columns, rank)
            ones = matrices.new_ones(*matrices.shape[:-1], 1)
            found[site.name] = matrices * nn.functional.dropout(ones, self.rate)
        return found


@dataclass(frozen=True)
class Tokens:
    """Each entry of each token that a layer is given is dropped, or divided by the part that is kept.

    Attributes:
        sites: of the matrices A.
        rate: part that is dropped.
        kept: says what is not; without it the global generators of torch do, as in training.
    """

    sites: Sequence[Site]
    rate: float
    kept: Kept | None = None

    def __call__(self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Value]:
        """Values for `Weights.install`: functions for the matrices A, the weights of all others."""
        found: dict[str, Value] = dict(weights)
        for site, numbers in _numbered(self.sites):
            matrices = weights[site.name].unbind()
            found[site.name] = [_Layer(self, number, each) for number, each in zip(numbers, matrices, strict=True)]
        return found

    def dropped(self, layer: int, inputs: Tensor) -> Tensor:
        """Inputs (..., inputs) of a layer after dropout."""
        if self.kept is None:
            return nn.functional.dropout(inputs, self.rate)
        return inputs * self.kept(layer, inputs).to(inputs) / (1 - self.rate)


@dataclass(frozen=True)
class _Layer:
    """The function x -> A dropout(x); ``matrix`` is A^T (inputs, rank)."""

    of: Tokens
    number: int
    matrix: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.of.dropped(self.number, inputs) @ self.matrix.to(inputs)


@dataclass(frozen=True)
class RowMasks:
    """Masks that depend on the seed, the draw, the row, the layer and the place among the row's tokens alone.

    So they are the same whatever else is in the batch, and however it is padded.

    Attributes:
        rate: part that is dropped.
        seed: of all masks.
        draw: number of the draw.
        rows: number of each row of the batch.
        attended: which tokens are the text's, (sequences, tokens) on the CPU; a row may have several sequences.
        layers: names of the layers by their numbers, for messages.
    """

    rate: float
    seed: int
    draw: int
    rows: Sequence[int]
    attended: Tensor
    layers: Sequence[str]

    def __call__(self, layer: int, inputs: Tensor) -> Tensor:
        """Which entries of inputs (sequences, ..., inputs) are kept.

        Raises:
            AdapterError: the inputs are not the batch's sequences one after another.
        """
        count = len(self.attended)
        check_sequences(self.layers[layer], inputs, count, "masks", ", or drop columns (by='column')")
        places = inputs.flatten(1, -2).shape[1] if inputs.dim() > 2 else 1
        whole = places == self.attended.shape[1]
        kept = torch.ones(count, places, inputs.shape[-1], dtype=torch.bool)
        for place in range(count):
            row, part = divmod(place, count // len(self.rows))
            where = self.attended[place] if whole else slice(None)
            size = int(self.attended[place].sum()) if whole else places
            # On the CPU, so that a mask is the same wherever the network is.
            own = derived_seed(self.seed, self.draw, self.rows[row], part, layer)
            generator = torch.Generator().manual_seed(own)
            kept[place, where] = torch.rand(size, inputs.shape[-1], generator=generator) >= self.rate
        return kept.reshape(inputs.shape).to(inputs.device)


def _numbered(sites: Sequence[Site]) -> Iterator[tuple[Site, range]]:
    """Sites, and the numbers of their layers among those of all."""
    first = 0
    for site in sites:
        yield site, range(first, first + len(site.layers))
        first += len(site.layers)
