"""Classes: one label a row, read as logits of a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from typing_extensions import Self

from bayeslora.errors import SettingError, TaskError
from bayeslora.observations.base import Curved, Observation, refuse
from bayeslora.predict.prediction import ClassPrediction

if TYPE_CHECKING:
    from bayeslora.tasks import TaskSpec

__all__ = ["Classes"]


@dataclass(frozen=True)
class Classes(Observation, Curved):
    """Class labels 0 ... classes - 1 with probabilities softmax(logits).

    Attributes:
        classes: number of classes.

    Raises:
        SettingError: fewer than two.
    """

    name: ClassVar[str] = "classes"
    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    label: ClassVar[type[int] | type[float] | None] = int

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise SettingError(f"{type(self).__name__}({self.classes!r}): an observation of classes has at least two.")

    @classmethod
    def of(cls, spec: TaskSpec) -> Self:
        """As many classes as the task has names for.

        Raises:
            TaskError: it has none.
        """
        if not spec.labels:
            raise TaskError(
                f"Task '{spec.name}' has no classes: there is no split '{spec.train}' or others to report on, or none "
                "has labels. Say what to train on, train=SPLIT (in a shell --set task.train=SPLIT), or name the "
                "classes, labels=[...] (in a shell --set task.labels=...)."
            )
        return cls(len(spec.labels))

    @property
    def outputs(self) -> int:
        """Number of logits of an example."""
        return self.classes

    def head(self, spec: TaskSpec) -> dict[str, Any]:
        """The names of the classes."""
        names = dict(enumerate(spec.labels))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Categorical with these logits."""
        return dist.Categorical(logits=outputs, validate_args=False)

    def check(self, labels: Sequence[Any]) -> None:
        """Make sure that labels are class numbers.

        Raises:
            DataError: one is none (the message names the row).
        """
        for row, label in enumerate(labels):
            if not isinstance(label, int | float) or label not in range(self.classes):
                raise refuse(row, label, f"a class number from 0 to {self.classes - 1}")

    def predicted(
        self, outputs: Tensor, labels: Tensor | None = None, names: tuple[str, ...] = (), **made: Any
    ) -> ClassPrediction:
        """A prediction of classes."""
        return ClassPrediction(outputs, labels, label_names=names, **made)

    def constant(self, labels: Tensor) -> Tensor:
        """Logarithms of the classes' shares."""
        return (labels.bincount(minlength=self.outputs) / len(labels)).log()

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """One-hot label less probabilities."""
        return nn.functional.one_hot(labels, outputs.shape[-1]) - outputs.softmax(-1)

    def gain(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Minus the log-likelihood: a label could become certain."""
        return -self.log_prob(outputs, labels)

    def curvature_root(self, outputs: Tensor) -> Tensor:
        """Roots of diag(p) - p p^T: (classes - 1, *shape).

        They are the columns of its Cholesky factor, known in closed form (Tanabe and Sagae, *An exact Cholesky
        decomposition and the generalized inverse of the variance-covariance matrix of the multinomial distribution*,
        JRSS B 1992).
        """
        p = outputs.softmax(-1)
        # Mass of the classes from each one on; of those after it, less the rounding of a difference.
        rest = p.flip(-1).cumsum(-1).flip(-1)
        after = torch.cat([rest[..., 1:], torch.zeros_like(rest[..., :1])], dim=-1)
        diagonal = (p * after / rest.clamp(min=torch.finfo(p.dtype).tiny)).sqrt()
        columns = []
        for number in range(p.shape[-1] - 1):
            scale = diagonal[..., number] / after[..., number].clamp(min=torch.finfo(p.dtype).tiny)
            column = torch.zeros_like(p)
            column[..., number] = diagonal[..., number]
            column[..., number + 1 :] = -p[..., number + 1 :] * scale.unsqueeze(-1)
            columns.append(column)
        return torch.stack(columns)
