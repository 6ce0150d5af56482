"""What is read of a network's output, and how labels follow from it: one file an observation.

An observation owns the kind of network, the encoding of rows and their batches, the outputs that are read, and the
distribution of the labels; nothing else asks which one it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bayeslora.errors import SettingError, unknown
from bayeslora.observations.base import Curved, Observation
from bayeslora.observations.batches import Batch, Collator, Padding, batches
from bayeslora.observations.choices import Choices
from bayeslora.observations.classes import Classes
from bayeslora.observations.encoding import Encoder, digest, encode, is_tokenised
from bayeslora.observations.value import Value

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

#: Every observation by its name.
OBSERVATIONS: dict[str, type[Observation]] = {each.name: each for each in (Classes, Value, Choices)}


def build(described: dict[str, Any]) -> Observation:
    """The observation that ``to_dict`` described.

    Raises:
        SettingError: its name is unknown.
    """
    fields = dict(described)
    name = str(fields.pop("name", ""))
    if name not in OBSERVATIONS:
        raise SettingError(unknown("observation", name, OBSERVATIONS))
    return OBSERVATIONS[name](**fields)


def of_task(spec: TaskSpec) -> Observation:
    """The observation that a task's labels call for, by an encoder."""
    return next(each for each in OBSERVATIONS.values() if each.kind == spec.kind).of(spec)
