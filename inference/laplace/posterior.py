"""The posterior of Laplace's approximation, and predictions of the network that is linear in its weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bayeslora.inference.laplace.curvature import Curvature
from bayeslora.inference.laplace.evidence import ModeEvidence
from bayeslora.inference.laplace.forms import make_curvature
from bayeslora.inference.laplace.gaussian import Basis, draw, log_det, quadratic
from bayeslora.inference.laplace.jacobians import Layer, as_matrices, as_value, matrices_of
from bayeslora.inference.laplace.predictors import LinearDraws, Linearised
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.posterior import Posterior, Record
from bayeslora.predictors import Draws, Mean, Predictor
from bayeslora.program import Program

__all__ = ["LaplacePosterior"]


class LaplacePosterior(Posterior):
    """A Gaussian over the matrices of some sites; all other latent sites stay at the mode.

    Predictions are those of the network that is linear in the weights around the mode, through a link of
    `bayeslora.inference.laplace.links`; or "linear" draws of that network, one set of weights for all rows; or
    "sample", draws of the weights in the network as it is; or "mean", the mode.

    Args:
        program: the program.
        record: how the posterior came about.
        latents: mode of every latent site.
        prior: of the sites that are random.
        curvature: of the log-likelihood in them.
        log_likelihood: of the data at the mode, in nats, divided by the temperature.
        log_evidence: log p(rows) of the linear model, likewise, of some of the rows.
        evidence_rows: how many: all, if they are some hundreds. Evidences of the same number can be compared.
    """

    kind: ClassVar[str] = "laplace"
    predictors: Mapping[str, Predictor] = {
        **{link: Linearised(link) for link in ("mc-joint", "mc-indep", "probit", "bridge")},
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
        log_evidence: float,
        evidence_rows: int,
    ) -> None:
        super().__init__(program, record)
        self.latents, self.prior, self.curvature = dict(latents), prior, curvature
        self.sites = [site for site in program.sites if site.name in prior.roots]
        self.log_likelihood = log_likelihood
        self.log_evidence, self.evidence_rows = log_evidence, evidence_rows

    @cached_property
    def basis(self) -> Basis:
        """Eigenvectors of the curvature where the prior is standard normal."""
        return self.curvature.basis(self.prior.roots)

    @property
    def mode_evidence(self) -> ModeEvidence:
        """Log p(data) under any prior as Laplace-LoRA has it: see `bayeslora.inference.laplace.evidence`."""
        return ModeEvidence(self.log_likelihood, matrices_of(self.sites, self.latents), self.curvature)

    @property
    def independent_layers(self) -> bool:
        """Whether the curvature is layer by layer."""
        return self.basis.local

    def draw(self) -> dict[str, Tensor]:
        """One draw of every latent site: the Gaussian's, and the mode of the others."""
        matrices = {key: self._mode(key) + shift for key, shift in self.shift().items()}
        latents = self.latents | self._values(matrices)
        return latents | self.program.weights_at(latents)

    def mean(self) -> dict[str, Tensor]:
        """The mode of the weights, by site."""
        return {name: value.clone() for name, value in self.program.weights_at(self.latents).items()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the Gaussian at values of its sites; those of other sites are not looked at."""
        around_mode = NormalPrior(matrices_of(self.sites, self.latents), self.prior.roots)
        standard = around_mode.whitened(matrices_of(self.sites, values))
        layers = {(name, place): row for name, value in standard.items() for place, row in enumerate(value)}
        log_root = log_det(self.basis, self.curvature.layers) / 2
        constant = torch.stack(list(around_mode.log_constants().values())).sum()
        return constant + log_root - quadratic(self.basis, layers) / 2

    def prior_draw(self) -> dict[str, Tensor]:
        """One draw of the prior that was tuned; latent sites without a Gaussian stay at the mode."""
        noise = {
            key: torch.randn_like(self._mode(key)) @ self._root(key).mT.to(self._mode(key))
            for key in self.curvature.layers
        }
        latents = self.latents | self._values(
            {(name, place): self.prior.centres[name][place] + value for (name, place), value in noise.items()}
        )
        return latents | self.program.weights_at(latents)

    def log_prior(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density of the prior that was tuned, by site."""
        return self.prior.log_prob(matrices_of(self.sites, values))

    def state(self) -> dict[str, Tensor]:
        """Mode, prior and curvature."""
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
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> LaplacePosterior:
        """Put mode, prior and curvature together again."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = value.to(program.device)
        settings = record.settings
        sites = [site for site in program.sites if site.name in parts["root"]]
        curvature = make_curvature(settings["curvature"], sites, settings["curvature_rank"], settings["sharing"])
        curvature.load(parts["curvature"])
        prior = NormalPrior(parts["centre"], parts["root"])
        log_likelihood, log_evidence = (float(parts["data"][name]) for name in ("log_likelihood", "log_evidence"))
        rows = int(parts["data"]["evidence_rows"])
        return cls(program, record, parts["mode"], prior, curvature, log_likelihood, log_evidence, rows)

    def shift(self) -> dict[Layer, Tensor]:
        """One draw of the matrices, less the mode."""
        noise = {key: torch.randn_like(self._mode(key)) for key in self.curvature.layers}
        return {key: value @ self._root(key).mT.to(value) for key, value in draw(self.basis, noise).items()}

    def _mode(self, key: Layer) -> Tensor:
        site = next(site for site in self.sites if site.name == key[0])
        return as_matrices(site, self.latents[site.name])[key[1]]

    def _root(self, key: Layer) -> Tensor:
        return self.prior.roots[key[0]][key[1]]

    def _values(self, matrices: Mapping[Layer, Tensor]) -> dict[str, Tensor]:
        return {
            site.name: as_value(
                site,
                torch.stack([matrices[site.name, place] for place in range(len(self.prior.roots[site.name]))]),
            )
            for site in self.sites
        }
