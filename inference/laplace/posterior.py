"""The posterior of Laplace's approximation, and predictions of the network that is linear in its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, singledispatch
from typing import ClassVar, cast

import torch
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.inference.laplace import links
from bayeslora.inference.laplace.curvature import Curvature
from bayeslora.inference.laplace.evidence import ModeEvidence
from bayeslora.inference.laplace.forms import make_curvature
from bayeslora.inference.laplace.gaussian import Basis, covariances, draw, log_det, quadratic
from bayeslora.inference.laplace.jacobians import Layer, as_value, jacobians, matrices_of
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.inference.softening import Softened, without
from bayeslora.observations import Choices, Classes, Curved, Observation, TextChoices
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predictors import Draws, Mean, Outputs, Predictor
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.rng import seeded

__all__ = ["LaplacePosterior", "LinearDraws", "Linearised", "linearised", "linked"]

#: Outputs drawn for each row by the links that draw: no pass of the network, and so not what `draws` counts.
OUTPUT_DRAWS = 1000


class Linearised:
    """The Gaussian over the outputs, through a link to the labels.

    Args:
        link: one of `bayeslora.inference.laplace.links`.
    """

    by_draws = False

    def __init__(self, link: str) -> None:
        self.link = link

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """What the link makes of the Gaussian; no draws of the weights are made."""
        laplace = cast(LaplacePosterior, posterior)
        means, (covariance,) = linearised(laplace, rows, torch.ones(1))
        return linked(rows.observation, means, covariance, self.link, seed)


class LinearDraws:
    """Draws of the linear network, each of one set of weights for all examples."""

    by_draws = True

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs (draws, examples, outputs)."""
        laplace = cast(LaplacePosterior, posterior)
        shifts = [laplace.shift() for _ in seeded(draws, seed, laplace.program.device)]
        stacked = {key: torch.stack([shift[key] for shift in shifts]) for key in shifts[0]}
        order, found = [], []
        for index, outputs, gradients in jacobians(laplace.program, laplace.sites, laplace.mean(), rows):
            changes = [torch.einsum("noab,sab->sno", each, stacked[key]) for key, each in gradients.items()]
            order.append(index)
            found.append((outputs + torch.stack(changes).sum(0)).cpu())
        return Outputs(torch.cat(found, dim=1)[:, torch.cat(order).argsort()])


