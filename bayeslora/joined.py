"""A layer at several matrices at once, each for its part of a batch."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Apart", "Joined"]


class Apart(Exception):  # noqa: N818 (no mistake: draws run one after another then)
    """A layer is given something else than a batch, of which no part would be a draw's own."""


class Joined:
    """The function x -> x W^T of a layer for several W, each for its part of x.

    Args:
        matrices: W^T (draws, inputs, outputs).
        rows: of all parts together.
        flat: whether x may be one vector a row.
        bias: (draws, 1, outputs) that is added.
    """

    def __init__(self, matrices: Tensor, rows: int, flat: bool = False, bias: Tensor | None = None) -> None:
        self._matrices, self._rows, self._least, self._bias = matrices, rows, 2 if flat else 3, bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """Outputs (rows, ..., outputs) of inputs (rows, ..., inputs), the parts of which follow one another.

        Raises:
            Apart: the inputs are not those rows, as with an expert's own tokens, relative positions that all rows
                share, or a network that has tokens come first.
        """
        if inputs.dim() < self._least or len(inputs) != self._rows:
            raise Apart
        found = inputs.reshape(len(self._matrices), -1, inputs.shape[-1]) @ self._matrices.to(inputs)
        if self._bias is not None:
            found = found + self._bias.to(found)
        return found.reshape(*inputs.shape[:-1], -1)
