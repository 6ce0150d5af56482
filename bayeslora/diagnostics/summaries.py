"""What is kept of a draw of LoRA matrices: numbers by layer that do not depend on the rotation of the rank, and more.

A and B are known up to an invertible r x r matrix between them: norms and singular values of the product B A are not
touched by it. Norms along the rank, and of columns, are: they say how a chain or guide has used its rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayeslora.sites import Site, pairs, short

__all__ = ["Summary", "summarise"]


class Summary(NamedTuple):
    """One quantity of a draw.

    Attributes:
        value: of any shape.
        dims: names of its dimensions.
        coordinates: of those dimensions that have names for their places.
    """

    value: Tensor
    dims: tuple[str, ...]
    coordinates: dict[str, list[str]]


def summarise(draw: Mapping[str, Tensor], sites: Sequence[Site], whole: Sequence[str] = ()) -> dict[str, Summary]:
    """Quantities of a draw, by name.

    Args:
        draw: every latent site and the weights.
        sites: the weights.
        whole: names of latent sites or weights that are kept entry by entry.
    """
    found = dict(_products(draw, sites))
    for site in sites:
        if not site.stacked:
            found[f"{site.name}.norm"] = Summary(draw[site.name].norm(), (), {})
        else:
            found |= _of_matrix(site, draw)
    for name in (each for each in whole if each not in found):
        value = draw[name]
        dims = tuple(f"{name}.{place}" for place in range(value.ndim))
        found[name] = Summary(value, dims, {})
    return found


def _products(draw: Mapping[str, Tensor], sites: Sequence[Site]) -> Iterator[tuple[str, Summary]]:
    """Norm and singular values of each layer's scaling B A, over all layers of a rank."""
    values: dict[int, list[Tensor]] = {}
    layers: dict[int, list[str]] = {}
    for a, b in pairs(site for site in sites if site.scaling):
        rank = a.initial.shape[-1]
        scaling = torch.tensor(a.scaling, dtype=torch.float64)[:, None]
        values.setdefault(rank, []).append(scaling * _singular_values(draw[a.name], draw[b.name]).cpu())
        layers.setdefault(rank, []).extend(map(short, a.layers))
    for rank, parts in values.items():
        name = "delta" if len(values) == 1 else f"delta_r{rank}"
        # Of a layer with a side that is shorter than the rank the others are zero.
        singular = torch.cat([pad(part, (0, rank - part.shape[-1])) for part in parts])
        names = {f"{name}_layer": layers[rank]}
        yield f"{name}.norm", Summary(singular.norm(dim=1), (f"{name}_layer",), names)
        yield f"{name}.singular", Summary(singular, (f"{name}_layer", f"{name}_place"), names)


def _singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Singular values (layers, shortest side or rank) of B A, from (layers, columns, rank), (layers, outputs, rank)."""
    right, left = (torch.linalg.qr(value.double(), mode="r").R for value in (a, b))
    return torch.linalg.svdvals(left @ right.mT)


def _of_matrix(site: Site, draw: Mapping[str, Tensor]) -> dict[str, Summary]:
    layer = {f"{site.group}_layer": [short(name) for name in site.layers]}
    place = f"{site.group}_layer"
    value = draw[site.name]
    found = {
        f"{site.name}.rank_norm": Summary(value.norm(dim=1), (place, f"{site.group}_rank"), layer),
        f"{site.name}.column_norm": Summary(value.norm(dim=2), (place, f"{site.name}_column"), layer),
    }
    if (factor := draw.get(f"{site.name}.scale_tril")) is not None:
        dims = (place, f"{site.group}_rank", f"{site.group}_rank_2")
        found[f"{site.name}.wishart"] = Summary(factor @ factor.mT, dims, layer)
    if (mixture := draw.get(f"{site.name}.mixture")) is not None:
        found[f"{site.name}.mixture"] = Summary(mixture, (place, f"{site.name}_component"), layer)
    return found
