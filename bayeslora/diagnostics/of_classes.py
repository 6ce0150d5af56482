"""What a diagnosis says of predicted classes: what the prior makes of them, and what their probabilities are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from bayeslora.diagnostics import plots
from bayeslora.diagnostics.diagnosis import MODEL, WORTH, Diagnosis, listed
from bayeslora.diagnostics.guesses import as_sure_as_right, say_risk
from bayeslora.predict.plots import reliability_diagram
from bayeslora.predict.selective import auroc

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior
    from bayeslora.predict.prediction import ClassPrediction
    from bayeslora.tasks import Split

__all__ = ["prior", "worth"]


def prior(found: Diagnosis, posterior: Posterior) -> None:
    """What the prior says before it has seen labels, and whether replicated labels look like these."""
    best = found.data["prior_predictive"]["probabilities"].max("class").values
    chance = 1 / posterior.program.observation.outputs
    corners = float((best > 0.99).mean())
    tuned = ", given its point estimates and under its own prior" if found.data.attrs["method"] == "linear" else ""
    found.say(
        MODEL,
        f"Before it has seen a label{tuned}, the model gives its likeliest class {best.mean():.2f} on average "
        f"(chance is {chance:.2f}), and above 0.99 in {corners:.0%} of rows and draws.",
        prior_confidence=float(best.mean()), prior_corners=corners,
    )  # fmt: skip
    found.pictures["prior_predictive"] = plots.prior_predictive(found.data)
    if "observed_data" in found.data:
        found.pictures["label_shares"] = plots.label_shares(found.data)


def worth(
    found: Diagnosis, posterior: Posterior, rows: Split, other: Split | None, draws: int, settings: dict[str, Any]
) -> None:
    """What the probabilities of the posterior's own way to predict are worth."""
    prediction = cast("ClassPrediction", posterior.predict(rows, draws, None, **settings))
    measured = prediction.metrics()
    confidence = float(prediction.probabilities.max(-1).values.mean())
    named = {name: measured[name] for name in ("accuracy", "nll", "ece_15")}
    chance = measured["ece_15_by_chance"].value
    sure = as_sure_as_right(confidence, measured["accuracy"])
    found.say(
        WORTH,
        f"{len(rows):,} rows of {rows.name}: {listed(named)}, which would be {chance:.3f} by chance alone if all "
        f"probabilities were true. On average {sure}.",
        **{name: each.value for name, each in named.items()}, ece_15_by_chance=chance, confidence=confidence,
    )  # fmt: skip
    say_risk(found, posterior.record.backend, prediction)
    found.pictures["reliability"] = reliability_diagram(
        prediction, title=f"{posterior.record.backend} on {rows.spec.name}"
    )
    found.pictures["classes"] = plots.class_calibration(prediction)
    found.pictures["uncertainty"] = plots.uncertainty_scatter(prediction)
    if other is not None:
        shifted = cast("ClassPrediction", posterior.predict(other, draws, None, **settings))
        _shift(found, prediction, shifted, (rows.name, other.name))


def _shift(found: Diagnosis, known: ClassPrediction, other: ClassPrediction, names: tuple[str, str]) -> None:
    entropy = auroc(known.entropy, other.entropy)
    information = auroc(known.mutual_information, other.mutual_information)
    found.say(
        WORTH,
        f"Rows of {names[1]} are told from those of {names[0]} with an AUROC of {entropy:.3f} by entropy, and "
        f"{information:.3f} by mutual information (0.5 is chance).",
        auroc_entropy=entropy, auroc_information=information,
    )  # fmt: skip
    found.pictures["shift"] = plots.shift_histograms(
        {
            "entropy, nats": (known.entropy, other.entropy),
            "mutual information, nats": (known.mutual_information, other.mutual_information),
        },
        names,
    )
