"""What is read of a network's output, and how labels follow from it: one file an observation.

An observation owns the kind of network, the encoding of rows and their batches, the outputs that are read, and the
distribution of the labels; nothing else asks which one it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bayeslora.errors import SettingError
from bayeslora.observations.base import Curved, Drawn, Observation, Sampled
from bayeslora.observations.batches import Batch, Collator, Padding, batches
from bayeslora.observations.choices import Choices
from bayeslora.observations.classes import Classes
from bayeslora.observations.completions import Completions
from bayeslora.observations.encoding import Encoder, digest, encode, is_tokenised
from bayeslora.observations.prompted import Prompted
from bayeslora.observations.text_choices import TextChoices
from bayeslora.observations.value import Value
from bayeslora.registry import Registry
from bayeslora.settings import build as build_settings

if TYPE_CHECKING:
    from bayeslora.tasks import TaskSpec

__all__ = [
    "OBSERVATIONS",
    "Batch",
    "Choices",
    "Classes",
    "Collator",
    "Completions",
    "Curved",
    "Drawn",
    "Encoder",
    "Observation",
    "Padding",
    "Prompted",
    "Sampled",
    "TextChoices",
    "Value",
    "batches",
    "build",
    "digest",
    "encode",
    "is_tokenised",
    "of_task",
]

OWN = {each.name: each for each in (Classes, Value, Choices, TextChoices, Prompted, Completions)}
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


def of_task(
    spec: TaskSpec, name: str | None = None, causal: bool = False, settings: Mapping[str, Any] | None = None
) -> Observation:
    """The observation of a task's labels.

    Args:
        spec: of the task.
        name: of the observation; by default the first that is for labels of this kind.
        causal: whether the base network is a causal language model, whose own observations come before others.
        settings: fields of the observation that are to differ from what the task says.

    Raises:
        SettingError: the name or a setting is unknown, or the observation is for labels of another kind.
    """
    named: type[Observation]
    if name is None:
        fitting = [each for each in OWN.values() if spec.kind in each.kinds]
        named = next((each for each in fitting if each.causal == causal), fitting[0])
    else:
        named = OBSERVATIONS[name]
    if spec.kind not in named.kinds:
        kinds = " or ".join(named.kinds)
        raise SettingError(f"The observation '{named.name}' is for {kinds}, and task '{spec.name}' is {spec.kind}.")
    found = named.of(spec)
    return build_settings(named, {**vars(found), **settings}) if settings else found
