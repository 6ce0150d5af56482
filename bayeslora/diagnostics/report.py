"""All diagnostics of one posterior in one go: verdicts in words, pictures, and the data of arviz behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayeslora.diagnostics import of_classes, of_texts, of_values, plots
from bayeslora.diagnostics.convergence import elbo_trend, prediction_ess, prediction_rhat, shuffled
from bayeslora.diagnostics.diagnosis import MODEL, NEAR, Diagnosis
from bayeslora.diagnostics.guide import LEAST_DRAWS, good_k, khat, khat_by_block, khat_error
from bayeslora.diagnostics.inference_data import MARKOV, to_inference_data
from bayeslora.diagnostics.loo import loo, loo_parts
from bayeslora.errors import DataError, PosteriorError
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.sequences import SequencePrediction
from bayeslora.predict.values import ValuePrediction
from bayeslora.progress import note

if TYPE_CHECKING:
    from bayeslora.posterior import Posterior
    from bayeslora.tasks import Split

__all__ = ["Diagnosis", "diagnose"]

#: Draws of the prior: its predictions are looked at for their shape alone.
PRIOR_DRAWS = 20


class Kind(NamedTuple):
    """What is said of one kind of prediction.

    Attributes:
        values: what draws are compared by, and one of them.
        prior: says what the prior makes of the rows.
        worth: says what probabilities are worth.
    """

    values: tuple[str, str]
    prior: Callable[[Diagnosis, Posterior], None]
    worth: Callable[[Diagnosis, Posterior, Split, Split | None, int, dict[str, Any]], None]


KINDS: dict[type[Prediction], Kind] = {
    ClassPrediction: Kind(("predicted probabilities", "probability"), of_classes.prior, of_classes.worth),
    SequencePrediction: Kind(("log-likelihoods of texts", "text"), of_texts.prior, of_texts.worth),
    ValuePrediction: Kind(("predicted means", "mean"), of_values.prior, of_values.worth),
}


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
        posterior: of classes, real labels or completions.
        rows: to report on.
        train: the rows that it was fitted to, without which k-hat and leave-one-out are left out.
        other: rows of another kind, which uncertainty should notice.
        draws: of each chain, or as many as it has; each takes a pass over the training rows.
        block_draws: draws for k-hat of each layer of the network, 0 for none; each takes a pass over the training rows.
        seed: of the draws.
        batch_size: rows a pass.
        progress: show bars, and say first what so few draws leave out.

    Raises:
        PosteriorError: predictions are of another kind.
        DataError: they are not known.
    """
    settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    observation = posterior.program.observation
    kind = KINDS.get(observation.prediction)
    if kind is None:
        raise PosteriorError(
            "A diagnosis is of class probabilities, real labels or completions: for what "
            f"'{observation.name}' predicts there is to_inference_data."
        )
    if not rows.labelled:  # not after all the passes
        raise DataError(f"A diagnosis compares with labels, and the rows of '{rows.name}' have none.")
    if posterior.random and draws < LEAST_DRAWS:
        note(
            f"With {draws} draws of each chain, k-hat, leave-one-out and R-hat are left out where they need more, up "
            f"to {LEAST_DRAWS}: give draws={LEAST_DRAWS} or more (in a shell --draws) to have them.",
            progress,
        )
    draws = min([draws, *(chain.most_draws for chain in posterior.chains if chain.most_draws is not None)])
    found = Diagnosis()
    found.data = to_inference_data(posterior, rows if train is None else train, draws, PRIOR_DRAWS, **settings)
    _rest(found, posterior)
    _agreement(found, posterior, *kind.values)
    _guide(found, posterior, train, block_draws, settings)
    _leave_one_out(found, posterior)
    kind.prior(found, posterior)
    kind.worth(found, posterior, rows, other, draws, settings)
    return found


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _guide(found: Diagnosis, posterior: Posterior, train: Split | None, draws: int, settings: dict[str, Any]) -> None:
    """How far the guide is from the posterior."""
    stats = found.data["sample_stats"]
    if "elbo" not in stats:
        dense = posterior.chains[0].dense
        reason = "these are not the rows that it was fitted to" if dense else "it has no density"
        reason = reason if "posterior" in found.data else "its predictions are not draws of the weights"
        found.say(NEAR, f"k-hat is left out: {'the training rows are not there' if train is None else reason}.")
        return
    try:
        # Each fit by itself: what one has for its point estimates, another has not.
        shape = max(khat(*pair) for pair in zip(stats["log_p"].values, stats["log_q"].values, strict=True))
    except PosteriorError as error:
        found.say(NEAR, f"k-hat is left out. {error}")
        return
    elbo = stats["elbo"].values
    spread = elbo.std(ddof=1) / elbo.size**0.5
    sentence = _of_khat(shape, elbo.shape[1], posterior, found.data.attrs["method"])
    found.say(NEAR, sentence, khat=shape, elbo=float(elbo.mean()), elbo_error=float(spread))
    if posterior.auxiliary:
        found.say(
            NEAR,
            "The guide's density is known with auxiliary values alone, such as those that a flow starts from: k-hat, "
            "ELBO and leave-one-out are by p / q of both jointly, which varies more than that of the weights. These "
            "alone have a k-hat no larger, but for the error, and an ELBO no smaller.",
        )
    free = " Their prior means were learned, which costs it nothing: it compares with such fits alone."
    found.say(
        NEAR,
        f"ELBO of the random sites {elbo.mean():.1f} nats, with a standard error of {spread:.1f} by {elbo.size} draws."
        f"{free if posterior.learned_means else ''}",
    )
    blocks = _blocks(found, posterior, train, draws, settings)
    found.pictures["khat"] = plots.khat_bars(shape, blocks)


