"""AdaLoRA: maximum likelihood that moves the rank of the update to where it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor

from bayeslora.errors import SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.training.allocation import Allocating, Triplets
from bayeslora.inference.training.objective import Hook, State
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.learning import learn
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.point import MLE
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.inference.variational.rates import groups_of
from bayeslora.models.base import full_precision
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide, encoded
from bayeslora.program import Program
from bayeslora.settings import Count, NotNegative, Positive

__all__ = ["AdaLoRA"]

Share = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(MLE):
    r"""Maximum likelihood of updates P diag(e) Q, whose singular values e share a budget that shrinks as training goes.

    The network needs an adapter of PEFT's AdaLoRA (``lora="adalora"``), with whose rank all n updates begin. In
    the middle part of training those singular values are kept whose triplet of value and vectors matters most to the
    loss, of all updates together, and the others are set to zero. A zero may learn, and come back, until the next
    allocation; after the last one it stays. What PEFT multiplies an update by stays that of the rank at the start.

    Not all is as the paper prints it. Of the departure from orthogonal P and Q (equation 4) there is the mean over
    those of all layers in place of the sum, so that its weight does not depend on their number; published code, and
    PEFT, have the mean of norms that are not squared. Training begins at orthogonal P and Q of the same update: PEFT's
    are far from it, and as long as they are, the gradient of the departure decides what seems to matter. With 150 rows
    of the demo task, seed 0 and 100 steps at 2e-3, the four matrices of the feed-forward blocks end with 5 of 69 ranks
    from PEFT's start, and with 24 from this one. Equation 12 has t - t_i - t_f where that code has t - t_i, by which
    the budget falls from b(0) to b(T) without a jump, as it does here. Sensitivity is of the weights at which its
    gradient was taken (equation 8), where that code has those after the step; the gradient is shortened to
    ``max_grad_norm``.

    Attributes:
        rank: average rank of an update at the end, b(T) / n; two thirds of the adapter's own, if left out (published:
            the start is 1.5 times the end).
        begin: part of all steps, the first ones, in which all singular values are kept (t_i / T; published: .1 to .2).
        end: part of all steps, the last ones, in which the ranks stay (t_f / T; published: .3 to .6).
        every: steps from one allocation to the next (published: 1 to 100).
        beta1: weight of what is known of a weight's sensitivity against a step's.
        beta2: the same of its uncertainty.
        orthogonality: weight of the departure of P and Q from orthogonal ones in the loss per example (gamma;
            published: .1 to .5).
        learning_rate: of all weights (published: 5e-4 to 2.2e-3). The singular values start at zero and have far to
            go: P diag(e) Q without allocation, on 300 rows of SST-2 in 304, 80 and 40 steps, has an accuracy of .773,
            .509 and .509 at 5e-4, and of .788, .764 and .575 at 2e-3 (``benchmarks/studies/robustness.yaml``).

    References:
        Zhang et al., *Adaptive budget allocation for parameter-efficient fine-tuning*, ICLR 2023: equations 4 (the
        departure), 6 to 11 (importance) and 12 (budget).
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "Zhang et al., ICLR 2023 (AdaLoRA)"

    rank: Count | None = None
    begin: Share = 0.1
    end: Share = 0.5
    every: Count = 10
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    orthogonality: NotNegative = 0.1
    learning_rate: Positive = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin + self.end >= 1:
            raise SettingError(
                f"begin={self.begin:g} and end={self.end:g} leave no steps in which ranks are allocated: their sum has "
                "to be below 1."
            )

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Maximise log p(y | weights) over the weights, within the budget; the record's history ends with the ranks.

        Raises:
            SettingError: the adapter is none of AdaLoRA's, or ``rank`` is above its own.
        """
        guide = make_guide("delta", program.model, run.sites(program))
        triplets = _triplets(program, guide)
        _orthogonal(triplets)
        before = sum(each.e.numel() for each in triplets)
        after = self._target(before, len(triplets))
        groups = groups_of(guide, self.learning_rate, self.learning_rate, weight_decay=self.weight_decay)
        optimiser = Allocating(groups, self.learning_rate, triplets, beta1=self.beta1, beta2=self.beta2)
        record = run.record(self.name, asdict(self), len(data), 0.0, guide.point_sites)
        posterior = learn(
            VariationalPosterior(program, record, guide),
            _Loss(program, guide, len(data), triplets, self.orthogonality),
            optimiser,
            data,
            self,
            run,
            [_Budget(self, optimiser, before, after)],
        )
        ranks = {each.layer: int(each.e.count_nonzero()) for each in triplets}
        posterior.record = replace(posterior.record, history=[*posterior.record.history, {"ranks": ranks}])
        return posterior

    def _target(self, before: int, matrices: int) -> int:
        """The budget b(T) at the end, of a start with so many singular values."""
        if self.rank is None:
            return round(before / 1.5)
        if self.rank * matrices > before:
            raise SettingError(
                f"rank={self.rank} is above the adapter's own, {before / matrices:g} on average, from which ranks are "
                f"taken away: set it lower, or make the adapter with a higher one (lora.r={round(1.5 * self.rank)})."
            )
        return self.rank * matrices


def _triplets(program: Program, guide: Guide) -> list[Triplets]:
    """Those of all layers, in order.

    Raises:
        SettingError: there are none.
    """
    points = {name.rpartition(".")[2]: value for name, value in guide.named_parameters()}
    places = [site.name.removesuffix(".lora_E") for site in program.sites if site.name.endswith(".lora_E")]
    if not places:
        found = program.weights.config.get("peft_type")
        what = f"one of PEFT's type {found.value}" if found else "a network that is trained without PEFT"
        raise SettingError(
            f"'adalora' allocates the ranks of an adapter P diag(e) Q, and found {what}: make the program with "
            "lora='adalora', or choose 'mle'."
        )
    return [
        Triplets(place.removeprefix("tensor."), *(points[encoded(f"{place}.lora_{role}")] for role in "BEA"))
        for place in places
    ]


class _Loss(NegativeELBO):
    """The negative log-likelihood per example, and the weighted departure of P and Q from orthogonal matrices."""

    def __init__(
        self, program: Program, guide: Guide, size: int, triplets: Sequence[Triplets], orthogonality: float
    ) -> None:
        super().__init__(program, guide, MeanFieldBound(), size, 0.0)
        self._triplets, self._orthogonality = triplets, orthogonality
        self._departure: Tensor | None = None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss per example, a scalar."""
        loss = super().forward(batch)
        with full_precision(self.program.device):
            departure = _departure(self._triplets)
        self._departure = departure.detach()
        return loss + self._orthogonality * departure

    def parts(self) -> dict[str, float]:
        """Beside the parts of the bound, ``orthogonality``, before it is weighted, and the ``rank`` of all updates."""
        ranks = sum(int(each.e.count_nonzero()) for each in self._triplets)
        found = {} if self._departure is None else {"orthogonality": float(self._departure)}
        return super().parts() | found | {"rank": float(ranks)}


