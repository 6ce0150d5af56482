"""Training-free Bayesianization: a trained adapter, and the widest noise that it bears."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from datasets import Dataset
from torch import Tensor

from bayeslora.errors import AdapterError, SettingError, TrainingError
from bayeslora.inference.base import Run
from bayeslora.inference.training.process import device_of
from bayeslora.inference.variational.point import Mode, Weighed, mode_of, weights_given
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models.guides.base import GuideList, PointGuide
from bayeslora.models.guides.product import ProductNoise, spectral_noise
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.settings import Count, Positive
from bayeslora.sites import pairs

__all__ = ["TFB", "TFBPosterior", "widest"]

#: Where the search begins, as the published one; the last width that it tries, and how often it halves the factor of
#: two that is left: the width is known to four per cent.
FIRST, LAST, HALVINGS = 1e-3, 1e3, 4


@dataclass(frozen=True, kw_only=True)
class TFB(Weighed):
    """The trained adapter as it is, and noise in A by which the products B A have one deviation sigma in all layers.

    Sigma is the largest that the loss of some rows bears, by draws whose noise differs in its size alone: the search
    doubles sigma while the loss is within the tolerance, and then halves the last step, in logarithms. What is left is
    the largest one that was tried and was within, and the next larger one that was tried was not.

    The loss may rise by the tolerance over the lowest one of the smaller widths that were tried, the mode's with them.
    A mode that is all too sure has a loss that noise lowers far before it rises; by the mode's alone, any noise would
    be borne.

    The released code divides the rise by the number of rows, by which it means nothing, bisects towards widths that
    break the bound, and looks between 0.001 and 0.015 alone; its labels are those that the mode predicts. Here they are
    the rows' own, and without held-out rows these are training rows, of which a mode may be too sure to bear much.

    The noise is none that follows from the prior. Diagnostics compare it with the program's posterior of A given all
    else.

    Attributes:
        mode: "train" finds it here; "given" takes the mean of the posterior that `fit` is to ``start`` from, or else
            the weights that the program was made with; "auto" trains if there is nothing to start from and the adapter
            was fresh, its products B A all zero.
        tolerance: part of the loss by which it may rise (published: 0.003 of the negative log-likelihood).
        draws: whose averaged prediction the loss is of.
        search_rows: at most so many rows, of those that `fit` was given as ``heldout``, or else of the training rows.

    References:
        Shi, Wang, Han, Zhang, Wang and Wang, *Training-free Bayesianization for low-rank adapters of large language
        models*, NeurIPS 2025, algorithm 1.
    """

    name: ClassVar[str] = "tfb"
    paper: ClassVar[str] = "Shi et al., NeurIPS 2025 (TFB)"

    mode: Literal["auto", "train", "given"] = "auto"
    tolerance: Positive = 0.003
    draws: Count = 10
    search_rows: Count = 500

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Find the mode, if it is not there, and the widest noise around it.

        Raises:
            AdapterError: there are no LoRA matrices, or all products B A are zero.
            SettingError: the model has no site for A itself.
        """
        program.to(device_of(self.cpu))
        _check(program)
        latents, history, cost = self._mode(program, data, run)
        weights = program.weights_at(latents)
        if not any(bool(weights[b.name].any()) for _, b in pairs(program.sites)):
            raise AdapterError(
                "All products B A are zero, so that noise in A would change nothing: train the adapter (mode='train'), "
                "or give one that was."
            )
        names = {a.name for a, _ in pairs(program.sites)}
        record = run.record(self.name, asdict(self), len(data), self.temperature, latents.keys() - names)
        around = partial(_around, program, record, latents, weights)
        rows = self._rows(program, data, run)
        with undisturbed(program), torch.no_grad():
            sigma, trace = widest(lambda sigma: self._loss(rows, around(sigma), run.seed), self.tolerance)
        posterior = around(sigma)
        posterior.record = replace(record, cost=cost, history=history + trace)
        return posterior

    def _mode(self, program: Program, data: Dataset, run: Run) -> Mode:
        """The mode of every latent site."""
        given = self.mode == "given" or (self.mode == "auto" and weights_given(program, run))
        weights = {"prior_weight": self.prior_weight, "weight_decay": self.weight_decay}
        return mode_of(self, program, data, run, given=given, points=self.points, **weights)

    def _rows(self, program: Program, data: Dataset, run: Run) -> Rows:
        """Rows to look at the loss of."""
        found = data if run.heldout is None else run.heldout
        chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(run.seed))[: self.search_rows]
        return Rows.of(program, found.select(sorted(chosen.tolist())), self.batch_size, run.progress)

    def _loss(self, rows: Rows, posterior: VariationalPosterior, seed: int) -> float:
        """Negative log-likelihood of an example, by the average over draws with the same noise at every width."""
        return rows.nll(rows.outputs_of(posterior.program, posterior.draws(self.draws, seed)))


