"""A masked autoregressive flow of inducing values, with a net for each of the stacked layers."""

from __future__ import annotations

import torch
from pyro.distributions.transforms import AffineAutoregressive
from pyro.nn.auto_reg_nn import create_mask
from torch import Tensor, nn

__all__ = ["Flow"]


class Flow(nn.Module):
    """Inducing values U = T(U0), U0 normal, by Pyro's affine autoregressive transform; T starts as the identity.

    The values of one direction of the rank are a sequence, each moved and scaled by those before it.

    Args:
        like: values of some layers (layers, k_c, k_r), for shape, type and device.
        hidden: units of the one hidden layer.

    References:
        Kingma et al., *Improved variational inference with inverse autoregressive flow*, NeurIPS 2016, equation 10.
    """

    def __init__(self, like: Tensor, hidden: int) -> None:
        super().__init__()
        self.net = _Nets(like, hidden)

    def forward(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """U (..., layers, k_c, k_r) of U0, and the logarithm (..., layers) of the Jacobian's determinant."""
        # One that stays would keep the graph of its last values.
        transform = AffineAutoregressive(self.net)
        values = transform(base.mT)
        return values.mT, transform.log_abs_det_jacobian(base.mT, values).sum(-1)


class _Nets(nn.Module):
    """Masked nets with one hidden layer, one for each of the stacked layers, as one.

    References:
        Germain et al., *MADE: masked autoencoder for distribution estimation*, ICML 2015.
    """

    inward: Tensor
    outward: Tensor

    def __init__(self, like: Tensor, hidden: int) -> None:
        super().__init__()
        layers, length, _ = like.shape
        (inward, outward), _ = create_mask(length, 0, [hidden], torch.arange(length), 2)
        self.register_buffer("inward", inward.to(like))
        self.register_buffer("outward", outward.to(like))
        first = nn.init.uniform_(torch.empty(layers, hidden, length), -(length**-0.5), length**-0.5)
        self.first = nn.Parameter(first.to(like))
        self.first_bias = nn.Parameter(like.new_zeros(layers, 1, hidden))
        self.second = nn.Parameter(like.new_zeros(layers, 2 * length, hidden))
        self.second_bias = nn.Parameter(like.new_zeros(layers, 1, 2 * length))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Shifts and logarithms of the scales of sequences (layers, k_r, k_c), each of what stands before it."""
        hidden = (values @ (self.first * self.inward).mT + self.first_bias).relu()
        shift, log_scale = (hidden @ (self.second * self.outward).mT + self.second_bias).chunk(2, -1)
        return shift, log_scale
