"""What is said of a mode, and of the draws around it, that cannot be right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from datasets import Dataset
from torch import Tensor

from bayeslora.errors import SettingError
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.passes import Rows, undisturbed

__all__ = ["check_distance", "warn_of_draws", "warn_of_mode"]

#: Nats a row by which a mode may be worse than chance before that is said.
WORSE = 0.5
#: Rows on which draws of the weights are tried, and how many times the mode's loss is too much for them.
FEW_ROWS, TOO_MUCH = 16, 1.5


def check_distance(prior: NormalPrior, matrices: Mapping[str, Tensor]) -> None:
    """Without distance from its centre, a mode gives the scale of a prior no reason to be larger than zero."""
    for name, value in prior.whitened(matrices).items():
        if not value.any():
            raise SettingError(
                f"The prior of site '{name}' is centred on the very weights that are given, so that by this evidence "
                "its best scale is zero: give the model centre='zero' (--set model.centre=zero), or tune='evidence'."
            )


def warn_of_draws(posterior: LaplacePosterior, data: Dataset) -> None:
    """Say if draws of the weights, by which texts are predicted, break the network that the curvature is about."""
    rows = Rows.of(posterior.program, data.select(range(min(FEW_ROWS, len(data)))))
    with undisturbed(posterior.program), torch.no_grad():
        mode, *drawn = rows.outputs_of(posterior.program, [posterior.mean(), *posterior.draws(2)])
    labels = rows.labels
    found, lost = (
        -float(rows.observation.predicted(each, labels).log_predictive_density.mean())
        for each in (mode.unsqueeze(0), torch.stack(drawn))
    )
    if not lost < TOO_MUCH * found:
        warnings.warn(
            f"Draws of the weights break the network: a text has a negative log-likelihood of {lost:.1f} by draws, and "
            f"{found:.1f} at the mode. The prior is too wide: leave it to tune='auto', the default, or to rows that "
            "are set aside (tune='heldout'), or give a narrower one (tune='none', model.deviation).",
            stacklevel=2,
        )


def warn_of_mode(found: float, chance: float) -> None:
    """Say if the mode explains its own rows far worse than a guess, as under swapped class names."""
    if found < chance - WORSE:
        warnings.warn(
            f"The mode explains the training rows far worse than chance does: a log-likelihood of {found:.2f} a row, "
            f"and {chance:.2f} by guessing. Check that classes are numbered as the adapter numbers them, and "
            "that it is of this base network.",
            stacklevel=2,
        )
