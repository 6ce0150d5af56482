"""All diagnostics of one posterior in one go: verdicts in words, pictures, and the data of arviz behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from bayeslora import files
from bayeslora.diagnostics import plots, versions
from bayeslora.diagnostics.calibration import auroc, risk_coverage
from bayeslora.diagnostics.convergence import elbo_trend, prediction_ess, prediction_rhat, shuffled
from bayeslora.diagnostics.guide import good_k, khat, khat_by_block, khat_error
from bayeslora.diagnostics.inference_data import MARKOV, to_inference_data
from bayeslora.diagnostics.loo import loo, loo_parts
from bayeslora.errors import PosteriorError
from bayeslora.predict.metrics import number_to_json
from bayeslora.predict.plots import reliability_diagram, save_figure
from bayeslora.predict.prediction import ClassPrediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayeslora.posterior import Posterior
    from bayeslora.tasks import Split

__all__ = ["Diagnosis", "diagnose"]

#: Draws of the prior: its predictions are looked at for their shape alone.
PRIOR_DRAWS = 20


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        verdicts: sentences, by the question that they answer.
        figures: numbers, by name.
        pictures: by the name of their file, without its ending.
        data: of `to_inference_data`.
    """

    verdicts: dict[str, list[str]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)
    data: Any = None

    def say(self, question: str, sentence: str, **figures: Any) -> None:
        """Add a verdict and the numbers that it rests on."""
        self.verdicts.setdefault(question, []).append(sentence)
        self.figures |= figures

    def markdown(self, title: str) -> str:
        """The verdicts as a Markdown text with the pictures."""
        lines = [f"# {title}", ""]
        for question, sentences in self.verdicts.items():
            lines += [f"## {question}", "", *(f"- {sentence}" for sentence in sentences), ""]
        lines += ["## Pictures", "", *(f"![{name}]({name}.png)" for name in self.pictures), ""]
        return "\n".join(lines)

    def save(self, folder: str | Path, title: str) -> None:
        """Write ``posterior.nc``, ``diagnosis.md``, ``diagnosis.json`` and the pictures as PNG."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        versions.write(self.data, target / "posterior.nc")
        for name, picture in self.pictures.items():
            save_figure(picture, target / f"{name}.png")
        files.write_json(target / "diagnosis.json", _plain(self.figures))
        files.write_text(target / "diagnosis.md", self.markdown(title))


def diagnose(
    posterior: Posterior,
    rows: Split,
    train: Split | None = None,
    other: Split | None = None,
    *,
    draws: int = 100,
    block_draws: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Diagnosis:
    """Ask a posterior how near it is to the true one, how good the model is, and what its probabilities are worth.

    Args:
        posterior: of classes.
        rows: to report on.
        train: the rows that it was fitted to, without which k-hat and leave-one-out are left out.
        other: rows of another kind, which uncertainty should notice.
        draws: of each chain, or as many as it has; each takes a pass over the training rows.
        block_draws: draws for k-hat of each layer of the network, 0 for none; each takes a pass over the training rows.
        seed: of the draws.
        batch_size: rows a pass.
        progress: show bars.

    Raises:
        PosteriorError: the labels are real numbers.
    """
    settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    observation = posterior.program.observation
    if not isinstance(observation.predicted(torch.zeros(1, 1, observation.outputs)), ClassPrediction):
        raise PosteriorError(
            f"A diagnosis is of class probabilities: for what '{observation.name}' predicts there is to_inference_data."
        )
    draws = min([draws, *(chain.most_draws for chain in posterior.chains if chain.most_draws is not None)])
    found = Diagnosis()
    found.data = to_inference_data(posterior, rows if train is None else train, draws, PRIOR_DRAWS, **settings)
    _guide(found, posterior, train, block_draws, settings)
    _model(found, posterior)
    _calibration(found, posterior, rows, other, draws, settings)
    return found


def _guide(found: Diagnosis, posterior: Posterior, train: Split | None, draws: int, settings: dict[str, Any]) -> None:
    """Whether the fit came to rest, whether fits agree, and how far the guide is from the posterior."""
    question = "How near is it to the posterior?"
    _rest(found, question, posterior)
    _agreement(found, question, posterior)
    stats = found.data["sample_stats"]
    if "elbo" not in stats:
        reason = "these are not the rows that it was fitted to" if posterior.dense else "it has no density"
        reason = reason if "posterior" in found.data else "its predictions are not draws of the weights"
        found.say(question, f"k-hat is left out: {'the training rows are not there' if train is None else reason}.")
        return
    try:
        # Each fit by itself: what one has for its point estimates, another has not.
        shape = max(khat(*pair) for pair in zip(stats["log_p"].values, stats["log_q"].values, strict=True))
    except PosteriorError as error:
        found.say(question, f"k-hat is left out. {error}")
        return
    elbo = stats["elbo"].values
    spread = elbo.std(ddof=1) / elbo.size**0.5
    sentence = _of_khat(shape, elbo.shape[1], posterior, found.data.attrs["method"])
    found.say(question, sentence, khat=shape, elbo=float(elbo.mean()), elbo_error=float(spread))
    found.say(
        question,
        f"ELBO of the random sites {elbo.mean():.1f} nats, with a standard error of {spread:.1f} by {elbo.size} draws.",
    )
    blocks = _blocks(found, question, posterior, train, draws, settings)
    found.pictures["khat"] = plots.khat_bars(shape, blocks)


def _rest(found: Diagnosis, question: str, posterior: Posterior) -> None:
    """Whether the loss of each fit came to rest."""
    chains = {f"chain {place}": chain.record.history for place, chain in enumerate(posterior.chains)}
    if any("loss" in row for history in chains.values() for row in history):
        found.pictures["loss"] = plots.loss_trace(chains)
    for name, history in chains.items():
        whose = f"The loss of {name}" if len(chains) > 1 else "The loss"
        try:
            trend = elbo_trend(history)
        except PosteriorError as error:
            found.say(question, f"Whether the fit came to rest is not known. {error}")
            return
        falls = "still falls: more epochs may help" if trend.change > 0 else "rises: a lower learning rate may help"
        state = "rests at the end of this schedule" if trend.settled else falls
        change = f"{'down' if trend.change > 0 else 'up'} by {abs(trend.change):.4f}"
        found.say(question, f"{whose} {state}: {change} nats an example, with an error of {trend.error:.4f}.")


def _agreement(found: Diagnosis, question: str, posterior: Posterior) -> None:
    """Whether fits, or the halves of a Markov chain, predict the same."""
    try:
        values, chance = prediction_rhat(found.data).values, shuffled(found.data).values
    except PosteriorError as error:
        found.say(question, f"R-hat and effective sample size are left out. {error}")
        return
    high, share, expected = float(np.nanmax(values)), float(np.mean(values > 1.01)), float(np.mean(chance > 1.01))
    found.say(
        question,
        f"R-hat of predicted probabilities: at most {high:.2f}, above 1.01 in {share:.0%} of them; by chance, "
        f"with the draws of all fits shuffled, at most {np.nanmax(chance):.2f} and in {expected:.0%}.",
        rhat_largest=high, rhat_above=share, rhat_above_by_chance=expected,
    )  # fmt: skip
    if found.data.attrs["draws_are"] != MARKOV:
        return
    least, all_draws = float(np.nanmin(prediction_ess(found.data).values)), found.data["posterior"].sizes
    total = all_draws["chain"] * all_draws["draw"]
    found.say(question, f"Of {total} draws at least {least:.0f} are effective for every probability.", ess_least=least)
    if any(chain.record.history[0].get("divergences") for chain in posterior.chains):
        count = sum(int(chain.record.history[0]["divergences"]) for chain in posterior.chains)
        found.say(question, f"{count} transitions diverged: a higher target_accept may help.", divergences=count)


def _blocks(
    found: Diagnosis, question: str, posterior: Posterior, train: Split | None, draws: int, settings: dict[str, Any]
) -> dict[str, float]:
    """k-hat of each layer of the first fit, if it is asked for."""
    first = posterior.chains[0]
    if not draws or train is None:
        return {}
    if not first.independent_layers:
        found.say(question, "k-hat by layer is left out: under this posterior layers are not independent.")
        return {}
    try:
        blocks = khat_by_block(first, train, draws, **settings)
    except PosteriorError as error:
        found.say(question, f"k-hat by layer is left out. {error}")
        return {}
    whose = " in the network as it is" if found.data.attrs["method"] == "linear" else ""
    whose += " of the first fit" if len(posterior.chains) > 1 else ""
    listed = ", ".join(f"{name} {value:.2f}" for name, value in blocks.items())
    found.say(
        question, f"k-hat of one layer at a time{whose}, the others at their mean: {listed}.", khat_by_block=blocks
    )
    return blocks


def _of_khat(shape: float, draws: int, posterior: Posterior, method: str) -> str:
    """The verdict on a k-hat from so many draws."""
    fixed = posterior.record.point_sites
    size = sum(site.initial.numel() for site in posterior.program.sites if site.name not in set(fixed))
    given = " given its point estimates" if fixed else ""
    target = f"the posterior{' of the linear network' if method == 'linear' else ''}{given}"
    good, error = good_k(draws), khat_error(shape, draws)
    found = f"k-hat {shape:.2f}, with an error of {error:.2f}"
    if np.isinf(shape):
        found = "k-hat infinite, since p / q has no tail that a Pareto law could be fitted to"
    if shape + error < min(0.5, good):
        return f"{found}: draws of the guide stand for draws of {target}."
    if shape + error < good:
        return f"{found}: draws of the guide stand for {target} once they are weighted."
    if shape - error < good:  # an infinite k-hat has no such bound
        return (
            f"{found}: whether draws of the guide stand for {target} is not known; {draws} draws can be weighted up to "
            f"{good:.2f}, which is within the error. More draws tell."
        )
    return (
        f"{found}: as a joint law of {size:,} weights the guide is far from {target}, as it is nearly always at this "
        f"size; {draws} draws can be weighted up to {good:.2f}. Predictions may still be fine: see what the "
        "probabilities are worth."
    )


def _model(found: Diagnosis, posterior: Posterior) -> None:
    """Leave-one-out, what the prior says before it has seen labels, and whether replicated labels look like these."""
    question = "How good is the model?"
    try:
        estimate = loo(found.data)
        total, error, shapes, good = loo_parts(estimate)
        bad = int((~(shapes <= good)).sum())
        trust = "" if not bad else f" {bad} of {len(shapes)} rows have a Pareto k above {good:.2f}: do not trust it."
        sentence = f"elpd_loo {total:.1f} with a standard error of {error:.1f}, {total / len(shapes):.3f} a row.{trust}"
        found.say(question, sentence, elpd_loo=total, elpd_loo_error=error, pareto_k_bad=bad)
        if fixed := posterior.record.point_sites:
            names = ", ".join(fixed[:3]) + (", ..." if len(fixed) > 3 else "")
            found.say(
                question, f"Too good by as much as point estimates have overfitted, which leave no row out: {names}."
            )
        found.pictures["pareto_k"] = plots.pareto_k(shapes, good)
    except PosteriorError as problem:
        found.say(question, f"Leave-one-out is left out. {problem}")
    best = found.data["prior_predictive"]["probabilities"].max("class").values
    chance = 1 / posterior.program.observation.outputs
    corners = float((best > 0.99).mean())
    tuned = ", given its point estimates and under its own prior" if found.data.attrs["method"] == "linear" else ""
    found.say(
        question,
        f"Before it has seen a label{tuned}, the model gives its likeliest class {best.mean():.2f} on average "
        f"(chance is {chance:.2f}), and above 0.99 in {corners:.0%} of rows and draws.",
        prior_confidence=float(best.mean()), prior_corners=corners,
    )  # fmt: skip
    found.pictures["prior_predictive"] = plots.prior_predictive(found.data)
    if "observed_data" in found.data:
        found.pictures["label_shares"] = plots.label_shares(found.data)


def _calibration(
    found: Diagnosis, posterior: Posterior, rows: Split, other: Split | None, draws: int, settings: dict[str, Any]
) -> None:
    """What the probabilities of the posterior's own way to predict are worth."""
    question = "What are the probabilities worth?"
    prediction = cast("ClassPrediction", posterior.predict(rows, draws, None, **settings))
    measured = prediction.metrics()
    confidence = float(prediction.probabilities.max(-1).values.mean())
    gap = confidence - measured["accuracy"].value
    named = {name: measured[name] for name in ("accuracy", "nll", "ece_15")}
    listed = ", ".join(f"{name} {each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for name, each in named.items())
    sure = f"surer than right, by {gap:.3f}" if gap > 0 else f"less sure than right, by {-gap:.3f}"
    if measured["accuracy"].low <= confidence <= measured["accuracy"].high:
        sure = f"as sure as right, within the interval of the accuracy: the difference is {gap:.3f}"
    found.say(
        question,
        f"{len(rows):,} rows of {rows.name}: {listed}. On average {sure}.",
        **{name: each.value for name, each in named.items()}, confidence=confidence,
    )  # fmt: skip
    risk = risk_coverage(prediction)
    at = float(risk.risk[int(0.8 * len(risk.risk)) - 1])
    found.say(
        question,
        f"Of the surest 80 % {at:.1%} are wrong, of all {risk.risk[-1]:.1%}; area under the risk {risk.area:.3f}.",
        aurc=risk.area, risk_80=at,
    )  # fmt: skip
    title = f"{posterior.record.backend} on {rows.spec.name}"
    found.pictures["reliability"] = reliability_diagram(prediction, title=title)
    found.pictures["classes"] = plots.class_calibration(prediction)
    found.pictures["risk"] = plots.risk_curves({posterior.record.backend: prediction})
    found.pictures["uncertainty"] = plots.uncertainty_scatter(prediction)
    if other is not None:
        shifted = cast("ClassPrediction", posterior.predict(other, draws, None, **settings))
        _shift(found, prediction, shifted, (rows.name, other.name))


def _shift(found: Diagnosis, known: ClassPrediction, other: ClassPrediction, names: tuple[str, str]) -> None:
    entropy = auroc(known.entropy, other.entropy)
    information = auroc(known.mutual_information, other.mutual_information)
    found.say(
        "What are the probabilities worth?",
        f"Rows of {names[1]} are told from those of {names[0]} with an AUROC of {entropy:.3f} by entropy, and "
        f"{information:.3f} by mutual information (0.5 is chance).",
        auroc_entropy=entropy, auroc_information=information,
    )  # fmt: skip
    found.pictures["shift"] = plots.shift_histograms(known, other, names)


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as JSON has them."""
    return {
        name: _plain(value) if isinstance(value, Mapping) else number_to_json(value) for name, value in figures.items()
    }
