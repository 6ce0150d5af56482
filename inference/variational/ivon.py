"""Natural-gradient variational inference: a normal posterior whose mean and deviations an optimiser keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from datasets import Dataset
from pydantic import Field
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Normal

from bayeslora.errors import SettingError
from bayeslora.inference.base import Run, check_random
from bayeslora.inference.training.newton import OnlineNewton
from bayeslora.inference.training.objective import Hook, Outcome
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.inference.variational.learning import learn
from bayeslora.inference.variational.loss import ProgramLoss
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.inference.variational.rates import POINT_RATE
from bayeslora.models.base import full_precision
from bayeslora.models.distributions import ColumnNormal, base_of
from bayeslora.models.gaussian import GaussianGuide
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide, PointGuide, encoded
from bayeslora.program import Program
from bayeslora.settings import Positive

__all__ = ["IVON"]

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class IVON(TrainingSettings):
    """Variational inference by natural gradients: each random weight has a mean and a standard deviation.

    Each entry's precision is N h / temperature plus the prior's, with N the rows of the data and h the curvature of
    the loss per example in its direction, which an optimiser estimates from gradients at draws of the weights: no
    second set of parameters learns by a rate of its own. The posterior has the family of `svi` with guide="entry".

    Which LoRA matrices are random is the model's to say (``sites="both"`` as published); the others and the head are
    points, moved by AdamW. The prior is the model's, around the start or around zero, and has to be of independent
    normal entries. Published runs have no prior (no weight decay) and 10^6 to 10^8 in place of N for some hundred to
    some thousand rows, which is a temperature of 10^-2 to 10^-5: noise that is set by hand. Steps are as there, without
    the factor h0 + d that the ``ivon-opt`` package has by default.

    Attributes:
        guide: the family, of which there is one.
        temperature: weight of the Kullback-Leibler term against the whole data's log-likelihood; 1 is Bayes' rule.
        learning_rate: of the means: the part of a Newton step that is made (published: 0.03).
        point_learning_rate: of weights that are point estimates, for AdamW.
        curvature: h at the start (published: 3e-4 to 1e-3).
        beta1: weight of what is known of the mean's gradient against a step's.
        beta2: the same of the curvature. Published: 0.99999, at which h hardly leaves its start in the 10,000 steps of
            a run; here it is to be learned in some hundred.
        clip_radius: longest Newton step of an entry, before the learning rate (published: 1e-3).
        max_grad_norm: as good as none, since shortened gradients would say of less curvature.

    References:
        Cong et al., *Variational low-rank adaptation using IVON*, 2411.04421, and *Improving LoRA with variational
        learning*, 2506.14280; Shen et al., ICML 2024, for the optimiser.
    """

    name: ClassVar[str] = "ivon"
    paper: ClassVar[str] = "Cong et al., 2024 and 2025 (IVON-LoRA)"
    default_model: ClassVar[tuple[str, dict[str, Any]]] = ("gaussian", {})

    guide: Literal["entry"] = "entry"
    temperature: Positive = 1.0
    learning_rate: Positive = 0.03
    point_learning_rate: Positive = POINT_RATE
    curvature: Positive = 1e-3
    beta1: Beta = 0.9
    beta2: Beta = 0.99
    clip_radius: Positive = 0.1
    max_grad_norm: Positive = 1e9

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Find mean and deviation of each random weight, and the points.

        Raises:
            SettingError: the model has hyper-sites, or a prior that is not of independent normal entries.
        """
        check_random(program)
        guide = make_guide(self.guide, program.model, run.sites(program))
        random = {part.name: part.mu for part in _matrices(guide)}
        points = guide.parameter_groups().get("point", [])
        prior = _normal_prior(program, random)
        groups: list[dict[str, Any]] = [
            {"params": [place], "centre": prior[name][0], "precision": prior[name][1]} for name, place in random.items()
        ]
        optimiser = OnlineNewton(
            groups + ([{"params": points, "lr": self.point_learning_rate}] if points else []),
            self.learning_rate,
            ess=len(data) / self.temperature,
            hessian=self.curvature,
            betas=(self.beta1, self.beta2),
            radius=self.clip_radius,
            seed=run.seed,
        )
        record = run.record(self.name, asdict(self), len(data), self.temperature, guide.point_sites)
        return learn(
            VariationalPosterior(program, record, guide),
            _Loss(program, guide, set(random), len(data), self.temperature),
            optimiser,
            data,
            self,
            run,
            [_Deviations(guide, optimiser)],
        )