class TFBPosterior(VariationalPosterior):
    """Noise in A around an adapter, of one size in all directions that its B reaches."""

    kind: ClassVar[str] = "tfb"

    @classmethod
    def blank(cls, program: Program, record: Record) -> GuideList:
        """The guide without an adapter."""
        noise = {}
        for a, _ in pairs(program.sites):
            layers, _, rank = a.initial.shape
            noise[a.name] = a.initial.new_zeros(layers, rank, rank), a.initial.new_zeros(layers, rank)
        return _guide(program, program.model.initial(program.sites), noise)


def widest(loss: Callable[[float], float], tolerance: float) -> tuple[float, list[dict[str, float]]]:
    """The largest width whose loss is within a tolerance of the lowest loss of smaller ones, as far as they are tried.

    Args:
        loss: of a width; that of zero is the first that is asked for.
        tolerance: as a part of the loss.

    Returns:
        The width; and ``sigma``, ``search_nll`` and whether it was ``borne`` of each that was tried, in that order.

    Raises:
        TrainingError: the loss at zero is infinite or not a number.
    """
    lowest = loss(0.0)
    trace = [{"sigma": 0.0, "search_nll": lowest, "borne": 1.0}]
    if not math.isfinite(lowest):
        raise TrainingError(f"The loss of the adapter without noise is {lowest}: there is nothing to put noise around.")

    def borne(sigma: float) -> bool:
        nonlocal lowest
        found = loss(sigma)
        within = found <= lowest + tolerance * abs(lowest)
        lowest = min(lowest, found) if within else lowest
        trace.append({"sigma": sigma, "search_nll": found, "borne": float(within)})
        return within

    good, bad = FIRST, math.inf
    while not borne(good):  # the end comes for certain: noise below rounding changes nothing
        good, bad = good / 2, good
    while bad == math.inf and good < LAST:
        if borne(2 * good):
            good *= 2
        else:
            bad = 2 * good
    if bad == math.inf:
        warnings.warn(f"The loss bears noise of any width: the posterior has {good:g}, the last tried.", stacklevel=3)
        return good, trace
    for _ in range(HALVINGS):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if borne(middle) else (good, middle)
    return good, trace


def _check(program: Program) -> None:
    """Make sure that there is an A for noise, and that it is a site of the model.

    Raises:
        AdapterError: there are no LoRA matrices.
        SettingError: the model has other sites in place of A.
    """
    if not pairs(program.sites):
        raise AdapterError(
            "Training-free Bayesianization is of LoRA matrices, and the network has none. Add LoRA layers, or choose "
            "'swag', which is of all weights that are trained."
        )
    latents = program.model.initial(program.sites)
    lacking = [a.name for a, _ in pairs(program.sites) if a.name not in latents]
    if lacking:
        raise SettingError(
            f"The model '{program.model.name}' makes '{lacking[0]}' of other sites, and the noise is in the matrix "
            "itself: choose model='gaussian', or collapse=True where the model has that."
        )


def _around(
    program: Program, record: Record, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], sigma: float
) -> TFBPosterior:
    """The posterior of a width."""
    noise = {a.name: spectral_noise(weights[b.name], sigma, program.model.sigma0(a)) for a, b in pairs(program.sites)}
    return TFBPosterior(program, record, _guide(program, latents, noise))


def _guide(program: Program, latents: Mapping[str, Tensor], noise: Mapping[str, tuple[Tensor, Tensor]]) -> GuideList:
    """Noise in A, of which there are frames and deviations; all other latent sites are points."""
    noisy = [ProductNoise(a, latents[a.name], *noise[a.name]) for a, _ in pairs(program.sites)]
    points = {name: value for name, value in latents.items() if name not in noise}
    return GuideList([*noisy, PointGuide(points, fixed=points, combine=program.model.weights)])
