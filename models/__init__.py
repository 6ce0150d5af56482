"""Pyro models of LoRA weights and their guides, installed as ``bayeslora.models``."""

from __future__ import annotations

from typing import Any

if __name__ != "bayeslora.models":
    raise ImportError(f"import bayeslora.models, not {__name__}: a second copy would break the registry")

from bayeslora.models.base import WeightModel
from bayeslora.models.distributions import ColumnNormal, WishartCholesky
from bayeslora.models.gaussian import Gaussian
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.models.monteclora import MonteCLoRA
from bayeslora.registry import Registry
from bayeslora.settings import build as build_settings

__all__ = [
    "MODELS",
    "ColumnNormal",
    "Gaussian",
    "Guide",
    "MonteCLoRA",
    "WeightModel",
    "WishartCholesky",
    "build",
    "make_guide",
]

#: Every model by its name.
MODELS: Registry[type[WeightModel]] = Registry("model", {model.name: model for model in (MonteCLoRA, Gaussian)})


def build(name: str, **settings: Any) -> WeightModel:
    """Make a model by its name; strings, as the command line gives them, are read by the type of their setting.

    Raises:
        SettingError: the model or a setting is unknown, or a setting has a value that it cannot take.
    """
    return build_settings(MODELS[name], settings)
