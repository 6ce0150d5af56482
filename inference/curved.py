"""The posterior of Laplace's approximation, and predictions of the network that is linear in its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.inference import links
from bayeslora.inference.curvature import Curvature, make_curvature
from bayeslora.inference.evidence import log_evidence
from bayeslora.inference.gaussian import covariance, draw, log_det, quadratic
from bayeslora.inference.jacobians import Layer, Tape, as_matrices, as_value, matrices_of
from bayeslora.inference.priors import NormalPrior
from bayeslora.passes import Rows, undisturbed
from bayeslora.posterior import Posterior, Record
from bayeslora.program import Program

__all__ = ["LaplacePosterior"]

#: Logits drawn for each row by the links that draw: no pass of the network, and so not what `samples` counts.
LOGIT_DRAWS = 1000


class LaplacePosterior(Posterior):
    """A Gaussian over the matrices of some sites; all other latent sites stay at the mode.

    Args:
        program: the program.
        record: how the posterior came about.
        latents: mode of every latent site.
        prior: of the sites that are random.
        curvature: of the log-likelihood in them.
        log_likelihood: of the data at the mode, in nats, divided by the temperature.
    """

    kind: ClassVar[str] = "laplace"
    methods: ClassVar[tuple[str, ...]] = ("mc-joint", "mc-indep", "probit", "bridge", "sample", "mean")

    def __init__(
        self,
        program: Program,
        record: Record,
        latents: Mapping[str, Tensor],
        prior: NormalPrior,
        curvature: Curvature,
        log_likelihood: float,
    ) -> None:
        super().__init__(program, record)
        self.latents, self.prior, self.curvature = dict(latents), prior, curvature
        self.sites = [site for site in program.sites if site.name in prior.roots]
        self.basis = curvature.basis(prior.roots)
        self.log_likelihood = log_likelihood

    @property
    def log_evidence(self) -> float:
        """Laplace's approximation of log p(data), in nats; the log-likelihood counts by one over the temperature."""
        matrices = matrices_of(self.sites, self.latents)
        return float(log_evidence(self.log_likelihood, self.prior, matrices, self.curvature))

    def draw(self) -> dict[str, Tensor]:
        """One draw of every latent site: the Gaussian's, and the mode of the others."""
        noise = {key: torch.randn_like(self._mode(key)) for key in self.curvature.layers}
        found = draw(self.basis, noise)
        matrices = {key: self._mode(key) + value @ self._root(key).mT.to(value) for key, value in found.items()}
        latents = self.latents | self._values(matrices)
        return latents | self.program.weights(latents)

    def mean(self) -> dict[str, Tensor]:
        """The mode of the weights, by site."""
        return {name: value.clone() for name, value in self.program.weights(self.latents).items()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the Gaussian at values of its sites; those of other sites are not looked at."""
        around_mode = NormalPrior(matrices_of(self.sites, self.latents), self.prior.roots)
        rows = around_mode.whitened(matrices_of(self.sites, values))
        layers = {(name, place): row for name, value in rows.items() for place, row in enumerate(value)}
        logs = log_det(self.basis, self.curvature.layers) / 2
        for name, root in self.prior.roots.items():
            logs = logs - rows[name].shape[1] * root.diagonal(dim1=-2, dim2=-1).log().sum()
        size = self.curvature.size
        return logs - quadratic(self.basis, layers) / 2 - size * math.log(2 * math.pi) / 2

    def state(self) -> dict[str, Tensor]:
        """Mode, prior and curvature."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "mode": self.latents,
            "centre": self.prior.centres,
            "root": self.prior.roots,
            "curvature": self.curvature.tensors(),
            "data": {"log_likelihood": torch.tensor(self.log_likelihood, dtype=torch.float64)},
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
        return cls(program, record, parts["mode"], prior, curvature, float(parts["data"]["log_likelihood"]))

    def linearised(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The network that is linear in the weights around the mode: logits' means and covariances.

        The Jacobian of a batch is contracted layer by layer; what is held is the layers' inputs and gradients of one
        batch, once for each class.

        Returns:
            Means (examples, classes) and covariances (examples, classes, classes), double precision, on the CPU.
        """
        means: Tensor | None = None
        weights, tape = self.mean(), Tape(self.program, self.sites)
        with undisturbed(self.program), torch.enable_grad():
            for batch, index in rows.batches(self.program.device):
                with tape:
                    logits = self.program.logits(weights, batch)
                    count = logits.shape[1]
                    outputs = torch.eye(count).to(logits).unsqueeze(1).expand(count, *logits.shape)
                    found = covariance(self.basis, list(tape.products(logits, outputs, batch)), self.prior.roots)
                if means is None:
                    means = torch.empty(len(rows.dataset), count, dtype=torch.float64)
                    covariances = torch.empty(len(rows.dataset), count, count, dtype=torch.float64)
                means[index], covariances[index] = logits.detach().double().cpu(), found.cpu()
        assert means is not None  # `encoded` refuses empty data
        return means, covariances

    def _outputs(self, rows: Rows, method: str, samples: int, seed: int) -> tuple[Tensor, Tensor | None]:
        if method not in links.LINKS:
            return super()._outputs(rows, method, samples, seed)
        if method in ("probit", "bridge") and self.program.likelihood.name == "normal":
            raise PosteriorError(f"The link '{method}' is one to class probabilities; for real labels use 'mc-joint'.")
        means, covariances = self.linearised(rows)
        if method == "bridge":
            concentration = links.bridge(means, covariances)
            shares = concentration / concentration.sum(-1, keepdim=True)
            return shares.log().float().unsqueeze(0), links.dirichlet_entropy(concentration)
        joint = method != "mc-indep"
        if self.program.likelihood.name == "normal":
            return links.draws(means, covariances, joint, LOGIT_DRAWS, seed).float(), None
        logs, aleatoric = links.averaged(means, covariances, joint, LOGIT_DRAWS, seed)
        logits = links.probit(means, covariances) if method == "probit" else logs
        return logits.float().unsqueeze(0), aleatoric

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
