"""Training-free Bayesianization: the search for a width, and posteriors around modes of every sort."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_scenarios import causal_base
from datasets import Dataset
from peft import LoraConfig
from scenarios import lora_regression, saved_base, text_program, text_rows, tiny_method, tiny_program, tiny_rows

import bayeslora as bl
from bayeslora.errors import AdapterError, SettingError, TrainingError
from bayeslora.inference import fit, load
from bayeslora.inference.posthoc import tfb
from bayeslora.inference.posthoc.tfb import FIRST, HALVINGS, TFBPosterior, widest
from bayeslora.inference.training.trainer import _Steps
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.posterior import Posterior
from bayeslora.program import Program

NEAR = 2 ** (1 / 2**HALVINGS)


def searched(posterior: Posterior) -> tuple[float, dict[float, float]]:
    """The width that was found, and the loss by width of all that were tried."""
    trace = [row for row in posterior.record.history if "sigma" in row]
    return max(row["sigma"] for row in trace if row["borne"]), {row["sigma"]: row["search_nll"] for row in trace}


@pytest.mark.parametrize("scale", [1e-6, 0.3, 3.0, 1e3])
def test_the_widest_within_the_tolerance_is_found(scale: float) -> None:
    found, trace = widest(lambda sigma: 2 + (sigma / scale) ** 2, 0.005)
    limit = 0.1 * scale
    assert limit / NEAR * 0.999 < found <= limit
    tried = {row["sigma"]: row["search_nll"] for row in trace}
    assert tried[found] <= 2.01 < tried[min(sigma for sigma in tried if sigma > found)]


def test_a_loss_that_noise_lowers_may_rise_over_its_lowest() -> None:
    # Lowest, 1, at 0.05; the mode's own, 3, is passed again at 0.37 alone.
    def loss(sigma: float) -> float:
        return 1 + math.log(sigma / 0.05) ** 2 / 2 if sigma > 7e-3 else 3.0

    found, trace = widest(loss, 0.02)
    lowest = min(row["search_nll"] for row in trace)
    further = min(row["sigma"] for row in trace if row["sigma"] > found)
    assert 0.05 < found < 0.08 and loss(found) <= 1.02 * lowest < loss(further) < 1.5


def test_a_negative_loss_rises_by_a_part_of_its_size() -> None:
    found, _ = widest(lambda sigma: -2 + sigma**2, 0.005)
    assert 0.1 / NEAR * 0.999 < found <= 0.1


def test_what_is_no_number_is_not_borne() -> None:
    found, _ = widest(lambda sigma: 1.0 if sigma < 0.02 else math.nan, 0.01)
    assert 0.02 / NEAR * 0.999 < found < 0.02
    with pytest.raises(TrainingError, match="without noise is nan"):
        widest(lambda _: math.nan, 0.01)


def test_noise_under_which_the_network_overflows_is_not_borne(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfb, "widest", lambda loss, _: (0.1, [{"wide": loss(1e30), "narrow": loss(0.1)}]))
    posterior = fit(tiny_program(Gaussian(sites="both")), tiny_rows(8), "tfb", mode="given", progress=False)
    assert posterior.record.history[-1]["wide"] == math.inf > posterior.record.history[-1]["narrow"]


def test_noise_of_any_width_that_is_borne_is_said() -> None:
    with pytest.warns(UserWarning, match="any width"):
        found, _ = widest(lambda _: 1.0, 0.01)
    assert found > 100 * FIRST


@pytest.mark.parametrize("heldout", [False, True])
def test_the_bound_holds_at_the_width_and_fails_a_step_further(heldout: bool) -> None:
    program, rows = tiny_program(MonteCLoRA(components=3)), tiny_rows(12)
    other = tiny_rows(10, seed=1)
    settings = {"heldout": other} if heldout else {}
    posterior = fit(program, rows, "tfb", draws=4, progress=False, seed=3, **settings)
    assert isinstance(posterior, TFBPosterior)
    assert "loss" not in posterior.record.history[0]  # around the weights that are there
    (found, tried), over = searched(posterior), other if heldout else rows

    def nll(**settings: Any) -> float:
        found = posterior.predict(over, draws=4, seed=3, progress=False, **settings)
        return -float(found.log_predictive_density.mean())

    assert nll(method="mean") == pytest.approx(tried[0.0], rel=1e-5)
    assert nll() == pytest.approx(tried[found], rel=1e-5)
    lowest = min(loss for width, loss in tried.items() if width <= found)
    further = min(width for width in tried if width > found)
    assert tried[found] <= 1.003 * lowest < tried[further]
    assert further < 1.05 * found
    draws = list(posterior.draws(2))
    names = {name for name in draws[0] if not torch.equal(draws[0][name], draws[1][name])}
    assert names == {site.name for site in program.sites if site.role == "A"}
    assert set(posterior.record.point_sites) == program.model.initial(program.sites).keys() - names


def test_on_a_regression_outputs_have_the_variance_of_the_product() -> None:
    known = lora_regression()
    program = Program(known.program.network, known.program.observation, Gaussian(deviation=0.7))
    posterior = fit(program, known.rows, "tfb", draws=5, progress=False)
    sigma, _ = searched(posterior)
    prediction = posterior.predict(known.rows, draws=500, progress=False)
    table = program.network.base_model.model.table.weight
    expected = (sigma * program.sites[0].scaling[0]) ** 2 * table.square().sum(-1)
    found = prediction.outputs.squeeze(-1).var(0)
    # The relative error of a variance is sqrt(2 / n) = 0.063; the largest of 40.
    torch.testing.assert_close(found, expected, rtol=0.26, atol=0)
    # B has one output and rank two: across it, A is as wide as its prior.
    (part,) = [part for part in posterior.guide.parts if hasattr(part, "deviations")]
    assert float(part.deviations[0, 1]) == pytest.approx(0.7)


def test_a_mode_is_trained_where_there_is_none_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = saved_base(tmp_path / "base", dropout=0.1), text_rows(8)
    settings = {"epochs": 3, "batch_size": 4, "draws": 3, "log_every": 1, "progress": False}
    whole = fit(text_program(base), rows, "tfb", **settings)
    mode = fit(text_program(base), rows, "mle", **{name: settings[name] for name in settings if name != "draws"})
    assert all(torch.equal(value, mode.mean()[name]) for name, value in whole.mean().items())
    assert [row for row in whole.record.history if "loss" in row] == [
        row for row in mode.record.history if "loss" in row
    ]
    on_step_end = _Steps.on_step_end

    def hooked(self: _Steps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_Steps, "on_step_end", hooked)
        fit(text_program(base), rows, "tfb", output_dir=tmp_path / "run", **settings)
    assert not load(tmp_path / "run").record.finished
    resumed = fit(text_program(base), rows, "tfb", output_dir=tmp_path / "run", resume=True, **settings)
    assert all(torch.equal(resumed.state()[name], value) for name, value in whole.state().items())
    assert searched(resumed) == searched(whole) and resumed.record.finished


def test_a_mode_under_a_prior_is_that_of_map() -> None:
    # Below the rate that points have beside a prior, so that it is seen whether they have it.
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "progress": False}
    own: dict[str, Any] = {"mode": "train", "prior_weight": 2.0, "weight_decay": 0.0, "draws": 2}
    found = fit(tiny_program(), tiny_rows(8), "tfb", **settings, **own)
    mode = fit(tiny_program(), tiny_rows(8), "map", prior_mean="model", temperature=2.0, **settings)
    assert all(torch.equal(value, found.mean()[name]) for name, value in mode.mean().items())
    assert found.record.temperature == 2.0


def test_completions_bear_noise_in_the_network_as_it_is() -> None:
    spec = bl.TaskSpec("pairs", "completion", ("prompt",), completion=" {completion}")
    columns = {"prompt": ["Is this good", "The sun is", "What is"] * 2, "completion": ["yes", "a stone", "true"] * 2}
    rows = bl.tasks.Split(Dataset.from_dict(columns), spec)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    program = bl.Program.from_pretrained(
        causal_base(), bl.tasks.Task(spec, train=rows), lora=lora, model=Gaussian(), max_length=32
    )
    posterior = fit(program, rows, "tfb", epochs=2, batch_size=3, draws=3, learning_rate=1e-2, progress=False)
    sigma, tried = searched(posterior)
    found = -float(posterior.predict(rows, draws=3, progress=False).log_predictive_density.mean())
    assert sigma and found == pytest.approx(tried[sigma], rel=1e-5)


def test_there_has_to_be_something_to_put_noise_on() -> None:
    with pytest.raises(AdapterError, match="network has none"):
        fit(tiny_method("ia3"), tiny_rows(4), "tfb", progress=False)
    with pytest.raises(SettingError, match="makes 'linear_16x16.A' of other sites"):
        fit(tiny_program(MonteCLoRA(collapse=False)), tiny_rows(4), "tfb", progress=False)
    program = tiny_program()
    zero = {site.name: torch.zeros_like(site.initial) if site.role == "B" else site.initial for site in program.sites}
    with pytest.raises(AdapterError, match="All products B A are zero"):
        fit(program.around(zero), tiny_rows(4), "tfb", mode="given", progress=False)


@pytest.mark.parametrize("settings", [{"tolerance": 0.0}, {"draws": 0}, {"search_rows": 0}, {"mode": "none"}])
def test_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        fit(tiny_program(), tiny_rows(4), "tfb", progress=False, **settings)
