"""Passes over data: the rows that a network is shown, in batches, and the random numbers that go with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayeslora.observations.likelihoods import Categorical
from bayeslora.program import Program
from bayeslora.progress import track

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.observations.encoding import Collator
    from bayeslora.observations.likelihoods import Likelihood
    from bayeslora.tasks import Split

__all__ = ["Rows", "answers", "collator", "encoded", "logits_at", "undisturbed"]


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, and how a pass over them is made.

    Attributes:
        dataset: the rows.
        collate: what makes a batch of them.
        batch_size: rows a batch.
        progress: show a bar.
    """

    dataset: Dataset
    collate: Collator
    batch_size: int
    progress: bool

    def batches(self, device: torch.device, title: str = "predict") -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The network's inputs on ``device``, and which rows they are."""
        from bayeslora.observations.encoding import batches

        steps = -(-len(self.dataset) // self.batch_size)
        made = batches(self.dataset, self.collate, self.batch_size)
        for batch in track(made, title, total=steps, show=self.progress):
            inputs = {key: value.to(device) for key, value in batch.items() if key not in ("labels", "index")}
            yield inputs, batch["index"]


def encoded(program: Program, data: Split | Dataset) -> Dataset:
    """Token ids, labels and row numbers of ``data``.

    Raises:
        DataError: there are no rows, or raw text and no encoder to turn it into tokens.
    """
    from bayeslora.observations.encoding import encode

    return encode(data, program.encoder)


def collator(program: Program) -> Collator:
    """What pads the rows of the program's data."""
    from bayeslora.observations.encoding import Collator

    return Collator() if program.encoder is None else program.encoder.collator()


def answers(program: Program, data: Split | Dataset) -> tuple[Likelihood, tuple[str, ...], Collator]:
    """Likelihood, class names and padding of a prediction: the program's, but for the number of choices of a task."""
    from bayeslora.tasks import Split

    collate = collator(program)
    if program.encoder is None:
        return program.likelihood, (), collate
    spec = program.encoder.spec
    if not (isinstance(data, Split) and data.spec.max_choices and spec.max_choices):
        return program.likelihood, spec.labels, collate
    choices = data.spec.max_choices
    return Categorical(choices), data.spec.labels, replace(collate, choices=choices)


def logits_at(program: Program, weights: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Logits (examples, classes) at one set of weights, in the order of ``rows``."""
    found: Tensor | None = None
    for batch, index in rows.batches(program.device):
        logits = program.logits(weights, batch).cpu()
        if found is None:
            found = logits.new_empty(len(rows.dataset), logits.shape[1])
        found[index] = logits
    assert found is not None  # `encoded` refuses empty data
    return found


@contextmanager
def undisturbed(program: Program) -> Iterator[None]:
    """The network without dropout, which would add noise that is not the posterior's; then as it was."""
    was_training = program.network.training
    program.network.eval()
    try:
        yield
    finally:
        program.network.train(was_training)
        program.weights.restore()
