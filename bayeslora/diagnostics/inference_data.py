"""A posterior as data of arviz: draws by chain, what they predict, and their densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

import bayeslora
from bayeslora.diagnostics import versions
from bayeslora.diagnostics.summaries import Summary, summarise
from bayeslora.errors import PosteriorError, unknown
from bayeslora.observations import digest
from bayeslora.passes import Rows, undisturbed
from bayeslora.rng import isolated, seeded

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.posterior import Posterior
    from bayeslora.predict.prediction import Prediction
    from bayeslora.predictors import Predictor
    from bayeslora.tasks import Split

__all__ = ["to_inference_data"]

#: What draws are: those of a chain, of a law, or passes that no draw of the weights belongs to.
MARKOV, INDEPENDENT, PASSES = "a Markov chain", "independent", "passes of the network"
#: Dimensions of everything that is drawn.
CHAINED = ("chain", "draw")
#: Added to the seed, so that draws of the prior do not share their noise with those of the posterior.
PRIOR_SEED = 1_000_003


def to_inference_data(
    posterior: Posterior,
    data: Split | Dataset,
    draws: int = 10,
    prior_draws: int | None = None,
    *,
    sites: Sequence[str] = (),
    method: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Any:
    """The posterior and its predictions of ``data`` as an `InferenceData` (arviz 1.x: a `DataTree`).

    Rows (``example``) have their number in ``data``, of which those that the fit has set aside are left out. Groups, by
    chain (independent fits) and draw: posterior, posterior_predictive, log_likelihood, log_prior,
    sample_stats, prior, prior_predictive, observed_data, constant_data. LoRA matrices are summarised: see
    `bayeslora.diagnostics.summaries`. A point estimate has one draw.

    What is of the weights (posterior, log_prior, log_p and log_q) is left out where a method does not predict by draws
    of them: what cannot be computed from the rest, such as k-hat and leave-one-out, then says so.

    In sample_stats are ``log_q`` of a posterior with a density and, if ``data`` are the rows that it was fitted to,
    ``log_p`` = log p(y | draw) / temperature + log p(draw) and their difference, whose mean is the ``elbo``: of the
    sites that are random, the others where they are. With a posterior's auxiliary values ``log_q`` is what
    `Posterior.log_prob` says of both, and the ``elbo`` is no larger than that of the weights alone.

    Args:
        posterior: of any backend.
        data: rows to predict.
        draws: of each chain; each takes a pass over the rows.
        prior_draws: draws of the prior, or of the priors that independent fits have tuned, in all; 0 for none, as many
            as ``draws`` by default.
        sites: names of latent sites or weights that are kept entry by entry besides.
        method: of ``posterior.predictors``; by default the first that predicts by draws of the weights or, if there is
            none, the first.
        seed: of the draws.
        batch_size: rows a pass.
        progress: show bars.

    Raises:
        PosteriorError: a name in ``sites`` or the method is unknown.
    """
    method, predictor = _method(posterior, method)
    known = posterior.program.model.initial(posterior.program.sites).keys() | {
        site.name for site in posterior.program.sites
    }
    for name in sites:
        if name not in known:
            raise PosteriorError(unknown("site", name, known))
    rows = Rows.of(posterior.program, data, batch_size, progress)
    trained = posterior.record.trained(rows.dataset)
    fitted = rows.labels is not None and digest(trained) == posterior.record.data
    numbers = posterior.record.kept(len(rows)) if fitted else list(range(len(rows)))
    rows = replace(rows, dataset=trained) if fitted else rows
    chains = []
    for place, chain in enumerate(posterior.chains):
        count, own = chain.differing(draws), seed + place
        prediction = chain.predict(rows.dataset if fitted else data, count, method, own, batch_size, progress)
        chains.append(_followed(chain, predictor, prediction, own, sites))
    noise = [each.noise_scales() for each in posterior.chains]
    groups = _posterior(chains, fitted) | _constant(rows, noise)
    count = draws if prior_draws is None else prior_draws
    if count:
        each = -(-count // len(posterior.chains))
        seeds = [seed + PRIOR_SEED + place for place in range(len(posterior.chains))]
        drawn = [_prior(chain, rows, each, own, sites) for chain, own in zip(posterior.chains, seeds, strict=True)]
        groups["prior"] = _summarised([summaries for summaries, _ in drawn])
        predictions = [rows.predicted(outputs) for _, outputs in drawn]
        groups["prior_predictive"] = _predicted(predictions, seeds)
    for name, group in groups.items():
        groups[name] = group.assign_coords(example=numbers) if "example" in group.dims else group
    attributes = {
        "created_by": f"bayeslora {bayeslora.__version__}",
        "backend": posterior.record.backend,
        "model": posterior.program.model.name,
        "method": method,
        "temperature": posterior.record.temperature,
        "rows": "training" if fitted else "other",
        "draws_are": _kind_of_draws(posterior, predictor),
    }
    return versions.join(groups, attributes)


def _method(posterior: Posterior, method: str | None) -> tuple[str, Predictor]:
    """The predictor that is asked for, or the one that says most of the weights."""
    by_draws = (name for name, each in posterior.predictors.items() if each.by_draws)
    return posterior.predictor(method or next(by_draws, None))


def _kind_of_draws(posterior: Posterior, predictor: Predictor) -> str:
    if not predictor.by_draws:
        return PASSES
    return MARKOV if posterior.chains[0].markov else INDEPENDENT


@dataclass(frozen=True)
class _Chain:
    """What is kept of the draws of one fit, and their predictions."""

    prediction: Prediction
    seed: int
    temperature: float
    summaries: list[dict[str, Summary]]
    log_prior: list[dict[str, float]]
    log_q: list[float]

    @property
    def log_p(self) -> list[float]:
        """Log of likelihood, tempered, times prior, for each draw."""
        likelihoods = (self.prediction.log_likelihood.sum(1) / self.temperature).tolist()
        return [value + sum(prior.values()) for value, prior in zip(likelihoods, self.log_prior, strict=True)]


def _followed(
    posterior: Posterior, predictor: Predictor, prediction: Prediction, seed: int, sites: Sequence[str]
) -> _Chain:
    """Draw again what the prediction is of, and keep of each draw what fits in little memory."""
    chain = _Chain(prediction, seed, posterior.record.temperature, [], [], [])
    for draw in posterior.draws(len(prediction.outputs), seed) if predictor.by_draws else ():
        chain.summaries.append(summarise(draw, posterior.program.sites, sites))
        chain.log_prior.append({name: float(value) for name, value in posterior.log_prior(draw).items()})
        if posterior.dense:
            chain.log_q.append(float(posterior.log_prob(draw)))
    return chain


def _posterior(chains: Sequence[_Chain], fitted: bool) -> dict[str, xr.Dataset]:
    """The groups with a dimension of draws."""
    first = chains[0]
    predictions = [chain.prediction for chain in chains]
    groups = {"posterior_predictive": _predicted(predictions, [chain.seed for chain in chains])}
    if first.summaries:
        groups["posterior"] = _summarised([chain.summaries for chain in chains])
    if first.prediction.labels is not None:
        values = np.stack([chain.prediction.log_likelihood.numpy() for chain in chains])
        variables: dict[str, Any] = {"y": ((*CHAINED, "example"), values)}
        groups["log_likelihood"] = xr.Dataset(variables, _indexed(variables))
    stats: dict[str, list[list[float]]] = {
        "seed": [[float(chain.seed)] * len(chain.prediction.outputs) for chain in chains]
    }
    if names := list(first.log_prior[0]) if first.log_prior else []:
        groups["log_prior"] = _scalars(
            {name: [[draw[name] for draw in chain.log_prior] for chain in chains] for name in names}
        )
        if fitted:
            stats["log_p"] = [chain.log_p for chain in chains]
    if first.log_q:
        stats["log_q"] = [chain.log_q for chain in chains]
        if fitted:
            stats["elbo"] = [[p - q for p, q in zip(chain.log_p, chain.log_q, strict=True)] for chain in chains]
    groups["sample_stats"] = _scalars(stats)
    return groups


def _prior(
    posterior: Posterior, rows: Rows, n: int, seed: int, sites: Sequence[str]
) -> tuple[list[dict[str, Summary]], Tensor]:
    """What is kept of draws of the prior, and outputs (draws, examples, outputs) at each."""
    program = posterior.program
    summaries, found = [], []
    with undisturbed(program), torch.no_grad():
        for _ in seeded(n, seed, program.device):
            draw = posterior.prior_draw()
            summaries.append(summarise(draw, program.sites, sites))
            found.append(rows.outputs(program, draw))
    return summaries, torch.stack(found)


def _summarised(chains: list[list[dict[str, Summary]]]) -> xr.Dataset:
    """Quantities of draws (chain, draw, ...), in single precision."""
    variables: dict[str, Any] = {}
    coordinates: dict[str, Any] = {}
    for name, first in chains[0][0].items():
        values = torch.stack([torch.stack([draw[name].value for draw in chain]) for chain in chains])
        variables[name] = ((*CHAINED, *first.dims), values.detach().float().cpu().numpy())
        coordinates |= first.coordinates
    return xr.Dataset(variables, _indexed(variables) | coordinates)


def _predicted(chains: Sequence[Prediction], seeds: Sequence[int]) -> xr.Dataset:
    """Labels that are drawn from every draw's prediction, where they can be, and what is predicted under each."""
    labels = []
    for prediction, seed in zip(chains, seeds, strict=True):
        with isolated(seed, torch.device("cpu")):
            labels += [prediction.sample().numpy()] if prediction.replicable else []
    variables: dict[str, Any] = {"y": ((*CHAINED, "example"), np.stack(labels))} if labels else {}
    each = [prediction.by_draw for prediction in chains]
    for name, (_, dims) in each[0].items():
        values = np.stack([found[name][0].numpy() for found in each])
        variables[name] = ((*CHAINED, "example", *dims), values)
    coordinates = {dim: list(names) for _, dims in each[0].values() for dim, names in dims.items()}
    return xr.Dataset(variables, _indexed(variables) | coordinates)


