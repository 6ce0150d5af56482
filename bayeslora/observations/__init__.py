"""What is read of a network's output, and how labels follow from it: one file an observation.

An observation owns the kind of network, the encoding of rows and their batches, the outputs that are read, and the
distribution of the labels; nothing else asks which one it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bayeslora.errors import SettingError
from bayeslora.observations.base import Curved, Observation
from bayeslora.observations.batches import Batch, Collator, Padding, batches
from bayeslora.observations.choices import Choices
from bayeslora.observations.classes import Classes
from bayeslora.observations.encoding import Encoder, digest, encode, is_tokenised
from bayeslora.observations.value import Value
from bayeslora.registry import Registry

if TYPE_CHECKING:
    from bayeslora.tasks import TaskSpec

__all__ = [
    "OBSERVATIONS",
    "Batch",
    "Choices",
    "Classes",
    "Collator",
    "Curved",
    "Encoder",
    "Observation",
    "Padding",
    "Value",
    "batches",
    "build",
    "digest",
    "encode",
    "is_tokenised",
    "of_task",
]

OWN = {each.name: each for each in (Classes, Value, Choices)}
#: Every observation by its name.
OBSERVATIONS: Registry[type[Observation]] = Registry("observation", OWN)


def build(described: dict[str, Any]) -> Observation:
    """The observation that ``to_dict`` described.

    Raises:
        SettingError: its name is unknown.
    """
    fields = dict(described)
    name = str(fields.pop("name", ""))
    return OBSERVATIONS[name](**fields)


def of_task(spec: TaskSpec, name: str | None = None) -> Observation:
    """The observation of a task's labels by an encoder: the one of a name, or that which their kind calls for.

    Raises:
        SettingError: the name is unknown, or its observation is for labels of another kind.
    """
    if name is None:
        return next(each for each in OWN.values() if each.kind == spec.kind).of(spec)
    named = OBSERVATIONS[name]
    if named.kind != spec.kind:
        raise SettingError(f"The observation '{name}' is for {named.kind}, and task '{spec.name}' is {spec.kind}.")
    return named.of(spec)
