"""Simulation-based calibration: is the posterior of simulated labels right about the weights that made them?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayeslora.errors import SettingError
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program, one_draw
from bayeslora.progress import track
from bayeslora.rng import isolated

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.tasks import Split

__all__ = ["Quantities", "Ranks", "sbc"]

#: Numbers of a draw, by name, given every latent site and weight, and the network's outputs (examples, outputs) there.
Quantities = Callable[[Mapping[str, Tensor], Tensor], Mapping[str, float]]


@dataclass(frozen=True)
class Ranks:
    """Ranks of true values among posterior draws.

    Attributes:
        ranks: how many draws are below the true value (simulations,), by quantity: 0 ... draws.
        draws: number of draws.
    """

    ranks: Mapping[str, NDArray[np.int64]]
    draws: int

    def edges(self, bins: int) -> NDArray[np.float64]:
        """Bounds of bins (bins + 1,) of ranks, as equal in size as whole ranks allow, and no more than there are."""
        return np.linspace(0, self.draws + 1, min(bins, self.draws + 1) + 1).round()

    def uniformity(self, bins: int = 10) -> dict[str, float]:
        """P-value of the hypothesis that the ranks are uniform, by quantity: chi-square over bins of ranks."""
        from scipy.stats import chisquare

        edges = self.edges(bins)
        expected = np.diff(edges) / (self.draws + 1)
        return {
            name: float(chisquare(np.histogram(ranks, edges)[0], expected * len(ranks)).pvalue)
            for name, ranks in self.ranks.items()
        }

    def symmetry(self) -> dict[str, float]:
        """P-value of the hypothesis that ranks are symmetric, by quantity: what variational posteriors must be.

        A guide may be too narrow or wide and yet right about the mean: asymmetry shows a bias (VSBC; Yao, Vehtari,
        Simpson and Gelman, ICML 2018). Wilcoxon's signed-rank test of the distances from the middle, in place of the
        paper's Kolmogorov-Smirnov test of ranks against their mirror image, which takes the two for independent.
        Ranks that are all in the middle are symmetric: their p-value is 1.
        """
        from scipy.stats import wilcoxon

        distances = {name: ranks - self.draws / 2 for name, ranks in self.ranks.items()}
        return {
            name: float(wilcoxon(distance, method="asymptotic").pvalue) if distance.any() else 1.0
            for name, distance in distances.items()
        }


def sbc(
    program: Program,
    backend: str,
    data: Split | Dataset,
    simulations: int = 100,
    posterior_draws: int = 99,
    *,
    quantities: Quantities | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Ranks:
    """Draw weights from the prior and labels from the likelihood, fit, and rank the weights among posterior draws.

    If posterior and prior belong together, ranks are uniform. A hump in their histogram is a posterior that is too
    wide, a valley one that is too narrow, a slope a bias. Every latent site is drawn from its prior, those included of
    which the backend makes point estimates, and for which it then is not calibrated. It judges the fit as it is made: a
    guide that is stopped too early is found too narrow or biased, whatever it would have become. Draws of a Markov
    chain are to be thinned until they are next to independent. The posterior has to be of all rows under the prior that
    weights are drawn from: ``heldout_size=0`` and ``prior_mean="model"`` of `svi`, ``tune="none"`` of `laplace`.

    Args:
        program: of a small adapter; it is fitted ``simulations`` times.
        backend: of `bayeslora.fit`.
        data: whose rows get simulated labels.
        simulations: number of fits.
        posterior_draws: of each fit, among which the true values are ranked.
        quantities: what is ranked; by default the log-likelihood of all labels, and the first rows' first logits.
        seed: of everything.
        progress: show a bar.
        **settings: of the backend.

    Raises:
        SettingError: fewer than one simulation or draw, or a fit that sets rows aside.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman, *Validating Bayesian inference algorithms with simulation-based
        calibration*, 2018; Modrak et al., *Simulation-based calibration checking for Bayesian computation: the choice
        of test quantities shapes sensitivity*, Bayesian Analysis 2025, for the likelihood.
    """
    from bayeslora.inference import fit

    if simulations < 1 or posterior_draws < 1:
        raise SettingError(
            f"Simulations and draws of each must be at least 1, found {simulations} and {posterior_draws}."
        )
    over = Rows.of(program, data)
    over = replace(over, batch_size=len(over))
    unlabelled = over.dataset.remove_columns([] if over.labels is None else ["labels"])
    found: dict[str, list[int]] = {}
    seeds = torch.randint(2**31, (simulations,), generator=torch.Generator().manual_seed(seed)).tolist()
    for each in track(seeds, "simulations", simulations, progress):
        with isolated(each, program.device), undisturbed(program), torch.no_grad():
            truth = one_draw(program.prior)
            outputs = over.outputs(program, truth)
            labels = over.observation.predicted(outputs.unsqueeze(0)).sample()[0]
        simulated = unlabelled.add_column("labels", labels.tolist())
        posterior = fit(program, simulated, backend, seed=each, progress=False, **settings)
        if posterior.record.heldout:
            raise SettingError(
                f"Ranks are of a posterior of all {len(over)} rows, and {backend} sets {len(posterior.record.heldout)} "
                "of them aside: give heldout_size=0 to the backend that does."
            )
        measure = quantities or _default(program, labels)
        true = measure(truth, outputs)
        below = dict.fromkeys(true, 0)
        with undisturbed(program), torch.no_grad():
            for draw in posterior.draws(posterior_draws, each):
                for name, value in measure(draw, over.outputs(program, draw)).items():
                    below[name] += value < true[name]
        for name, rank in below.items():
            found.setdefault(name, []).append(int(rank))
    return Ranks({name: np.array(ranks) for name, ranks in found.items()}, posterior_draws)


def _default(program: Program, labels: Tensor) -> Quantities:
    def measure(draw: Mapping[str, Tensor], outputs: Tensor) -> dict[str, float]:
        likelihood = program.observation.log_prob(outputs.double(), labels).sum()
        first = {f"logit of row {row}": float(outputs[row, 0]) for row in range(min(3, len(outputs)))}
        return {"log-likelihood": float(likelihood), **first}

    return measure
