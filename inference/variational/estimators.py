"""Estimators of the expected log-likelihood of a batch, with noise of each row's own.

One draw of the weights for a whole batch makes an error that all its rows share, and that more rows do not average out.
The bound is a sum over rows, so each row may see a draw of its own. With M the mean of a matrix, a row of the inputs X
(one vector for each of its tokens) has the outputs

    flipout    X M^T + ((X * s) (W - M)^T) * t    of one draw W for all rows; s and t are random signs of the row
    local      X M^T + N                          N of the law of X (W - M)^T, independent of all other rows'

Signs and noise are a row's own and not a token's: all tokens of a row pass by one and the same draw, as they do in a
prediction. With noise of each token's own it would be another bound, whose tokens know of no common weights. The noise
is drawn before the pass, so that activations which are computed again see the same.

References:
    Wen, Vicol, Ba, Tran and Grosse, *Flipout: efficient pseudo-independent weight perturbations on mini-batches*, ICLR
    2018, equation 4; Kingma, Salimans and Welling, *Variational dropout and the local reparameterization trick*, NIPS
    2015, equation 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslora.errors import SettingError
from bayeslora.inference.training.objective import Hook, State
from bayeslora.models.guides.base import Guide, Spread
from bayeslora.program import Program
from bayeslora.sites import Value, check_sequences

__all__ = ["Draw", "NoiseWarmup", "RowNoise", "make_estimator"]

#: The noise of a layer's outputs (rows, vectors, outputs), of its inputs (rows, vectors, inputs).
Noise = Callable[[Tensor], Tensor]


def make_estimator(kind: str, program: Program, guide: Guide) -> Draw | RowNoise:
    """The estimator of a name.

    Args:
        kind: "draw", "flipout" or "local".
        program: whose network.
        guide: of its weights.

    Raises:
        SettingError: the guide's noise has not the symmetry that is needed, or a layer is not linear.
    """
    if kind == "draw":
        return Draw(guide)
    spreads = guide.spreads()
    for site in program.model.split(program.sites)[0]:
        spread = spreads.get(site.name)
        if spread is None or (kind == "local" and spread.deviation is None):
            raise SettingError(
                f"estimator='{kind}' needs a guide of normal matrices whose entries are independent"
                f"{', or at least its columns' if kind == 'flipout' else ''}; that of '{site.name}' has none of which "
                f"this is known. Give estimator='draw', or guide='structured' with the model 'gaussian'"
                f"{' or monteclora' if kind == 'flipout' else ''}."
            )
        for layer in program.weights.not_linear([site]):
            raise SettingError(
                f"estimator='{kind}' needs linear layers, and '{layer}' is none, or does more with its matrices than "
                "multiply by them. Give estimator='draw', or leave the layer out (target_modules)."
            )
    return RowNoise(program, guide, _flips if kind == "flipout" else _owns)


@dataclass
class Draw:
    """The draw itself, or with a part of its noise: M + share (W - M).

    Attributes:
        guide: of the weights; where it does not say how a matrix lies around its mean, its draws have all their noise.
        share: of the noise.
    """

    guide: Guide
    share: float = 1.0

    def __call__(self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Mapping[str, Value]:
        """Values for `Weights.install` of a draw, by site."""
        if self.share == 1:
            return weights
        means = {name: spread.mean for name, spread in self.guide.spreads().items()}
        return {**weights, **{name: mean.lerp(weights[name], self.share) for name, mean in means.items()}}


@dataclass
class RowNoise:
    """Functions with noise of each row's own, in place of random matrices.

    Attributes:
        program: whose network.
        guide: of its weights.
        noises: of each layer of a site, made of a draw, its spread, the number of rows, and whether the matrices are
            (inputs, outputs), not (outputs, inputs).
        share: of the noise.
    """

    program: Program
    guide: Guide
    noises: Callable[[Tensor, Spread, int, bool], Iterator[Noise]]
    share: float = 1.0

    def __call__(self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Value]:
        """Values for `Weights.install`: functions for random sites, the weights of all others.

        Args:
            weights: a draw, by site.
            batch: of rows; each may have several sequences (choices), one after another in the layers' inputs.
        """
        tokens = batch["input_ids"]
        rows, sequences = len(tokens), tokens.numel() // tokens.shape[-1]
        found: dict[str, Value] = dict(weights)
        spreads = self.guide.spreads()
        for site in self.program.model.split(self.program.sites)[0]:
            spread = spreads[site.name]
            inputs_first = self.program.weights.slots(site.name)[0].transposed
            noises = self.noises(weights[site.name], spread, rows, inputs_first)
            layers = zip(site.layers, _matrices(spread.mean, inputs_first), noises, strict=True)
            found[site.name] = [
                _Noisy(layer, mean, noise, rows, sequences, self.share) for layer, mean, noise in layers
            ]
        return found


@dataclass
class NoiseWarmup(Hook):
    """The share of the noise rises linearly from zero to all of it in the first ``part`` of all steps."""

    estimator: Draw | RowNoise
    part: float

    def before_step(self, state: State) -> None:
        """Set the share of the step."""
        self.estimator.share = min(1.0, (state.step + 1) / state.steps / self.part)


class _Noisy:
    """The function of a layer, of which each row of a batch sees noise of its own.

    Args:
        layer: its name.
        mean: M^T (inputs, outputs).
        noise: of the outputs.
        rows: in the batch.
        sequences: in the batch.
        share: of the noise.
    """

    def __init__(self, layer: str, mean: Tensor, noise: Noise, rows: int, sequences: int, share: float) -> None:
        self._layer, self._mean, self._noise, self._rows, self._sequences = layer, mean, noise, rows, sequences
        self._share = share

    def __call__(self, inputs: Tensor) -> Tensor:
        """Outputs (sequences, ..., outputs) of inputs (sequences, ..., inputs).

        Raises:
            AdapterError: the inputs are not those sequences one after another.
        """
        check_sequences(self._layer, inputs, self._sequences, "noise", ", or give estimator='draw'")
        parts = inputs.reshape(self._rows, -1, inputs.shape[-1])
        found = torch.add(parts @ self._mean.to(inputs), self._noise(parts), alpha=self._share)
        return found.reshape(*inputs.shape[:-1], -1)


class _Flip:
    """((X * s) D^T) * t, D^T (inputs, outputs), signs s (rows, 1, inputs) and t (rows, 1, outputs)."""

    def __init__(self, difference: Tensor, before: Tensor, after: Tensor) -> None:
        self._difference, self._before, self._after = difference, before, after

    def __call__(self, parts: Tensor) -> Tensor:
        signed = parts * self._before.to(parts)
        return (signed @ self._difference.to(parts)) * self._after.to(parts)


class _Own:
    """Noise of the law of X D^T, D^T (inputs, outputs) of independent normal entries, for each row by itself.

    A row of several vectors is multiplied by a matrix of its own, since their noise depends on each other's. That of
    one vector has independent entries, and is drawn as such: of the same law, with less variance in the gradient.

    Args:
        deviation: of D^T (inputs, outputs).
        matrices: standard normal (rows, inputs, outputs).
        vectors: standard normal (rows, 1, outputs).
    """

    def __init__(self, deviation: Tensor, matrices: Tensor, vectors: Tensor) -> None:
        self._deviation, self._matrices, self._vectors = deviation, matrices, vectors

    def __call__(self, parts: Tensor) -> Tensor:
        deviation = self._deviation.to(parts)
        if parts.shape[1] > 1:
            return parts @ (deviation * self._matrices.to(parts))
        variance = parts.square() @ deviation.square()
        # The root has no derivative at zero, which inputs that are all zero would ask for.
        return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * self._vectors.to(parts)


def _flips(draw: Tensor, spread: Spread, rows: int, inputs_first: bool) -> Iterator[Noise]:
    layers, columns, rank = draw.shape
    of_columns = _signs(draw, (layers, rows, 1, columns))
    # Entries of a column that depend on each other have one sign.
    shape = (layers, rows, 1, rank)
    of_rank = draw.new_ones(()).expand(shape) if spread.deviation is None else _signs(draw, shape)
    before, after = (of_columns, of_rank) if inputs_first else (of_rank, of_columns)
    return map(_Flip, _matrices(draw - spread.mean, inputs_first), before, after)


def _owns(draw: Tensor, spread: Spread, rows: int, inputs_first: bool) -> Iterator[Noise]:
    assert spread.deviation is not None
    deviation = _matrices(spread.deviation.expand_as(draw), inputs_first)
    layers, inputs, outputs = draw.shape if inputs_first else draw.mT.shape
    matrices = torch.randn(layers, rows, inputs, outputs, dtype=draw.dtype, device=draw.device)
    vectors = torch.randn(layers, rows, 1, outputs, dtype=draw.dtype, device=draw.device)
    return map(_Own, deviation, matrices, vectors)


def _matrices(value: Tensor, inputs_first: bool) -> Tensor:
    """Matrices (layers, inputs, outputs) of a site's value."""
    return value if inputs_first else value.mT


def _signs(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fair random signs."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(0.5).mul_(2).sub_(1)
