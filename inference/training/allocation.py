"""An optimiser within a budget: AdamW that measures how much singular values matter, and keeps those that do most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

__all__ = ["Allocating", "Triplets"]


class Triplets(NamedTuple):
    """The parameters of one update P diag(e) Q of rank r.

    Attributes:
        layer: whose update it is.
        p: (outputs, r).
        e: (r, 1).
        q: (r, columns).
    """

    layer: str
    p: nn.Parameter
    e: nn.Parameter
    q: nn.Parameter


class Allocating(AdamW):
    """AdamW that keeps within a budget of singular values.

    What it knows of importance is part of its state, as a checkpoint keeps it.

    Attributes:
        measuring: whether a step adds to what is known of importance.
        budget: of singular values to keep after the step; None keeps what there is.

    Args:
        groups: of parameters.
        lr: of groups that do not say.
        triplets: whose parameters are among them.
        beta1: weight of what is known of a weight's sensitivity against a step's.
        beta2: the same of its uncertainty.

    References:
        Zhang et al., *Adaptive budget allocation for parameter-efficient fine-tuning*, ICLR 2023, whose equations are
        named below.
    """

    measuring: bool = True
    budget: int | None = None

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, triplets: Sequence[Triplets], *, beta1: float, beta2: float
    ) -> None:
        super().__init__(groups, lr=lr)
        self._triplets, self._decays = triplets, (beta1, beta2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the weights, measure their importance, and set to zero the singular values beyond the budget."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Equation 8: at the weights whose gradient it is. AdamW begins the state of a weight, and wants it empty then.
        sensitivity = {
            parameter: (parameter * parameter.grad).abs()
            for _, *parameters in self._triplets
            for parameter in parameters
            if self.measuring and parameter.grad is not None
        }
        super().step()
        for parameter, found in sensitivity.items():
            self._measure(self.state[parameter], found)
        if self.budget is not None:
            self._allocate(self.budget)
        return loss

    def _measure(self, state: dict[str, Any], found: Tensor) -> None:
        """Move the averages of sensitivity and uncertainty (equations 9 and 10)."""
        averages = (state.setdefault(name, torch.zeros_like(found)) for name in ("sensitivity", "uncertainty"))
        sensitivity, uncertainty = averages
        of_sensitivity, of_uncertainty = self._decays
        sensitivity.lerp_(found, 1 - of_sensitivity)
        uncertainty.lerp_((found - sensitivity).abs(), 1 - of_uncertainty)

    def _importance(self, parameter: nn.Parameter) -> Tensor:
        """Importance of each entry of a weight (equation 11); none before it has a gradient."""
        state = self.state.get(parameter, {})
        return state["sensitivity"] * state["uncertainty"] if "sensitivity" in state else torch.zeros_like(parameter)

    def _allocate(self, budget: int) -> None:
        """Set all singular values to zero but those of the most important triplets (equations 6 and 7)."""
        scores = torch.cat([
            self._importance(e).squeeze(1) + self._importance(p).mean(0) + self._importance(q).mean(1)
            for _, p, e, q in self._triplets
        ])  # fmt: skip
        kept = torch.zeros_like(scores)
        kept[scores.topk(budget).indices] = 1.0
        for each, mask in zip(self._triplets, kept.split([each.e.numel() for each in self._triplets]), strict=True):
            each.e.mul_(mask.unsqueeze(1))
