"""Inference backends over one program, installed as ``bayeslora.inference``.

`fit` looks a backend up by name, builds its settings and runs it; `load` brings a saved posterior back. What is heavy
is imported when it is asked for, so that a wrong name is told at once.
"""

from __future__ import annotations

if __name__ != "bayeslora.inference":
    raise ImportError(f"import bayeslora.inference, not {__name__}: a second copy would break the registry")

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bayeslora.registry import Registry

if TYPE_CHECKING:
    from bayeslora.inference.base import Backend, Run
    from bayeslora.inference.baselines.adalora import AdaLoRA
    from bayeslora.inference.baselines.checkpoints import CheckpointEnsemble
    from bayeslora.inference.baselines.dropout import MCDropout
    from bayeslora.inference.baselines.ensemble import Ensemble
    from bayeslora.inference.baselines.lora_plus import LoRAPlus
    from bayeslora.inference.baselines.temperature import Temperature
    from bayeslora.inference.fitting import fit
    from bayeslora.inference.laplace.laplace import Laplace
    from bayeslora.inference.loading import load
    from bayeslora.inference.mcmc.nuts import NUTS
    from bayeslora.inference.mcmc.sghmc import SGHMC
    from bayeslora.inference.mcmc.sgld import SGLD
    from bayeslora.inference.posthoc.swag import SWAG
    from bayeslora.inference.posthoc.tfb import TFB
    from bayeslora.inference.presets import PRESETS, Preset, preset
    from bayeslora.inference.variational.clora import CLoRA
    from bayeslora.inference.variational.ivon import IVON
    from bayeslora.inference.variational.point import MAP, MLE
    from bayeslora.inference.variational.svi import SVI
    from bayeslora.posterior import Posterior

__all__ = [
    "BACKENDS",
    "IVON",
    "MAP",
    "MLE",
    "NUTS",
    "PRESETS",
    "SGHMC",
    "SGLD",
    "SVI",
    "SWAG",
    "TFB",
    "AdaLoRA",
    "Backend",
    "CLoRA",
    "CheckpointEnsemble",
    "Ensemble",
    "Laplace",
    "LoRAPlus",
    "MCDropout",
    "Preset",
    "Run",
    "Temperature",
    "fit",
    "load",
    "preset",
]

#: Where the class of each backend is, by its name.
_BACKENDS = {
    "adalora": "bayeslora.inference.baselines.adalora:AdaLoRA",
    "c-lora": "bayeslora.inference.variational.clora:CLoRA",
    "checkpoint-ensemble": "bayeslora.inference.baselines.checkpoints:CheckpointEnsemble",
    "ensemble": "bayeslora.inference.baselines.ensemble:Ensemble",
    "ivon": "bayeslora.inference.variational.ivon:IVON",
    "laplace": "bayeslora.inference.laplace.laplace:Laplace",
    "lora+": "bayeslora.inference.baselines.lora_plus:LoRAPlus",
    "map": "bayeslora.inference.variational.point:MAP",
    "mc-dropout": "bayeslora.inference.baselines.dropout:MCDropout",
    "mle": "bayeslora.inference.variational.point:MLE",
    "nuts": "bayeslora.inference.mcmc.nuts:NUTS",
    "sghmc": "bayeslora.inference.mcmc.sghmc:SGHMC",
    "sgld": "bayeslora.inference.mcmc.sgld:SGLD",
    "svi": "bayeslora.inference.variational.svi:SVI",
    "swag": "bayeslora.inference.posthoc.swag:SWAG",
    "temperature": "bayeslora.inference.baselines.temperature:Temperature",
    "tfb": "bayeslora.inference.posthoc.tfb:TFB",
}  # fmt: skip
#: Every backend by its name.
BACKENDS: Registry[type[Backend]] = Registry("backend", _BACKENDS)

#: Where the class of each kind of posterior is.
POSTERIORS: Registry[type[Posterior]] = Registry("kind of posterior", {
    "c-lora": "bayeslora.inference.variational.clora:CLoRAPosterior",
    "checkpoints": "bayeslora.inference.baselines.checkpoints:CheckpointPosterior",
    "column-dropout": "bayeslora.inference.baselines.dropout:ColumnDropoutPosterior",
    "empirical": "bayeslora.inference.mcmc.posterior:EmpiricalPosterior",
    "variational": "bayeslora.inference.variational.posterior:VariationalPosterior",
    "laplace": "bayeslora.inference.laplace.posterior:LaplacePosterior",
    "swag": "bayeslora.inference.posthoc.swag:SWAGPosterior",
    "tempered": "bayeslora.inference.baselines.temperature:TemperedPosterior",
    "tfb": "bayeslora.inference.posthoc.tfb:TFBPosterior",
    "token-dropout": "bayeslora.inference.baselines.dropout:TokenDropoutPosterior",
    "mixture": "bayeslora.inference.mixture:MixturePosterior",
})  # fmt: skip

#: Names of backends by their classes, which are attributes of this module.
CLASSES = {home.partition(":")[2]: name for name, home in _BACKENDS.items()}
HOMES = {"Backend": "base", "Run": "base", "fit": "fitting", "load": "loading"} | dict.fromkeys(
    ("PRESETS", "Preset", "preset"), "presets"
)


def __getattr__(name: str) -> Any:
    if name in CLASSES:
        return BACKENDS[CLASSES[name]]
    if name in HOMES:
        return getattr(import_module(f"bayeslora.inference.{HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
