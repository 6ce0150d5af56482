"""Learning rates of a guide's parameters, by what they are: the optimiser's groups."""

from __future__ import annotations

from typing import Any

from bayeslora.errors import SettingError, unknown
from bayeslora.models.guides.base import Guide

__all__ = ["POINT_RATE", "groups_of", "rate_of_points"]

#: At which weights that are point estimates learn fast enough beside random matrices, and do not overshoot.
POINT_RATE = 2e-3


def rate_of_points(learning_rate: float, *, held: bool, noisy: bool) -> float:
    """Default learning rate of weights that are point estimates beside random ones, such as B and the head.

    A random matrix A learns of the data through B alone, which starts at zero. Where the prior pulls A back to a mean
    that stays, B has to learn by itself, at no less than 2e-3; where A learns too, noise in it still dilutes the
    gradient of B, which then has twice the rate, as long as that is no more than 2e-3. That B be faster than A is the
    finding of LoRA+ (Hayou et al., ICML 2024). At a high rate it overshoots: with SmolLM2 and LoRA on all linear layers
    at 3e-3 (150 rows of ARC-Easy, three epochs, seed 0 of ``benchmarks/studies/language.yaml``) the bound over the last
    20 of 114 steps is -0.76 nats a row with B at 3e-3 and -1.18 with ``point_learning_rate=6e-3``.

    Args:
        learning_rate: of the means of random weights.
        held: whether a prior holds them.
        noisy: whether they have noise.
    """
    least = max(learning_rate, POINT_RATE)
    if held:
        return least
    return min(2 * learning_rate, least) if noisy else learning_rate


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
