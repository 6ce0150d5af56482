"""Minimise a loss over batches with `transformers.Trainer`.

Accumulation, mixed precision, gradient checkpointing, schedules, trackers, resuming and several processes are the
Trainer's; what stands here is what it lacks: an objective and an optimiser of any kind, hooks, parts of the loss in the
log, a clean stop on a signal, and an end as soon as the loss is not finite.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from bayeslora.errors import PosteriorError, TrainingError
from bayeslora.inference.base import Run
from bayeslora.inference.training.objective import Hook, Objective, Outcome, State
from bayeslora.inference.training.order import Order, Ordered
from bayeslora.inference.training.process import peak, restored_generators
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.passes import Rows
from bayeslora.progress import bar
from bayeslora.rng import isolated
from bayeslora.signals import noted, stop
from bayeslora.store import CHECKPOINTS, is_main_process, last_checkpoint, record_at

__all__ = ["train"]


def train(
    objective: Objective,
    optimiser: Optimizer,
    rows: Rows,
    settings: TrainingSettings,
    run: Run,
    hooks: Sequence[Hook] = (),
    order: Ordered | None = None,
) -> Outcome:
    """Minimise an objective over rows.

    Args:
        objective: maps a batch to a scalar loss per example.
        optimiser: any of torch's kind over the objective's parameters. Forward and backward of each batch happen within
            its ``context()``, if it has such a method.
        rows: training rows, and what makes a batch of them.
        settings: of the optimisation.
        run: seed, output folder, resume.
        hooks: called in their order.
        order: in which the rows come, epoch by epoch; the run's own, if left out.

    Raises:
        TrainingError: the loss became infinite or not a number; the last checkpoint stays.
        KeyboardInterrupt: after Ctrl-C or another signal to stop, once the step is done and its checkpoint written.
    """
    with ExitStack() as stack:
        if run.output_dir is None:  # nothing stays
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = run.output_dir / CHECKPOINTS
        arguments = _arguments(settings, run, folder)
        stack.enter_context(restored_generators(arguments.device))
        asked = stack.enter_context(noted())
        objective.to(arguments.device)
        rows_a_step = settings.batch_size * settings.gradient_accumulation_steps
        if order is None:
            order = Order(rows.dataset, rows_a_step, run.seed, settings.group_by_length)
        progress = stack.enter_context(bar("fit", show=run.progress and is_main_process()))
        begun = record_at(run.output_dir) if run.output_dir and run.resume else None
        before = begun.cost.get("seconds", 0.0) if begun else 0.0

        def outcome() -> Outcome:
            seconds = before + time.perf_counter() - start
            return Outcome(seconds, peak(arguments.device), list(trainer.state.log_history))

        trainer = _Trainer(
            model=objective,
            args=arguments,
            train_dataset=rows.dataset,
            data_collator=rows.collate,
            optimizers=(optimiser, None),
        )
        trainer.order = order
        trainer.around = getattr(optimiser, "context", nullcontext)
        trainer.remove_callback(PrinterCallback)
        steps = _Steps(trainer, hooks, asked, progress, outcome)
        trainer.add_callback(steps)
        start = time.perf_counter()
        with suppress(_Ended):
            trainer.train(resume_from_checkpoint=_checkpoint(run) if run.resume else None)
        done = outcome()
    if steps.stopped is not None:
        stop(steps.stopped)
    return done


class _Ended(Exception):
    """The checkpoint that training was to go on from is that of its last step."""


class _Trainer(Trainer):
    """The Trainer for a module that returns its loss.

    Attributes:
        order: of the rows.
        around: context of forward and backward.
        last_batch: that was trained on.
        rows: of a batch of this step, on average.
        losses: sum of the losses after step ``logged``, the last one that was logged; a checkpoint keeps both.
    """

    order: Ordered
    around: Callable[[], AbstractContextManager[Any]]
    last_batch: dict[str, Tensor]
    rows: float
    losses: Tensor | float = 0.0
    logged: int = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, counted = super().get_batch_samples(*args, **kwargs)
        self.rows = sum(_rows_in(each) for each in batches) / max(len(batches), 1)
        return batches, counted

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor:
        self.last_batch = inputs
        loss: Tensor = model(inputs)
        return loss * (_rows_in(inputs) / self.rows)  # batches of a step are one of all their rows

    def check(self) -> None:
        """Make sure that the weights after the last step still give a finite loss.

        Raises:
            TrainingError: they do not.
        """
        with torch.no_grad(), isolated(0, self.args.device):
            loss = self.model(self.last_batch)
        self._refuse(loss, f"after step {self.state.global_step}")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check()  # a broken state must not replace the last good one
        super()._save_checkpoint(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = super()._clip_grad_norm(model)
        # Scaled to the longest that is allowed, a gradient without end is none: the weights would stay as they are.
        self._refuse(norm, f"at step {self.state.global_step + 1}", "length of the gradient")
        return norm

    def _refuse(self, found: Tensor, when: str, what: str = "loss") -> None:
        if not torch.isfinite(found):
            kept = "" if self.args.save_strategy == "no" else " A checkpoint that was written before is kept."
            raise TrainingError(
                f"The {what} is {float(found)} {when}. Try a lower learning rate, a longer warm-up of it (warmup), "
                "float32 in place of bfloat16, or, where there is a prior, one whose scales are neither so small nor "
                f"so large.{kept}"
            )

    def _get_learning_rate(self) -> float:
        rate: float = self.optimizer.param_groups[0]["lr"]  # of the log: a hook may have set it over the schedule's
        return rate

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.around():
            loss: Tensor = super().training_step(*args, **kwargs)
        # Before the optimiser's step, so that the weights of the last good step are kept.
        self._refuse(loss, f"at step {self.state.global_step + 1}")
        self.losses = self.losses + loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            step = self.state.global_step
            # The Trainer's own mean begins again where a run is resumed.
            total = self.accelerator.reduce(torch.as_tensor(self.losses, device=self.args.device), "mean")
            logs = {**logs, "loss": float(total) / (step - self.logged), **self.model.parts()}
            self.losses, self.logged = 0.0, step
        logs.pop("train_loss", None)  # a mean over the steps since the fit was resumed, by the number of all
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return self.order


@dataclass(eq=False)
class _Steps(TrainerCallback, ExportableState):
    """What happens between steps: hooks are called, and signals heeded; ``stopped`` is the one that ended training."""

    trainer: _Trainer
    hooks: Sequence[Hook]
    asked: Callable[[], int | None]
    progress: tqdm
    outcome: Callable[[], Outcome]
    stopped: int | None = None

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"losses": float(self.trainer.losses), "logged": self.trainer.logged}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = state.stateful_callbacks[type(self).__name__]
        self.trainer.losses, self.trainer.logged = kept["losses"], kept["logged"]
        if state.global_step >= state.max_steps:
            self.on_save(args, state, control)  # what hooks take of the optimiser was left to do
            raise _Ended

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.order.epoch = int(state.epoch or 0)
        self.progress.total = state.max_steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.model.keep_parts = (state.global_step + 1) % args.logging_steps == 0
        for hook in self.hooks:
            hook.before_step(_state(state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(state.global_step - self.progress.n)
        for hook in self.hooks:
            hook.on_step(_state(state))
        if (number := self._signal()) is not None:
            self.stopped = number
            control.should_training_stop = True

    def _signal(self) -> int | None:
        """The signal to stop that any process was sent: one that stopped alone would leave the others waiting."""
        number, accelerator = self.asked(), self.trainer.accelerator
        if accelerator.num_processes == 1:
            return number
        told = torch.tensor([number or 0], device=accelerator.device)
        return int(accelerator.gather(told).max()) or None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = _state(state)
        if now.epoch.is_integer() or now.step == now.steps:  # else it was stopped, and is gone on with later
            for hook in self.hooks:
                hook.on_epoch(now)
        if args.save_strategy == "no":
            self.trainer.check()
            self.on_save(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for hook in self.hooks:
            hook.on_checkpoint(self.outcome())


def _rows_in(batch: Mapping[str, Tensor]) -> int:
    return len(batch["labels"])


def _state(state: TrainerState) -> State:
    return State(state.global_step, state.max_steps, float(state.epoch or 0))


def _arguments(settings: TrainingSettings, run: Run, folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        bf16=settings.bf16,
        use_cpu=settings.cpu or not torch.cuda.is_available(),
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # `training_step` looks already, and each look waits for the device
        report_to=settings.report_to,
        save_strategy="epoch" if run.output_dir else "no",
        save_total_limit=settings.keep_checkpoints,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and not settings.cpu,
        disable_tqdm=True,  # its bar prints the log as well
        seed=run.seed,
    )
    # On several GPUs one process would train copies of the objective, whose weights are not where the network reads
    # them. A process takes one GPU; a launcher starts one process for each.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _checkpoint(run: Run) -> str:
    last = None if run.output_dir is None else last_checkpoint(run.output_dir)
    if last is None:
        raise PosteriorError(f"There is no checkpoint to resume from in '{run.output_dir}'. Fit without resume first.")
    return str(last)
