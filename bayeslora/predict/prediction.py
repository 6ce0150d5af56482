"""Predictions of a posterior: logits of every weight draw, and what follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayeslora import files
from bayeslora.errors import DataError, PosteriorError
from bayeslora.observations.likelihoods import Likelihood, build_likelihood, to_dict
from bayeslora.predict import metrics

if TYPE_CHECKING:
    from bayeslora.predict.metrics import Metrics

__all__ = ["Predictive"]

FORMAT = "bayeslora predictive 1"
CHUNK = 2**24  # entries of logits in double precision at once


@dataclass(frozen=True, eq=False)
class Predictive:
    """The posterior predictive distribution of every row's label, as a mixture over draws of the weights.

    Averages are over probabilities, never over logits: the mean of logits knows nothing of their spread. What
    is derived is in double precision and made when first asked for.

    Attributes:
        logits: outputs of the network (draws, examples, outputs), float32 on the CPU; choices that a row
            lacks have minus infinity.
        labels: true labels (examples,), where they are known.
        likelihood: what the logits mean.
        method: how it was made, one of the posterior's `methods`.
        label_names: names of the classes, where they have some.
        aleatoric: expected entropy (examples,) in nats, where a formula gives it in place of draws.

    Raises:
        DataError: the shapes do not belong together, or a logit is NaN.
    """

    logits: Tensor
    labels: Tensor | None
    likelihood: Likelihood
    method: str = "sample"
    label_names: tuple[str, ...] = ()
    aleatoric: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or self.logits.shape[-1] != self.likelihood.outputs:
            raise DataError(
                f"Expected logits (draws, examples, {self.likelihood.outputs}) for a {self.likelihood.name}"
                f" likelihood, found the shape {tuple(self.logits.shape)}."
            )
        if self.labels is not None and self.labels.shape != self.logits.shape[1:2]:
            raise DataError(
                f"Expected {self.logits.shape[1]} labels, one an example, found the shape {tuple(self.labels.shape)}."
            )
        if self.logits.isnan().any():
            row = int(self.logits.isnan().any(-1).any(0).nonzero()[0])
            raise DataError(f"The logits of row {row} are NaN: the network or the posterior is not finite.")

    def __len__(self) -> int:
        return self.logits.shape[1]

    @property
    def draws(self) -> int:
        """Number of weight draws."""
        return self.logits.shape[0]

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Log of the class probabilities averaged over draws (examples, classes)."""
        self._need_classes("class probabilities")
        return self._by_rows(lambda logits: logits.log_softmax(-1).logsumexp(0) - math.log(self.draws))

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities averaged over draws (examples, classes)."""
        return self.log_probabilities.exp()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the averaged probabilities (examples,), in nats: the total uncertainty about a label."""
        return _entropy(self.log_probabilities)

    @cached_property
    def expected_entropy(self) -> Tensor:
        """Mean over draws of the entropy at each (examples,), in nats: what more data would not remove."""
        self._need_classes("entropy")
        if self.aleatoric is not None:
            return self.aleatoric
        return self._by_rows(lambda logits: _entropy(logits.log_softmax(-1)).mean(0))

    @property
    def mutual_information(self) -> Tensor:
        """Information that a label would give about the weights (examples,), in nats (Houlsby et al. 2011).

        The entropy less the expected entropy; never negative, up to rounding, which is cut off.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @cached_property
    def mean(self) -> Tensor:
        """Predictive mean of a real label (examples,)."""
        self._need_reals("mean")
        return self._by_rows(lambda logits: self.likelihood.distribution(logits).mean.mean(0))

    @cached_property
    def variance(self) -> Tensor:
        """Predictive variance of a real label (examples,): the noise's plus that of the mean over draws."""
        self._need_reals("variance")

        def total(logits: Tensor) -> Tensor:
            label = self.likelihood.distribution(logits)
            return label.variance.mean(0) + label.mean.var(0, correction=0)

        return self._by_rows(total)

    @property
    def predictions(self) -> Tensor:
        """The most probable class, or the predictive mean of a real label (examples,)."""
        return self.mean if self.likelihood.name == "normal" else self.log_probabilities.argmax(-1)

    @cached_property
    def log_likelihood(self) -> Tensor:
        """Log density of each label under each draw (draws, examples).

        Raises:
            DataError: the labels are not known.
        """
        labels = self._labels()
        density = [
            self.likelihood.distribution(logits.double()).log_prob(labels[rows]) for rows, logits in self._chunks()
        ]
        return torch.cat(density, dim=1)

    @property
    def log_predictive_density(self) -> Tensor:
        """Log of the density of each label averaged over draws (examples,); its mean is minus the NLL.

        Raises:
            DataError: the labels are not known.
        """
        return self.log_likelihood.logsumexp(0) - math.log(self.draws)

    def metrics(self, intervals: bool = True, seed: int = 0) -> Metrics:
        """Metrics over all rows.

        Args:
            intervals: make 95 % bootstrap intervals over rows as well.
            seed: of the resamples.

        Returns:
            Accuracy, NLL, Brier score, ECE and MCC of classes; RMSE, NLL and correlations of real labels.

        Raises:
            DataError: the labels are not known, or there are no rows.
        """
        labels = self._labels()
        if self.likelihood.name == "normal":
            found = metrics.regression(self.mean, self.log_predictive_density, labels, intervals=intervals, seed=seed)
        else:
            found = metrics.classification(self.log_probabilities, labels, intervals=intervals, seed=seed)
        return metrics.Metrics(found, len(self), self.draws, self.method)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, which describes itself in its metadata, in one step."""
        from safetensors.torch import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"logits": self.logits.contiguous()}
        for name in ("labels", "aleatoric"):
            if (value := getattr(self, name)) is not None:
                tensors[name] = value.contiguous()
        described = {
            "likelihood": to_dict(self.likelihood),
            "method": self.method,
            "label_names": list(self.label_names),
        }
        with files.staged(target.parent) as stage:
            save_file(tensors, stage / target.name, metadata={"format": FORMAT, "predictive": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> Predictive:
        """Read what `save` wrote.

        Raises:
            PosteriorError: the file does not exist or is no saved predictive.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise PosteriorError(f"Cannot read a predictive from {path}: {error}") from error
        if metadata.get("format") != FORMAT:
            raise PosteriorError(f"{path} holds no predictive: its format is {metadata.get('format')!r}.")
        described = json.loads(metadata["predictive"])
        return cls(
            tensors["logits"],
            tensors.get("labels"),
            build_likelihood(described["likelihood"]),
            described["method"],
            tuple(described["label_names"]),
            tensors.get("aleatoric"),
        )

    def _chunks(self) -> list[tuple[slice, Tensor]]:
        """Rows and their logits, some at a time: all in double precision may not fit."""
        step = max(1, CHUNK // max(1, self.draws * self.logits.shape[-1]))
        starts = range(0, max(1, len(self)), step)
        return [(slice(start, start + step), self.logits[:, start : start + step]) for start in starts]

    def _by_rows(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function that removes the dimension of draws to the logits of some rows at a time."""
        return torch.cat([reduce(logits.double()) for _, logits in self._chunks()])

    def _labels(self) -> Tensor:
        if self.labels is None:
            raise DataError("The rows that were predicted have no labels to compare with.")
        return self.labels

    def _need_classes(self, what: str) -> None:
        if self.likelihood.name == "normal":
            raise PosteriorError(f"A prediction of real labels has no {what}: use mean and variance.")

    def _need_reals(self, what: str) -> None:
        if self.likelihood.name != "normal":
            raise PosteriorError(f"A prediction of classes has no {what}: use probabilities and entropy.")


def _entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy over the last dimension in nats; an impossible class adds nothing."""
    return torch.special.entr(log_probabilities.exp()).sum(-1)
