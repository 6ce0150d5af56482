"""The joint density of a program where every latent site is a vector of real numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from bayeslora.program import Program

__all__ = ["Unconstrained"]

#: Draws of the prior from which the spread of a site is estimated, once all its entries are taken together.
SPREAD_DRAWS = 100


class Unconstrained:
    """Maps between the latent sites of a program and real numbers, and log p(y, latents) in terms of those.

    Args:
        program: whose sites.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._transforms = {
            name: biject_to(node["fn"].support)
            for name, node in poutine.trace(program.prior).get_trace().nodes.items()
            if node["type"] == "sample" and not node["is_observed"] and not node["infer"].get("_deterministic")
        }

    def draw(self) -> dict[str, Tensor]:
        """A draw of the prior."""
        nodes = poutine.trace(self.program.prior).get_trace().nodes
        return self.at({name: nodes[name]["value"] for name in self._transforms})

    def at(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the latent sites, copied."""
        return {name: each.inv(latents[name]).detach().clone() for name, each in self._transforms.items()}

    def spread(self) -> dict[str, float]:
        """Standard deviation of the entries of each site under the prior."""
        draws = [self.draw() for _ in range(SPREAD_DRAWS)]
        return {
            name: float(torch.stack([draw[name] for draw in draws]).std(0).square().mean().sqrt()) for name in draws[0]
        }

    def constrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latent sites."""
        return {name: each(values[name]) for name, each in self._transforms.items()}

    def log_joint(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor], size: int) -> Tensor:
        """Log density of latent sites and labels, of which a batch stands for all ``size``."""
        latents = self.constrained(values)
        conditioned = poutine.condition(self.program, data=latents)
        density = poutine.trace(conditioned).get_trace(batch, size).log_prob_sum()
        jacobians = [
            each.log_abs_det_jacobian(values[name], latents[name]).sum() for name, each in self._transforms.items()
        ]
        found: Tensor = density + torch.stack(jacobians).sum()
        return found
