"""Published settings by name: a backend and a model of the weights, each with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bayeslora.registry import Registry
from bayeslora.settings import Settings

if TYPE_CHECKING:
    from bayeslora.inference.base import Backend
    from bayeslora.models.base import WeightModel

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset(Settings):
    """What a paper runs.

    Attributes:
        name: of the preset.
        paper: that it is of.
        note: what the published run is beside that, and what is otherwise here.
        backend: inference algorithm.
        settings: of the backend.
        model: Pyro model of the weights.
        model_settings: of the model.
    """

    name: str
    paper: str
    note: str = ""
    backend: str = "svi"
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "gaussian"
    model_settings: dict[str, Any] = field(default_factory=dict)

    def build_backend(self, **settings: Any) -> Backend:
        """The backend, with the preset's settings where no others are given.

        Raises:
            SettingError: a setting is unknown, or has a value that it cannot take.
        """
        from bayeslora.inference import BACKENDS

        algorithm: Backend = BACKENDS.build(self.backend, over(self.settings, settings))
        return algorithm

    def build_model(self, **settings: Any) -> WeightModel:
        """The model, with the preset's settings where no others are given.

        Raises:
            SettingError: a setting is unknown, or has a value that it cannot take.
        """
        from bayeslora.models import build

        return build(self.model, **over(self.model_settings, settings))


#: Every preset by its name.
PRESETS: Registry[Preset] = Registry("preset", {})


def preset(name: str) -> Preset:
    """The preset of a name, whose parts go into a program and a fit.

    ``p = preset(name)``, then ``Program.from_pretrained(base, task, model=p.build_model())`` and ``fit(program,
    task.train, p.build_backend(epochs=3))``.

    Raises:
        SettingError: there is none.
    """
    return PRESETS[name]


def over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those that were given put over them; settings of one guide are none of another."""
    merged = {**settings, **given}
    if "guide_settings" in settings and merged.get("guide") == settings.get("guide"):
        merged["guide_settings"] = {**settings["guide_settings"], **given.get("guide_settings", {})}
    elif "guide_settings" in settings:
        merged["guide_settings"] = given.get("guide_settings", {})
    return merged
