"""What a diagnosis says of real labels: what the prior makes of them, and whether they are where they are predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from bayeslora.diagnostics import plots
from bayeslora.diagnostics.diagnosis import MODEL, WORTH, Diagnosis, listed
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
    measured = prediction.metrics()
    inside = round(measured["coverage_90"].value * len(rows))
    found.say(
        WORTH,
        f"{len(rows):,} rows of {rows.name}: {listed(measured, '.3g')}.",
        **{name: each.value for name, each in measured.items()},
    )
    found.say(
        WORTH,
        f"{inside:,} of {len(rows):,} labels are in the middle 90 % of what is predicted of them: "
        f"{_width(inside, len(rows))}.",
    )
    noise = prediction.scale * prediction.stretch
    deviation, disagreement = float(prediction.variance.sqrt().mean()), float(prediction.disagreement.mean())
    found.say(
        WORTH,
        f"On average a label has a standard deviation of {deviation:.3g}: {noise:.3g} is noise, and draws differ by "
        f"{disagreement:.3g}.",
        deviation=deviation, disagreement=disagreement,
    )  # fmt: skip
    found.pictures["calibration"] = plots.transform_histogram(prediction)
    found.pictures["values"] = plots.values_scatter(prediction)
    if other is not None:
        shifted = cast("ValuePrediction", posterior.predict(other, draws, None, **settings))
        _shift(found, prediction, shifted, (rows.name, other.name))


def _width(inside: int, rows: int) -> str:
    """Whether more or fewer labels than nine of ten are inside, by more than chance."""
    from scipy.stats import binom

    low, high = (int(binom.ppf(level, rows, 0.9)) for level in (0.025, 0.975))
    verdict = "too narrow" if inside < low else "too wide" if inside > high else "as wide as these rows can tell"
    return f"{verdict}, since of true predictions {low:,} to {high:,} would be (95 %)"


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