class _Loss(ProgramLoss):
    """Negative log-likelihood per example at one set of weights, and the prior of those that are points.

    The prior of random weights is the optimiser's, which knows its curvature.

    Args:
        program: the Pyro model.
        guide: whose means are the weights; what shapes its noise has no part in this.
        random: names of the random weights.
        size: number of training examples N.
        temperature: weight of the prior.
    """

    def __init__(self, program: Program, guide: Guide, random: set[str], size: int, temperature: float) -> None:
        super().__init__()
        self.program = program
        points = [part.values() for part in guide.modules() if isinstance(part, PointGuide)]
        self._places = {part.name: part.mu for part in _matrices(guide)} | {
            k: v for each in points for k, v in each.items()
        }
        # The very parameters of the guide, which is no part of this module: what is without gradients stays outside.
        self.means = nn.ParameterDict({encoded(name): place for name, place in self._places.items()})
        self.size = size
        self._random, self._temperature = random, temperature
        self._log_likelihood: Tensor | None = None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss per example, a scalar."""
        trace = poutine.trace(poutine.condition(self.program, data=self._places)).get_trace(batch, self.size)
        with full_precision(self.program.device):
            labels = trace.nodes["y"]
            fit = labels["fn"].log_prob(labels["value"]).mean()
            self._log_likelihood = fit.detach()
            self.count(self.size * self._log_likelihood)
            prior = [
                node["fn"].log_prob(node["value"]).sum()
                for name, node in trace.nodes.items()
                if node["type"] == "sample" and name not in self._random | {"y", "data"}
            ]
            return torch.stack(prior).sum() * (-self._temperature / self.size) - fit if prior else -fit

    def parts(self) -> dict[str, float]:
        """The log-likelihood of the last batch at its draw of the weights, in nats an example."""
        return {} if self._log_likelihood is None else {"log_likelihood": float(self._log_likelihood)}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The means: the frozen network is not part of a checkpoint."""
        return self.means.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave."""
        return self.means.load_state_dict(state_dict, strict=True, assign=assign)


@dataclass(frozen=True)
class _Deviations(Hook):
    """The optimiser's standard deviations, in the guide before it is saved."""

    guide: Guide
    optimiser: OnlineNewton

    def on_checkpoint(self, outcome: Outcome) -> None:
        """Put them there, in multiples of the prior's."""
        for part in _matrices(self.guide):
            part.to(part.mu.device)
            with torch.no_grad():
                part.log_eps.copy_((self.optimiser.deviation(part.mu) / part.sigma0).log())


def _matrices(guide: Guide) -> list[GaussianGuide]:
    return [part for part in guide.modules() if isinstance(part, GaussianGuide)]


def _normal_prior(program: Program, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and precision of each entry of the random weights under the prior, broadcastable to the weights."""
    laws, found = program.model.prior_laws(program.sites), {}
    for name in names:
        law = base_of(laws[name])
        if not (isinstance(law, Normal) or (isinstance(law, ColumnNormal) and law.independent_entries)):
            raise SettingError(
                f"The prior of site '{name}' is a {type(law).__name__} with correlations or none that is normal; "
                "ivon's update is for independent normal entries. Choose model='gaussian', or backend='svi'."
            )
        found[name] = (law.loc, law.scale.square().reciprocal())
    return found
