"""Predictions of the network that is linear in its weights around the mode."""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.inference.laplace import links
from bayeslora.inference.laplace.gaussian import covariances
from bayeslora.inference.laplace.jacobians import jacobians
from bayeslora.observations import Classes, Observation
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predictors import Outputs
from bayeslora.rng import seeded

if TYPE_CHECKING:
    from bayeslora.inference.laplace.posterior import LaplacePosterior

__all__ = ["LinearDraws", "Linearised", "linearised", "linked"]

#: Outputs drawn for each row by the links that draw: no pass of the network, and so not what `draws` counts.
OUTPUT_DRAWS = 1000


class Linearised:
    """The Gaussian over the outputs, through a link to the labels.

    Args:
        link: one of `bayeslora.inference.laplace.links`.
    """

    by_draws = False

    def __init__(self, link: str) -> None:
        self.link = link

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """What the link makes of the Gaussian; no draws of the weights are made."""
        means, (covariance,) = linearised(cast("LaplacePosterior", posterior), rows, torch.ones(1))
        return linked(rows.observation, means, covariance, self.link, seed)


class LinearDraws:
    """Draws of the linear network, each of one set of weights for all examples."""

    by_draws = True

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs (draws, examples, outputs)."""
        laplace = cast("LaplacePosterior", posterior)
        shifts = [laplace.shift() for _ in seeded(draws, seed, laplace.program.device)]
        stacked = {key: torch.stack([shift[key] for shift in shifts]) for key in shifts[0]}
        order, found = [], []
        for index, outputs, gradients in jacobians(laplace.program, laplace.sites, laplace.mean(), rows):
            changes = [torch.einsum("noab,sab->sno", each, stacked[key]) for key, each in gradients.items()]
            order.append(index)
            found.append((outputs + torch.stack(changes).sum(0)).cpu())
        return torch.cat(found, dim=1)[:, torch.cat(order).argsort()], None


def linearised(posterior: LaplacePosterior, rows: Rows, multiples: Tensor) -> tuple[Tensor, Tensor]:
    """The linear network's outputs under priors of which each is one of ``multiples`` (multiples,) times as wide.

    Returns:
        Means (examples, outputs) and covariances (multiples, examples, outputs, outputs), in double precision, on the
        CPU, by one pass.
    """
    order, means, found = [], [], []
    for index, outputs, gradients in jacobians(posterior.program, posterior.sites, posterior.mean(), rows):
        order.append(index)
        means.append(outputs.double().cpu())
        found.append(covariances(posterior.basis, gradients, posterior.prior.roots, multiples).cpu())
    places = torch.cat(order).argsort()
    return torch.cat(means)[places], torch.cat(found, dim=1)[:, places]


@singledispatch
def linked(observation: Observation, means: Tensor, covariance: Tensor, link: str, seed: int) -> Outputs:
    """What a link makes of a Gaussian over outputs; of labels of any kind, draws.

    Args:
        observation: of the labels.
        means: (examples, outputs).
        covariance: (examples, outputs, outputs).
        link: its name.
        seed: of draws.

    Returns:
        Outputs (draws, examples, outputs), and expected entropies (examples,) where the link gives them.

    Raises:
        PosteriorError: the link is one to class probabilities, and the labels are none.
    """
    if link not in ("mc-joint", "mc-indep"):
        raise PosteriorError(
            f"The link '{link}' is one to class probabilities; for labels that are {observation.name} use 'mc-joint'."
        )
    return links.draws(means, covariance, link == "mc-joint", OUTPUT_DRAWS, seed).float(), None


@linked.register
def _(observation: Classes, means: Tensor, covariance: Tensor, link: str, seed: int) -> Outputs:
    if link == "bridge":
        concentration = links.bridge(means, covariance)
        shares = concentration / concentration.sum(-1, keepdim=True)
        return shares.log().float().unsqueeze(0), links.dirichlet_entropy(concentration)
    logs, aleatoric = links.averaged(means, covariance, link != "mc-indep", OUTPUT_DRAWS, seed)
    logits = links.probit(means, covariance) if link == "probit" else logs
    return logits.float().unsqueeze(0), aleatoric
