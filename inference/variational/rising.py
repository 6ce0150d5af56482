"""Whether a fit ended before its bound was there."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayeslora.inference.training.objective import Hook, State
from bayeslora.inference.variational.loss import NegativeELBO

__all__ = ["Rising"]

#: Steps of a quarter of which something can be said.
LEAST_STEPS = 10
#: Nats a row, and standard errors, by which the bound has to rise from one quarter to the next for that to be said:
#: point estimates go on to fit the training rows for ever.
CLEAR, ERRORS = 0.05, 2.0
#: Nats in all, and standard errors, where the bound has a maximum: so few nats that chance alone has to be kept out.
CLEAR_IN_ALL, MORE_ERRORS = 0.1, 3.0


@dataclass
class Rising(Hook):
    """How much the bound rose from the third quarter of all steps to the last.

    The learning rate falls in the meantime, by default to zero: what is still gained then is little beside what more
    steps would gain. Where a fit is long enough, the two quarters differ by noise. Under a prior that
    holds A `svi` with MiniLM gains 0.10 to 0.16 nats a row on 300 rows of SST-2 in 8 epochs (at 2e-3, four seeds;
    ``benchmarks/studies/rates.yaml``), and 0.04 on 1,000 rows of MRPC in 10 (at three rates up to 1e-3, one seed;
    ``benchmarks/studies/mrpc-rates.yaml``).

    Attributes:
        objective: whose bound.
        bounded: whether all weights are random under a prior that stays, so that the bound has a maximum.
    """

    objective: NegativeELBO
    bounded: bool = False
    steps: int = 0
    _losses: defaultdict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def on_step(self, state: State) -> None:
        """Keep the loss of a step of the second half."""
        self.steps = state.steps
        quarter = 4 * (state.step - 1) // state.steps
        if quarter >= 2:
            self._losses[quarter].append(self.objective.loss)

    def found(self) -> tuple[float, float] | None:
        """Nats a row and their standard error; None of too few steps, or where a part was before a resumption."""
        if min(len(self._losses[quarter]) for quarter in (2, 3)) < max(LEAST_STEPS, self.steps // 4):
            return None
        before, after = (torch.stack(self._losses[quarter]).double() for quarter in (2, 3))
        error = (before.var() / len(before) + after.var() / len(after)).sqrt()
        return float(before.mean() - after.mean()), float(error)

    def warn(self) -> None:
        """Say that the fit was too short, if the bound still rose clearly."""
        found = self.found()
        clear, errors = (CLEAR_IN_ALL / self.objective.size, MORE_ERRORS) if self.bounded else (CLEAR, ERRORS)
        if found is not None and found[0] > max(clear, errors * found[1]):
            rise, error = found
            warnings.warn(
                f"The bound still rises: in the last quarter of the {self.steps} steps it was {rise:.2g} ± "
                f"{error:.1g} nats a row above the quarter before, though the learning rate fell. Train for more "
                "epochs, twice as many to begin with, until this is no longer said.",
                stacklevel=2,
            )