class LaplacePosterior(Softened):
    """A Gaussian over the matrices of some sites; all other latent sites stay at the mode.

    Predictions are those of the network that is linear in the weights around the mode, through a link of
    `bayeslora.inference.laplace.links`; or "linear" draws of that network, one set of weights for all rows; or
    "sample", draws of the weights in the network as it is; or "mean", the mode. Of texts it is one of the last two.
    "tempered" is what the default link predicts under a temperature, where one was chosen.

    Args:
        program: the program.
        record: how the posterior came about.
        latents: mode of every latent site.
        prior: of the sites that are random.
        curvature: of the log-likelihood in them.
        log_likelihood: of the data at the mode, in nats, divided by the temperature.
        log_evidence: log p(rows) of the linear model, likewise, of some of the rows.
        evidence_rows: how many: all, if they are some hundreds. Evidences of the same number can be compared.

    Attributes:
        sites: that are random.
        modes: their mode, as matrices (layers, columns, rank) by site.
    """

    kind: ClassVar[str] = "laplace"
    predictors: Mapping[str, Predictor] = {
        **{link: Linearised(link) for link in links.LINKS},
        "linear": LinearDraws(),
        "sample": Draws(),
        "mean": Mean(),
    }

    def __init__(
        self,
        program: Program,
        record: Record,
        latents: Mapping[str, Tensor],
        prior: NormalPrior,
        curvature: Curvature,
        log_likelihood: float,
        log_evidence: float = math.nan,
        evidence_rows: int = 0,
    ) -> None:
        super().__init__(program, record)
        if not isinstance(program.observation, Curved):  # a linear network says nothing of whole texts
            self.predictors = {name: self.predictors[name] for name in ("sample", "mean")}
        self.latents, self.prior, self.curvature = dict(latents), prior, curvature
        self.sites = [site for site in program.sites if site.name in prior.roots]
        self.modes = matrices_of(self.sites, self.latents)
        self.log_likelihood = log_likelihood
        self.log_evidence, self.evidence_rows = log_evidence, evidence_rows

    def under(self, prior: NormalPrior) -> LaplacePosterior:
        """The posterior under another prior around the same mode."""
        latents, curvature = self.latents, self.curvature
        return LaplacePosterior(self.program, self.record, latents, prior, curvature, self.log_likelihood)

    @cached_property
    def basis(self) -> Basis:
        """Eigenvectors of the curvature where the prior is standard normal."""
        return self.curvature.basis(self.prior.roots)

    @property
    def mode_evidence(self) -> ModeEvidence:
        """Log p(data) under any prior as Laplace-LoRA has it: see `bayeslora.inference.laplace.evidence`."""
        return ModeEvidence(self.log_likelihood, self.modes, self.curvature)

    @property
    def independent_layers(self) -> bool:
        """Whether the curvature is layer by layer."""
        return self.basis.local

    def draw(self) -> dict[str, Tensor]:
        """One draw of every latent site: the Gaussian's, and the mode of the others."""
        return self._around(self.modes, self.shift())

    def mean(self) -> dict[str, Tensor]:
        """The mode of the weights, by site."""
        return {name: value.clone() for name, value in self.program.weights_at(self.latents).items()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the Gaussian at values of its sites; those of other sites are not looked at."""
        around_mode = NormalPrior(self.modes, self.prior.roots)
        standard = around_mode.whitened(matrices_of(self.sites, values))
        layers = {(name, place): row for name, value in standard.items() for place, row in enumerate(value)}
        log_root = log_det(self.basis, self.curvature.layers) / 2
        constant = torch.stack(list(around_mode.log_constants().values())).sum()
        return constant + log_root - quadratic(self.basis, layers) / 2

    def prior_draw(self) -> dict[str, Tensor]:
        """One draw of the prior that was tuned; latent sites without a Gaussian stay at the mode."""
        return self._around(self.prior.centres, self._scaled(self._noise()))

    def log_prior(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density of the prior that was tuned, by site."""
        return self.prior.log_prob(matrices_of(self.sites, values))

    def state(self) -> dict[str, Tensor]:
        """Mode, prior and curvature, and the temperature of predictions, if there is one."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "mode": self.latents,
            "centre": self.prior.centres,
            "root": self.prior.roots,
            "curvature": self.curvature.tensors(),
            "data": {
                "log_likelihood": torch.tensor(self.log_likelihood, dtype=torch.float64),
                "log_evidence": torch.tensor(self.log_evidence, dtype=torch.float64),
                "evidence_rows": torch.tensor(self.evidence_rows),
            },
        }
        own = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        return super().state() | own

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> LaplacePosterior:
        """Put mode, prior and curvature together again."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in without(state).items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = value
        settings = record.settings
        sites = [site for site in program.sites if site.name in parts["root"]]
        curvature = make_curvature(settings["curvature"], sites, settings["curvature_rank"], settings["sharing"])
        curvature.load(parts["curvature"])
        prior = NormalPrior(parts["centre"], parts["root"])
        log_likelihood, log_evidence = (float(parts["data"][name]) for name in ("log_likelihood", "log_evidence"))
        rows = int(parts["data"]["evidence_rows"])
        posterior = cls(program, record, parts["mode"], prior, curvature, log_likelihood, log_evidence, rows)
        posterior.soften_as(state)
        return posterior

    def shift(self) -> dict[Layer, Tensor]:
        """One draw of the matrices, less the mode."""
        return self._scaled(draw(self.basis, self._noise()))

    def _noise(self) -> dict[Layer, Tensor]:
        return {(name, place): torch.randn_like(self.modes[name][place]) for name, place in self.curvature.layers}

    def _scaled(self, standard: Mapping[Layer, Tensor]) -> dict[Layer, Tensor]:
        """Matrices whose prior is standard normal, in the weights' own units."""
        roots = self.prior.roots
        return {(name, place): value @ roots[name][place].mT.to(value) for (name, place), value in standard.items()}

    def _around(self, centres: Mapping[str, Tensor], shifts: Mapping[Layer, Tensor]) -> dict[str, Tensor]:
        """Every latent site and the weights, the random ones shifted from their centres, the others at the mode."""
        latents = dict(self.latents)
        for site in self.sites:
            shift = torch.stack([shifts[site.name, place] for place in range(len(centres[site.name]))])
            latents[site.name] = as_value(site, centres[site.name] + shift)
        return latents | self.program.weights_at(latents)


def linearised(posterior: LaplacePosterior, rows: Rows, multiples: Tensor) -> tuple[Tensor, Tensor]:
    """The linear network's outputs under priors of which each is one of ``multiples`` (multiples,) times as wide.

    Returns:
        Means (examples, outputs) and covariances (multiples, examples, outputs, outputs), in double precision, on the
        CPU, by one pass.
    """
    order, means, found = [], [], []
    for index, outputs, gradients in jacobians(posterior.program, posterior.sites, posterior.mean(), rows):
        order.append(index)
        means.append(outputs.double().cpu())
        found.append(covariances(posterior.basis, gradients, posterior.prior.roots, multiples).cpu())
    places = torch.cat(order).argsort()
    return torch.cat(means)[places], torch.cat(found, dim=1)[:, places]


@singledispatch
def linked(observation: Observation, means: Tensor, covariance: Tensor, link: str, seed: int) -> Outputs:
    """What a link makes of a Gaussian over outputs; of labels of any kind, draws.

    Args:
        observation: of the labels.
        means: (examples, outputs).
        covariance: (examples, outputs, outputs).
        link: its name.
        seed: of draws.

    Returns:
        Outputs (draws, examples, outputs), and expected entropies (examples,) where the link gives them.

    Raises:
        PosteriorError: the link is one to class probabilities, and the labels are none.
    """
    if link not in ("mc-joint", "mc-indep"):
        raise PosteriorError(
            f"The link '{link}' is one to class probabilities; for labels that are {observation.name} use 'mc-joint'."
        )
    return Outputs(links.draws(means, covariance, link == "mc-joint", OUTPUT_DRAWS, seed).float())


@linked.register
def _(observation: Classes, means: Tensor, covariance: Tensor, link: str, seed: int) -> Outputs:
    if link == "bridge":
        concentration = links.bridge(means, covariance)
        shares = concentration / concentration.sum(-1, keepdim=True)
        return Outputs(shares.log().float().unsqueeze(0), links.dirichlet_entropy(concentration))
    logs, aleatoric = links.averaged(means, covariance, link != "mc-indep", OUTPUT_DRAWS, seed)
    logits = links.probit(means, covariance) if link == "probit" else logs
    return Outputs(logits.float().unsqueeze(0), aleatoric)


@linked.register
def _(observation: TextChoices, means: Tensor, covariance: Tensor, link: str, seed: int) -> Outputs:
    # Log-likelihoods of texts are far from zero, all of them, and a network is unsure of that as well.
    return linked(Choices(observation.classes), *links.centred(means, covariance), link, seed)
