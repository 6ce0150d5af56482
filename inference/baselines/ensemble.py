"""Ensembles: independent fits, whose predicted probabilities are averaged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
from datasets import Dataset

from bayeslora.inference.base import Run
from bayeslora.inference.baselines.nested import Over
from bayeslora.inference.fitting import independent
from bayeslora.inference.mixture import MixturePosterior, refitted
from bayeslora.program import Program
from bayeslora.settings import Count

__all__ = ["Ensemble"]


@dataclass(frozen=True)
class Ensemble(Over):
    """Independent fits of another backend, whose mixture is the posterior: of `mle`, a deep ensemble of LoRA adapters.

    Each member has its own order of the rows, its own noise and, but for the first, LoRA matrices of its own at the
    start, drawn as PEFT draws them (and a head, where the base network has none). So `fit` does with ``chains``, whose
    seeds are consecutive: those of members are drawn by the seed of the ensemble, so that no two ensembles share any
    member but one that is both's first. Members of a fit that is told where to start all start there.

    Attributes:
        members: how many.

    References:
        Lakshminarayanan, Pritzel and Blundell, *Simple and scalable predictive uncertainty estimation using deep
        ensembles*, NeurIPS 2017; Wang, Aitchison and Rudolph, *LoRA ensembles for large language model fine-tuning*,
        arXiv 2310.00035, 2023.
    """

    name: ClassVar[str] = "ensemble"
    paper: ClassVar[str] = "Lakshminarayanan et al., NeurIPS 2017; Wang et al., arXiv 2310.00035"

    members: Count = 5

    def fit(self, program: Program, data: Dataset, run: Run) -> MixturePosterior:
        """Fit one member after the other."""
        runs = [replace(run.chain(number), seed=seed_of_member(run.seed, number)) for number in range(self.members)]
        found = refitted(independent(program, data, self.inner, runs))
        # What `fit` counts as chains are those that it was asked for itself.
        found.record = replace(found.record, backend=self.name, settings=asdict(self), chains=1)
        return found


def seed_of_member(seed: int, number: int) -> int:
    """The seed of a member: that of the ensemble for the first."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) if number else seed
