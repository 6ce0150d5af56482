"""How near a guide is to the posterior: the tail of p / q, of all weights and block by block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayeslora.diagnostics import versions
from bayeslora.errors import PosteriorError, unknown
from bayeslora.observations import digest
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program
from bayeslora.sites import short

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.posterior import Posterior
    from bayeslora.tasks import Split

__all__ = ["khat", "khat_by_block", "layer_blocks"]

#: Fewer draws have no tail to fit a Pareto law to.
LEAST_DRAWS = 30
#: A layer's block: its path up to the first number, which counts the network's layers.
NUMBERED = re.compile(r"^(.*?\.\d+)\.")


def khat(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Shape of the generalised Pareto law of the largest ratios p / q.

    Below 0.5 the draws of q stand for p, up to 0.7 they do once weighted, above they do not. It is about the joint law:
    predictions may be fine all the same. It is infinite where the largest ratios dwarf all others, or are all alike.

    Args:
        log_p: log density of the posterior at draws of q, up to a constant, of any shape.
        log_q: log density of q there.

    Raises:
        PosteriorError: too few draws to tell, or a density that is not a number.

    References:
        Yao, Vehtari, Simpson and Gelman, *Yes, but did it work? Evaluating variational inference*, ICML 2018.
    """
    ratios = np.ravel(np.asarray(log_p, dtype=np.float64) - np.asarray(log_q, dtype=np.float64))
    if len(ratios) < LEAST_DRAWS:
        raise PosteriorError(f"k-hat needs at least {LEAST_DRAWS} draws, found {len(ratios)}.")
    if np.isnan(ratios).any():
        raise PosteriorError(f"k-hat needs densities, found {int(np.isnan(ratios).sum())} that are not numbers.")
    return float(versions.psis(ratios - ratios.max())[1])


def good_k(draws: int) -> float:
    """The k-hat up to which so many draws are enough for a weighted average.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto smoothed importance sampling*, JMLR 2024.
    """
    return float(min(1 - 1 / np.log10(draws), 0.7))


def khat_error(shape: float, draws: int) -> float:
    """Standard error of a k-hat from so many draws, of which min(draws / 5, 3 sqrt(draws)) are the tail.

    References:
        Smith, *Estimating tails of probability distributions*, Annals of Statistics 1987: (1 + k) / sqrt(tail).
    """
    return (1 + shape) / min(draws / 5, 3 * draws**0.5) ** 0.5


def khat_by_block(
    posterior: Posterior,
    data: Split | Dataset,
    draws: int = 100,
    *,
    blocks: Mapping[str, set[str]] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """`khat` of some layers at a time, with the weights of all others at their mean.

    The network is evaluated as it is, also for a Gaussian around a mode. A block takes ``draws`` passes over the rows.
    What has no mean in closed form, such as covariances and mixture weights, has that of the draws.

    Where a density is known with auxiliary values alone (`Posterior.auxiliary`), as that of the guide "inducing" with a
    flow, p / q is of weights and values jointly: it has the same mean, but varies more. Up to its error, k-hat is then
    a bound from above on that of the weights.

    Args:
        posterior: whose layers are independent of each other.
        data: rows that it was fitted to.
        draws: for each block.
        blocks: names of layers by block; by default those of `layer_blocks`.
        seed: of the draws.
        batch_size: rows a pass.
        progress: show bars.

    Raises:
        PosteriorError: the posterior has no density, its layers are not independent, a block has a layer without LoRA
            matrices, or there are too few draws to tell.
    """
    if not posterior.dense or not posterior.independent_layers:
        raise PosteriorError("k-hat by block needs a posterior with a density under which layers are independent.")
    program = posterior.program
    known = set().union(*layer_blocks(program).values())
    for name in sorted(set().union(*(blocks or {}).values()) - known):
        raise PosteriorError(unknown("layer", name, known))
    over = Rows.of(program, data, batch_size, progress)
    over = replace(over, dataset=posterior.record.trained(over.dataset))
    if over.labels is None or digest(over.dataset) != posterior.record.data:
        raise PosteriorError("k-hat by block needs the rows that it was fitted to, with their labels.")
    rest = _mean(posterior, draws, seed)
    found = {}
    for name, layers in (blocks or layer_blocks(program)).items():
        log_p, log_q = [], []
        for draw in posterior.draws(draws, seed):
            mixed = dict(_replaced(program, rest, draw, layers))
            with undisturbed(program), torch.no_grad():
                outputs = over.outputs(program, program.weights_at(mixed)).double()
            likelihood = over.observation.log_prob(outputs, over.labels).sum() / posterior.record.temperature
            log_p.append(float(likelihood) + sum(float(value) for value in posterior.log_prior(mixed).values()))
            log_q.append(float(posterior.log_prob(mixed)))
        found[name] = khat(np.array(log_p), np.array(log_q))
    return found


def layer_blocks(program: Program) -> dict[str, set[str]]:
    """Layers with LoRA matrices by the numbered layer of the network that they belong to."""
    blocks: dict[str, set[str]] = {}
    for site in program.sites:
        if site.stacked:
            for layer in site.layers:
                path = short(layer)
                match = NUMBERED.match(path)
                blocks.setdefault(match.group(1) if match else path, set()).add(layer)
    return blocks


def _mean(posterior: Posterior, draws: int, seed: int) -> dict[str, Tensor]:
    """Mean of every latent site and auxiliary value: the posterior's own, or that of some draws."""
    total: dict[str, Tensor] = {}
    names = (*posterior.program.model.initial(posterior.program.sites), *posterior.auxiliary)
    for draw in posterior.draws(draws, seed):
        total = {name: total.get(name, torch.zeros_like(draw[name])) + draw[name] / draws for name in names}
    return total | {name: value for name, value in posterior.mean().items() if name in names}


def _replaced(
    program: Program, rest: Mapping[str, Tensor], draw: Mapping[str, Tensor], layers: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Latent sites that are the draw's in some layers, and elsewhere the rest's; hyper-sites go with their layer."""
    for name, value in rest.items():
        site = next((site for site in program.sites if name == site.name or name.startswith(f"{site.name}.")), None)
        if site is None or not site.stacked:
            yield name, value
            continue
        chosen = torch.tensor([layer in layers for layer in site.layers], device=value.device)
        yield name, torch.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), draw[name], value)
