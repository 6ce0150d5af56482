"""How a loss is minimised, as settings that all backends share that train."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from transformers.integrations import get_available_reporting_integrations

from bayeslora.errors import SettingError, unknown
from bayeslora.settings import Count, Positive, Settings

__all__ = ["Schedule", "TrainingSettings"]

#: Schedules of transformers that need no more than a name.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """How a loss is minimised.

    Attributes:
        epochs: passes over the training data.
        batch_size: rows a step and process; the last batch of an epoch may be smaller and is not dropped. Of several
            processes it is as large as the others', with rows from the epoch's beginning in it once more.
        learning_rate: of the weights, for AdamW. Plain LoRA overfits or falls back to chance at much higher ones (`mle`
            with MiniLM on 300 rows of SST-2, 8 epochs, seeds 0 and 1, at 5e-4 two more, 800 other rows; of the study
            ``benchmarks/studies/rates.yaml``: accuracy / NLL at 3e-4 .742 / .536, at 5e-4 .808 / .484, at
            1e-3 .791 / .825, at 2e-3 .775 / 1.307).
        max_grad_norm: longest gradient of a step; longer ones are shortened.
        warmup: part of all steps in which the learning rate rises from zero.
        schedule: of the learning rate, one of transformers' that need no more than a name.
        gradient_accumulation_steps: batches a step.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        bf16: run the network under bfloat16 autocast; priors and guides stay in float32.
        group_by_length: put rows of like length into the same batch, which saves padding.
        log_every: steps between two entries of the log.
        keep_checkpoints: number of epochs, the last ones, whose checkpoints stay in the output folder.
        report_to: trackers of transformers, such as ``"tensorboard"`` or ``"wandb"``.
        cpu: stay on the CPU even if there is a GPU.
    """

    name: ClassVar[str]

    epochs: Positive = 10.0
    batch_size: Count = 32
    learning_rate: Positive = 5e-4
    max_grad_norm: Positive = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    schedule: Schedule = "linear"
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    group_by_length: bool = True
    log_every: Count = 10
    keep_checkpoints: Count = 1
    report_to: str = "none"
    cpu: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.report_to in ("none", "all"):
            return
        trackers = ["none", "all", *get_available_reporting_integrations()]
        if self.report_to not in trackers:
            raise SettingError(unknown("tracker", self.report_to, trackers) + " Others have to be installed.")

    def steps_of(self, rows: int) -> int:
        """Steps of a fit to so many rows, which the processes that a launcher started share."""
        batches = math.ceil(math.ceil(rows / int(os.environ.get("WORLD_SIZE", "1"))) / self.batch_size)
        return math.ceil(self.epochs * math.ceil(batches / self.gradient_accumulation_steps))
