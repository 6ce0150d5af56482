"""Each setting of training has its effect: a test here is red if the setting is withheld from the Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scenarios import tiny_program, tiny_rows
from torch import Tensor, nn

from bayeslora.errors import SettingError
from bayeslora.inference import fit
from bayeslora.inference.training import settings as settings_room
from bayeslora.inference.training import trainer as room
from bayeslora.inference.training.settings import Schedule
from bayeslora.inference.training.trainer import _Trainer
from bayeslora.inference.variational.point import MLE
from bayeslora.observations import Classes
from bayeslora.posterior import Posterior

QUICK = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "progress": False, "cpu": True}


def fitted(backend: str = "mle", rows: int = 12, **settings: Any) -> Posterior:
    return fit(tiny_program(), tiny_rows(rows), backend, **QUICK | settings)


def logged(posterior: Posterior, name: str) -> list[float]:
    return [entry[name] for entry in posterior.record.history if "loss" in entry]


def steps(posterior: Posterior) -> list[float]:
    return logged(posterior, "step")


def length(posterior: Posterior) -> float:
    return float(torch.stack([value.square().sum() for value in posterior.mean().values()]).sum())


def moved(posterior: Posterior) -> float:
    mean = posterior.mean()
    return max(float((mean[site.name] - site.initial).abs().max()) for site in posterior.program.sites)


@pytest.mark.parametrize(("epochs", "expected"), [(1, 3), (2, 6), (0.5, 2), (1.5, 5)])
def test_epochs_and_parts_of_them_are_counted_in_steps(epochs: float, expected: int) -> None:
    assert steps(fitted(epochs=epochs)) == list(range(1, expected + 1))


def test_batches_and_accumulation_divide_the_rows_into_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    loss = _Trainer.compute_loss

    def counted(trainer: _Trainer, model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **more: Any) -> Tensor:
        seen.append(len(inputs["labels"]))
        return loss(trainer, model, inputs, *rest, **more)

    monkeypatch.setattr(_Trainer, "compute_loss", counted)
    assert len(steps(fitted(batch_size=3, gradient_accumulation_steps=2, epochs=1))) == 2
    assert seen == [3, 3, 3, 3]


def test_steps_are_known_before_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"epochs": 1.5}, {"batch_size": 5}, {"batch_size": 3, "gradient_accumulation_steps": 3}):
        assert steps(fitted(**settings))[-1] == MLE(**{"epochs": 2, "batch_size": 4} | settings).steps_of(12)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert MLE(epochs=3, batch_size=3).steps_of(13) == 9  # 7 rows a process


def test_no_weight_goes_further_than_the_learning_rate() -> None:
    # AdamW's first step moves each weight by the rate, whatever its gradient.
    for rate in (1e-2, 1e-3):
        one = fitted(epochs=1, batch_size=12, learning_rate=rate, warmup=0.0, weight_decay=0.0)
        assert moved(one) == pytest.approx(rate, rel=1e-3)


def test_the_learning_rate_rises_in_the_warmup_and_follows_its_schedule() -> None:
    rates = logged(fitted(epochs=4, warmup=0.5, schedule="constant_with_warmup"), "learning_rate")
    assert rates == pytest.approx([1e-2 * min(step / 6, 1) for step in range(12)])
    rates = logged(fitted(epochs=4, warmup=0.0, schedule="linear"), "learning_rate")
    assert rates == pytest.approx([1e-2 * (1 - step / 12) for step in range(12)])


def test_long_gradients_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    step = torch.optim.AdamW.step

    def measured(optimiser: torch.optim.AdamW, *rest: Any, **more: Any) -> Any:
        gradients = [value.grad for group in optimiser.param_groups for value in group["params"]]
        left.append(float(torch.stack([each.square().sum() for each in gradients if each is not None]).sum().sqrt()))
        return step(optimiser, *rest, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    found = fitted(max_grad_norm=1e-3)
    assert all(norm > 1e-2 for norm in logged(found, "grad_norm"))
    assert left == pytest.approx([1e-3] * 6, rel=1e-2)


@pytest.mark.parametrize("backend", ["mle", "mc-dropout", "checkpoint-ensemble", "swag"])
def test_weights_decay(backend: str) -> None:
    settings = {"epochs": 10, "learning_rate": 0.1, "schedule": "constant", "warmup": 0.0}
    fast, none = (length(fitted(backend, weight_decay=decay, **settings)) for decay in (5.0, 0.0))
    assert fast < none / 5


@pytest.mark.parametrize("bf16", [False, True])
def test_the_network_runs_in_the_precision_that_is_asked_for(bf16: bool) -> None:
    program, seen = tiny_program(), set()
    layer = program.network.get_submodule("base_model.model.bert.encoder.layer.0.output.dense")
    handle = layer.register_forward_hook(
        lambda module, inputs, output: seen.add((torch.is_grad_enabled(), output.dtype))
    )
    fit(program, tiny_rows(8), "svi", bf16=bf16, **QUICK)
    handle.remove()
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_computed_again_if_asked_for(checkpointing: bool) -> None:
    program, passes = tiny_program(), 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled()

    layer = program.network.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    handle = layer.register_forward_hook(count)
    fit(program, tiny_rows(8), "svi", gradient_checkpointing=checkpointing, **QUICK)
    handle.remove()
    assert passes == (8 if checkpointing else 4)


def test_rows_of_like_length_are_put_together_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    padding: list[int] = []
    collator = Classes.collator

    def noting(*given: Any) -> Any:
        collate = collator(*given)

        def noted(rows: Any) -> Any:
            batch = collate(rows)
            padding.append(int((batch["attention_mask"] == 0).sum()))
            return batch

        return noted

    monkeypatch.setattr(Classes, "collator", noting)
    fitted(rows=48, group_by_length=True, epochs=1)
    fitted(rows=48, group_by_length=False, epochs=1)
    assert sum(padding[:12]) < sum(padding[12:]) / 1.5


def test_the_log_has_an_entry_for_so_many_steps() -> None:
    every = fitted(epochs=2)
    found = fitted(epochs=2, log_every=3)
    assert steps(found) == [3, 6]
    losses = logged(every, "loss")
    assert logged(found, "loss") == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


@pytest.mark.parametrize("kept", [1, 2])
def test_so_many_checkpoints_are_kept(tmp_path: Path, kept: int) -> None:
    fitted(epochs=3, keep_checkpoints=kept, output_dir=tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == kept


def test_the_tracker_that_is_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # None of transformers' trackers has to be installed here: what the Trainer is told is what it looks them up by.
    made = []
    arguments = room.TrainingArguments
    monkeypatch.setattr(settings_room, "get_available_reporting_integrations", lambda: ["mine"])

    def noted(**given: Any) -> Any:
        made.append(given["report_to"])
        return arguments(**given | {"report_to": "none"})

    monkeypatch.setattr(room, "TrainingArguments", noted)
    fitted(report_to="mine", epochs=0.1)
    assert made == ["mine"]


@pytest.mark.parametrize(("cpu", "gpu", "expected"), [(True, True, True), (False, True, False), (False, False, True)])
def test_a_fit_stays_on_the_cpu_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, gpu: bool, expected: bool
) -> None:
    class Told(Exception):
        pass

    def told(**given: Any) -> None:
        assert given["use_cpu"] is expected
        raise Told

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(room, "TrainingArguments", told)
    with pytest.raises(Told):
        fitted(cpu=cpu)


@dataclass(frozen=True)
class Case:
    message: str
    error: type[Exception] = SettingError
    settings: tuple[tuple[str, Any], ...] = ()


CASES = {
    "backend": Case("Unknown backend 'sivi'. Did you mean 'svi'", settings=(("backend", "sivi"),)),
    "setting": Case("Unknown setting of svi 'epoch'. Did you mean 'epochs'", settings=(("epoch", 2),)),
    "type": Case("svi: epochs should be a valid number.*found 'many'", settings=(("epochs", "many"),)),
    "epochs": Case("epochs should be greater than 0, found 0", settings=(("epochs", 0),)),
    "batch": Case("batch_size should be greater than or equal to 1, found -1", settings=(("batch_size", -1),)),
    "warmup": Case("warmup should be less than 1, found 1", settings=(("warmup", 1.0),)),
    "elbo": Case(
        "elbo should be 'mean-field'.*found 'mean-feild'. Did you mean 'mean-field'", settings=(("elbo", "mean-feild"),)
    ),
    "guide": Case("Unknown guide 'structurd'. Did you mean 'structured'", settings=(("guide", "structurd"),)),
    "particles": Case("particles should be greater than or equal to 1", settings=(("particles", 0),)),
    "temperature": Case("temperature should be greater than 0, found 0", settings=(("temperature", 0.0),)),
    "kl": Case("kl_warmup.*found 2", settings=(("kl_warmup", 2.0),)),
    "kl schedule": Case("kl_schedule should be 'linear' or 'step'.*'steps'", settings=(("kl_schedule", "steps"),)),
    "kl step": Case("kl_warmup above 0 and below 1, found 0", settings=(("kl_schedule", "step"),)),
    "kl never": Case("above 0 and below 1, found 1", settings=(("kl_schedule", "step"), ("kl_warmup", 1.0))),
    "tracker": Case("Unknown tracker 'tensorbord'", settings=(("report_to", "tensorbord"),)),
    "seed": Case("seed should be a valid integer.* found 1.5", settings=(("seed", 1.5),)),
    "resume": Case("resume=True needs the output_dir", settings=(("resume", True),)),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_settings_are_errors_that_say_what_is_right(case: str) -> None:
    expected = CASES[case]
    with pytest.raises(expected.error, match=expected.message):
        fit(tiny_program(), tiny_rows(4), progress=False, **dict(expected.settings))


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_needs_no_more_than_its_name(schedule: str) -> None:
    posterior = fit(tiny_program(), tiny_rows(5), schedule=schedule, **{**QUICK, "epochs": 1})
    assert posterior.record.finished
