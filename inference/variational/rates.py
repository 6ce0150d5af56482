"""Learning rates of a guide's parameters, by what they are: the optimiser's groups."""

from __future__ import annotations

from typing import Any

from bayeslora.errors import SettingError, unknown
from bayeslora.models.guides.base import Guide

__all__ = ["LEAST_RATE", "groups_of", "rate_of_points"]

#: Of weights that are point estimates beside matrices that their prior holds where they start.
LEAST_RATE = 2e-3


def rate_of_points(learning_rate: float, *, held: bool, noisy: bool) -> float:
    """Default learning rate of weights that are point estimates beside random ones, such as B and the head.

    A random matrix A learns of the data through B alone, which starts at zero. Where the prior pulls A back to a mean
    that stays, B has to learn by itself, at no less than 2e-3; where A learns too, noise in it still dilutes the
    gradient of B, which then has twice the rate. That B be faster than A is the finding of LoRA+ (Hayou et al., ICML
    2024).

    Args:
        learning_rate: of the means of random weights.
        held: whether a prior holds them.
        noisy: whether they have noise.
    """
    if held:
        return max(learning_rate, LEAST_RATE)
    return 2 * learning_rate if noisy else learning_rate


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
    return [{"params": found[name], "lr": rates[name], "weight_decay": weight_decay} for name in found]
