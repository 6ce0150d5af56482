"""Pyro models of LoRA weights and their guides, installed as ``bayeslora.models``."""

from __future__ import annotations

if __name__ != "bayeslora.models":
    raise ImportError(f"import bayeslora.models, not {__name__}: a second copy would break the registry")

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bayeslora.registry import Registry

if TYPE_CHECKING:
    from bayeslora.models.base import WeightModel
    from bayeslora.models.distributions import ColumnNormal
    from bayeslora.models.gaussian import Gaussian
    from bayeslora.models.guides.auto import make_guide
    from bayeslora.models.guides.base import Guide
    from bayeslora.models.monteclora import MonteCLoRA
    from bayeslora.models.scalabl import ScalaBL
    from bayeslora.models.wishart import WishartCholesky

__all__ = [
    "MODELS",
    "ColumnNormal",
    "Gaussian",
    "Guide",
    "MonteCLoRA",
    "ScalaBL",
    "WeightModel",
    "WishartCholesky",
    "build",
    "make_guide",
]

#: Every model by its name.
MODELS: Registry[type[WeightModel]] = Registry("model", {
    "gaussian": "bayeslora.models.gaussian:Gaussian",
    "monteclora": "bayeslora.models.monteclora:MonteCLoRA",
    "scalabl": "bayeslora.models.scalabl:ScalaBL",
})  # fmt: skip

#: Where public names are; each is imported when it is first used.
HOMES = {
    "ColumnNormal": "distributions",
    "Gaussian": "gaussian",
    "Guide": "guides.base",
    "MonteCLoRA": "monteclora",
    "ScalaBL": "scalabl",
    "WeightModel": "base",
    "WishartCholesky": "wishart",
    "make_guide": "guides.auto",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"bayeslora.models.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def build(name: str, **settings: Any) -> WeightModel:
    """Make a model by its name; strings, as the command line gives them, are read by the type of their setting.

    Raises:
        SettingError: the model or a setting is unknown, or a setting has a value that it cannot take.
    """
    model: WeightModel = MODELS.build(name, settings)
    return model
