"""Classes whose labels are wrong now and then: p(y) = (1 - noise) softmax + noise / classes."""

from dataclasses import dataclass

import pyro.distributions as dist

import bayeslora as bl
from bayeslora.observations import Classes, Observation


@bl.register
@dataclass(frozen=True)
class NoisyClasses(Observation):
    name, kinds = "noisy-classes", ("classification",)

    classes: int
    noise: float = 0.1

    head, check = Classes.head, Classes.check

    @classmethod
    def of(cls, spec):
        return cls(len(spec.labels))

    @property
    def outputs(self):
        return self.classes

    def distribution(self, outputs):
        return dist.Categorical(probs=(1 - self.noise) * outputs.softmax(-1) + self.noise / self.classes)

    def predicted(self, outputs, labels=None, names=(), **made):
        return bl.ClassPrediction(self.distribution(outputs).logits, labels, label_names=names, **made)
