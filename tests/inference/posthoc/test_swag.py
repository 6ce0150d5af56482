"""SWAG: when it collects and at which rate, what it finds, and that it goes on where it was stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import (
    METHODS,
    lora_regression,
    saved_base,
    text_program,
    text_rows,
    tiny_method,
    tiny_program,
    tiny_rows,
)

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit, load
from bayeslora.inference.posthoc import swag
from bayeslora.inference.training.trainer import _Steps
from bayeslora.models import Gaussian, MonteCLoRA

QUICK = {"epochs": 6, "batch_size": 4, "snapshots": 3, "rank": 3, "learning_rate": 1e-2, "progress": False}


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, float]]:
    """Where the weights are after each step, and the learning rate that they got there by."""
    found: list[tuple[torch.Tensor, float]] = []
    rates: list[float] = []
    before, after = swag._Collect.before_step, swag._Collect.on_step

    def before_step(self: Any, state: Any) -> None:
        before(self, state)
        rates.append(self.optimiser.param_groups[0]["lr"])

    def on_step(self: Any, state: Any) -> None:
        found.append((self.trajectory.here().double(), rates[-1]))
        after(self, state)

    monkeypatch.setattr(swag._Collect, "before_step", before_step)
    monkeypatch.setattr(swag._Collect, "on_step", on_step)
    return found


def test_snapshots_are_taken_at_the_ends_of_the_last_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = watched(monkeypatch)
    program, rows = tiny_program(MonteCLoRA(components=3)), tiny_rows(8)
    posterior = fit(program, rows, "swag", **QUICK, warmup=0.0)
    places = torch.stack([place for place, _ in steps])[[7, 9, 11]]  # two steps an epoch, the last three of six
    mean, factor, variances = (each.double() for each in posterior.guide.moments())
    torch.testing.assert_close(mean, places.mean(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        variances + factor.square().sum(0), places.var(0).clamp_min(1e-30), rtol=1e-3, atol=1e-12
    )
    rates = [rate for _, rate in steps]
    assert rates[:6] == pytest.approx([1e-2 * (1 - step / 12) for step in range(6)])
    assert rates[6:] == pytest.approx([5e-3] * 6)
    # Hyper-sites are not trained; everything else is random, whatever the model says.
    fixed = {name for name in program.model.initial(program.sites) if name.endswith(("scale_tril", "mixture"))}
    assert set(posterior.record.point_sites) == fixed
    one, two = posterior.draws(2)
    assert {name for name in one if torch.equal(one[name], two[name])} == fixed


@pytest.mark.parametrize("method", METHODS)
def test_any_peft_method(method: str, tmp_path: Path) -> None:
    program, rows = tiny_method(method), tiny_rows(8)
    posterior = fit(program, rows, "swag", **{**QUICK, "epochs": 3, "collect_from": 0.0})
    posterior.save(tmp_path)
    loaded = load(tmp_path, program=tiny_method(method))
    one, two = (each.predict(rows, draws=2, progress=False).logits for each in (posterior, loaded))
    assert torch.equal(one, two) and not torch.equal(one[0], one[1])


def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on_step_end = _Steps.on_step_end

    def hooked(self: _Steps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(_Steps, "on_step_end", hooked)


@pytest.mark.parametrize("step", [4, 8, 9])
def test_a_resumed_trajectory_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    # Twelve steps, and snapshots after 8, 10 and 12: stopped before the first, at it, and between two.
    base, rows = saved_base(tmp_path / "base", dropout=0.1), text_rows(8)
    whole = fit(text_program(base), rows, "swag", **QUICK)
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted_after(step, patched)
        fit(text_program(base), rows, "swag", output_dir=folder, **QUICK)
    stopped = load(folder)
    assert not stopped.record.finished
    stopped.predict(rows, method="mean", progress=False)
    with pytest.raises(PosteriorError, match="two snapshots"):
        stopped.draw()
    resumed = fit(text_program(base), rows, "swag", output_dir=folder, resume=True, **QUICK)
    assert resumed.record.finished
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name
    assert torch.equal(load(folder).sample(1)["linear_16x16.A"], whole.sample(1)["linear_16x16.A"])


def test_on_a_regression_the_mean_is_the_posteriors_and_the_width_is_that_of_training() -> None:
    known = lora_regression(noise=2.0)
    settings = {"epochs": 100, "learning_rate": 0.1, "warmup": 0.0, "prior_weight": 1.0, "weight_decay": 0.0}
    settings |= {"max_grad_norm": 1e9, "log_every": 500, "progress": False, "snapshots": 20, "rank": 20}
    deviations, widths = known.covariance.diagonal().sqrt(), []
    for rate in (0.05, 1.0):
        posterior = fit(known.program, known.rows, "swag", batch_size=10, collecting_rate=rate, **settings)
        mean, factor, variances = (each.double() for each in posterior.guide.moments())
        # The noise of batches leaves the mean of 20 snapshots within some hundredths of a deviation.
        assert ((mean - known.mean) / deviations).abs().max() < 0.2
        widths.append(float(((variances + factor.square().sum(0)).sqrt() / deviations).mean()))
    # The width is that of training, wider at a higher rate, and here far from the posterior's at either.
    assert 2 * widths[0] < widths[1] < 0.5


def test_the_objective_has_the_prior_that_is_asked_for() -> None:
    program, rows = tiny_program(Gaussian(sites="both", centre="zero", deviation=1e-3)), tiny_rows(8)
    plain, strong = (fit(program, rows, "swag", prior_weight=weight, **QUICK) for weight in (0.0, 2.0))
    assert strong.mean()["linear_16x16.A"].abs().mean() < plain.mean()["linear_16x16.A"].abs().mean()
    # What diagnostics compare with is a posterior in any case.
    assert plain.record.temperature == 1.0 and strong.record.temperature == 2.0


@pytest.mark.parametrize(("weight", "faster"), [(0.0, 1.0), (1.0, 2.0)])
def test_beside_a_prior_points_have_a_rate_of_their_own(
    monkeypatch: pytest.MonkeyPatch, weight: float, faster: float
) -> None:
    """As `map` has it, and `mle`: 2e-3 or more beside a prior that holds A, of which half is left while collecting."""
    rates: list[list[float]] = []
    before = swag._Collect.before_step

    def before_step(self: Any, state: Any) -> None:
        before(self, state)
        rates.append([group["lr"] for group in self.optimiser.param_groups])

    monkeypatch.setattr(swag._Collect, "before_step", before_step)
    settings: dict[str, Any] = QUICK | {"learning_rate": 1e-3, "prior_weight": weight}
    fit(tiny_program(), tiny_rows(8), "swag", **settings)
    assert rates[-1] == pytest.approx([0.5e-3, faster * 0.5e-3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 2}, "3 snapshots take as many steps, and of 4 in all 2 are left"),
        ({"rank": 4}, "rank 4 takes as many snapshots, found 3"),
        ({"snapshots": 1, "rank": 1}, "snapshots"),
        ({"collect_from": 1.0}, "collect_from"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        fit(tiny_program(), tiny_rows(8), "swag", **{**QUICK, **settings})
