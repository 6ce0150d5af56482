"""Whether a fit ended before its bound was there."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayeslora.inference.training.objective import Hook, State
from bayeslora.inference.variational.loss import NegativeELBO

__all__ = ["CLEAR", "CLEAR_IN_ALL", "Rising"]

#: Steps of a quarter of which something can be said.
LEAST_STEPS = 10
#: Nats a row by which the bound has to rise from one quarter to the next for that to be said, since point estimates go
#: on to fit the training rows for ever; and nats in all where all weights are random, whose bound has a highest place.
CLEAR, CLEAR_IN_ALL = 0.05, 0.1
#: Standard errors by which it has to rise besides.
ERRORS = 2.0


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
        clear: nats a row that are worth a word.
    """

    objective: NegativeELBO
    clear: float = CLEAR
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
        if found is not None and found[0] > max(self.clear, ERRORS * found[1]):
            rise, error = found
            warnings.warn(
                f"The bound still rises: in the last quarter of the {self.steps} steps it was {rise:.3f} ± "
                f"{error:.3f} nats a row above the quarter before, though the learning rate fell. Train for more "
                "epochs, twice as many to begin with, until this is no longer said.",
                stacklevel=2,
            )
