"""What a diagnosis says of real labels: what the prior makes of them, and whether they are where they are predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from bayeslora.diagnostics import plots
from bayeslora.diagnostics.diagnosis import MODEL, WORTH, Diagnosis
from bayeslora.predict.resampling import Interval
from bayeslora.predict.selective import auroc

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior
    from bayeslora.predict.values import ValuePrediction
    from bayeslora.tasks import Split

__all__ = ["prior", "worth"]


def prior(found: Diagnosis, posterior: Posterior) -> None:
    """How much predicted means differ between rows before any label was seen, and after."""
    before, after = (
        float(found.data[group]["mean"].std("example").mean()) for group in ("prior_predictive", "posterior_predictive")
    )
    labels = ""
    if "observed_data" in found.data:
        labels = f"; labels differ by {float(found.data['observed_data']['y'].std()):.3g}"
    found.say(
        MODEL,
        f"Before it has seen a label, a draw of the model predicts means that differ by {before:.3g} between rows; of "
        f"the posterior, by {after:.3g}{labels} (standard deviations).",
        prior_deviation=before, posterior_deviation=after,
    )  # fmt: skip
    found.pictures["prior_predictive"] = plots.prior_values(found.data)


def worth(
    found: Diagnosis, posterior: Posterior, rows: Split, other: Split | None, draws: int, settings: dict[str, Any]
) -> None:
    """How near predictions come, and whether labels fall within their intervals as often as these say."""
    prediction = cast("ValuePrediction", posterior.predict(rows, draws, None, **settings))
    measured = dict(prediction.metrics())
    coverage = measured.pop("coverage_90")
    listed = ", ".join(
        f"{name} {each.value:.3g} ({each.low:.3g} to {each.high:.3g})" for name, each in measured.items()
    )
    found.say(
        WORTH,
        f"{len(rows):,} rows of {rows.name}: {listed}.",
        **{name: each.value for name, each in measured.items()},
    )
    found.say(
        WORTH,
        f"{coverage.value:.1%} of labels ({coverage.low:.1%} to {coverage.high:.1%}) are in the middle 90 % of what is "
        f"predicted of them: {_as_wide_as_needed(coverage)}.",
        coverage_90=coverage.value,
    )
    deviation, disagreement = float(prediction.variance.sqrt().mean()), float(prediction.disagreement.mean())
    found.say(
        WORTH,
        f"On average a label has a standard deviation of {deviation:.3g}: {prediction.scale * prediction.stretch:.3g} is noise, and draws "
        f"differ by {disagreement:.3g}.",
        deviation=deviation, disagreement=disagreement,
    )  # fmt: skip
    found.pictures["calibration"] = plots.transform_histogram(prediction)
    found.pictures["values"] = plots.values_scatter(prediction)
    if other is not None:
        shifted = cast("ValuePrediction", posterior.predict(other, draws, None, **settings))
        _shift(found, prediction, shifted, (rows.name, other.name))


def _as_wide_as_needed(coverage: Interval) -> str:
    """Whether more or fewer labels than said are in an interval, by more than chance."""
    if coverage.low <= 0.9 <= coverage.high:
        return "as wide as needed, within the interval of the share"
    return "too wide" if coverage.value > 0.9 else "too narrow"


def _shift(found: Diagnosis, known: ValuePrediction, other: ValuePrediction, names: tuple[str, str]) -> None:
    told = auroc(known.disagreement, other.disagreement)
    found.say(
        WORTH,
        f"Rows of {names[1]} are told from those of {names[0]} with an AUROC of {told:.3f} by how much draws differ "
        "(0.5 is chance).",
        auroc_disagreement=told,
    )
    found.pictures["shift"] = plots.shift_histograms(
        {"standard deviation over draws": (known.disagreement, other.disagreement)}, names
    )
