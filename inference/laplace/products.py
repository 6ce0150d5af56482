"""Gradients of examples as sums of outer products over their tokens, and where tokens of examples are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Places", "Products"]


@dataclass(frozen=True)
class Products:
    """Gradients of one function of the logits of each example with respect to one weight matrix.

    The gradient of an example is the sum over its tokens of wide (x) narrow. The narrow side is zero at padding, the
    wide side anything finite.

    Attributes:
        wide: the side of the columns, (examples, tokens, columns); or row numbers (examples, tokens) of an embedding,
            which stand for unit vectors.
        narrow: the side of the rank, (examples, tokens, rank).
        counted: true for tokens that are no padding, (examples, tokens).
        columns: number of columns.
        wide_is_input: whether the wide side entered the layer, and the narrow one came back; else the other way round.
    """

    wide: Tensor
    narrow: Tensor
    counted: Tensor
    columns: int
    wide_is_input: bool

    def matrices(self) -> Tensor:
        """The gradients (examples, columns, rank)."""
        return self.gathered(self.narrow)

    def of(self, chosen: Tensor) -> Products:
        """Those of some examples, given whether each is (examples,)."""
        if chosen.all():
            return self
        return replace(self, wide=self.wide[chosen], narrow=self.narrow[chosen], counted=self.counted[chosen])

    def projected(self, basis: Tensor) -> Tensor:
        """Wide sides in the columns of ``basis`` (columns, k): (examples, tokens, k), zero at padding."""
        found = self.wide @ basis if self.wide.is_floating_point() else basis[self.wide]
        return found * self.counted.unsqueeze(-1)

    def gathered(self, values: Tensor) -> Tensor:
        """Sum over tokens of wide (x) ``values`` (examples, tokens, k), zero at padding: (examples, columns, k)."""
        if self.wide.is_floating_point():
            return self.wide.mT @ values
        found = values.new_zeros(len(values), self.columns, values.shape[-1])
        return found.scatter_add_(1, self.wide.unsqueeze(-1).expand_as(values), values)

    def summed(self, values: Tensor) -> Tensor:
        """The same, summed over examples as well: (columns, k)."""
        if self.wide.is_floating_point():
            return self.wide.flatten(0, 1).mT @ values.flatten(0, 1)
        values = values.flatten(0, 1)
        return values.new_zeros(self.columns, values.shape[-1]).index_add_(0, self.wide.flatten(), values)


class Places:
    """Positions of all examples, which a layer is given one after another in a single row, such as a head of texts.

    Args:
        owners: number of the example of each position, in ascending order (positions,).
        examples: number of examples.
    """

    def __init__(self, owners: Tensor, examples: int) -> None:
        counts = owners.bincount(minlength=examples)
        first = counts.cumsum(0) - counts
        self._index = owners, torch.arange(len(owners), device=owners.device) - first[owners]
        self._shape = examples, int(counts.max())

    def __len__(self) -> int:
        return len(self._index[0])

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Values of all positions, in parts (1, positions, k), by example (examples, tokens, k), with zeros behind."""
        values = torch.cat(parts, dim=1)[0]
        found = values.new_zeros(*self._shape, values.shape[-1])
        found[self._index] = values
        return found
