"""Passes over data: the rows that a network is shown, in batches, and what it says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayeslora.errors import DataError
from bayeslora.observations import Observation, batches, encode, is_tokenised
from bayeslora.observations.batches import Batch, Collator
from bayeslora.observations.encoding import check_tokens
from bayeslora.positions import learned_positions, vocabulary
from bayeslora.program import Program
from bayeslora.progress import track
from bayeslora.tasks import Split, Task, check_compatible, rows_of

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.predict.prediction import Prediction

__all__ = ["Rows", "undisturbed"]


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, and how a pass over them is made.

    Attributes:
        dataset: the rows.
        observation: of their labels; rows of another task may have another number of choices than the program's.
        collate: what makes a batch of them.
        names: of the classes, where labels are such.
        batch_size: rows a batch.
        progress: show a bar.
    """

    dataset: Dataset
    observation: Observation
    collate: Collator
    names: tuple[str, ...] = ()
    batch_size: int = 64
    progress: bool = False

    @classmethod
    def of(cls, program: Program, data: Any, batch_size: int = 64, progress: bool = False) -> Rows:
        """Rows as a program's network reads them.

        Args:
            program: whose network and encoder.
            data: rows of a task, a data set that is tokenised already, new rows as `bayeslora.tasks.rows_of` takes
                them: texts, pairs, mappings, a DataFrame; or what this made of them for the same network.
            batch_size: rows a batch.
            progress: show a bar.

        Raises:
            DataError: there are no rows, raw text and no encoder to turn it into tokens, or tokens that the network
                does not know.
            TaskError: the rows are of a task with other classes.
        """
        if isinstance(data, cls):
            return replace(data, batch_size=batch_size, progress=progress)
        spec = None if program.encoder is None else program.encoder.spec
        if isinstance(data, Task):
            raise DataError("Expected rows, found a whole task: give one of its splits, such as task.train.")
        if not isinstance(data, Split) and not is_tokenised(data):
            if spec is None:
                raise DataError("The rows are not tokenised: expected a column 'input_ids', or an encoder to make it.")
            data = rows_of(spec, data)
        if isinstance(data, Split) and spec is not None:
            check_compatible(spec, data.spec)
            spec = data.spec
        observation = program.observation if spec is None else program.observation.for_rows(spec)
        collate = observation.collator(program.padding)
        names = () if spec is None or program.encoder is None else program.encoder.names(spec)
        rows = encode(data, observation, program.encoder)
        check_tokens(rows, vocabulary(program.weights.base), learned_positions(program.network))
        return cls(rows, observation, collate, names, batch_size, progress)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Tensor | None:
        """Labels (examples,), where they are known."""
        known = "labels" in self.dataset.column_names
        return torch.as_tensor(self.dataset["labels"][:]) if known else None

    def predicted(
        self,
        outputs: Tensor,
        aleatoric: Tensor | None = None,
        averaged: int = 1,
        stretch: float = 1.0,
        *,
        method: str = "sample",
    ) -> Prediction:
        """The prediction of these rows that `bayeslora.predictors.Outputs` make."""
        made: dict[str, Any] = {"method": method}
        made |= {} if aleatoric is None else {"aleatoric": aleatoric}
        made |= {} if averaged == 1 else {"averaged": averaged}
        made |= {} if stretch == 1 else {"stretch": stretch}
        return self.observation.predicted(outputs, self.labels, self.names, **made)

    def nll(self, outputs: Tensor) -> float:
        """Mean over rows of minus the log density of the label, averaged over outputs (draws, examples, outputs).

        It is infinite where an output is NaN or infinity, as of weights that are too large for the network's precision.
        """
        if not (outputs < math.inf).all():
            return math.inf
        return -float(self.predicted(outputs).log_predictive_density.double().mean())

    def batches(self, device: torch.device, title: str = "predict") -> Iterator[tuple[Batch, Tensor]]:
        """Batches on ``device``, labels included where they are known, and which rows they are."""
        steps = -(-len(self.dataset) // self.batch_size)
        made = batches(self.dataset, self.collate, self.batch_size)
        for batch in track(made, title, total=steps, show=self.progress):
            index = batch.pop("index")
            yield {key: value.to(device) for key, value in batch.items()}, index

    def outputs(self, program: Program, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs (examples, outputs) of the network at one set of weights, in the order of the rows, on the CPU."""
        return self.outputs_of(program, [weights])[0]

    def outputs_of(self, program: Program, draws: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """The same at several draws of the weights: (draws, examples, outputs).

        As many draws are run at once as let a pass have no more rows than ``batch_size``.
        """
        at_once = max(1, self.batch_size // len(self.dataset))
        left, found = iter(draws), []
        while some := list(islice(left, at_once)):
            found.append(self._outputs(program, some))
        return torch.cat(found)

    def passed(self, program: Program, outputs_of: Callable[[Batch, Tensor], Tensor]) -> Tensor:
        """Outputs (examples, outputs) of a pass whose values depend on the rows, in their order, on the CPU.

        Args:
            program: whose network it is.
            outputs_of: a batch and which rows it holds.
        """
        found, order = [], []
        for batch, index in self.batches(program.device):
            found.append(outputs_of(batch, index).cpu())
            order.append(index.cpu())
        return torch.cat(found)[torch.cat(order).argsort()]

    def _outputs(self, program: Program, draws: Sequence[Mapping[str, Tensor]]) -> Tensor:
        found: Tensor | None = None
        for batch, index in self.batches(program.device):
            outputs = program.joint_outputs(draws, batch).cpu()
            if found is None:
                found = outputs.new_empty(len(draws), len(self.dataset), outputs.shape[-1])
            found[:, index] = outputs
        assert found is not None  # `encode` refuses empty data
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
