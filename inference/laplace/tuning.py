"""The ways to tune the prior by name: each takes what was measured around the mode, and gives a prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from datasets import Dataset

from bayeslora.inference.laplace.evidence import LinearEvidence
from bayeslora.inference.laplace.heldout import best_width
from bayeslora.inference.laplace.intact import intact_width
from bayeslora.inference.laplace.likeliest import matched_width, refitted_width, tuned_width
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.priors import NormalPrior
from bayeslora.inference.laplace.refitted import RefittedEvidence
from bayeslora.observations import Curved
from bayeslora.passes import Rows
from bayeslora.progress import note

__all__ = ["WAYS", "Tuned", "Untuned"]


@dataclass(frozen=True)
class Untuned:
    """What is known of a network around its mode, before the prior is tuned.

    Attributes:
        posterior: under the model's prior.
        linear: evidence of the linear model there.
        data: the rows that the curvature is of.
        heldout: rows that the mode has not seen; only one way needs them.
        batch_size: rows a pass.
        progress: show bars, and say what was chosen.
    """

    posterior: LaplacePosterior
    linear: LinearEvidence
    data: Dataset
    heldout: Dataset | None
    batch_size: int
    progress: bool

    def refitted(self) -> RefittedEvidence:
        """The evidence of the linear network at its own mode, by another pass."""
        at, over = self.posterior, Rows.of(self.posterior.program, self.data, self.batch_size, self.progress)
        return RefittedEvidence(at.program, at.sites, at.mean(), at.modes, at.prior, over, at.record.temperature)


class Tuned(NamedTuple):
    """A prior, what was found on the way to it, and the temperature of predictions."""

    prior: NormalPrior
    trace: list[dict[str, float]]
    temperature: float | None = None


def _heldout(found: Untuned) -> Tuned:
    assert found.heldout is not None  # `Laplace` refuses
    best = best_width(found.posterior, found.heldout, found.batch_size, found.progress)
    softened = "" if best.temperature is None else f", predictions at a temperature of {best.temperature:.3g}"
    chosen = f"a prior {best.multiple:.3g} times as wide{softened}"
    note(f"On {len(found.heldout):,} held-out rows laplace chose {chosen}.", found.progress)
    return Tuned(best.prior, best.trace, best.temperature)


def _intact(found: Untuned) -> Tuned:
    return Tuned(*intact_width(found.posterior, found.data, found.batch_size, found.progress))


def _matched(found: Untuned) -> Tuned:
    return Tuned(*matched_width(found.refitted(), found.posterior.prior))


def _evidence(found: Untuned) -> Tuned:
    prior = found.posterior.prior
    if isinstance(found.posterior.program.observation, Curved):
        return Tuned(*refitted_width(found.refitted(), prior))
    return Tuned(*tuned_width(found.linear, prior))


def _mode_evidence(found: Untuned) -> Tuned:
    return Tuned(*tuned_width(found.posterior.mode_evidence, found.posterior.prior))


def _none(found: Untuned) -> Tuned:
    return Tuned(found.posterior.prior, [])


#: Ways by name; what each does is said of `Laplace`.
WAYS: Mapping[str, Callable[[Untuned], Tuned]] = {
    "heldout": _heldout,
    "intact": _intact,
    "matched": _matched,
    "evidence": _evidence,
    "mode-evidence": _mode_evidence,
    "none": _none,
}
