"""Stochastic variational inference: the program's ELBO, maximised over a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pyro import poutine
from torch import Tensor

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.elbo import NegativeELBO, bound
from bayeslora.inference.training import TrainingSettings, train
from bayeslora.models.guides import Guide, make_guide
from bayeslora.posterior import Posterior, Record, isolated
from bayeslora.program import Program

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SVI", "GuidePosterior"]


@dataclass(frozen=True)
class SVI(TrainingSettings):
    """Stochastic variational inference with a Monte Carlo ELBO.

    The network's own dropout, if it has any, is on while the bound is maximised, as in fine-tuning; predictions and
    draws are without it.

    Attributes:
        guide: ``"structured"`` (the model's own), ``"mean-field"``, ``"low-rank"``, ``"full"`` (small adapters),
            ``"delta"``, or the name of any class in ``pyro.infer.autoguide``.
        elbo: ``"mean-field"`` (divergences in closed form where one is known), ``"trace"``, or ``"renyi"`` (order 1/2,
            two particles or more).
        particles: weight draws a step; each costs a pass of the network.
        temperature: weight of the Kullback-Leibler term against the whole data's log-likelihood; 1 is Bayes' rule,
            less gives a colder posterior.
        kl_warmup: part of all steps in which that weight rises linearly from zero.
        scale_learning_rate: learning rate of what shapes the noise: scales, Wishart and Dirichlet parameters.
        init_scale: standard deviation that Pyro's autoguides start from, in their unconstrained space.

    References:
        Hoffman et al., *Stochastic variational inference*, JMLR 2013; Kingma and Welling, *Auto-encoding variational
        Bayes*, ICLR 2014 (the reparameterised estimator).
    """

    name: ClassVar[str] = "svi"
    paper: ClassVar[str] = "Hoffman et al., JMLR 2013; Kingma and Welling, ICLR 2014"

    guide: str = "structured"
    elbo: str = "mean-field"
    particles: int = 1
    temperature: float = 1.0
    kl_warmup: float = 0.0
    scale_learning_rate: float = 1e-2
    init_scale: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "init_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingError(f"{name} must be positive, found {getattr(self, name)}.")
        if not 0 <= self.scale_learning_rate < float("inf"):
            raise SettingError(f"scale_learning_rate cannot be negative, found {self.scale_learning_rate}.")
        if not 0 <= self.kl_warmup <= 1:
            raise SettingError(f"kl_warmup is a part of all steps, from 0 to 1; found {self.kl_warmup}.")
        bound(self.elbo, self.particles)
        if self.elbo == "renyi" and self.particles < 2:
            raise SettingError("A Rényi bound of one particle is the ELBO: give particles=2 or more, or elbo='trace'.")

    def fit(self, program: Program, data: Dataset, run: Run) -> GuidePosterior:
        """Maximise the ELBO of ``program`` over the guide."""
        with isolated(run.seed, program.device):
            guide = make_guide(self.guide, program.model, program.sites, self.init_scale)
        rates = {"location": self.learning_rate, "scale": self.scale_learning_rate}
        groups = [
            {"params": parameters, "lr": rates[name], "weight_decay": 0.0}
            for name, parameters in guide.parameter_groups().items()
            if parameters
        ]
        return optimise(self, program, guide, groups, data, run, self._kl_weight)

    def _kl_weight(self, done: float) -> float:
        return self.temperature * (min(1.0, done / self.kl_warmup) if self.kl_warmup else 1.0)


class GuidePosterior(Posterior):
    """The distribution that a guide has become."""

    kind: ClassVar[str] = "guide"

    def __init__(self, program: Program, record: Record, guide: Guide) -> None:
        super().__init__(program, record)
        self.guide = guide
        self.random = guide.random

    def draw(self) -> dict[str, Tensor]:
        """One draw of every latent site of the model, and the weights it implies."""
        with torch.no_grad(), torch.autocast(self.program.device.type, enabled=False):
            trace = poutine.trace(self.guide).get_trace()
            latents = {
                name: trace.nodes[name]["value"]
                for name in trace.stochastic_nodes
                if not trace.nodes[name]["infer"].get("is_auxiliary")
            }
            return latents | self.program.model.weights(latents)

    def mean(self) -> dict[str, Tensor]:
        """The guide's mean of the weights, by site."""
        return self.guide.mean()

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the guide at the values of the latent sites.

        Raises:
            PosteriorError: the guide is a point estimate.
        """
        with torch.no_grad():
            return self.guide.log_prob(dict(values))

    def state(self) -> dict[str, Tensor]:
        """The guide's parameters."""
        return dict(self.guide.state_dict())

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> GuidePosterior:
        """Make the guide that the record names, and load its parameters.

        Raises:
            PosteriorError: the parameters do not fit the guide.
        """
        kind = record.settings.get("guide", "delta")
        guide = make_guide(kind, program.model, program.sites, record.settings.get("init_scale", 1e-2))
        try:
            guide.load_state_dict(dict(state))
        except RuntimeError as error:
            raise PosteriorError(f"The saved parameters do not fit the guide '{kind}': {error}") from error
        return cls(program, record, guide.to(program.device))


def optimise(
    settings: TrainingSettings,
    program: Program,
    guide: Guide,
    groups: list[dict[str, Any]],
    data: Dataset,
    run: Run,
    kl_weight: Callable[[float], float],
) -> GuidePosterior:
    """Train a guide, leaving a posterior in the run's folder at every checkpoint.

    Raises:
        TrainingError: the loss became infinite or not a number.
    """
    elbo = bound(getattr(settings, "elbo", "mean-field"), getattr(settings, "particles", 1))
    loss = NegativeELBO(program, guide, elbo, len(data))
    record = Record(
        backend=settings.name,
        settings=asdict(settings),
        n_data=len(data),
        seed=run.seed,
        temperature=getattr(settings, "temperature", 1.0),
        task=run.task,
        finished=False,
    )
    posterior = GuidePosterior(program, record, guide)

    def save(history: list[dict[str, float]]) -> None:
        posterior.record = replace(record, history=list(history))
        if run.output_dir is not None:
            posterior.save(run.output_dir)

    outcome = train(loss, groups, data, settings, run, kl_weight=kl_weight, save=save)
    learned = sum(value.numel() for value in guide.parameters() if value.requires_grad)
    plain = sum(site.initial.numel() for site in program.sites)
    cost = {
        "seconds": outcome.seconds,
        "peak_memory_bytes": float(outcome.peak_memory_bytes),
        "parameters": float(learned),
        "extra_parameters": float(learned - plain),
    }
    posterior.record = replace(record, cost=cost, history=outcome.history, finished=True)
    return posterior
