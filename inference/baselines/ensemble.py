"""Ensembles: independent fits, whose predicted probabilities are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from datasets import Dataset

from bayeslora.errors import SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.baselines.nested import Over
from bayeslora.inference.baselines.stacked import side_by_side
from bayeslora.inference.fitting import independent, starts
from bayeslora.inference.mixture import MixturePosterior, mixture_of
from bayeslora.inference.softening import soften_whole
from bayeslora.inference.variational.point import MLE
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.rng import derived_short_seed
from bayeslora.settings import Count

__all__ = ["Ensemble"]


@dataclass(frozen=True, kw_only=True)
class Ensemble(Over):
    """Independent fits of another backend, whose mixture is the posterior: of `mle`, a deep ensemble of LoRA adapters.

    Each member has its own order of the rows, its own noise and, but for the first, LoRA matrices of its own at the
    start, drawn as PEFT draws them where ``init_lora_weights`` is true or "gaussian" (and a head, where the base
    network has none). So `fit` does with ``chains``, whose seeds are consecutive: those of members are drawn by the
    seed of the ensemble, so that no two ensembles share any member but one that is both's first. Members of a fit that
    is told where to start all start there.

    Attributes:
        members: how many.
        stacked: train them side by side, in one network that gives each a part of every batch: as many times the
            memory of one, and less than as many times its time. Of `mle` in linear LoRA layers and heads of linear
            layers; checkpoints are of all members together.

    References:
        Lakshminarayanan, Pritzel and Blundell, *Simple and scalable predictive uncertainty estimation using deep
        ensembles*, NeurIPS 2017; Wang, Aitchison and Rudolph, *LoRA ensembles for large language model fine-tuning*,
        arXiv 2310.00035, 2023.
    """

    name: ClassVar[str] = "ensemble"
    paper: ClassVar[str] = "Lakshminarayanan et al., NeurIPS 2017; Wang et al., arXiv 2310.00035"

    members: Count = 5
    stacked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stacked and type(self.inner) is not MLE:
            raise SettingError(f"stacked=True trains members of 'mle' side by side, found of='{self.of}'.")

    @property
    def fits(self) -> int:
        """As many as the members make together."""
        return self.members * super().fits

    def fit(self, program: Program, data: Dataset, run: Run) -> Posterior:
        """Fit one member after the other, or all side by side.

        Raises:
            SettingError: they are to be side by side, and the network cannot be at several sets of weights at once.
        """
        runs = [replace(run.chain(number), seed=seed_of_member(run.seed, number)) for number in range(self.members)]
        if not self.stacked:
            whole = self._whole(independent(program, data, self.inner, runs))
            soften_whole(whole, run)
            return whole
        inner, seeds = self.inner, [each.seed for each in runs]
        assert isinstance(inner, MLE)
        return side_by_side(list(starts(program, runs)), data, inner, run, seeds, self._whole)

    def _whole(self, members: Iterable[Posterior]) -> MixturePosterior:
        """The mixture of members, under the ensemble's name."""
        found = mixture_of(members)
        # What `fit` counts as chains are those that it was asked for itself.
        found.record = replace(found.record, backend=self.name, settings=asdict(self), chains=1)
        return found


def seed_of_member(seed: int, number: int) -> int:
    """The seed of a member: that of the ensemble for the first."""
    return derived_short_seed(seed, number) if number else seed
