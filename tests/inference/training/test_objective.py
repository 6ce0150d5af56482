"""The seam of training: any objective, any optimiser, hooks at steps, epochs and checkpoints."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import tiny_rows
from torch import Tensor, nn
from transformers import TrainingArguments

from bayeslora.errors import TrainingError
from bayeslora.inference.base import Run
from bayeslora.inference.training.objective import Hook, Objective, Outcome, State
from bayeslora.inference.training.settings import TrainingSettings
from bayeslora.inference.training.trainer import _Trainer, train
from bayeslora.observations import Classes, Padding, encode
from bayeslora.passes import Rows
from bayeslora.signals import Stopped


@dataclass(frozen=True)
class Quick(TrainingSettings):
    name = "toy"

    epochs: float = 3
    batch_size: int = 4
    learning_rate: float = 0.1
    log_every: int = 1
    cpu: bool = True


class Toy(Objective):
    """A point that is drawn to the mean of the labels; what it sees is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.register_buffer("epochs", torch.zeros(()))
        self.rows: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            self.rows.append(batch["index"].tolist())
            self.modes.append(self.training)
        return (self.place - batch["labels"].float()).square().mean()

    def parts(self) -> dict[str, float]:
        return {"place": self.place.item()}


class Perturbed(torch.optim.SGD):
    """Forward and backward at a point beside the one that moves, as IVON's are."""

    inside = 0

    @contextmanager
    def context(self) -> Iterator[None]:
        (place,) = self.param_groups[0]["params"]
        with torch.no_grad():
            place += 1
        self.inside += 1
        try:
            yield
        finally:
            with torch.no_grad():
                place -= 1


class Counts(Hook):
    """Counts what is fired, and keeps the passes over the data in the objective."""

    def __init__(self, objective: Toy) -> None:
        self.objective = objective
        self.before: list[int] = []
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self.checkpoints: list[int] = []

    def before_step(self, state: State) -> None:
        self.before.append(state.step)

    def on_step(self, state: State) -> None:
        self.steps.append(state.step)

    def on_epoch(self, state: State) -> None:
        self.epochs.append(state.epoch)
        self.objective.epochs += 1

    def on_checkpoint(self, outcome: Outcome) -> None:
        self.checkpoints.append(len(outcome.history))


def toy_rows(n: int = 12) -> Rows:
    classes = Classes(3)
    return Rows(encode(tiny_rows(n), classes, None), classes, classes.collator(Padding()))


def minimised(folder: Path | None = None, *hooks: Hook, objective: Toy | None = None, **settings: Any) -> Toy:
    toy = objective or Toy()
    optimiser = torch.optim.SGD(toy.parameters(), lr=0.1)
    run = Run(output_dir=folder, progress=False, resume=bool(settings.pop("resume", False)))
    train(toy, optimiser, toy_rows(), Quick(**settings), run, hooks)
    return toy


def test_any_objective_is_minimised_and_its_parts_are_logged() -> None:
    toy = Toy()
    optimiser = torch.optim.SGD(toy.parameters(), lr=0.1)
    outcome = train(toy, optimiser, toy_rows(), Quick(epochs=40, warmup=0.0), Run(progress=False))
    labels = torch.as_tensor(toy_rows().dataset["labels"][:]).float()
    assert toy.place.item() == pytest.approx(float(labels.mean()), abs=0.1)
    assert outcome.history[-2]["place"] == pytest.approx(toy.place.item(), abs=0.1)
    assert all(toy.modes)


def test_the_optimisers_context_is_around_forward_and_backward() -> None:
    toy = Toy()
    optimiser = Perturbed(toy.parameters(), lr=0.1)
    settings = Quick(epochs=40, warmup=0.0, batch_size=2, gradient_accumulation_steps=2)
    train(toy, optimiser, toy_rows(), settings, Run(progress=False))
    labels = torch.as_tensor(toy_rows().dataset["labels"][:]).float()
    assert optimiser.inside == 40 * 6  # each batch of a step
    assert toy.place.item() == pytest.approx(float(labels.mean()) - 1, abs=0.1)


def test_a_step_that_lacks_a_batch_is_as_long_as_its_rows_say() -> None:
    toy = Toy()
    optimiser = torch.optim.SGD(toy.parameters(), lr=1e-9)
    outcome = train(toy, optimiser, toy_rows(), Quick(epochs=1, gradient_accumulation_steps=2), Run(progress=False))
    labels = torch.as_tensor(toy_rows().dataset["labels"][:]).float()
    one, two, three = (labels[rows] for rows in toy.rows)
    logged = [(entry["loss"], entry["grad_norm"]) for entry in outcome.history if "loss" in entry]
    for found, rows in zip(logged, (torch.cat([one, two]), three), strict=True):
        assert found == pytest.approx((float(rows.square().mean()), 2 * float(rows.mean())), rel=1e-4)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("epochs", "steps", "ends"), [(3, 9, [1, 2, 3]), (1.5, 5, [1, 1 + 2 / 3])])
