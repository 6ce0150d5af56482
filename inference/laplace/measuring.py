"""The pass over the data in which curvature and evidence are added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from bayeslora.inference.laplace.curvature import Curvature
from bayeslora.inference.laplace.evidence import LinearEvidence
from bayeslora.inference.laplace.fisher import Fisher
from bayeslora.inference.laplace.jacobians import Tape
from bayeslora.observations import Curved
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program
from bayeslora.rng import isolated

__all__ = ["Measuring"]


@dataclass(frozen=True)
class Measuring:
    """How rows pass the network while their gradients are taken.

    Attributes:
        program: whose network.
        tape: that listens to it.
        fisher: how the log-likelihood is expanded.
        bf16: whether the network computes in bfloat16.
    """

    program: Program
    tape: Tape
    fisher: Fisher
    bf16: bool

    def probe(self, data: Dataset) -> None:
        """Take the gradients of two rows, so that a layer which cannot be split by examples is named at once."""

        def take(found: Any, batch: Mapping[str, Tensor], _: Tensor) -> None:
            given = self.fisher.given(found)
            next(self.tape.products(given, torch.ones_like(given).unsqueeze(0), batch))

        rows = Rows.of(self.program, data.select(range(min(2, len(data)))), 2)
        self._pass({site.name: site.initial for site in self.program.sites}, rows, 0, take)

    def add_up(
        self, weights: Mapping[str, Tensor], rows: Rows, seed: int, curvature: Curvature, evidence: LinearEvidence
    ) -> tuple[float, float]:
        """Add all rows to curvature and evidence.

        Returns:
            The tempered log-likelihood at the weights; and chance's, not tempered, and zero for labels that are drawn.
        """
        observation = self.program.observation
        total = chance = 0.0

        def take(found: Any, batch: Mapping[str, Tensor], index: Tensor) -> None:
            nonlocal total, chance
            given, to = self.fisher.given(found), self.fisher.expand(found, batch)
            evidence.count(index, to.values)
            for number, products in enumerate(self.tape.products(given, to.roots.to(given), batch)):
                if number in to.curved:
                    curvature.add(products, to.curved.index(number))
                if number in to.evident:
                    vector = to.evident.index(number)
                    evidence.add(products, vector, index, to.shifts[vector])
            total += float(to.log_likelihoods.sum())
            if isinstance(observation, Curved):
                chance += float(observation.chance(given.detach(), batch["labels"]).sum())

        self._pass(weights, rows, seed, take)
        curvature.finish()
        return total, chance

    def _pass(
        self,
        weights: Mapping[str, Tensor],
        rows: Rows,
        seed: int,
        take: Callable[[Any, Mapping[str, Tensor], Tensor], None],
    ) -> None:
        """Hand on what a pass gives of each batch, the batch and which rows they are, while the tape listens."""
        program = self.program
        cast = torch.autocast(program.device.type, dtype=torch.bfloat16, enabled=self.bf16)
        with isolated(seed, program.device), undisturbed(program), torch.enable_grad():
            for batch, index in rows.batches(program.device, "curvature"):
                with self.tape:
                    with cast:
                        found = self.fisher.run(program, weights, batch)
                    take(found, batch, index)
