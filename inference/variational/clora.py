"""C-LoRA: LoRA with noise whose mean and deviation a small network reads off each layer's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.inference.base import Run
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.inference.variational.contextual import ContextGuide, Contextual, Passes, linear_sites
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.learning import learn
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.inference.variational.rates import groups_of
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.predictors import Predictor
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.rng import isolated
from bayeslora.settings import Count, Part, Positive

__all__ = ["CLoRA", "CLoRAPosterior"]


class CLoRAPosterior(VariationalPosterior):
    """Point estimates of the weights, and noise that depends on the input: no law of the weights.

    Predictions average probabilities over draws of the noise (``"noise"``), or are made at its mean (``"mean"``). The
    saved adapter holds the weights, and as plain LoRA it is without the networks.
    """

    kind: ClassVar[str] = "c-lora"
    dense = False
    predictors: Mapping[str, Predictor] = MappingProxyType({"noise": Passes(True), "mean": Passes(False)})

    def __init__(self, program: Program, record: Record, guide: Guide) -> None:
        super().__init__(program, record, guide)
        self.random = True  # passes differ, if no weights do

    def draw(self) -> dict[str, Tensor]:
        """There is no draw of the weights.

        Raises:
            PosteriorError: always.
        """
        raise self._refused("no draws of the weights")

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """There is no density of the weights.

        Raises:
            PosteriorError: always.
        """
        raise self._refused("no density, and no k-hat")

    @classmethod
    def blank(cls, program: Program, record: Record) -> ContextGuide:
        """Points and networks where they start."""
        settings = record.settings
        with torch.random.fork_rng():
            points = make_guide("delta", program.model, program.sites)
            return ContextGuide(points, linear_sites(program), settings["hidden"], settings["deviation"])

    def _refused(self, what: str) -> PosteriorError:
        return PosteriorError(
            f"'{self.record.backend}' is noise that depends on the input, not a distribution over weights: there are "
            f"{what}. Predictions, their metrics and to_inference_data have what its passes say."
        )


@dataclass(frozen=True, kw_only=True)
class CLoRA(TrainingSettings):
    r"""Contextual LoRA: a layer computes W0 x + s B E(x) A x, with E(x) ~ N(m(A x), diag s(A x)^2) in R^(r x r).

    This is input-dependent noise, not uncertainty of the weights: A, B and the head are point estimates under the
    model's prior, as with `map`, and more rows do not make the noise vanish. There is no k-hat, and no leave-one-out by
    draws of the weights.

    Published code draws E for each token, and multiplies by signs of each token, so that no two tokens of a text know
    of one function. Here one standard normal matrix is drawn for each row and layer, which all tokens of the row share:
    equal tokens have equal noise, and texts that are choices of one row do as well. Mean and deviation are read off
    each token, as there. Further, the divergence counts once for all rows (1 / N in the loss per example) where the
    code has 1e-6 / 65, at which it is absent; it is averaged over tokens and summed over layers. Its prior is around
    the identity, where E starts, in place of zero. A row's own latent variable would count for each row:
    ``temperature=N``.

    Attributes:
        hidden: units of each network (published: 64).
        deviation: of the prior of E's entries (published: 0.2), and of E at the start.
        temperature: weight of that divergence and of the weights' log prior against the data's log-likelihood.
        scale_learning_rate: of the networks.

    References:
        Rahmati et al., *C-LoRA: contextual low-rank adaptation for uncertainty estimation in large language models*,
        NeurIPS 2025, 2505.17773.
    """

    name: ClassVar[str] = "c-lora"
    paper: ClassVar[str] = "Rahmati et al., NeurIPS 2025 (C-LoRA)"

    hidden: Count = 64
    deviation: Part = 0.2
    temperature: Positive = 1.0
    scale_learning_rate: Positive = 2e-3

    def fit(self, program: Program, data: Dataset, run: Run) -> CLoRAPosterior:
        """Find weights and networks.

        Raises:
            SettingError: a LoRA layer is not linear.
        """
        sites = linear_sites(program)
        with isolated(run.seed, program.device):
            points = make_guide("delta", program.model, run.sites(program))
            guide = ContextGuide(points, sites, self.hidden, self.deviation)
        groups = groups_of(guide, self.learning_rate, self.learning_rate, self.scale_learning_rate)
        record = run.record(self.name, asdict(self), len(data), self.temperature, guide.point_sites)
        return learn(
            CLoRAPosterior(program, record, guide),
            CLoRALoss(program, guide, len(data), self.temperature),
            torch.optim.AdamW(groups, lr=self.learning_rate),
            data,
            self,
            run,
        )


class CLoRALoss(NegativeELBO):
    """The loss of `map` under noise of each row, and the divergence of the noise."""

    def __init__(self, program: Program, guide: ContextGuide, size: int, temperature: float) -> None:
        super().__init__(program, guide, MeanFieldBound(), size, temperature)
        self.context = guide
        self._divergence: Tensor | None = None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss per example, a scalar."""
        sites = [site for site in self.program.sites if site.role == "A"]
        rows = len(batch["input_ids"])
        noise = {}
        for site in sites:
            layers, _, rank = site.initial.shape
            noise[site.name] = site.initial.new_empty(layers, rows, rank, rank).normal_()
        # Without gradients the loss is looked at for whether it is finite.
        attended = self.program.observation.attended(batch).flatten(0, 1) if torch.is_grad_enabled() else None
        self.estimator = contextual = Contextual(sites, self.context, noise, attended)
        loss = super().forward(batch)
        if attended is None:
            return loss
        divergence = torch.stack(contextual.divergences).sum()
        self._divergence = divergence.detach()
        return loss + self.kl_weight * divergence / self.size

    def parts(self) -> dict[str, float]:
        """Parts of the bound, with the divergence of the noise in nats an example."""
        found: dict[str, Any] = super().parts()
        return found | ({} if self._divergence is None else {"kl/noise": float(self._divergence) / self.size})