def test_hooks_fire_with_and_without_a_folder(
    tmp_path: Path, kept: bool, epochs: float, steps: int, ends: list[float]
) -> None:
    counts = Counts(toy := Toy())
    minimised(tmp_path if kept else None, counts, objective=toy, epochs=epochs)
    assert counts.before == list(range(steps))
    assert counts.steps == list(range(1, steps + 1))
    assert counts.epochs == pytest.approx(ends)
    assert counts.checkpoints == [min(3 * (end + 1), steps) for end in range(len(ends))]
    assert bool(list(tmp_path.rglob("checkpoint-*"))) is kept


class Stop(Hook):
    """A signal after a step; Ctrl-C, if no other."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step(self, state: State) -> None:
        if state.step == self.step:
            os.kill(os.getpid(), self.number)


# Stopped at the end of an epoch and within one, between two entries of the log, with a batch left of a step, and at the
# end of all.
@pytest.mark.parametrize(("step", "accumulation", "log_every"), [(3, 2, 1), (4, 1, 4), (5, 2, 4), (8, 1, 4)])
def test_a_resumed_run_ends_where_the_whole_one_does(
    tmp_path: Path, step: int, accumulation: int, log_every: int
) -> None:
    settings = {
        "epochs": 2.5, "batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation,
        "log_every": log_every,
    }  # fmt: skip
    counts = Counts(whole := Toy())
    history = _history(whole, None, settings, counts)
    first, second = Counts(stopped := Toy()), Counts(resumed := Toy())
    with pytest.raises(KeyboardInterrupt):
        _history(stopped, tmp_path, settings, first, Stop(step))
    assert first.checkpoints and (tmp_path / "checkpoints" / f"checkpoint-{step}").exists()
    found = _history(resumed, tmp_path, settings | {"resume": True}, second)
    assert torch.equal(resumed.place, whole.place)
    assert resumed.epochs == whole.epochs == 3
    assert first.steps + second.steps == counts.steps
    assert first.epochs + second.epochs == counts.epochs
    assert stopped.rows + resumed.rows == whole.rows
    assert found == history
    again = Counts(ended := Toy())  # killed after the last checkpoint
    assert _history(ended, tmp_path, settings | {"resume": True}, again) == history
    assert not again.steps and torch.equal(ended.place, whole.place)


def _history(toy: Toy, folder: Path | None, settings: dict[str, Any], *hooks: Hook) -> list[dict[str, float]]:
    settings = dict(settings)
    run = Run(output_dir=folder, progress=False, resume=settings.pop("resume", False))
    optimiser = torch.optim.SGD(toy.parameters(), lr=0.1, momentum=0.9)
    outcome = train(toy, optimiser, toy_rows(), Quick(**settings), run, hooks)
    return [entry for entry in outcome.history if "loss" in entry]


def test_every_checkpoint_can_be_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        minimised(tmp_path, Stop(4), keep_checkpoints=5)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-3", "checkpoint-4"]
    parts = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert all(parts <= {path.name for path in folder.iterdir()} for folder in folders)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_any_signal_to_stop_leaves_a_checkpoint_and_says_which_it_was(tmp_path: Path, number: int) -> None:
    counts = Counts(toy := Toy())
    with pytest.raises(Stopped) as found:
        minimised(tmp_path, counts, Stop(2, number), objective=toy)
    assert found.value.number == number
    assert counts.steps == [1, 2] and counts.epochs == [] and counts.checkpoints == [2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_weights_without_a_finite_loss_are_refused_without_a_folder_too() -> None:
    toy = Toy()
    optimiser = torch.optim.SGD(toy.parameters(), lr=1e38)
    with pytest.raises(TrainingError, match="after step 1"):
        train(toy, optimiser, toy_rows(), Quick(warmup=0.0, max_grad_norm=1e9, epochs=0.1), Run(progress=False))


def test_one_process_on_several_gpus_trains_the_objective_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    begin, loss = TrainingArguments.__post_init__, _Trainer.compute_loss

    def on_two(arguments: TrainingArguments) -> None:
        begin(arguments)
        arguments._n_gpu = 2

    def spied(trainer: _Trainer, model: nn.Module, *rest: Any, **more: Any) -> Tensor:
        seen.append(model)
        return loss(trainer, model, *rest, **more)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_two)
    monkeypatch.setattr(_Trainer, "compute_loss", spied)
    toy = minimised()
    assert all(model is toy for model in seen)
    assert all(len(rows) == 4 for rows in toy.rows)  # not as many for each