def _constant(rows: Rows, noise: Sequence[Mapping[str, Tensor]]) -> dict[str, xr.Dataset]:
    """What is not drawn: the rows' lengths and labels, and the guides' noise."""
    variables: dict[str, Any] = {"tokens": (("example",), np.asarray(rows.dataset["length"][:]))}
    for name in noise[0]:
        values = torch.stack([each[name] for each in noise]).cpu().numpy()
        variables[name] = (("chain", *(f"{name}.{place}" for place in range(values.ndim - 1))), values)
    found = {"constant_data": xr.Dataset(variables, _indexed(variables))}
    if rows.labels is not None:
        labels: dict[str, Any] = {"y": (("example",), rows.labels.numpy())}
        found["observed_data"] = xr.Dataset(labels, _indexed(labels))
    return found


def _scalars(values: Mapping[str, list[list[float]]]) -> xr.Dataset:
    variables = {name: (CHAINED, np.asarray(each)) for name, each in values.items()}
    return xr.Dataset(variables, _indexed(variables))


def _indexed(variables: Mapping[str, tuple[tuple[str, ...], NDArray[Any]]]) -> dict[str, Any]:
    """Numbers for the places of every dimension."""
    return {
        dim: np.arange(size)
        for dims, values in variables.values()
        for dim, size in zip(dims, values.shape, strict=True)
    }