def _departure(triplets: Sequence[Triplets]) -> Tensor:
    """The mean of ||P^T P - I||^2 and ||Q Q^T - I||^2 over all updates, a scalar (equation 4)."""
    alike: dict[torch.Size, list[Tensor]] = {}
    for each in triplets:
        for columns in (each.p, each.q.mT):
            alike.setdefault(columns.shape, []).append(columns)
    total = []
    for shape, matrices in alike.items():  # at once, where shapes allow
        stack = torch.stack(matrices)
        total.append((stack.mT @ stack - torch.eye(shape[1], device=stack.device)).square().sum())
    return torch.stack(total).sum() / (2 * len(triplets))


@torch.no_grad()
def _orthogonal(triplets: Sequence[Triplets]) -> None:
    """Let P and Q be orthogonal, by the singular value decomposition of each update; none of more ranks than a side."""
    for _, p, e, q in triplets:
        if len(e) <= min(len(p), q.shape[1]):
            (left, by_left), (right, by_right) = torch.linalg.qr(p), torch.linalg.qr(q.mT)
            # Of a new adapter e is zero, and so is what is decomposed here: P and Q are then their own bases.
            u, s, v = torch.linalg.svd((by_left * e.mT) @ by_right.mT)
            p.copy_(left @ u)
            e.copy_(s.unsqueeze(1))
            q.copy_(v @ right.mT)


@dataclass(frozen=True)
class _Budget(Hook):
    """How many singular values are kept, by the number of the step (equation 12)."""

    settings: AdaLoRA
    optimiser: Allocating
    before: int
    after: int

    def before_step(self, state: State) -> None:
        """Tell the optimiser. After the last allocation it measures no more, so that the same values stay zero."""
        number, last = state.step + 1, state.steps - int(self.settings.end * state.steps)
        first = int(self.settings.begin * state.steps)
        left = max(0.0, 1 - (number - first) / (last - first))
        due = number >= last or (number > first and number % self.settings.every == 0)
        self.optimiser.measuring = number <= last
        self.optimiser.budget = int(self.after + (self.before - self.after) * left**3) if due else None
