"""Laplace's approximation around the mode of the same program: a Gaussian whose precision is prior plus curvature.

Yang, Robeyns, Wang and Aitchison, *Bayesian low-rank adaptation for large language models*, ICLR 2024 (Laplace-LoRA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from datasets import Dataset

from bayeslora.errors import SettingError
from bayeslora.inference.aside import ENOUGH, rows_aside
from bayeslora.inference.base import Run, check_random
from bayeslora.inference.laplace.checks import check_distance, warn_of_draws, warn_of_mode
from bayeslora.inference.laplace.curvature import Curvature
from bayeslora.inference.laplace.evidence import LinearEvidence
from bayeslora.inference.laplace.fisher import FisherName, fisher_of
from bayeslora.inference.laplace.forms import make_curvature
from bayeslora.inference.laplace.jacobians import Tape, matrices_of
from bayeslora.inference.laplace.measuring import Measuring
from bayeslora.inference.laplace.posterior import LaplacePosterior
from bayeslora.inference.laplace.priors import normal_prior
from bayeslora.inference.laplace.tuning import WAYS, Untuned
from bayeslora.inference.training.process import available, device_of
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.inference.variational.point import MLE, Mode, mode_of, weights_given
from bayeslora.observations import Curved
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.settings import Count, NotNegative, Positive, Size
from bayeslora.sites import Site

__all__ = ["Laplace"]


@dataclass(frozen=True, kw_only=True)
class Laplace(TrainingSettings):
    """Laplace's approximation: N(mode, (curvature + prior precision)^-1) over the random sites of the model.

    Attributes:
        mode: "mle" finds it here by maximum likelihood, which is LoRA as practised, and the published way; "map" finds
            that of the model's prior as it is; "given" takes the mean of the posterior that `fit` is to ``start`` from,
            or else the weights that the program was made with, in one pass over the data. "auto" takes what is given
            if there is something to start from or the adapter was not fresh, its products B A not all zero; else it is
            "map" where the prior stays as it is (``tune="none"``), and "mle" where it is tuned afterwards: a prior that
            was not tuned yet can draw A and B to zero together, where neither has a gradient.
        curvature: "kron", "diag", "full" (small adapters) or "exact" (few examples); see
            `bayeslora.inference.laplace.curvature`. What the last two need is compared with the memory that is
            free before the pass.
        curvature_rank: rank of the wide factor of "kron"; exact where it reaches the number of columns.
        fisher: expectation over labels: "exact", by the likelihood's curvature; "mc", labels drawn for each row, of a
            text for each token; or "empirical", the labels of the data (biased). "auto" is "exact" where that is to be
            had, and else "mc".
        sharing: how "kron" treats the tokens of an example: "sum", much the nearer, or "expand", as published.
        subset: "all" random sites, or "last-layer": the head's last layer alone.
        head: count the head among the random sites, with the prior that the model gives it.
        tune: each way has its function in `bayeslora.inference.laplace.tuning`. "auto" is "heldout" where there are 30
            rows or more for it, and else what needs none: of texts, which are predicted by draws of the weights in the
            network as it is and of which the linear model knows nothing, the widest prior of which a draw adds at most
            a hundredth to the mode's loss on some training rows (`intact_width`); of other labels "evidence", but no
            wider than fits weights that were stopped early (`matched_width`). "heldout" takes the width, and a
            temperature of predictions, by which rows that `fit` was given as ``heldout`` are predicted best
            (`best_width`); "evidence" maximises that of the linear model around the mode, for the width of the prior at
            that model's own mode under each (see `bayeslora.inference.laplace.refitted`); "mode-evidence" does as
            published, and takes the weights for a mode under every prior (see `bayeslora.inference.laplace.evidence`);
            "none" keeps the model's prior.
        heldout_size: training rows that are set aside to tune on and that the mode does not see, where it is found here
            and `fit` was given no ``heldout``. By default they are a tenth of all, but 1,000 at most, and none where
            that is less than 30. They are drawn by the run's seed, with each class's share. Of rows that are given as
            ``heldout`` it says nothing: they are tuned on with 0 as well.
        temperature: weight of the log prior against the whole data's log-likelihood; 1 is Bayes' rule.
        point_learning_rate: of weights that are not random in the model; of the mode "mle" by default that of all.
            See `map` for the other.
    """

    name: ClassVar[str] = "laplace"
    paper: ClassVar[str] = "Yang et al., ICLR 2024 (Laplace-LoRA)"
    # A prior around the weights at which a mode started, or that are given, says little of how wide it should be.
    default_model: ClassVar[tuple[str, dict[str, Any]]] = (
        "gaussian",
        {"sites": "both", "centre": "zero", "deviation": 0.1},
    )

    mode: Literal["auto", "mle", "map", "given"] = "auto"
    curvature: Literal["kron", "diag", "full", "exact"] = "kron"
    curvature_rank: Count = 16
    fisher: FisherName = "auto"
    sharing: Literal["sum", "expand"] = "sum"
    subset: Literal["all", "last-layer"] = "all"
    head: bool = False
    tune: Literal["auto", "heldout", "evidence", "mode-evidence", "none"] = "auto"
    heldout_size: Size | None = None
    temperature: Positive = 1.0
    point_learning_rate: NotNegative | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharing != "sum" and self.curvature != "kron":
            raise SettingError(
                f"sharing='{self.sharing}' is for curvature='kron': '{self.curvature}' takes every token."
            )
        if self.heldout_size and self.tune not in ("auto", "heldout"):
            raise SettingError(
                f"heldout_size={self.heldout_size} sets training rows aside to tune on, and tune='{self.tune}' tunes "
                "on none: leave heldout_size out, or give tune='heldout'."
            )

    def fit(self, program: Program, data: Dataset, run: Run) -> LaplacePosterior:
        """Find the mode, measure the curvature there in one pass, and tune the prior."""
        check_random(program)
        program.to(device_of(self.cpu))
        sites, fisher = self._sites(program), fisher_of(program, self.fisher, self.temperature)
        curvature = make_curvature(self.curvature, sites, self.curvature_rank, self.sharing)
        measuring = Measuring(program, Tape(program, sites), fisher, self.bf16)
        self._check(program, sites, curvature, len(data), fisher.vectors, run)
        measuring.probe(data)

        latents, history, cost = self._mode(program, data, run)
        prior, way = normal_prior(program, sites, latents), self._way(program, run)
        weights = program.weights_at(latents)
        modes = matrices_of(sites, weights)
        if way == "mode-evidence":
            check_distance(prior, modes)

        linear = LinearEvidence(modes, prior, len(data), fisher.vectors)
        over = Rows.of(program, data, self.batch_size, run.progress)
        log_likelihood, chance = measuring.add_up(weights, over, run.seed, curvature, linear)
        if not cost and isinstance(program.observation, Curved):  # the mode was given
            warn_of_mode(log_likelihood * self.temperature / len(data), chance / len(data))

        record = run.record(self.name, asdict(self), len(data), self.temperature, latents.keys() - prior.roots.keys())
        around = partial(LaplacePosterior, program, record, latents, curvature=curvature, log_likelihood=log_likelihood)
        untuned = Untuned(around(prior=prior), linear, data, run.heldout, self.batch_size, run.progress)
        tuned = WAYS[way](untuned)

        posterior = around(
            prior=tuned.prior,
            log_evidence=float(linear(tuned.prior)),
            evidence_rows=linear.rows,
        )
        if tuned.temperature is not None:
            posterior.soften(tuned.temperature)
        if way != "intact" and not isinstance(program.observation, Curved):
            warn_of_draws(posterior, data)
        posterior.record = replace(record, cost=cost, history=history + tuned.trace)
        return posterior

    def sets_aside(self, program: Program, rows: int, run: Run) -> int:
        """How many of so many training rows are set aside to tune on: none that a given mode may have seen.

        Raises:
            SettingError: some are asked for, and there are others, or not enough, or the mode is given.
        """
        if self.tune not in ("auto", "heldout"):
            return 0
        least = 1 if self.tune == "heldout" else ENOUGH
        seen = self._found(program, run) == "given"
        return rows_aside(self.heldout_size, rows, run, seen=seen, purpose="to tune on", least=least)

    def _way(self, program: Program, run: Run) -> str:
        """How the prior is tuned: of texts no linear network is predicted with, of which an evidence would be."""
        if self.tune != "auto":
            return self.tune
        enough = run.heldout is not None and (self.heldout_size or len(run.heldout) >= ENOUGH)
        if enough:
            return "heldout"
        return "matched" if isinstance(program.observation, Curved) else "intact"

    def _found(self, program: Program, run: Run) -> str:
        """How the mode is found."""
        if self.mode != "auto":
            return self.mode
        if weights_given(program, run):
            return "given"
        return "map" if self.tune == "none" else "mle"

    def _mode(self, program: Program, data: Dataset, run: Run) -> Mode:
        """The mode of every latent site."""
        found, points = self._found(program, run), self.point_learning_rate
        mode = partial(mode_of, self, program, data, run, given=found == "given")
        if found == "mle":
            points = self.learning_rate if points is None else points
            return mode(prior_weight=0.0, weight_decay=MLE.weight_decay, points=points)
        return mode(prior_weight=self.temperature, points=points)

    def _check(
        self, program: Program, sites: Sequence[Site], curvature: Curvature, rows: int, vectors: int, run: Run
    ) -> None:
        """Refuse what cannot work before the time of training and of a pass is spent."""
        normal_prior(program, sites, program.model.initial(program.sites))
        if self.tune == "heldout" and run.heldout is None:
            raise SettingError(
                "tune='heldout' needs rows to tune on that the mode has not seen: set some of its training rows aside "
                "(heldout_size), and give fit(..., heldout=task.heldout)."
            )
        needed, free = curvature.room(rows * vectors), available(program.device)
        if needed > free:
            raise SettingError(
                f"curvature='{self.curvature}' needs {needed / 2**30:.1f} GiB for {curvature.size:,} weights and "
                f"{rows:,} rows, and {free / 2**30:.1f} GiB are free: choose 'kron' or 'diag', or fewer sites."
            )

    def _sites(self, program: Program) -> list[Site]:
        """The sites whose weights get a Gaussian."""
        heads = [site for site in program.sites if site.role == "head"]
        if self.subset == "last-layer":
            if not heads:
                raise SettingError("subset='last-layer' needs a head, and PEFT trains none here (modules_to_save).")
            last = heads[-1].layers[0].rpartition(".")[0]
            return [site for site in heads if site.layers[0].rpartition(".")[0] == last]
        random = {site.name for site in program.model.split(program.sites)[0]}
        return [site for site in program.sites if site.name in random or (self.head and site.role == "head")]