def _rest(found: Diagnosis, posterior: Posterior) -> None:
    """Whether the loss of each fit came to rest."""
    chains = {f"chain {place}": chain.record.history for place, chain in enumerate(posterior.chains)}
    if any("loss" in row for history in chains.values() for row in history):
        found.pictures["loss"] = plots.loss_trace(chains)
    for name, history in chains.items():
        whose = f"The loss of {name}" if len(chains) > 1 else "The loss"
        try:
            trend = elbo_trend(history)
        except PosteriorError as error:
            found.say(NEAR, f"Whether the fit came to rest is not known. {error}")
            return
        falls = "still falls: more epochs may help" if trend.change > 0 else "rises: a lower learning rate may help"
        state = "rests at the end of this schedule" if trend.settled else falls
        change = f"{'down' if trend.change > 0 else 'up'} by {abs(trend.change):.4f}"
        found.say(NEAR, f"{whose} {state}: {change} nats an example, with an error of {trend.error:.4f}.")


def _rhat(value: float) -> str:
    return f"{value:.2f}" if value < 100 else "100 or more"


def _agreement(found: Diagnosis, posterior: Posterior, values: str, each: str) -> None:
    """Whether fits, or the halves of a Markov chain, predict the same."""
    try:
        rhats, chance = prediction_rhat(found.data).values, shuffled(found.data).values
    except PosteriorError as error:
        found.say(NEAR, f"R-hat and effective sample size are left out. {error}")
        return
    # Choices that a row lacks have the same probability, zero, in every draw, and no R-hat.
    rhats, chance = rhats[~np.isnan(rhats)], chance[~np.isnan(chance)]
    if not rhats.size or not chance.size:
        found.say(NEAR, f"R-hat is left out: the draws of {values} do not differ.")
        return
    high, share, expected = float(np.max(rhats)), float(np.mean(rhats > 1.01)), float(np.mean(chance > 1.01))
    found.say(
        NEAR,
        f"R-hat of {values}: at most {_rhat(high)}, above 1.01 in {share:.0%} of them; by chance, "
        f"with the draws of all fits shuffled, at most {_rhat(float(np.max(chance)))} and in {expected:.0%}.",
        rhat_largest=high, rhat_above=share, rhat_above_by_chance=expected,
    )  # fmt: skip
    if found.data.attrs["draws_are"] != MARKOV:
        return
    least, all_draws = float(np.nanmin(prediction_ess(found.data).values)), found.data["posterior"].sizes
    total = all_draws["chain"] * all_draws["draw"]
    found.say(NEAR, f"Of {total} draws at least {least:.0f} are effective for every {each}.", ess_least=least)
    count = sum(int(row.get("divergences", 0)) for chain in posterior.chains for row in chain.record.history[:1])
    if count:
        found.say(NEAR, f"{count} transitions diverged: a higher target_accept may help.", divergences=count)


def _blocks(
    found: Diagnosis, posterior: Posterior, train: Split | None, draws: int, settings: dict[str, Any]
) -> dict[str, float]:
    """k-hat of each layer of the first fit, if it is asked for."""
    first = posterior.chains[0]
    if not draws or train is None:
        return {}
    if not first.independent_layers:
        found.say(NEAR, "k-hat by layer is left out: under this posterior layers are not independent.")
        return {}
    try:
        blocks = khat_by_block(first, train, draws, **settings)
    except PosteriorError as error:
        found.say(NEAR, f"k-hat by layer is left out. {error}")
        return {}
    whose = " in the network as it is" if found.data.attrs["method"] == "linear" else ""
    whose += " of the first fit" if len(posterior.chains) > 1 else ""
    listed = ", ".join(f"{name} {value:.2f}" for name, value in blocks.items())
    found.say(NEAR, f"k-hat of one layer at a time{whose}, the others at their mean: {listed}.", khat_by_block=blocks)
    return blocks


def _of_khat(shape: float, draws: int, posterior: Posterior, method: str) -> str:
    """The verdict on a k-hat from so many draws."""
    fixed = posterior.record.point_sites
    latents = posterior.program.model.initial(posterior.program.sites)
    size = sum(value.numel() for name, value in latents.items() if name not in set(fixed))
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
        f"{found}: as a joint law of {size:,} numbers the guide is far from {target}, as it is nearly always at this "
        f"size; {draws} draws can be weighted up to {good:.2f}. Predictions may still be fine: see what the "
        "probabilities are worth."
    )


def _leave_one_out(found: Diagnosis, posterior: Posterior) -> None:
    """How likely each training row is by the others."""
    try:
        estimate = loo(found.data)
        total, error, by_row, good = loo_parts(estimate)
        shapes = by_row.values
        bad = int((~(shapes <= good)).sum())
        trust = "" if not bad else f" {bad} of {len(shapes)} rows have a Pareto k above {good:.2f}: do not trust it."
        sentence = f"elpd_loo {total:.1f} with a standard error of {error:.1f}, {total / len(shapes):.3f} a row.{trust}"
        found.say(MODEL, sentence, elpd_loo=total, elpd_loo_error=error, pareto_k_bad=bad)
        of_all_rows = {"point estimates": posterior.record.point_sites, "prior means": posterior.learned_means}
        if named := [f"{what} of {_shortened(sites)}" for what, sites in of_all_rows.items() if sites]:
            found.say(
                MODEL,
                f"This is optimistic: {' and '.join(named)} were fitted to all rows, the one that is left out "
                "included. It ranks no model that has such against one that has none.",
            )
        found.pictures["pareto_k"] = plots.pareto_k(by_row["example"].values, shapes, good)
    except PosteriorError as problem:
        found.say(MODEL, f"Leave-one-out is left out. {problem}")
