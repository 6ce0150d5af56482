"""What backends share that sample the posterior by a Markov chain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayeslora.inference.base import Run, check_random
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.inference.training.process import device_of
from bayeslora.passes import undisturbed
from bayeslora.program import Program
from bayeslora.rng import isolated
from bayeslora.settings import Count, Positive, Settings, Size

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ChainSettings", "Tempering"]


@dataclass(frozen=True, kw_only=True)
class ChainSettings(Settings, ABC):
    """A chain that samples the posterior of all latent sites, those included of which `svi` makes point estimates.

    A chain is kept when it is done; one that was stopped begins anew.

    Attributes:
        draws: draws that are kept.
        warmup: draws before those, which are not.
        temperature: weight of the log prior against the whole data's log-likelihood; 1 is Bayes' rule, less gives a
            colder posterior.
        cpu: stay on the CPU even if there is a GPU.
    """

    name: ClassVar[str]

    draws: Count = 500
    warmup: Size = 500
    temperature: Positive = 1.0
    cpu: bool = False

    @abstractmethod
    def chain(self, program: Program, data: Dataset, run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Draws (draws, ...) of every latent site by the global generators of torch, and how the chain went."""

    def fit(self, program: Program, data: Dataset, run: Run) -> EmpiricalPosterior:
        """Sample the posterior."""
        check_random(program)
        program.to(device_of(self.cpu))
        with undisturbed(program), isolated(run.seed, program.device):
            draws, found = self.chain(program, data, run)
        record = run.record(self.name, asdict(self), len(data), self.temperature, point_sites=())
        return EmpiricalPosterior(program, replace(record, history=[found]), draws)


class Tempering(Messenger):
    """Divides the log-likelihood of a Pyro model by a temperature, and leaves its prior, with factors, as it is.

    Args:
        temperature: of the posterior.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and not isinstance(msg["fn"], dist.Unit):
            msg["scale"] = msg["scale"] / self.temperature
