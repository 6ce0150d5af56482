"""Predictions of a posterior: outputs of the network under every draw of the weights, and what follows from them."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslora import files
from bayeslora.errors import DataError, PosteriorError
from bayeslora.predict import metrics
from bayeslora.predict.resampling import Bounded, bootstrap
from bayeslora.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

    from bayeslora.predict.metrics import Metrics

__all__ = ["ClassPrediction", "Prediction"]

FORMAT = "bayeslora prediction 2"
CHUNK = 2**24  # entries of outputs in double precision at once


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(ABC):
    """The posterior predictive distribution of every row's label, as a mixture over draws of the weights.

    Averages are over probabilities, never over logits: the mean of logits knows nothing of their spread. What
    is derived is in double precision and made when first asked for.

    Attributes:
        outputs: of the network (draws, or averages of some, examples, outputs), float32 on the CPU.
        labels: true labels (examples,), where they are known.
        method: how it was made, one of the posterior's predictors.

    Raises:
        DataError: the shapes do not belong together, or an output is NaN or infinity.
    """

    kind: ClassVar[str]
    #: Whether labels can be drawn from it.
    replicable: ClassVar[bool] = True

    outputs: Tensor
    labels: Tensor | None = None
    method: str = "sample"

    def __post_init__(self) -> None:
        if self.outputs.ndim != 3:
            raise DataError(
                f"Expected outputs (draws, examples, outputs), found the shape {tuple(self.outputs.shape)}."
            )
        if self.labels is not None and self.labels.shape != self.outputs.shape[1:2]:
            raise DataError(
                f"Expected {self.outputs.shape[1]} labels, one an example, found the shape {tuple(self.labels.shape)}."
            )
        broken = ~(self.outputs < math.inf).all(-1).all(0)  # minus infinity is the logarithm of nothing
        if broken.any():
            row = int(broken.nonzero()[0])
            raise DataError(f"The outputs of row {row} are NaN or infinity: network or posterior is not finite.")

    def __len__(self) -> int:
        return self.outputs.shape[1]

    def __repr__(self) -> str:
        known = "labels known" if self.labels is not None else "no labels"
        return f"{type(self).__name__}({len(self):,} rows, {self.draws} draws, method={self.method!r}, {known})"

    @property
    def draws(self) -> int:
        """Number of weight draws."""
        return len(self.outputs)

    @abstractmethod
    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Distribution of the labels (draws, rows) given outputs (draws, rows, outputs)."""

    @property
    @abstractmethod
    def predictions(self) -> Tensor:
        """The best guess of every label (examples,)."""

    @property
    @abstractmethod
    def by_draw(self) -> dict[str, tuple[Tensor, dict[str, tuple[str, ...]]]]:
        """What is predicted under each draw, by name: values (draws, examples, ...), and names along what follows."""

    @abstractmethod
    def statistics(self) -> dict[str, Bounded]:
        """Metrics by name as statistics of how often each row counts, of a prediction whose labels are known."""

    @abstractmethod
    def to_pandas(self) -> pd.DataFrame:
        """A table with a row for each example: what is predicted, and how sure it is."""

    @cached_property
    def log_likelihood(self) -> Tensor:
        """Log density of each label under each draw (draws, examples).

        Raises:
            DataError: the labels are not known.
        """
        return self._by_rows(lambda part, labels: self.distribution(part).log_prob(labels), self._known(), dim=1)

    @property
    def log_predictive_density(self) -> Tensor:
        """Log of the density of each label averaged over draws (examples,); its mean is minus the NLL.

        Raises:
            DataError: the labels are not known.
        """
        return self.log_likelihood.logsumexp(0) - math.log(len(self.outputs))

    def sample(self) -> Tensor:
        """A label of every row from each draw's distribution (draws, examples), by torch's global generator."""
        found: Tensor = self.distribution(self.outputs).sample()
        return found

    def metrics(self, intervals: bool = True, seed: int = 0) -> Metrics:
        """Metrics over all rows.

        Args:
            intervals: make 95 % bootstrap intervals over rows as well.
            seed: of the resamples.

        Returns:
            Accuracy, NLL, Brier score, ECE and MCC of classes; RMSE, NLL, correlations and coverage of real labels.

        Raises:
            DataError: the labels are not known, or there are no rows.
        """
        self._known()
        found = bootstrap(self.statistics(), len(self), seed, intervals)
        return metrics.Metrics(found, len(self), self.draws, self.method)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, which describes itself in its metadata, in one step."""
        from safetensors.torch import save_file

        target = Path(path)
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in values.items() if name not in tensors}
        metadata = {"format": FORMAT, "kind": self.kind, "fields": json.dumps(plain)}
        with files.replaced(target) as new:
            save_file(tensors, new, metadata=metadata)

    @staticmethod
    def load(path: str | Path) -> Prediction:
        """Read what `save` wrote.

        Raises:
            PosteriorError: the file does not exist or is no saved prediction.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise PosteriorError(f"Cannot read a prediction from {path}: {error}") from error
        if metadata.get("format") != FORMAT or metadata.get("kind") not in KINDS:
            raise PosteriorError(f"{path} holds no prediction: its format is {metadata.get('format')!r}.")
        plain: dict[str, Any] = json.loads(metadata["fields"])
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        return KINDS[metadata["kind"]](**plain | tensors)

    def _by_rows(self, made: Callable[..., Tensor], *more: Tensor, dim: int = 0) -> Tensor:
        """What a function makes of the outputs of some rows, and more of these: all in double precision may not fit."""
        step = max(1, CHUNK // max(1, len(self.outputs) * self.outputs.shape[-1]))
        parts = zip(self.outputs.split(step, 1), *(each.split(step) for each in more), strict=True)
        return torch.cat([made(part.double(), *rest) for part, *rest in parts], dim)

    def _known(self) -> Tensor:
        if self.labels is None:
            raise DataError("The rows that were predicted have no labels to compare with.")
        return self.labels


@dataclass(frozen=True, eq=False, repr=False)
class ClassPrediction(Prediction):
    """A prediction of classes, whose outputs are logits: their softmax is the probability of each class.

    Attributes:
        label_names: names of the classes, where they have some.
        aleatoric: expected entropy (examples,) in nats, where a formula gives it in place of draws.
        truth: true probabilities (examples, classes), where they are known; see `bayeslora.predict.truth`.
        averaged: draws whose average each of the outputs is made of: of one that has a temperature all of them.
    """

    kind: ClassVar[str] = "classes"

    label_names: tuple[str, ...] = ()
    aleatoric: Tensor | None = None
    truth: Tensor | None = None
    averaged: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_names and len(self.label_names) != self.outputs.shape[-1]:
            raise DataError(f"Expected names of {self.outputs.shape[-1]} classes, found {len(self.label_names)}.")
        if self.truth is not None and self.truth.shape != self.outputs.shape[1:]:
            raise DataError(
                f"Expected true probabilities of the shape {tuple(self.outputs.shape[1:])}, found "
                f"{tuple(self.truth.shape)}."
            )

    @property
    def draws(self) -> int:
        """Number of weight draws, of all averages together where the outputs are such."""
        return len(self.outputs) * self.averaged

    @property
    def logits(self) -> Tensor:
        """The outputs (draws, examples, classes); choices that a row lacks have minus infinity."""
        return self.outputs

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each class: its number, where it has none."""
        return self.label_names or tuple(str(number) for number in range(self.outputs.shape[-1]))

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Categorical."""
        return dist.Categorical(logits=outputs, validate_args=False)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Log of the class probabilities averaged over draws (examples, classes)."""
        return self._by_rows(lambda logits: logits.log_softmax(-1).logsumexp(0) - math.log(len(self.outputs)))

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
        if self.aleatoric is not None:
            return self.aleatoric
        return self._by_rows(lambda logits: _entropy(logits.log_softmax(-1)).mean(0))

    @property
    def mutual_information(self) -> Tensor:
        """Information that a label would give about the weights (examples,), in nats (Houlsby et al. 2011).

        The entropy less the expected entropy; never negative, up to rounding, which is cut off. Of S independent draws
        it is on average about a part of 1 / S too small, of pairs less: compare methods at the same number of draws.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def predictions(self) -> Tensor:
        """The most probable class (examples,)."""
        return self.log_probabilities.argmax(-1)

    @property
    def by_draw(self) -> dict[str, tuple[Tensor, dict[str, tuple[str, ...]]]]:
        """``probabilities`` (draws, examples, classes)."""
        return {"probabilities": (self.outputs.softmax(-1), {"class": self.names})}

    def statistics(self) -> dict[str, Bounded]:
        """See `bayeslora.predict.metrics.class_statistics`."""
        return metrics.class_statistics(self.log_probabilities, self._known(), self.truth)

    def to_pandas(self) -> pd.DataFrame:
        """Columns ``class``, ``p(NAME)`` of every class, ``entropy`` and ``mutual_information`` in nats."""
        import pandas as pd

        names = self.names
        columns: dict[str, Any] = {"class": [names[number] for number in self.predictions.tolist()]}
        columns |= {f"p({name})": column.numpy() for name, column in zip(names, self.probabilities.T, strict=True)}
        columns |= {"entropy": self.entropy.numpy(), "mutual_information": self.mutual_information.numpy()}
        return pd.DataFrame(columns)


#: Predictions by what they are of.
KINDS: Registry[type[Prediction]] = Registry(
    "prediction",
    {
        "classes": ClassPrediction,
        "values": "bayeslora.predict.values:ValuePrediction",
        "sequences": "bayeslora.predict.sequences:SequencePrediction",
    },
)


def _entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy over the last dimension in nats; an impossible class adds nothing."""
    return torch.special.entr(log_probabilities.exp()).sum(-1)
