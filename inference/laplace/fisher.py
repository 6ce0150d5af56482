"""The log-likelihood of a batch to second order: vectors whose squares add up to its Fisher information.

The information of few outputs is known exactly; that of all tokens of a text, each of them one of a vocabulary, is not
even a matrix that one could hold, and is estimated by labels that are drawn (Martens, *New insights and perspectives on
the natural gradient method*, JMLR 2020, section 5).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference.laplace.curvature import check_finite
from bayeslora.observations import Curved, Drawn, Sampled
from bayeslora.program import Program

__all__ = ["Expansion", "Fisher", "FisherName", "fisher_of", "offsets"]

FisherName = Literal["auto", "exact", "mc", "empirical"]


class Expansion(NamedTuple):
    """A batch's log-likelihood around some weights, divided by the temperature.

    Attributes:
        log_likelihoods: of the labels (examples,).
        roots: vectors by what is differentiated (vectors, examples, outputs).
        curved: which of them have gradients whose squares add up to the curvature.
        evident: which of them the evidence is of.
        values: log-likelihoods (examples,) of what the evidence is of.
        shifts: `offsets` of the evidence's vectors (vectors, examples).
    """

    log_likelihoods: Tensor
    roots: Tensor
    curved: range
    evident: range
    values: Tensor
    shifts: Tensor


@dataclass(frozen=True)
class Fisher(ABC):
    """A way to expand the log-likelihood.

    Attributes:
        observation: whose it is.
        name: of the expectation over labels.
        temperature: that it is divided by.
    """

    observation: Any
    name: str
    temperature: float

    @property
    def vectors(self) -> int:
        """How many an example has."""
        return 1

    @abstractmethod
    def run(self, program: Program, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Any:
        """Pass a batch through the network."""

    @abstractmethod
    def given(self, found: Any) -> Tensor:
        """What is differentiated of a pass (examples, outputs)."""

    @abstractmethod
    def expand(self, found: Any, batch: Mapping[str, Tensor]) -> Expansion:
        """The expansion of a pass."""


class _OfOutputs(Fisher):
    """The Fisher matrix by outputs of an observation that says how its log-likelihood curves."""

    @property
    def vectors(self) -> int:
        if self.name != "exact":
            return 1
        return len(self.observation.curvature_root(torch.zeros(1, self.observation.outputs)))

    def run(self, program: Program, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return program.outputs(weights, batch)

    def given(self, found: Tensor) -> Tensor:
        return found

    def expand(self, found: Tensor, batch: Mapping[str, Tensor]) -> Expansion:
        observation, root = self.observation, math.sqrt(self.temperature)
        logits, labels = found.detach().double(), batch["labels"]
        if self.name == "exact":
            roots = metric = observation.curvature_root(logits) / root
        else:
            drawn = observation.distribution(logits).sample() if self.name == "mc" else labels
            roots = metric = observation.score(logits, drawn).unsqueeze(0) / root
            if self.name == "mc":
                metric = observation.curvature_root(logits) / root
        score = observation.score(logits, labels) / self.temperature
        check_finite({"the logits": score})
        shifts = offsets(roots, metric, score, observation.gain(logits, labels) / self.temperature)
        values = observation.log_prob(logits, labels) / self.temperature
        return Expansion(values, roots, range(len(roots)), range(len(roots)), values, shifts)


class _OfDraws(Fisher):
    """By labels that are drawn where the network says them.

    The gradient of the log-likelihood of all labels of a row, each drawn by itself, has on average the square that is
    the sum of theirs. One vector for many labels would tell the evidence far too little of how much they fix: of each
    row it is of one label, and so of a part of the data.
    """

    def run(self, program: Program, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Drawn:
        program.weights.install(weights)
        found: Drawn = self.observation.drawn(program.network, batch, self.name == "mc")
        return found

    def given(self, found: Drawn) -> Tensor:
        return found.drawn

    def expand(self, found: Drawn, batch: Mapping[str, Tensor]) -> Expansion:
        root = math.sqrt(self.temperature)
        check_finite({"the logits": found.log_likelihood})
        values, one = (each.double() / self.temperature for each in (found.log_likelihood, found.one))
        roots = torch.eye(2).to(values).unsqueeze(1).expand(-1, len(values), -1) / root
        shifts = clipped(found.offset.double().unsqueeze(0) / root, -one)
        return Expansion(values, roots, range(1), range(1, 2), one, shifts)


def fisher_of(program: Program, name: FisherName, temperature: float) -> Fisher:
    """The way of a name to expand the log-likelihood of a program.

    Raises:
        PosteriorError: the observation does not say how its log-likelihood curves.
        SettingError: its Fisher information is not known exactly.
    """
    observation = program.observation
    if isinstance(observation, Curved):
        return _OfOutputs(observation, "exact" if name == "auto" else name, temperature)
    if not isinstance(observation, Sampled):
        raise PosteriorError(
            f"The observation '{observation.name}' does not say how its log-likelihood curves, which Laplace's "
            "approximation needs: make it a bayeslora.observations.Curved, or choose another backend."
        )
    if name == "exact":
        raise SettingError(
            f"fisher='exact' is not to be had for '{observation.name}': of all tokens of a text it fits into no "
            "memory. Choose 'mc', the default for it, or 'empirical'."
        )
    return _OfDraws(observation, "mc" if name == "auto" else name, temperature)


def offsets(roots: Tensor, metric: Tensor, score: Tensor, gain: Tensor) -> Tensor:
    """The c (vectors, examples) of the evidence of a linear model: r^T (sum_m m m^T)^+ score for each r.

    With the vectors themselves for m, the c give the score back; if they are drawn, and m are the exact ones, the c do
    on average.

    Args:
        roots: vectors r (vectors, examples, outputs).
        metric: vectors m, in the same shape but for their number.
        score: (examples, outputs).
        gain: how much each example's log-likelihood can rise at most (examples,).
    """
    inverse = torch.linalg.pinv(metric.permute(1, 2, 0))
    return clipped(torch.einsum("vnc,nmc,nmd,nd->vn", roots, inverse, inverse, score), gain)


def clipped(found: Tensor, gain: Tensor) -> Tensor:
    """Offsets (vectors, examples) of which half the square of each example's is at most its gain (examples,)."""
    length = found.norm(dim=0).clamp(min=torch.finfo(found.dtype).tiny)
    return found * ((2 * gain).sqrt() / length).clamp(max=1)
