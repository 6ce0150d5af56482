"""What a diagnosis says of best guesses, be they classes or tokens: whether they are as sure as right, and the risk."""

from __future__ import annotations

from bayeslora.diagnostics import plots
from bayeslora.diagnostics.calibration import risk_coverage
from bayeslora.diagnostics.diagnosis import WORTH, Diagnosis
from bayeslora.predict.prediction import Prediction
from bayeslora.predict.reliability import Guesses
from bayeslora.predict.resampling import Interval

__all__ = ["as_sure_as_right", "say_risk"]


def as_sure_as_right(confidence: float, accuracy: Interval) -> str:
    """Whether guesses are surer than right, by more than chance."""
    gap = confidence - accuracy.value
    if accuracy.low <= confidence <= accuracy.high:
        return f"as sure as right, within the interval of the accuracy: the difference is {gap:.3f}"
    return f"surer than right, by {gap:.3f}" if gap > 0 else f"less sure than right, by {-gap:.3f}"


def say_risk(found: Diagnosis, name: str, guesses: Prediction | Guesses) -> None:
    """How often the surest guesses are wrong, in words and as a picture, where the line has a name."""
    risk = risk_coverage(guesses)
    at = float(risk.risk[int(0.8 * len(risk.risk)) - 1])
    whose = "of tokens " if isinstance(guesses, Guesses) else ""
    found.say(
        WORTH,
        f"Of the surest 80 % {whose}{at:.1%} are wrong, of all {risk.risk[-1]:.1%}; area under the risk "
        f"{risk.area:.3f}.",
        aurc=risk.area, risk_80=at,
    )  # fmt: skip
    found.pictures["risk"] = plots.risk_curves({name: guesses})
