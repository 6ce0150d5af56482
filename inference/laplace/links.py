"""From a Gaussian over logits to probabilities: the links of a linearised network.

With f the logits at the mode and V their covariance:

- ``probit``: p_i in proportion to 1 / sum_j exp(-m_ij / sqrt(1 + pi v_ij / 8)), with m_ij and v_ij the mean and the
  variance of the difference f_i - f_j. Of two classes that is MacKay's formula, *The evidence framework applied to
  classification networks*, Neural Computation 1992; of more, his formula for each pair, as in Daunizeau,
  *Semi-analytical approximations to statistical moments of sigmoid and softmax mappings of normal variables*, 2017, and
  Lu, Ie and Sha, *Mean-field approximation to Gaussian-softmax integral*, 2020. Published code of Laplace-LoRA divides
  each logit by sqrt(1 + pi V_ii / 8): that depends on what all logits have in common, which the softmax does not.
- ``bridge``: the Dirichlet that matches the Gaussian in the logits' space (Hobbhahn, Kristiadi and Hennig, *Fast
  predictive uncertainty for classification with Bayesian deep networks*, UAI 2022), its mean. As published: for two
  classes the mean does not depend on the size of V, and for more it is not the softmax where V vanishes.
- ``mc-indep`` and ``mc-joint``: draws of the logits, from the diagonal of V or from V.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LINKS", "averaged", "bridge", "centred", "dirichlet_entropy", "draws", "probit"]

#: Numbers drawn at once.
CHUNK = 2**22
#: Links by name, the default first.
LINKS = ("mc-joint", "mc-indep", "probit", "bridge")


def centred(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (examples, classes) and their covariance less what all logits of an example have in common.

    Probabilities do not depend on that; links that look at each logit by itself do.
    """
    present = mean.isfinite()
    shares = present / present.sum(-1, keepdim=True).to(mean)
    shift = (torch.where(present, mean, 0.0) * shares).sum(-1, keepdim=True)
    projection = present.to(mean).diag_embed() - present.unsqueeze(-1) * shares.unsqueeze(-2)
    return mean - shift, projection @ covariance @ projection.mT


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Log of the probabilities (examples, classes), given logits (examples, classes) and their covariance."""
    present = mean.isfinite()
    known = torch.where(present, mean, 0.0)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    # Entry (i, j) is of the difference f_i - f_j.
    spread = (variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance).clamp(min=0)
    against = (known.unsqueeze(-2) - known.unsqueeze(-1)) / (1 + math.pi / 8 * spread).sqrt()
    odds = torch.where(present.unsqueeze(-2), against, -torch.inf).logsumexp(-1)
    return torch.where(present, -odds, -torch.inf).log_softmax(-1)


def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Concentrations of the Dirichlet distribution (examples, classes); zero for choices that a row lacks.

    The map leaves one direction open, the sum of the logits, so that the Gaussian is first put on sum zero: it is
    conditioned on that or, where the sum is certain, shifted.
    """
    present = mean.isfinite()
    count = present.sum(-1, keepdim=True).to(mean)
    f = torch.where(present, mean, 0.0)
    v = covariance * (present.unsqueeze(-1) & present.unsqueeze(-2))
    sums = v.sum(-1)
    total = sums.sum(-1, keepdim=True)
    trace = v.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    certain = total <= count * torch.finfo(torch.float32).eps * trace  # what rounding leaves of zero
    weights = torch.where(certain, 1 / count, sums / torch.where(certain, 1.0, total))
    f = f - weights * f.sum(-1, keepdim=True)
    variance = v.diagonal(dim1=-2, dim2=-1) - torch.where(certain, 0.0, weights * sums)
    # A logit that is known exactly has infinite concentration: the floor keeps it finite.
    variance = variance.clamp(min=1e-6)
    inverse = torch.where(present, (-f).exp(), 0.0).sum(-1, keepdim=True)
    found = (1 - 2 / count + f.exp() / count.square() * inverse) / variance
    found = torch.where(count == 1, 1.0, found)  # the only choice is certain
    return torch.where(present, found, 0.0)


def dirichlet_entropy(concentration: Tensor) -> Tensor:
    """Expected entropy (examples,) in nats of probabilities with a Dirichlet distribution."""
    total = concentration.sum(-1, keepdim=True)
    return (concentration / total * ((total + 1).digamma() - (concentration + 1).digamma())).sum(-1)


def draws(mean: Tensor, covariance: Tensor, joint: bool, n: int, seed: int) -> Tensor:
    """Logits (n, examples, classes) from N(mean, covariance), or from its diagonal.

    The noise comes in pairs of opposite sign and, if the pairs are more than the classes, has the covariance I exactly:
    the draws' mean and covariance are those that are asked for. It is the same for every example, so that an example's
    draws do not depend on which others there are.
    """
    generator = torch.Generator(mean.device).manual_seed(seed)
    half = torch.randn((n // 2, mean.shape[1]), generator=generator, dtype=mean.dtype, device=mean.device)
    if len(half) > half.shape[1]:
        root = torch.linalg.cholesky(half.mT @ half / len(half))
        half = torch.linalg.solve_triangular(root, half.mT, upper=False).mT
    noise = torch.cat([half, -half])
    if not joint:
        return mean + noise.unsqueeze(1) * covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh(covariance)
    # The symmetric root: signs and order of the eigenvectors do not matter.
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    return mean + torch.einsum("nij,sj->sni", root, noise)


def averaged(mean: Tensor, covariance: Tensor, joint: bool, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log of the class probabilities averaged over `draws` (examples, classes), and their expected entropy in nats.

    Some examples at a time, so that memory does not grow with their number.
    """
    step = max(1, CHUNK // (n * mean.shape[1]))
    logs, entropies = [], []
    for start in range(0, len(mean), step):
        rows = slice(start, start + step)
        each = draws(mean[rows], covariance[rows], joint, n, seed).log_softmax(-1)
        logs.append(each.logsumexp(0) - math.log(len(each)))
        entropies.append(torch.special.entr(each.exp()).sum(-1).mean(0))
    return torch.cat(logs), torch.cat(entropies)
