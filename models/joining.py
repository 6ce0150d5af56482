"""Laws of one kind as one law.

A network has groups of layers of different shape, but the hyper-sites of all groups have the same shape: what is
computed of them, once for all layers, costs as many kernels as one group does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import Distribution, Independent

from bayeslora.models.wishart import DiagonalWishartCholesky

__all__ = ["joined", "kind_of"]


def kind_of(law: Distribution) -> Hashable | None:
    """What laws have in common that `joined` can make one law of; None, if it never can.

    Args:
        law: of one event (layers, ...), independent layer by layer.
    """
    if not isinstance(law, Independent) or law.reinterpreted_batch_ndims != 1 or law.batch_shape:
        return None
    base = law.base_dist
    if type(base) is DiagonalWishartCholesky:
        return DiagonalWishartCholesky, base.event_shape, base.degrees
    return (dist.Dirichlet, base.event_shape) if type(base) is dist.Dirichlet else None


def joined(laws: Sequence[Any]) -> Distribution:
    """One law with the layers of all as its batch, (layers of all,); the laws are of one kind."""
    parts = [law.base_dist for law in laws]
    if isinstance(parts[0], DiagonalWishartCholesky):
        scale = torch.cat([part.scale for part in parts])
        return DiagonalWishartCholesky(parts[0].degrees, scale, validate_args=False)
    return dist.Dirichlet(torch.cat([part.concentration for part in parts]), validate_args=False)
