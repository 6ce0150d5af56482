"""Members of an ensemble trained side by side: one pass of the network is one of all, each with its own rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from pyro import poutine
from torch import Tensor, nn

from bayeslora.errors import SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.training.objective import Hook, Objective, Outcome
from bayeslora.inference.training.order import Order, Ordered
from bayeslora.inference.training.process import restored_network
from bayeslora.inference.training.trainer import train
from bayeslora.inference.variational.learning import describe
from bayeslora.inference.variational.point import MLE
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.inference.variational.rates import groups_of
from bayeslora.joined import Apart
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.store import POSTERIOR

__all__ = ["side_by_side"]

#: What members make together.
Whole = Callable[[Sequence[Posterior]], Posterior]
#: No gradient is so long.
UNCLIPPED = 1e30


def side_by_side(
    programs: Sequence[Program], data: Dataset, algorithm: MLE, run: Run, seeds: Sequence[int], whole: Whole
) -> Posterior:
    """Maximum likelihood of several members at once: what one after another gives, up to rounding and dropout's noise.

    Args:
        programs: with each member's initial weights, over one network.
        data: tokenised rows with labels.
        algorithm: its settings; a batch is of each member's.
        run: output folder, resume.
        seeds: of each member's order of the rows.
        whole: what the members make together, saved in the run's folder at every checkpoint.

    Raises:
        SettingError: the network, or the launcher's several processes, cannot do that.
    """
    program, count = programs[0], len(programs)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise _refused("each of several processes would have a part of all members")
    if not program.weights.stackable:
        raise _refused("what is trained is more than LoRA matrices and heads of linear layers")
    guides = [make_guide("delta", each.model, run.sites(each)) for each in programs]
    groups = [
        group
        for guide in guides
        for group in groups_of(
            guide, algorithm.learning_rate, algorithm.learning_rate, weight_decay=algorithm.weight_decay
        )
    ]
    optimiser = torch.optim.AdamW(groups, lr=algorithm.learning_rate)
    optimiser.register_step_pre_hook(_clipping(guides, algorithm.max_grad_norm))
    rows = Rows.of(program, data)
    rows_a_step = algorithm.batch_size * algorithm.gradient_accumulation_steps
    orders = [Order(rows.dataset, rows_a_step, seed, algorithm.group_by_length) for seed in seeds]
    # Each member's gradient is shortened by itself, not with those of the others.
    settings = replace(algorithm, batch_size=count * algorithm.batch_size, max_grad_norm=UNCLIPPED)
    members = []
    for each, guide, seed in zip(programs, guides, seeds, strict=True):
        record = replace(run, seed=seed).record(algorithm.name, asdict(algorithm), len(data), 0.0, guide.point_sites)
        members.append(VariationalPosterior(each, record, guide))
    kept, order = _Kept(members, run, whole), _Interleaved(orders, algorithm.batch_size)
    with restored_network(program, algorithm.gradient_checkpointing):
        try:
            kept.describe(train(_Losses(programs, guides), optimiser, rows, settings, run, [kept], order))
        except Apart as error:
            raise _refused("a layer is given something else than the batch's sequences") from error
    for member in members:
        member.record = replace(member.record, finished=True)
    return whole(members)


@dataclass(frozen=True)
class _Kept(Hook):
    """All members, saved in the run's folder at every checkpoint."""

    members: Sequence[VariationalPosterior]
    run: Run
    whole: Whole

    def on_checkpoint(self, outcome: Outcome) -> None:
        """Save the members as they are now."""
        self.describe(outcome)
        if self.run.output_dir is not None:
            self.whole(self.members).save(self.run.output_dir / POSTERIOR)

    def describe(self, outcome: Outcome) -> None:
        """Put each member's part of what training took, and its own losses, into its record."""
        seconds = outcome.seconds / len(self.members)
        for number, member in enumerate(self.members):
            history = [_own(entry, number) for entry in outcome.history]
            describe(member, replace(outcome, seconds=seconds, history=history))


class _Losses(Objective):
    """The sum of the members' losses per example: each one's gradient is that of its own."""

    def __init__(self, programs: Sequence[Program], guides: Sequence[Guide]) -> None:
        super().__init__()
        self.program = programs[0]
        self.guides = nn.ModuleList(guides)
        self._programs = tuple(programs)
        self._losses = torch.zeros(len(guides))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch whose equal parts are the members' own, a scalar."""
        pairs = zip(self._programs, self.guides, strict=True)
        draws = [poutine.condition(program.prior, data=guide())() for program, guide in pairs]
        weights, labels, ids = self.program.weights, batch["labels"].chunk(len(draws)), batch["input_ids"]
        # A row may have several sequences, one for each choice.
        weights.install(weights.joined(draws, ids.numel() // ids.shape[-1] // len(draws), flat=True))
        outputs = self.program.observation.run(self.program.network, batch).chunk(len(draws))
        pairs_of = zip(outputs, labels, strict=True)
        losses = torch.stack([-self.program.observation.log_prob(*pair).mean() for pair in pairs_of])
        self._losses = losses.detach()
        return losses.sum()

    def parts(self) -> dict[str, float]:
        """Each member's loss."""
        return {f"loss/{number}": value for number, value in enumerate(self._losses.tolist())}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The members' weights: the frozen network is not part of a checkpoint."""
        return self.guides.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave."""
        return self.guides.load_state_dict(state_dict, strict=True, assign=assign)


class _Interleaved(Ordered):
    """A batch of each order in turn.

    Args:
        orders: of as many rows each.
        batch_size: rows of each in a batch of all.
    """

    def __init__(self, orders: Sequence[Order], batch_size: int) -> None:
        self.orders, self.batch_size, self.epoch = orders, batch_size, 0

    def __len__(self) -> int:
        return sum(map(len, self.orders))

    def __iter__(self) -> Iterator[int]:
        for order in self.orders:
            order.epoch = self.epoch
        rows = [list(order) for order in self.orders]
        for start in range(0, len(rows[0]), self.batch_size):
            for each in rows:
                yield from each[start : start + self.batch_size]


def _clipping(guides: Sequence[Guide], longest: float) -> Callable[..., None]:
    """What shortens each member's gradient before a step."""

    def clip(*_: Any) -> None:
        for guide in guides:
            nn.utils.clip_grad_norm_(guide.parameters(), longest)

    return clip


def _own(entry: Mapping[str, float], number: int) -> dict[str, float]:
    """What the log says of one member."""
    shared = {name: value for name, value in entry.items() if not name.startswith("loss/")}
    return shared | ({"loss": entry[f"loss/{number}"]} if f"loss/{number}" in entry else {})


def _refused(why: str) -> SettingError:
    return SettingError(f"Members cannot be trained side by side: {why}. Fit one after the other (stacked=False).")
