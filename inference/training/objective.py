"""What training needs of others: something to minimise, and hooks that are called as it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Hook", "Objective", "Outcome", "State"]


class Objective(nn.Module):
    """What is minimised: a module that maps a batch to its loss per example, a scalar.

    Its ``state_dict`` is what a checkpoint keeps. What a hook has to keep over a stop belongs there too.

    Attributes:
        keep_parts: whether `parts` will be asked for after this step.
    """

    keep_parts: bool = True
    #: The Trainer divides by the batches of a step; it would not, were ``forward`` to take further arguments.
    accepts_loss_kwargs: bool = False

    def parts(self) -> dict[str, float]:
        """What the log tells of the last loss beside its value."""
        return {}


@dataclass(frozen=True)
class State:
    """How far training is.

    Attributes:
        step: steps that are done.
        steps: all of them.
        epoch: passes over the data that are done.
    """

    step: int
    steps: int
    epoch: float


@dataclass(frozen=True)
class Outcome:
    """What training has taken and logged so far, the parts before a resumption included (but for the peak)."""

    seconds: float
    peak_memory_bytes: int
    history: list[dict[str, float]]


class Hook:
    """What is called as training goes on, in every process of it; whoever needs less leaves the rest out."""

    def before_step(self, state: State) -> None:
        """A step is about to be made."""

    def on_step(self, state: State) -> None:
        """A step was made."""

    def on_epoch(self, state: State) -> None:
        """A pass over the data was made, or the last part of one; its checkpoint follows."""

    def on_checkpoint(self, outcome: Outcome) -> None:
        """The weights are good, and if there is an output folder they are in it: after each epoch, and at a stop.

        Also where a fit is resumed that has no step left to make.
        """
