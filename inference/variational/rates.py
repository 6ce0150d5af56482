"""Learning rates of a guide's parameters, by what they are: the optimiser's groups."""

from __future__ import annotations

from typing import Any

from bayeslora.errors import SettingError, unknown
from bayeslora.models.guides.base import Guide

__all__ = ["LEAST_RATE", "groups_of"]

#: Of weights that are point estimates beside random ones, if nothing else is said.
LEAST_RATE = 2e-3


def groups_of(
    guide: Guide, learning_rate: float, points: float | None = None, scales: float = 0.0, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """AdamW's groups of parameters, each with its learning rate.

    The prior of a matrix A pulls from the first step, noise in it dilutes the gradient of B, and A itself is told of
    the data through B alone, which starts at zero. At the rates that plain LoRA does well with neither would move, so
    that B, and the head with it, has a rate of its own, as in LoRA+ (Hayou et al., ICML 2024).

    Args:
        guide: whose parameters learn.
        learning_rate: of the means of random weights; of a point estimate, of those matrices A that are random.
        points: of all other weights; ``learning_rate`` by default, but no less than 2e-3 beside random weights.
        scales: of what shapes the noise.
        weight_decay: AdamW's.

    Raises:
        SettingError: the guide has a group of another name.
    """
    found = {name: parameters for name, parameters in guide.parameter_groups().items() if parameters}
    least = LEAST_RATE if "location" in found else 0.0
    rates = {
        "location": learning_rate,
        "scale": scales,
        "point": max(learning_rate, least) if points is None else points,
    }
    for name in found:
        if name not in rates:
            raise SettingError(unknown(f"group of parameters of {type(guide).__name__}", name, rates))
    return [{"params": found[name], "lr": rates[name], "weight_decay": weight_decay} for name in found]
