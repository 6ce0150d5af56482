"""Checkpoint ensembles: which weights are kept, how they predict, and that a fit goes on where it was stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import saved_base, text_program, text_rows, tiny_method, tiny_program, tiny_rows

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit, load
from bayeslora.inference.baselines import checkpoints
from bayeslora.inference.baselines.checkpoints import CheckpointPosterior
from bayeslora.inference.training.trainer import _Steps
from bayeslora.models import MonteCLoRA
from bayeslora.passes import Rows

QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 4, "checkpoints": 3, "learning_rate": 1e-2, "progress": False}


def test_the_last_epochs_are_averaged_as_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[torch.Tensor] = []
    collect = checkpoints._Collect.on_epoch

    def on_epoch(self: Any, state: Any) -> None:
        places.append(self.trajectory.here().clone())
        collect(self, state)

    monkeypatch.setattr(checkpoints._Collect, "on_epoch", on_epoch)
    program, rows = tiny_program(MonteCLoRA(components=3)), tiny_rows(8)
    posterior = fit(program, rows, "checkpoint-ensemble", **QUICK)
    assert len(places) == 4 and torch.equal(posterior.kept(), torch.stack(places[1:]))
    prediction = posterior.predict(rows, progress=False)
    assert prediction.draws == 3  # of the ten that are asked for by default
    each = [Rows.of(program, rows).outputs(program, draw).detach().softmax(-1) for draw in posterior.draws(3)]
    torch.testing.assert_close(prediction.probabilities.float(), torch.stack(each).mean(0))
    last = next(iter(posterior.draws(1)))
    assert torch.equal(last["linear_16x16.A"], posterior.guide.mean()["linear_16x16.A"])  # the end of training
    draws = posterior.sample(3)["linear_16x16.A"]
    torch.testing.assert_close(posterior.mean()["linear_16x16.A"], draws.mean(0))
    with pytest.raises(PosteriorError, match="3 checkpoints were kept, and 4 draws"):
        posterior.sample(4)


@pytest.mark.parametrize(
    ("weight", "backend", "own"),
    [
        (0.0, "mle", {}),
        (1.0, "map", {"prior_mean": "model"}),
        (5.0, "map", {"prior_mean": "model", "temperature": 5.0}),
    ],
)
def test_the_last_one_is_the_end_of_the_point_that_is_trained(weight: float, backend: str, own: dict[str, Any]) -> None:
    # Below the rate that points have beside a prior, so that it is seen whether they have it.
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "progress": False}
    rows, decay = tiny_rows(8), {"weight_decay": 0.0}
    posterior = fit(
        tiny_program(), rows, "checkpoint-ensemble", checkpoints=1, prior_weight=weight, **decay, **settings
    )
    point = fit(tiny_program(), rows, backend, **settings, **own, **(decay if backend == "mle" else {}))
    assert all(torch.equal(value, posterior.mean()[name]) for name, value in point.mean().items())
    assert posterior.record.temperature == (weight or 1.0)


def test_without_lora_matrices() -> None:
    rows = tiny_rows(8)
    posterior = fit(tiny_method("full"), rows, "checkpoint-ensemble", **{**QUICK, "epochs": 2, "checkpoints": 2})
    one, two = posterior.predict(rows, progress=False).outputs
    assert not torch.equal(one, two)


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = saved_base(tmp_path / "base", dropout=0.1), text_rows(8)
    whole = fit(text_program(base), rows, "checkpoint-ensemble", **QUICK)
    folder, on_step_end = tmp_path / "run", _Steps.on_step_end

    def hooked(self: _Steps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:  # within the third of four epochs
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_Steps, "on_step_end", hooked)
        fit(text_program(base), rows, "checkpoint-ensemble", output_dir=folder, **QUICK)
    begun = load(folder)
    assert begun.predict(rows, progress=False).draws == 2
    assert isinstance(begun, CheckpointPosterior) and isinstance(whole, CheckpointPosterior)
    assert torch.equal(begun.kept()[1], whole.kept()[0])  # the second epoch of four
    resumed = fit(text_program(base), rows, "checkpoint-ensemble", output_dir=folder, resume=True, **QUICK)
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name


def test_more_checkpoints_than_epochs() -> None:
    with pytest.raises(SettingError, match="The last 5 epochs of 4 were asked for"):
        fit(tiny_program(), tiny_rows(8), "checkpoint-ensemble", **{**QUICK, "checkpoints": 5})
