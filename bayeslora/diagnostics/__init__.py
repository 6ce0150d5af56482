"""How far a posterior can be trusted: how near a guide is, how good the model, what its probabilities are worth."""

from __future__ import annotations

from bayeslora.diagnostics.calibration import by_class, risk_coverage
from bayeslora.diagnostics.convergence import elbo_trend, prediction_ess, prediction_rhat, shuffled
from bayeslora.diagnostics.guide import khat, khat_by_block, layer_blocks
from bayeslora.diagnostics.inference_data import to_inference_data
from bayeslora.diagnostics.loo import loo
from bayeslora.diagnostics.report import Diagnosis, diagnose
from bayeslora.diagnostics.simulation import Ranks, sbc
from bayeslora.diagnostics.tokens import TokenCalibration, token_calibration
from bayeslora.diagnostics.versions import read, write
from bayeslora.predict.selective import auroc

__all__ = [
    "Diagnosis",
    "Ranks",
    "TokenCalibration",
    "auroc",
    "by_class",
    "diagnose",
    "elbo_trend",
    "khat",
    "khat_by_block",
    "layer_blocks",
    "loo",
    "prediction_ess",
    "prediction_rhat",
    "read",
    "risk_coverage",
    "sbc",
    "shuffled",
    "to_inference_data",
    "token_calibration",
    "write",
]
