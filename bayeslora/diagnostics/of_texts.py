"""What a diagnosis says of completions: what the prior makes of them, how likely they are, how sure of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from bayeslora.diagnostics import plots
from bayeslora.diagnostics.diagnosis import MODEL, WORTH, Diagnosis, listed
from bayeslora.diagnostics.guesses import as_sure_as_right, say_risk
from bayeslora.diagnostics.tokens import METHODS, token_calibration
from bayeslora.positions import vocabulary
from bayeslora.predict.plots import reliability_diagram
from bayeslora.predict.selective import auroc

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior
    from bayeslora.predict.sequences import SequencePrediction
    from bayeslora.tasks import Split

__all__ = ["prior", "worth"]


def prior(found: Diagnosis, posterior: Posterior) -> None:
    """How likely the texts are before any was seen, under draws of the prior, and after."""
    tokens = found.data["observed_data"]["y"]
    before, after = (
        -float((found.data[group]["mean"] * tokens).sum("example").mean() / tokens.sum())
        for group in ("prior_predictive", "posterior_predictive")
    )
    known = vocabulary(posterior.program.weights.base)
    chance = "" if known is None else f" (all of {known:,} tokens alike: {math.log(known):.2f})"
    found.say(
        MODEL,
        f"Before it has seen a text, a draw of the model needs {before:.2f} nats a token{chance}; of the posterior, "
        f"{after:.2f}.",
        prior_nll_token=before, posterior_nll_token=after,
    )  # fmt: skip
    found.pictures["prior_predictive"] = plots.prior_texts(found.data)


def worth(
    found: Diagnosis, posterior: Posterior, rows: Split, other: Split | None, draws: int, settings: dict[str, Any]
) -> None:
    """How likely texts are, what averaging over draws is worth, and whether tokens are as likely as they come."""
    prediction = cast("SequencePrediction", posterior.predict(rows, draws, None, **settings))
    measured = prediction.metrics()
    found.say(
        WORTH,
        f"{len(rows):,} texts of {rows.name}: {listed(measured)}.",
        **{name: each.value for name, each in measured.items()},
    )
    if prediction.draws > 1:
        gain = float(prediction.disagreement.mean())
        found.say(
            WORTH,
            f"A draw alone has nll {measured['nll'].value + gain:.3f} on average: averaging probabilities over "
            f"{prediction.draws} draws is worth {gain:.3f} nats a text.",
            disagreement=gain,
        )
        found.pictures["uncertainty"] = plots.text_scatter(prediction)
    if prediction.method in METHODS:
        _tokens(found, posterior, rows, draws, settings)
    if other is not None:
        shifted = cast("SequencePrediction", posterior.predict(other, draws, None, **settings))
        _shift(found, prediction, shifted, (rows.name, other.name))


def _tokens(found: Diagnosis, posterior: Posterior, rows: Split, draws: int, settings: dict[str, Any]) -> None:
    """Whether the likeliest token comes as often as it is probable, given the true ones before it."""
    tokens = token_calibration(posterior, rows, draws, **settings)
    measured = tokens.measured()
    accuracy, error = measured["token_accuracy"], measured["token_ece_15"]
    found.say(
        WORTH,
        f"Of {len(tokens.correct):,} tokens {accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f}) are the "
        f"likeliest, ece_15 {error.value:.3f} ({error.low:.3f} to {error.high:.3f}). On average "
        f"{as_sure_as_right(measured['token_confidence'].value, accuracy)}.",
        **{name: measured[name].value for name in ("token_accuracy", "token_confidence", "token_ece_15")},
    )
    say_risk(found, posterior.record.backend, tokens)
    found.pictures["reliability"] = reliability_diagram(tokens, title=f"{posterior.record.backend} on {rows.spec.name}")


def _shift(found: Diagnosis, known: SequencePrediction, other: SequencePrediction, names: tuple[str, str]) -> None:
    each = {"nats a token": (known.nll_by_token, other.nll_by_token)}
    if known.draws > 1:
        each["nats of disagreement between draws"] = known.disagreement, other.disagreement
    told = {name: auroc(*values) for name, values in each.items()}
    by_each = ", and ".join(f"{value:.3f} by {name}" for name, value in told.items())
    found.say(
        WORTH,
        f"Texts of {names[1]} are told from those of {names[0]} with an AUROC of {by_each} (0.5 is chance).",
        **dict(zip(("auroc_nll", "auroc_disagreement"), told.values(), strict=False)),
    )
    found.pictures["shift"] = plots.shift_histograms(each, names)
