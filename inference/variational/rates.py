"""Learning rates of a guide's parameters, by what they are: the optimiser's groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from bayeslora.errors import SettingError, unknown
from bayeslora.inference.training.objective import Hook, State
from bayeslora.models.guides.base import Guide
from bayeslora.sites import Site

__all__ = ["POINT_RATE", "REACH", "RateLimit", "early_rate", "groups_of", "rate_beside_noise", "rate_beside_prior"]

#: At which weights that are point estimates learn fast enough beside random matrices, and do not overshoot.
POINT_RATE = 2e-3

#: Rate times steps by which they come far enough: twice what AdamW moves a weight by, as the rate falls to zero.
REACH = 0.24

#: By which part of the size of A's entries a step moves them at most before B has learned.
EARLY_STEP = 1 / 12


def rate_beside_prior(learning_rate: float) -> float:
    """Default learning rate of weights such as B and the head beside matrices A that a prior holds: 2e-3 or more.

    A prior pulls A back to a mean that stays, and A learns of the data through B alone, which starts at zero.

    Args:
        learning_rate: of the matrices A.
    """
    return max(learning_rate, POINT_RATE)


def rate_beside_noise(learning_rate: float, steps: int) -> float:
    """Default learning rate of weights that are point estimates, such as B and the head, beside random matrices A.

    Noise in A dilutes the gradient of B, which is faster where steps are few: rate times steps is 0.24 or more, since a
    step of AdamW moves a weight by the rate at most. That B be faster than A is also the finding of LoRA+ (Hayou et
    al., ICML 2024). Where steps are many it overfits by that: with MiniLM and 1,000 rows of MRPC, 320 steps at 5e-4,
    200 held-out rows have an NLL of 0.618, 0.605 and 0.683 with B at 5e-4, 7.5e-4 and 1e-3 (0.544, 0.542 and 0.560
    under their best temperatures). Above all the rate is 2e-3 at most, since B overshoots there: with 300 rows of
    SST-2, 304 steps at 5e-3, seed 0 and AdamW's own second moments the accuracy is 0.737 with B at 2e-3, and 0.524 at
    3.16e-3 (872 other rows).

    Args:
        learning_rate: of the means of random weights.
        steps: of the fit.
    """
    return min(max(learning_rate, REACH / steps), POINT_RATE)


def groups_of(
    guide: Guide, learning_rate: float, points: float, scales: float = 0.0, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """AdamW's groups of parameters, each with its learning rate.

    Args:
        guide: whose parameters learn.
        learning_rate: of the means of random weights; of a point estimate, of those matrices A that are random.
        points: of all other weights.
        scales: of what shapes the noise.
        weight_decay: AdamW's.

    Raises:
        SettingError: the guide has a group of another name.
    """
    found = {name: parameters for name, parameters in guide.parameter_groups().items() if parameters}
    rates = {"location": learning_rate, "scale": scales, "point": points}
    for name in found:
        if name not in rates:
            raise SettingError(unknown(f"group of parameters of {type(guide).__name__}", name, rates))
    return [{"params": found[name], "lr": rates[name], "weight_decay": weight_decay, "name": name} for name in found]


def early_rate(random: Sequence[Site], points: Sequence[Site]) -> float:
    """Learning rate that random matrices A have at most while matrices B that are point estimates leave zero.

    The gradient of A is proportional to B, which starts at zero, but a step of AdamW is a full one all the same: at
    high rates A is far from where it started before B has learned anything of it. So a step moves entries by a twelfth
    of their root mean square at most, 2e-3 with MiniLM. Where no B starts at zero there is no limit.

    Args:
        random: sites of random matrices.
        points: all others.
    """
    if not any(site.role == "B" and not site.start.any() for site in points):
        return math.inf
    start = torch.cat([site.start.flatten() for site in random])
    return EARLY_STEP * float(start.square().mean().sqrt()) or math.inf


@dataclass(frozen=True)
class RateLimit(Hook):
    """The means of random weights learn at ``rate`` at most in the first ``part`` of all steps."""

    optimiser: Optimizer
    rate: float
    part: float

    def before_step(self, state: State) -> None:
        """Set the rate of the step, over that of the schedule."""
        if state.step < self.part * state.steps:
            for group in self.optimiser.param_groups:
                if group.get("name") == "location":  # checkpoints of before have no names
                    group["lr"] = min(group["lr"], self.rate)
