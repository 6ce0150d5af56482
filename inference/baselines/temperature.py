"""A temperature of predictions, over any posterior, fitted on training rows that are set aside."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor

from bayeslora.errors import SettingError
from bayeslora.inference.aside import ENOUGH, MOST, PART, check_asked
from bayeslora.inference.base import Run, posterior_class
from bayeslora.inference.baselines.nested import Over
from bayeslora.inference.fitting import fitted_in_folder
from bayeslora.inference.training.process import cost_of, device_of
from bayeslora.inference.variational.point import weights_given
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models.guides.auto import make_guide
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import COLDEST, HOTTEST, best_temperature, gain
from bayeslora.predictors import Outputs, Predictor, Tempered
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.settings import Count

__all__ = ["Temperature", "TemperedPosterior"]


@dataclass(frozen=True, kw_only=True)
class Temperature(Over):
    """Another backend's posterior, whose predicted probabilities p become p^(1 / T), normalised.

    T has the least negative log-likelihood on rows that the weights were not trained on. Of several draws, or members
    of an ensemble, p is their average: see `bayeslora.predict.temperature.tempered`. The best guess of a label stays
    what it was. T is of predictions; the ``temperature`` of `svi` or `map` is of a posterior.

    Predictions are tempered by default (``"tempered"``). All other methods, and all that is said of the weights, are
    the other posterior's, without T. A backend that chooses something on held-out rows itself, as `svi` and `laplace`
    do, chooses it on the same ones, before T. Of independent fits (``chains``) each has a T of its own; members of an
    ``ensemble`` have one together.

    Attributes:
        mode: "fit" fits the other backend; "given" takes the mean of the posterior that `fit` is to ``start`` from, or
            else the weights that the program was made with, as a point, and asks for ``heldout`` rows.
        heldout_size: training rows that are set aside, if `fit` was given no ``heldout``; by default a tenth, but 30 at
            least, and no more than 1,000 or half of all. They are drawn by the run's seed, with each class's share.
        draws: by which those rows are predicted.
        method: of the other posterior's predictions; its first, if left out.

    References:
        Guo, Pleiss, Sun and Weinberger, *On calibration of modern neural networks*, ICML 2017.
    """

    name: ClassVar[str] = "temperature"
    paper: ClassVar[str] = "Guo et al., ICML 2017"

    mode: Literal["fit", "given"] = "fit"
    heldout_size: Annotated[int, Field(ge=1)] | None = None
    draws: Count = 10
    method: str | None = None

    def sets_aside(self, program: Program, rows: int, run: Run) -> int:
        """How many of so many training rows are set aside: those that the other backend wants, or else as many as said.

        Raises:
            SettingError: there are held-out rows already, or the weights that are given may have seen those rows.
        """
        self._check(program)
        wanted = super().sets_aside(program, rows, run)
        if run.heldout is not None and not self.heldout_size:
            return 0
        size = self.heldout_size or wanted or max(1, min(max(rows // PART, ENOUGH), rows // 2, MOST))
        seen = self.mode == "given" or weights_given(program, run)
        check_asked(size, rows, run, seen, "to fit a temperature on")
        return size

    def fit(self, program: Program, data: Dataset, run: Run) -> TemperedPosterior:
        """Fit the other backend, and the temperature of its predictions.

        Raises:
            SettingError: labels are not classes, or there are no held-out rows.
            PosteriorError: there is no such method.
        """
        self._check(program)
        if run.heldout is None:
            raise SettingError("A temperature is fitted on held-out rows: give fit(..., heldout=...).")
        fitted = self.mode == "fit"
        inner = fitted_in_folder(program, data, self.inner, run.chain(0)) if fitted else given(program, data, run)
        begun = time.monotonic()
        found = inner.predict(run.heldout, self.draws, self.method, run.seed, progress=run.progress)
        assert isinstance(found, ClassPrediction)  # `_check` sees to it
        temperature = best_temperature(found)
        _warn_of_limit(temperature, len(run.heldout))
        cost = inner.record.cost | {"seconds": inner.record.cost["seconds"] + time.monotonic() - begun}
        record = replace(inner.record, backend=self.name, settings=asdict(self), cost=cost, chains=1)
        history = [*inner.record.history, gain(found, temperature)]
        record = replace(record, members=[asdict(inner.record)], history=history)
        return TemperedPosterior(inner, torch.tensor(temperature, dtype=torch.float64), self.method, record)

    def _check(self, program: Program) -> None:
        """Make sure that labels are classes."""
        if not issubclass(program.observation.prediction, ClassPrediction):
            raise SettingError(
                f"A temperature is of predicted classes, and '{program.observation.name}' predicts none: choose "
                f"'{self.of}' itself."
            )


def _warn_of_limit(temperature: float, rows: int) -> None:
    """Say if the held-out rows have no best temperature: any mistake elsewhere would cost far more than it gains."""
    if not 1.01 * COLDEST < temperature < HOTTEST / 1.01:
        warnings.warn(
            f"The {rows:,} held-out rows have no best temperature, as where all of them are predicted right, or no "
            f"better than by chance: {temperature:.3g} is the last one that was tried, and other rows are likely to "
            "have another. Hold out more of them (heldout_size, or heldout=...).",
            stacklevel=2,
        )


def given(program: Program, data: Dataset, run: Run) -> Posterior:
    """The weights to start from, as a point."""
    program.to(device_of(cpu=False))
    guide = make_guide("delta", program.model, run.sites(program))
    record = run.record("given", {}, len(data), 0.0, guide.point_sites)
    return VariationalPosterior(program, replace(record, cost=cost_of(program, 0.0, 0), finished=True), guide)


class TemperedPosterior(Posterior):
    """A posterior, and the temperature of its predictions.

    Args:
        inner: the posterior.
        by: temperature, a scalar.
        method: of the posterior's predictions that is tempered; its first, if left out.
        record: of the whole.
    """

    kind: ClassVar[str] = "tempered"

    def __init__(self, inner: Posterior, by: Tensor, method: str | None, record: Record) -> None:
        super().__init__(inner.program, record)
        self.inner, self.by, self.method = inner, by, method
        self.random, self.markov = inner.random, inner.markov
        own: dict[str, Predictor] = {name: _Of(inner, each) for name, each in inner.predictors.items()}
        default, _ = inner.predictor(method)
        found: dict[str, Predictor] = {"tempered": Tempered(own[default], float(by))}
        self.predictors = found | {name: each for name, each in own.items() if name not in found}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, T = {float(self.by):.3g})"

    @property
    def chains(self) -> tuple[Posterior, ...]:
        """The independent fits, each under the one temperature."""
        fits = self.inner.chains
        return (self,) if len(fits) == 1 else tuple(self._with(each) for each in fits)

    def _with(self, fit: Posterior) -> TemperedPosterior:
        ours, own = self.record, fit.record
        record = replace(own, backend=ours.backend, settings=ours.settings, members=[asdict(own)])
        return TemperedPosterior(fit, self.by, self.method, record)

    @property
    def dense(self) -> bool:
        """The posterior's."""
        return self.inner.dense

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """The posterior's."""
        return self.inner.auxiliary

    @property
    def independent_layers(self) -> bool:
        """The posterior's."""
        return self.inner.independent_layers

    @property
    def learned_means(self) -> tuple[str, ...]:
        """The posterior's."""
        return self.inner.learned_means

    @property
    def most_draws(self) -> int | None:
        """The posterior's."""
        return self.inner.most_draws

    def differing(self, draws: int) -> int:
        """The posterior's."""
        return self.inner.differing(draws)

    def noise_scales(self) -> dict[str, Tensor]:
        """The posterior's."""
        return self.inner.noise_scales()

    def draw(self) -> dict[str, Tensor]:
        """The posterior's."""
        return self.inner.draw()

    def draws(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """The posterior's."""
        return self.inner.draws(n, seed)

    def mean(self) -> dict[str, Tensor]:
        """The posterior's."""
        return self.inner.mean()

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """The posterior's."""
        return self.inner.log_prob(values)

    def pairs(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """The posterior's."""
        return self.inner.pairs(n, seed)

    def prior_draw(self) -> dict[str, Tensor]:
        """The posterior's."""
        return self.inner.prior_draw()

    def log_prior(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The posterior's."""
        return self.inner.log_prior(values)

    def state(self) -> dict[str, Tensor]:
        """The temperature, and what the posterior needs, with its kind before each name."""
        inner = {f"{self.inner.kind}/{name}": value for name, value in self.inner.state().items()}
        return inner | {"temperature": self.by}

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> TemperedPosterior:
        """Rebuild the posterior."""
        parts = {name: value for name, value in state.items() if name != "temperature"}
        (kind,) = {name.partition("/")[0] for name in parts}
        own = {name.partition("/")[2]: value for name, value in parts.items()}
        inner = posterior_class(kind).from_state(program, Record(**record.members[0]), own)
        return cls(inner, state["temperature"], record.settings["method"], record)


class _Of:
    """One of the posterior's ways to predict, without a temperature."""

    def __init__(self, inner: Posterior, way: Predictor) -> None:
        self.inner, self.way = inner, way
        self.by_draws = way.by_draws

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """The posterior's outputs."""
        return self.way(self.inner, rows, draws, seed)
