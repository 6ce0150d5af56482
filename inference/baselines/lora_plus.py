"""LoRA+: maximum likelihood with a higher learning rate of B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset

from bayeslora.errors import SettingError
from bayeslora.inference.base import Run
from bayeslora.inference.variational.elbo import MeanFieldBound
from bayeslora.inference.variational.learning import optimise
from bayeslora.inference.variational.point import MLE
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import encoded
from bayeslora.program import Program
from bayeslora.settings import Positive

__all__ = ["LoRAPlus"]


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(MLE):
    """Maximum likelihood by AdamW with a higher learning rate for the matrices B, which start at zero.

    Attributes:
        learning_rate: of the matrices A, the head and all else.
        ratio: of B's learning rate to that (published: 16).

    References:
        Hayou, Ghosh and Yu, *LoRA+: efficient low rank adaptation of large models*, ICML 2024.
    """

    name: ClassVar[str] = "lora+"
    paper: ClassVar[str] = "Hayou et al., ICML 2024 (LoRA+)"

    learning_rate: Positive = 1e-4
    ratio: Positive = 16.0

    def fit(self, program: Program, data: Dataset, run: Run) -> VariationalPosterior:
        """Maximise log p(y | weights) over the weights.

        Raises:
            SettingError: there are no matrices B.
        """
        guide = make_guide("delta", program.model, run.sites(program))
        of_b = {encoded(site.name) for site in program.sites if site.role == "B"}
        learned = {name: value for name, value in guide.named_parameters() if value.requires_grad}

        def is_b(name: str) -> bool:
            return name.rpartition(".")[2] in of_b

        faster = [value for name, value in learned.items() if is_b(name)]
        if not faster:
            raise SettingError(
                f"A rate of B's own needs LoRA matrices, each a site of the model '{program.model.name}': take 'mle'."
            )
        others = [value for name, value in learned.items() if not is_b(name)]
        rates = ((others, self.learning_rate), (faster, self.learning_rate * self.ratio))
        return optimise(
            program,
            guide,
            data,
            self,
            run,
            groups=[{"params": each, "lr": rate, "weight_decay": self.weight_decay} for each, rate in rates if each],
            elbo=MeanFieldBound(),
            temperature=0.0,
        )
