"""MC dropout: maximum likelihood with dropout of what LoRA layers are given, which stays on for predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.baselines.masks import Columns, RowMasks, Tokens
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.learning import learn
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.point import MLE
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.inference.variational.rates import groups_of
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.observations.batches import Batch
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predictors import Mean, Outputs, Predictor
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.sites import Site

__all__ = ["ColumnDropoutPosterior", "MCDropout", "TokenDropoutPosterior"]


@dataclass(frozen=True, kw_only=True)
class MCDropout(MLE):
    """Monte Carlo dropout: plain LoRA, trained with dropout of what its layers are given, and predicted with it.

    With ``by="token"``, as in the tables of Laplace-LoRA and BLoB, each entry of each token is dropped by itself. A
    pass is then no draw of the weights, since each token sees others: there are predictions, and neither draws of the
    weights, k-hat nor leave-one-out. With ``by="column"`` one mask a layer drops columns of A for all rows and tokens
    of a pass, which is a draw of the weights A diag(m) / (1 - rate), of a law without a density.

    Neither law has a part for the prior, nor narrows with more rows: its width is the rate's. The head and the base
    network are predicted without dropout. In training masks are drawn for a step; in predictions by token, by the
    number of the row, so that they do not depend on batches.

    Attributes:
        rate: part of the inputs that is dropped (in those tables: 0.1). PEFT's own ``lora_dropout`` has to be zero.
        by: what is dropped as one.

    References:
        Gal and Ghahramani, *Dropout as a Bayesian approximation*, ICML 2016.
    """

    name: ClassVar[str] = "mc-dropout"
    paper: ClassVar[str] = "Gal and Ghahramani, ICML 2016"

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.1
    by: Literal["token", "column"] = "token"

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Maximise the average of log p(y | weights) over masks.

        Raises:
            SettingError: there are no LoRA matrices, a layer cannot drop tokens, or PEFT drops inputs as well.
        """
        if program.weights.config.get("lora_dropout"):
            raise SettingError(
                f"The adapter has lora_dropout={program.weights.config['lora_dropout']}, and 'mc-dropout' a rate of "
                "its own: inputs would be dropped twice. Make the adapter without (lora.dropout=0)."
            )
        guide = make_guide("delta", program.model, run.sites(program))
        noise = _BY[self.by].noise(program, self.rate)
        fixed = set(guide.point_sites) - {site.name for site in noise.sites}
        # Diagnostics compare draws with the program's posterior.
        record = run.record(self.name, asdict(self), len(data), 1.0, fixed)
        groups = groups_of(guide, self.learning_rate, self.learning_rate, weight_decay=self.weight_decay)
        return learn(
            _BY[self.by](program, record, guide),
            NegativeELBO(program, guide, MeanFieldBound(), len(data), 0.0, noise),
            torch.optim.AdamW(groups, lr=self.learning_rate),
            data,
            self,
            run,
        )


class _DropoutPosterior(VariationalPosterior):
    """Point estimates of the weights, and what is dropped of them or of what they are given."""

    dense = False

    def __init__(self, program: Program, record: Record, guide: Guide) -> None:
        super().__init__(program, record, guide)
        self.random = True
        self.rate: float = record.settings["rate"]

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """There is no density.

        Raises:
            PosteriorError: always.
        """
        raise PosteriorError(f"'{self.record.backend}' is masks over a point: it has no density, and no k-hat.")


class ColumnDropoutPosterior(_DropoutPosterior):
    """Draws of the weights: columns of A dropped at random, all else where it is."""

    kind: ClassVar[str] = "column-dropout"

    @staticmethod
    def noise(program: Program, rate: float) -> Columns:
        """What is dropped in training."""
        return Columns(_matrices(program), rate)

    def draw(self) -> dict[str, Tensor]:
        """The weights with masks by the global generators of torch."""
        return self.noise(self.program, self.rate)(super().draw())


class Passes:
    """Passes with masks of each row's own."""

    by_draws = False

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """Outputs (draws, examples, outputs)."""
        program, weights = posterior.program, posterior.mean()
        sites, rate = _linear_matrices(program), posterior.record.settings["rate"]
        names = [layer for site in sites for layer in site.layers]

        def outputs(draw: int, batch: Batch, index: Tensor) -> Tensor:
            attended = program.observation.attended(batch).flatten(0, 1).cpu()
            masks = RowMasks(rate, seed, draw, index.tolist(), attended, names)
            return program.outputs(Tokens(sites, rate, masks)(weights, batch), batch)

        return Outputs(torch.stack([rows.passed(program, partial(outputs, draw)) for draw in range(draws)]))


class TokenDropoutPosterior(_DropoutPosterior):
    """Passes with dropout by token (``"passes"``), or one without (``"mean"``): no law of the weights."""

    kind: ClassVar[str] = "token-dropout"
    predictors: Mapping[str, Predictor] = MappingProxyType({"passes": Passes(), "mean": Mean()})

    @staticmethod
    def noise(program: Program, rate: float) -> Tokens:
        """What is dropped in training."""
        return Tokens(_linear_matrices(program), rate)

    def draw(self) -> dict[str, Tensor]:
        """There is no draw of the weights.

        Raises:
            PosteriorError: always.
        """
        raise PosteriorError(
            f"'{self.record.backend}' by token is noise of each token's own, not a distribution over weights: there "
            "are no draws of the weights. Predictions, their metrics and to_inference_data have what its passes say; "
            "by='column' has draws."
        )


_BY: dict[str, type[ColumnDropoutPosterior] | type[TokenDropoutPosterior]] = {
    "token": TokenDropoutPosterior,
    "column": ColumnDropoutPosterior,
}


def _matrices(program: Program) -> list[Site]:
    """The sites of matrices A.

    Raises:
        SettingError: there are none.
    """
    found = [site for site in program.sites if site.role == "A"]
    if not found:
        raise SettingError("Dropout is of what LoRA matrices are given, and the network has none: choose 'mle'.")
    return found


def _linear_matrices(program: Program) -> list[Site]:
    """The sites of matrices A, all of layers in which a token can have a mask of its own.

    Raises:
        SettingError: there is none, or a layer is of another sort.
    """
    found = _matrices(program)
    for layer in program.weights.not_linear(found):
        raise SettingError(
            f"Dropout by token needs linear LoRA layers, and '{layer}' is none, or does more with its matrices than "
            "multiply by them: leave it out (target_modules), or drop columns (by='column')."
        )
    return found
