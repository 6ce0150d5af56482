"""The protocol of an observation: what is read of a network's output, and how labels follow from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayeslora.errors import DataError
from bayeslora.observations.batches import Batch, Collator, Padding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bayeslora.observations.encoding import Encoder
    from bayeslora.predict.prediction import Prediction
    from bayeslora.tasks import Split, Task, TaskSpec

__all__ = ["LENGTH", "Causal", "Curved", "Drawn", "Observation", "Sampled"]

#: Most tokens of a row, where nothing else is said.
LENGTH = 256
#: Keys of a batch that are not arguments of the network.
NOT_INPUTS = frozenset({"labels", "index"})


@dataclass(frozen=True)
class Observation(ABC):
    """What is read of a network's output, and how labels follow from it: the one place that knows both.

    A frozen dataclass whose fields are plain data, kept with every posterior.

    Attributes:
        name: of the observation.
        kinds: of the tasks whose labels it explains; see `bayeslora.tasks`.
        network: Auto class of transformers that has the right head.
        peft_task: PEFT's name for such a network, or None.
        causal: whether the network is a causal language model with its own head.
        apart: columns of a batch that are not arguments of the network, beside labels and index.
        label: type of a label, as which those of tokenised rows are read; None leaves them as they are.
        rate: what `constant` knows of the labels, in words.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    network: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str | None] = "SEQ_CLS"
    causal: ClassVar[bool] = False
    apart: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[type[int] | type[float] | None] = None
    rate: ClassVar[str] = "the shares of the labels"

    @classmethod
    @abstractmethod
    def of(cls, spec: TaskSpec) -> Observation:
        """The observation of a task's labels."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of outputs that are read of an example."""

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec) -> Observation:
        """The observation with what only the network's tokenizer can tell, such as the tokens of labels."""
        return self

    def for_training(self, rows: Split, head: Callable[[], Observation | None]) -> Observation:
        """The observation with what only rows can tell, such as the spread of real labels.

        Args:
            rows: of a task to train on; there may be none.
            head: gives what the network's head was trained under, as far as it is known; None for one just drawn.
        """
        return self

    def for_rows(self, spec: TaskSpec) -> Observation:
        """The observation of rows of another task of the same kind."""
        return self

    def length(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
        """Most tokens of a row, where nobody says how many; texts that are longer are cut."""
        return LENGTH

    def for_network(self, network: nn.Module) -> Observation:
        """The observation as a network can be read; what that costs is said in a warning.

        Raises:
            SettingError: it cannot.
        """
        return self

    def head(self, spec: TaskSpec) -> dict[str, Any]:
        """What the network's configuration has to say of its head."""
        return {}

    def trained_in_full(self, base: nn.Module) -> list[str]:
        """Modules that are trained in full beside LoRA: all of the network but its body."""
        # PEFT matches by the end of a name: naming a head's dropout would also hit LoRA's own dropout.
        return [
            name
            for name, module in base.named_children()
            if name != getattr(base, "base_model_prefix", "") and next(module.parameters(), None) is not None
        ]

    def shown(self, spec: TaskSpec, row: Mapping[str, Any], label: float | None = None) -> str:
        """A row of a task for the eye, as a network reads it, and what answers it."""
        return spec.rules.render(spec, spec.texts(row), label)

    def columns(self, spec: TaskSpec) -> tuple[str, ...]:
        """Fields that a row has to have for a prediction of it."""
        return spec.columns

    def tokens(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> dict[str, list[Any]]:
        """Columns of token ids of some rows of a task."""
        return encoder.pairs([pair for row in rows for pair in spec.texts(row)])

    def asked(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]], spec: TaskSpec) -> list[list[int]]:
        """Token ids of what a causal language model goes on after, of some rows of a task; answers are left out."""
        raise TypeError(f"The observation '{self.name}' is not of a causal language model: it asks nothing.")

    def collator(self, padding: Padding) -> Collator:
        """What makes batches of encoded rows."""
        return Collator(padding)

    def inputs(self, batch: Mapping[str, Tensor]) -> Batch:
        """The network's arguments among the tensors of a batch."""
        return {key: value for key, value in batch.items() if key not in NOT_INPUTS | self.apart}

    def attended(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which tokens are of the text, in each sequence of each example: (examples, sequences, tokens)."""
        return batch["attention_mask"].bool().unsqueeze(1)

    def scored(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Example of each position that the head is given (positions,), where it is given those of all in one row."""
        return None

    def run(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Pass a batch through the network: outputs (examples, outputs) in float32."""
        return self.read(network(**self.inputs(batch)), batch)

    def read(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Outputs (examples, outputs) in float32 of what the network returned."""
        logits: Tensor = output.logits
        return logits.float()

    @abstractmethod
    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """Distribution of the labels (..., examples) given outputs (..., examples, outputs)."""

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Log density of labels (examples,) given outputs (..., examples, outputs): (..., examples)."""
        found: Tensor = self.distribution(outputs).log_prob(labels)
        return found

    def chance(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Log density of labels (examples,) for one who knows nothing of them: with outputs that are all zero.

        Args:
            outputs: of the network (examples, outputs), which say what a row does not have, by minus infinity.
            labels: of the data.
        """
        return self.log_prob(torch.where(outputs.isneginf(), outputs, 0.0), labels)

    def constant(self, labels: Tensor) -> Tensor | None:
        """The outputs (outputs,) that explain labels (examples,) best if all rows have the same; None: not known.

        How well they do is what the base rate of the labels tells without the texts.
        """
        return None

    def observe(self, outputs: Tensor, batch: Mapping[str, Tensor], size: int) -> None:
        """The Pyro model of the labels: site ``y`` in a plate that scales a batch up to ``size`` examples."""
        labels = batch["labels"]
        # The plate asks which rows it holds only to know how many; a user's own batch may not number them.
        rows = batch["index"] if "index" in batch else torch.arange(len(labels), device=labels.device)
        with pyro.plate("data", size, subsample=rows):
            pyro.sample("y", self.distribution(outputs), obs=labels)

    @abstractmethod
    def check(self, labels: Sequence[Any]) -> None:
        """Make sure that labels can be what is observed.

        Raises:
            DataError: one cannot (the message names the row).
        """

    @abstractmethod
    def predicted(
        self, outputs: Tensor, labels: Tensor | None = None, names: tuple[str, ...] = (), **made: Any
    ) -> Prediction:
        """The prediction that outputs (draws, examples, outputs) make.

        Args:
            outputs: under each draw.
            labels: true labels (examples,), where they are known.
            names: of the classes, if labels are such.
            made: how the outputs were made: ``method``; ``aleatoric``, the expected entropy (examples,), where a
                formula gives it in place of draws; ``averaged``, of how many draws an output is the average; and
                ``stretch``, of the law of real labels about its mean.
        """

    @property
    def prediction(self) -> type[Prediction]:
        """Class of what is predicted by outputs, such as `ClassPrediction`."""
        return type(self.predicted(torch.zeros(1, 1, self.outputs)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `bayeslora.observations.build` makes the same observation."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Causal(Observation):
    """An observation of a causal language model, whose head is its own: nothing is to be said of it, nor learned."""

    network: ClassVar[str] = "AutoModelForCausalLM"
    peft_task: ClassVar[str | None] = "CAUSAL_LM"
    causal: ClassVar[bool] = True

    def head(self, spec: TaskSpec) -> dict[str, Any]:
        """What the configuration has to say of a head: nothing."""
        return {}

    def trained_in_full(self, base: nn.Module) -> list[str]:
        """Modules that are trained in full beside LoRA: none."""
        return []


class Curved(ABC):
    """An observation whose log-likelihood has known derivatives by the outputs: what Laplace's approximation needs."""

    @abstractmethod
    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Derivative of the log-likelihood of ``labels`` (examples,) by the outputs, in their shape."""

    @abstractmethod
    def gain(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How much the log-likelihood of ``labels`` (examples,) could rise at most, with other outputs: (examples,)."""

    @abstractmethod
    def curvature_root(self, outputs: Tensor) -> Tensor:
        """Vectors r with sum_k r_k r_k^T = the Fisher information of the outputs: (vectors, *shape of outputs)."""


@dataclass(frozen=True)
class Drawn:
    """A pass of a batch through the network, with labels that were drawn from what it says.

    Attributes:
        log_likelihood: of the labels of the data (examples,).
        drawn: log-likelihoods that can be differentiated (examples, 2): of all labels that were drawn in place of those
            of an example, and of one of them, chosen at random.
        one: log-likelihood of the label of the data in whose place that one is (examples,).
        offset: of that place (examples,): with r and s the scores of the label that was drawn and of the data's, and F
            the Fisher information, r^T F^+ s, by which the score of what was drawn gives on average that of the data.
    """

    log_likelihood: Tensor
    drawn: Tensor
    one: Tensor
    offset: Tensor


class Sampled(ABC):
    """An observation of so many labels a row that Laplace's approximation draws them to know how they curve."""

    @abstractmethod
    def drawn(self, network: nn.Module, batch: Mapping[str, Tensor], sample: bool) -> Drawn:
        """Pass a batch through the network, and draw labels.

        Args:
            network: with weights in place.
            batch: with the labels of the data.
            sample: draw them, by torch's global generator; else those of the data stand for what is drawn.
        """


def refuse(row: int, label: Any, expected: str) -> DataError:
    """The error of a label that cannot be observed."""
    return DataError(f"Row {row} has label {label!r}; expected {expected}.")
