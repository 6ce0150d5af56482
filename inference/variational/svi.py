"""Stochastic variational inference: the program's ELBO, maximised over a guide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from datasets import Dataset
from pydantic import Field

from bayeslora.errors import SettingError
from bayeslora.inference.aside import has_temperature, rows_aside
from bayeslora.inference.base import Run, check_random
from bayeslora.inference.softening import soften
from bayeslora.inference.training.process import available
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.inference.variational.elbo import ELBOS
from bayeslora.inference.variational.estimators import NoiseWarmup, make_estimator
from bayeslora.inference.variational.learning import optimise
from bayeslora.inference.variational.loss import KLSchedule
from bayeslora.inference.variational.point import weights_given
from bayeslora.inference.variational.posterior import PriorMean, VariationalPosterior, prior_sites
from bayeslora.inference.variational.rates import early_rate, groups_of, rate_beside_noise, rate_beside_prior
from bayeslora.models.guides.auto import ALIASES, guide_settings, make_guide
from bayeslora.program import Program
from bayeslora.rng import isolated
from bayeslora.settings import Count, NotNegative, Part, Positive, Size

__all__ = ["SVI"]


@dataclass(frozen=True, kw_only=True)
class SVI(TrainingSettings):
    """Stochastic variational inference with a Monte Carlo ELBO.

    The network's own dropout, if it has any, is on while the bound is maximised, as in fine-tuning; predictions and
    draws are without it.

    Attributes:
        guide: ``"structured"`` (the model's own), ``"mean-field"``, ``"low-rank"``, ``"full"`` (its covariance has an
            entry for each pair of weights: small adapters), ``"entry"`` (a standard deviation for each entry) and
            ``"inducing"`` (a sparse Gaussian process), both of `Gaussian`, ``"delta"`` (point estimates), or the name
            of one of Pyro's autoguides that need no more than a name.
        guide_settings: settings of the guide by name, of those of the library and of plug-ins.
        elbo: ``"mean-field"`` (divergences in closed form where one is known), ``"trace"``, ``"path"`` (the gradient
            of the draw's path alone, which has no noise at the exact posterior: for ``"full"`` and small adapters), or
            ``"renyi"`` (order 1/2, two particles or more).
        particles: weight draws a step; each costs a pass of the network.
        estimator: of the expected log-likelihood of a batch, and of its gradient: ``"draw"`` (one draw of the weights
            for all rows), ``"flipout"`` (a draw for each row, which differ by random signs), or ``"local"``
            (independent noise in each row's activations); see `bayeslora.inference.variational.estimators`. All are
            unbiased for the same bound, and predictions are by draws of the weights in any case. Variances of the
            gradient of 32 rows of SST-2 by 24 draws, in parts of those of "draw", for A's means, the deviations, and B
            with the head: flipout 0.30, 1.63 and 1.14, local 0.21, 1.46 and 0.69 (``benchmarks/estimators.py``).
        temperature: weight of the Kullback-Leibler term against the whole data's log-likelihood; 1 is Bayes' rule,
            less gives a colder posterior (accuracy / NLL / ECE-15 of `WeightModel`'s example at 1: .842 / .364 / .030;
            at 0.1: .831 / .395 / .063).
        prior_mean: "learned": the prior mean of each random matrix is a hyperparameter, at which the bound is largest
            (empirical Bayes): the guide's own mean, so that only noise is charged for, as in MonteCLoRA's own loss. Of
            guides whose mean is a parameter: "structured", "entry". "model": the prior stays where the model has it. A
            step of AdamW moves all entries of A, which costs more nats than the labels of a small task can pay for, so
            that A stays where it starts and B learns through a random projection.
        kl_warmup: part of all steps, the first ones, in which that weight rises from zero (0.5: .840 / .361 / .027).
        kl_schedule: how the weight is in that part: "linear" (it rises linearly) or "step" (it is zero; the likelihood
            alone is maximised before the divergence counts, then all of it counts from one step to the next).
        noise_warmup: part of all steps in which the noise that the network sees rises linearly from none to all of the
            guide's: means learn faster without it, and then how to bear it (MiniLM on 300 rows of SST-2, 8 epochs at
            2e-3, a prior that holds A, four seeds, 800 other rows, ``benchmarks/studies/rates.yaml``: accuracy / NLL /
            ECE-15 .773 / .476 / .039, and .754 / .503 / .056 at zero). The divergence is the whole guide's from the
            first step. Of guides that say how their draws lie around a mean: "structured", "entry".
        learning_rate: of the means of random weights, for AdamW; the one that suits plain LoRA suits them. In the part
            ``noise_warmup`` of all steps it has a limit under any guide, 2e-3 with MiniLM, beside a B that starts at
            zero (see `early_rate`): A would be lost before B has learned (MiniLM on 300 rows of SST-2 at 5e-3 in
            batches of 8, seed 0: accuracy .771, and without .734 or, on another processor, .509).
        scale_learning_rate: learning rate of what shapes the noise: scales, Wishart and Dirichlet parameters.
        point_learning_rate: learning rate of weights that are point estimates, such as B and the head; see
            `rate_beside_noise` for what it is by default: ``learning_rate``, more where steps are few (0.24 over their
            number), and 2e-3 at most; no less than that where the prior mean is the model's.
        beta2: part of AdamW's second moments that a step keeps. At AdamW's own 0.999, a memory of a thousand steps,
            high rates can end at the base rate of the labels (``docs/results.md``, "Robustness").
        heldout_size: training rows that are set aside, on which a temperature of the predictions is chosen: see
            `soften`. By default they are a tenth of all, but 1,000 at most, and none where that is less than 30, where
            texts are learned, where weights to start from may have seen them, or where `fit` was given ``heldout``,
            which is taken then. They are drawn by the run's seed, with each class's share. 0: no temperature.
        init_scale: standard deviation that Pyro's autoguides start from, in their unconstrained space.

    References:
        Hoffman et al., *Stochastic variational inference*, JMLR 2013; Kingma and Welling, *Auto-encoding variational
        Bayes*, ICLR 2014 (the reparameterised estimator).
    """

    name: ClassVar[str] = "svi"
    paper: ClassVar[str] = "Hoffman et al., JMLR 2013; Kingma and Welling, ICLR 2014"

    guide: str = "structured"
    guide_settings: dict[str, Any] = field(default_factory=dict)
    elbo: Literal["mean-field", "trace", "path", "renyi"] = "mean-field"
    particles: Count = 1
    estimator: Literal["draw", "flipout", "local"] = "draw"
    temperature: Positive = 1.0
    prior_mean: PriorMean = "learned"
    kl_warmup: Part = 0.0
    kl_schedule: KLSchedule = "linear"
    noise_warmup: Part = 0.5
    scale_learning_rate: NotNegative = 1e-2
    point_learning_rate: NotNegative | None = None
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    heldout_size: Size | None = None
    init_scale: Positive = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "guide_settings", guide_settings(self.guide, self.guide_settings))
        if self.particles > 1 and self.gradient_checkpointing:
            raise SettingError(
                "gradient_checkpointing needs particles=1: what the backward pass computes again of all particles "
                "would be with the weights of the last."
            )
        if self.estimator != "draw" and self.elbo != "mean-field":
            raise SettingError(
                f"estimator='{self.estimator}' needs elbo='mean-field', whose divergence asks for no draw of the "
                f"weights; found elbo='{self.elbo}'."
            )
        if self.kl_schedule == "step" and not 0 < self.kl_warmup < 1:
            raise SettingError(
                "kl_schedule='step' is for a part of all steps in which the divergence does not count: give a "
                f"kl_warmup above 0 and below 1, found {self.kl_warmup:g}."
            )
        if self.elbo == "renyi" and self.particles < 2:
            raise SettingError("A Rényi bound of one particle is the ELBO: give particles=2 or more, or elbo='trace'.")

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Maximise the ELBO of ``program`` over the guide, and choose the temperature of its predictions."""
        check_random(program)
        if ALIASES.get(self.guide, self.guide) == ALIASES["full"]:
            _check_room(program)
        with isolated(run.seed, program.device):
            guide = make_guide(self.guide, program.model, run.sites(program), self.init_scale, self.guide_settings)
        estimator = make_estimator(self.estimator, program, guide)
        held = all(site.centre is None for site in prior_sites(program, guide, self.prior_mean))
        points = self.point_learning_rate
        if points is None and held:
            points = rate_beside_prior(self.learning_rate)
        elif points is None:
            points = rate_beside_noise(self.learning_rate, self.steps_of(len(data)))
        groups = groups_of(guide, self.learning_rate, points, self.scale_learning_rate)
        posterior = optimise(
            program,
            guide,
            data,
            self,
            run,
            groups=[group | {"betas": (0.9, self.beta2)} for group in groups],
            elbo=ELBOS[self.elbo](num_particles=self.particles),
            temperature=self.temperature,
            prior_mean=self.prior_mean,
            kl_warmup=self.kl_warmup,
            kl_schedule=self.kl_schedule,
            rate_limit=early_rate(*program.model.split(run.sites(program))),
            limited=self.noise_warmup,
            estimator=estimator,
            hooks=[NoiseWarmup(estimator, self.noise_warmup)] if self.noise_warmup else [],
        )
        if self._softens(program, run):
            soften(posterior, run)
        return posterior

    def sets_aside(self, program: Program, rows: int, run: Run) -> int:
        """How many of so many training rows are set aside to choose a temperature on.

        Raises:
            SettingError: some are asked for, and there are others, or not enough, or given weights may have seen them,
                or labels are neither classes nor real numbers.
        """
        if has_temperature(program):
            seen = weights_given(program, run)
            return rows_aside(self.heldout_size, rows, run, seen=seen, purpose="to choose a temperature on")
        if self.heldout_size:
            raise SettingError(
                f"heldout_size={self.heldout_size} sets rows aside for a temperature of classes or real labels, and "
                f"'{program.observation.name}' predicts neither: leave heldout_size out."
            )
        return 0

    def _softens(self, program: Program, run: Run) -> bool:
        """Whether there are rows to choose a temperature on."""
        return run.heldout is not None and self.heldout_size != 0 and has_temperature(program)


def _check_room(program: Program) -> None:
    """Make sure that there is memory for a full covariance before it is asked for.

    Raises:
        SettingError: there is not.
    """
    random = program.model.stochastic(program.sites)
    size = sum(value.numel() for name, value in program.model.initial(program.sites).items() if name in random)
    # The covariance's factor, its gradient, and AdamW's two moments of it.
    needed, free = 4 * 4 * size**2, available(program.device)
    if needed > free:
        raise SettingError(
            f"A full covariance of {size:,} weights needs {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are "
            "free: choose guide='structured', 'mean-field' or 'low-rank', or fewer layers (target_modules)."
        )
