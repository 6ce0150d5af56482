"""A file of a user's own: a model, guide, backend, posterior, observation, preset and task, each under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bayeslora as bl
from bayeslora.inference import Preset
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.models import Gaussian, Guide
from bayeslora.observations import Classes
from bayeslora.settings import Settings
from bayeslora.tasks import TaskSpec


@bl.register
@dataclass(frozen=True, kw_only=True)
class Wide(Gaussian):
    """A Gaussian that is wide.

    Attributes:
        width: how wide.
    """

    name: ClassVar[str] = "wide"
    width: float = 3.0

    def sigma0(self, site: Any) -> Tensor:
        return self.width * super().sigma0(site)


@dataclass(frozen=True)
class FixedSettings(Settings):
    """Of `Fixed`.

    Attributes:
        spread: logarithm of the spread at the start.
    """

    name: ClassVar[str] = "fixed"
    spread: float = -6.0


@bl.register
class Fixed(Guide):
    """Normal around the start with a spread that is learned, one for all."""

    name = "fixed"
    settings = FixedSettings

    def __init__(self, model: Any, sites: Any, settings: FixedSettings) -> None:
        super().__init__([site.name for site in sites])
        self.places = nn.ParameterList(site.initial.clone() for site in sites)
        self.spread = nn.Parameter(torch.tensor(settings.spread))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        pairs = zip(self.latents, self.places, strict=True)
        return {name: pyro.sample(name, dist.Normal(at, self.spread.exp()).to_event(3)) for name, at in pairs}

    def mean(self) -> dict[str, Tensor]:
        return {name: at.detach().clone() for name, at in zip(self.latents, self.places, strict=True)}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"location": list(self.places), "scale": [self.spread]}


@bl.register
class Stored(EmpiricalPosterior):
    kind = "stored"


@bl.register
@dataclass(frozen=True)
class FromPrior:
    """Draws of the prior.

    Attributes:
        number: of draws.
    """

    name: ClassVar[str] = "from-prior"
    paper: ClassVar[str] = "Bayes, 1763"
    number: int = 3

    def fit(self, program: Any, data: Any, run: Any) -> Stored:
        torch.manual_seed(run.seed)
        with torch.random.fork_rng(), torch.no_grad():
            draws = [program.prior() for _ in range(self.number)]
        record = run.record(self.name, {"number": self.number}, len(data), 1.0, ())
        return Stored(program, record, {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]})


@bl.register
@dataclass(frozen=True)
class Flat(Classes):
    """Classes whose logits are halved."""

    name: ClassVar[str] = "flat"

    def read(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return super().read(output, batch) / 2


bl.register(
    Preset(
        name="published",
        paper="Nobody, 1900",
        note="Elsewhere the width was another.",
        settings={"guide": "fixed", "guide_settings": {"spread": -4.0}, "epochs": 2.0},
        model="wide",
        model_settings={"width": 2.0, "head_scale": 0.5},
    )
)
bl.register(TaskSpec("mine", text=("sentence",), label="verdict", labels=("no", "yes"), validation=None, test=None))
