"""Noise that depends on the input: small networks between the two LoRA matrices of a layer, and what they predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bayeslora.errors import SettingError
from bayeslora.models.base import full_precision
from bayeslora.models.guides.base import Guide, GuideList, encoded
from bayeslora.observations.batches import Batch
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predictors import Outputs
from bayeslora.program import Program
from bayeslora.rng import derived_seed
from bayeslora.sites import Site, Value, check_sequences

__all__ = ["ContextGuide", "Contextual", "Passes", "linear_sites", "standard_noise"]


class SiteNets(nn.Module):
    r"""For each layer of a site a network r -> hidden -> 2 r^2 from A x to mean and deviation of E(x).

    At the start the mean is the identity and the deviation the prior's, whatever the input.

    Args:
        site: of the matrices A.
        hidden: units between.
        deviation: of the prior of E's entries around the identity.
    """

    def __init__(self, site: Site, hidden: int, deviation: float) -> None:
        super().__init__()
        layers, _, self.rank = site.initial.shape
        self.prior = deviation
        bound = self.rank**-0.5
        self.first = nn.Parameter(site.initial.new_empty(layers, self.rank, hidden).uniform_(-bound, bound))
        self.first_bias = nn.Parameter(site.initial.new_empty(layers, hidden).uniform_(-bound, bound))
        self.second = nn.Parameter(site.initial.new_zeros(layers, hidden, 2 * self.rank**2))
        bias = site.initial.new_zeros(layers, 2 * self.rank**2)
        root = math.sqrt(deviation)
        bias[:, self.rank**2 :] = math.log(root / (1 - root))
        self.second_bias = nn.Parameter(bias)

    def moments(self, layer: int, reduced: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (..., r, r) of E at A x (..., r), the deviation as the square of a sigmoid."""
        hidden = (reduced @ self.first[layer] + self.first_bias[layer]).relu()
        both = hidden @ self.second[layer] + self.second_bias[layer]
        mean, root = both.unflatten(-1, (2, self.rank, self.rank)).unbind(-3)
        return mean + torch.eye(self.rank, dtype=mean.dtype, device=mean.device), root.sigmoid().square()

    def divergence(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """KL (...) of N(mean, deviation^2) from N(I, prior^2), summed over the entries of E."""
        off = mean - torch.eye(self.rank, dtype=mean.dtype, device=mean.device)
        ratio = (deviation / self.prior).square()
        return (ratio - 1 - ratio.log() + (off / self.prior).square()).sum((-2, -1)) / 2


class ContextGuide(GuideList):
    """Point estimates of all weights, and the networks of each site of matrices A.

    Args:
        points: of the weights.
        sites: of the matrices A.
        hidden: units of each network.
        deviation: of the prior of E.
    """

    def __init__(self, points: Guide, sites: Sequence[Site], hidden: int, deviation: float) -> None:
        super().__init__([points])
        self.nets = nn.ModuleDict({encoded(site.name): SiteNets(site, hidden, deviation) for site in sites})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The weights under "point", the networks' under "scale"."""
        return super().parameter_groups() | {"scale": list(self.nets.parameters())}


@dataclass
class Contextual:
    """The function x -> E(x) A x in place of each matrix A: an estimator of a program.

    Attributes:
        sites: of the matrices A.
        guide: that has the networks.
        noise: standard normal numbers (layers, rows, r, r) by site, one matrix for each row of a batch, which all its
            tokens share; none is none. Each layer and row has its own.
        attended: which tokens are of the texts (sequences, tokens), where divergences are asked for.
        divergences: of the layers that have passed, each averaged over those tokens.
    """

    sites: Sequence[Site]
    guide: ContextGuide
    noise: Mapping[str, Tensor] | None
    attended: Tensor | None = None
    divergences: list[Tensor] = field(default_factory=list)

    def __call__(self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Value]:
        """Values for `Weights.install`: functions for the matrices A, the weights of all others."""
        found: dict[str, Value] = dict(weights)
        for site in self.sites:
            found[site.name] = [
                _Layer(self, site, number, weights[site.name][number], batch) for number in range(len(site.layers))
            ]
        return found


@dataclass(frozen=True)
class _Layer:
    """E(x) A x of one layer; ``matrix`` is A^T (inputs, r)."""

    of: Contextual
    site: Site
    number: int
    matrix: Tensor
    batch: Mapping[str, Tensor]

    def __call__(self, inputs: Tensor) -> Tensor:
        """E(x) A x (sequences, ..., r) of inputs (sequences, ..., inputs).

        Raises:
            AdapterError: the inputs are not the batch's sequences one after another.
        """
        tokens = self.batch["input_ids"]
        sequences = tokens.numel() // tokens.shape[-1]
        check_sequences(self.site.layers[self.number], inputs, sequences, "noise", "")
        nets = self.of.guide.nets[encoded(self.site.name)]
        assert isinstance(nets, SiteNets)
        reduced = inputs @ self.matrix.to(inputs)
        with full_precision(inputs.device):
            narrow = reduced.float()
            mean, deviation = nets.moments(self.number, narrow)
            if self.of.attended is not None:
                self.of.divergences.append(_over_tokens(nets.divergence(mean, deviation), self.of.attended))
            between = mean
            if self.of.noise is not None:
                rows = self.of.noise[self.site.name][self.number]  # (rows, r, r)
                parts = (deviation.reshape(len(rows), -1, *rows.shape[1:]) * rows.unsqueeze(1)).reshape(mean.shape)
                between = mean + parts
            return (between @ narrow.unsqueeze(-1)).squeeze(-1).to(reduced)


def _over_tokens(values: Tensor, attended: Tensor) -> Tensor:
    """Mean over what is of texts, where a layer sees all tokens or a vector of each sequence; else over all."""
    seen = attended.any(-1) if values.numel() == len(attended) else attended
    if seen.numel() != values.numel():
        return values.mean()
    weights = seen.reshape(values.shape).to(values)
    return (values * weights).sum() / weights.sum()


def standard_noise(sites: Sequence[Site], rows: Sequence[int], seed: int, draw: int) -> dict[str, Tensor]:
    """Standard normal numbers (layers, rows, r, r) by site, by the number of each row, of the draw, and the seed."""
    shapes = [(len(site.layers), site.initial.shape[-1]) for site in sites]
    sizes = [layers * rank**2 for layers, rank in shapes]
    generators = [torch.Generator().manual_seed(derived_seed(seed, draw, row)) for row in rows]
    drawn = [torch.randn(sum(sizes), generator=generator) for generator in generators]
    parts = torch.stack(drawn).split(sizes, dim=1)
    return {
        site.name: part.reshape(len(drawn), layers, rank, rank).transpose(0, 1).to(site.initial)
        for site, part, (layers, rank) in zip(sites, parts, shapes, strict=True)
    }


def linear_sites(program: Program) -> list[Site]:
    """The sites of matrices A, of layers in whose place functions can stand.

    Raises:
        SettingError: there is none, or a layer is of another sort.
    """
    sites = [site for site in program.sites if site.role == "A"]
    for layer in program.weights.not_linear(sites):
        raise SettingError(
            f"Noise that depends on the input needs linear LoRA layers, and '{layer}' is none, or does more with its "
            "matrices than multiply by them: leave it out (target_modules)."
        )
    if not sites:
        raise SettingError("Noise that depends on the input stands between LoRA matrices, and the network has none.")
    return sites


class Passes:
    """Passes with noise of each row's own; without noise, one at its mean.

    Args:
        noisy: whether there is noise.
    """

    by_draws = False

    def __init__(self, noisy: bool) -> None:
        self._noisy = noisy

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs (draws, examples, outputs): noise is by the row's number, so that batches do not matter."""
        guide = getattr(posterior, "guide", None)
        assert isinstance(guide, ContextGuide)
        program, weights = posterior.program, posterior.mean()
        sites = linear_sites(program)

        def outputs(draw: int, batch: Batch, index: Tensor) -> Tensor:
            noise = standard_noise(sites, index.tolist(), seed, draw) if self._noisy else None
            return program.outputs(Contextual(sites, guide, noise)(weights, batch), batch)

        count = draws if self._noisy else 1
        return Outputs(torch.stack([rows.passed(program, partial(outputs, draw)) for draw in range(count)]))
