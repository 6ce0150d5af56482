"""AdaLoRA: where ranks go, what is kept orthogonal, and what a fit leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from scenarios import SPEC, plain_logits, saved_base, text_rows, tiny_bert, tiny_method, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.errors import SettingError
from bayeslora.inference import fit, load
from bayeslora.inference.baselines.adalora import AdaLoRA, _Budget, _orthogonal, _triplets
from bayeslora.inference.training.objective import State
from bayeslora.inference.training.trainer import _Steps
from bayeslora.models import Gaussian
from bayeslora.models.guides.auto import make_guide
from bayeslora.observations import Classes
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.recipes import LoraSettings
from bayeslora.tasks import Task

#: Six rows in batches of three: two steps an epoch.
QUICK: dict[str, Any] = {"batch_size": 3, "learning_rate": 5e-3, "warmup": 0.0, "log_every": 1, "progress": False}
ROWS = tiny_rows(6)


def program(dead: bool = False) -> Program:
    """Updates of rank 4 of the queries and values of two layers; those of the second may be without effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = tiny_bert()
        if dead:  # nothing of the attention goes on from there
            base.bert.encoder.layer[1].attention.output.dense.weight.data.zero_()
        config = AdaLoraConfig(
            init_r=4, target_r=4, lora_alpha=8, target_modules=["query", "value"], total_step=10, task_type="SEQ_CLS"
        )
        return Program(get_peft_model(base, config), Classes(3), Gaussian())


def updates(values: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """P, e and Q by layer."""
    layers = [name.removesuffix(".lora_E") for name in values if name.endswith(".lora_E")]
    return {layer: tuple(values[f"{layer}.lora_{role}"] for role in "BEA") for layer in layers}


def log(posterior: Posterior, name: str) -> list[float]:
    return [entry[name] for entry in posterior.record.history if "loss" in entry]


def test_the_budget_falls_as_the_papers() -> None:
    settings = QUICK | {"epochs": 10, "begin": 0.2, "end": 0.3, "every": 3, "rank": 1}
    posterior = fit(program(), ROWS, "adalora", **settings)
    # Of 20 steps the first 4 keep all 16, and the last allocation is at step 14; between them at 6, 9 and 12.
    expected = [
        4 if step >= 14 else int(4 + 12 * (1 - (step - 4) / 10) ** 3) if step > 4 and step % 3 == 0 else 16
        for step in range(1, 21)
    ]
    assert log(posterior, "rank") == expected and expected[2] == 16 and expected[5:9] == [10, 16, 16, 5]
    left = [e for _, e, _ in updates(posterior.mean()).values()]
    assert sum(int(e.count_nonzero()) for e in left) == 4
    ranks = posterior.record.history[-1]["ranks"]
    assert list(ranks.values()) == [int(e.count_nonzero()) for e in left]
    assert "bert.encoder.layer.0.attention.self.query" in ranks


def test_nothing_is_measured_after_the_last_allocation() -> None:
    told = SimpleNamespace()
    hook = _Budget(AdaLoRA(begin=0.0, end=0.5, every=4), told, before=10, after=3)
    for step in range(20):
        hook.before_step(State(step, 20, 0.0))
        assert told.measuring == (step + 1 <= 10)
        assert (told.budget is None) == (step + 1 not in (4, 8) and step + 1 < 10)


def test_two_thirds_of_the_ranks_are_left_by_default() -> None:
    posterior = fit(program(), ROWS, "adalora", epochs=2, **QUICK)
    assert log(posterior, "rank")[-1] == round(16 / 1.5)


def test_weights_decay() -> None:
    settings = QUICK | {"epochs": 5, "learning_rate": 2e-2, "orthogonality": 0.0, "schedule": "constant"}
    fast, none = (fit(program(), ROWS, "adalora", weight_decay=decay, **settings).mean() for decay in (10.0, 0.0))
    # Ten steps at 2e-2 leave a tenth of a weight, and what its gradients add. Orthogonal at the start, P has length 2.
    for name in (name for name in fast if name.endswith(".lora_B")):
        assert fast[name].norm() < none[name].norm() / 2, name


def test_layers_without_effect_lose_their_ranks() -> None:
    # The departure from orthogonality has a gradient in all layers: by it one of the eight ranks was seen to go astray.
    settings = QUICK | {"epochs": 10, "rank": 2, "every": 3, "orthogonality": 0.0}
    idle, busy = (fit(program(dead), ROWS, "adalora", **settings).record.history[-1]["ranks"] for dead in (True, False))
    # Query and value of the first layer, and of the second.
    assert list(idle.values()) == [4, 4, 0, 0]
    assert sum(busy.values()) == 8 and list(busy.values())[3] > 0


def departure(posterior: Posterior) -> float:
    """The mean of ||P^T P - I||^2 and ||Q Q^T - I||^2, entry by entry."""
    total, matrices = 0.0, 0
    for p, _, q in updates(posterior.mean()).values():
        for columns in (p.T.tolist(), q.tolist()):
            matrices += 1
            for one, first in enumerate(columns):
                for two, second in enumerate(columns):
                    total += (sum(a * b for a, b in zip(first, second, strict=True)) - (one == two)) ** 2
    return total / matrices


def test_what_is_added_to_the_loss_keeps_p_and_q_orthogonal() -> None:
    settings = QUICK | {"epochs": 10, "learning_rate": 2e-2}
    held, free = (fit(program(), ROWS, "adalora", orthogonality=weight, **settings) for weight in (0.5, 0.0))
    assert departure(held) < departure(free) / 10
    for posterior in (held, free):  # the log has that of the weights before the last step, which is a short one
        assert log(posterior, "orthogonality")[-1] == pytest.approx(departure(posterior), rel=0.1, abs=2e-4)
        assert log(posterior, "orthogonality")[0] == pytest.approx(0.0, abs=1e-6)  # before the first
    for weight, posterior in ((0.5, held), (0.0, free)):
        parts = [log(posterior, name) for name in ("loss", "log_likelihood", "orthogonality")]
        for loss, fitted, apart in zip(*parts, strict=True):
            assert loss == pytest.approx(weight * apart - fitted, abs=1e-4)


def test_under_bfloat16_the_departure_is_that_of_float32() -> None:
    posterior = fit(program(), ROWS, "adalora", epochs=1, bf16=True, cpu=True, **QUICK)
    # Of the orthogonal start: products that are rounded to 8 bits would be 1e-3 off.
    assert log(posterior, "orthogonality")[0] == pytest.approx(0.0, abs=1e-9)


def test_the_start_is_orthogonal_and_the_same_update() -> None:
    made = program()
    guide = make_guide("delta", made.model, made.sites)
    found = _triplets(made, guide)
    for each, scale in zip(found, (0.0, 0.5, 1.0, 2.0), strict=True):
        each.e.data = scale * torch.tensor([[0.4], [-1.0], [0.0], [0.1]])
    before = [each.p @ (each.e * each.q) for each in found]
    _orthogonal(found)
    for each, update in zip(found, before, strict=True):
        torch.testing.assert_close(each.p @ (each.e * each.q), update, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(each.p.T @ each.p, torch.eye(4))
        torch.testing.assert_close(each.q @ each.q.T, torch.eye(4))
    assert not found[0].e.any() and bool((found[1].e[:3] > 0).all())


def text_program(base: Path) -> Program:
    lora = LoraSettings(method="adalora", r=3, alpha=6, target_modules=("query", "value"))
    return Program.from_pretrained(base, Task(SPEC, train=text_rows()), lora=lora, model=Gaussian(), max_length=16)


@pytest.mark.parametrize("step", [5, 7, 9])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    # Twelve steps, and allocations at 2, 4, 6 and 8: stopped between two, before the last and after it.
    base, rows = saved_base(tmp_path / "base", dropout=0.1), text_rows(9)
    settings = QUICK | {"epochs": 4, "rank": 1, "begin": 0.0, "end": 0.4, "every": 2}
    whole, folder, end = fit(text_program(base), rows, "adalora", **settings), tmp_path / "run", _Steps.on_step_end

    def hooked(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_Steps, "on_step_end", hooked)
        fit(text_program(base), rows, "adalora", output_dir=folder, **settings)
    resumed = fit(text_program(base), rows, "adalora", output_dir=folder, resume=True, **settings)
    assert resumed.record.finished and log(resumed, "rank") == log(whole, "rank")
    for found in (resumed, load(folder)):
        assert all(torch.equal(found.state()[name], value) for name, value in whole.state().items())
        assert found.record.history[-1] == whole.record.history[-1]


def test_the_saved_adapter_is_plain_adalora(tmp_path: Path) -> None:
    base, rows = saved_base(tmp_path / "base"), text_rows(6)
    made = text_program(base)
    posterior = fit(made, rows, "adalora", epochs=5, rank=1, **QUICK)
    expected = posterior.predict(rows, progress=False).logits[0]
    posterior.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").predict(rows, progress=False).logits[0], expected)
    torch.testing.assert_close(plain_logits(base, tmp_path / "saved", made, rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (tiny_program, {}, "found one of PEFT's type LORA: make the program with lora='adalora', or choose 'mle'"),
        (lambda: tiny_method("full"), {}, "found a network that is trained without PEFT"),
        (program, {"rank": 5}, r"rank=5 is above the adapter's own, 4 on average.*lora\.r=8"),
        (program, {"begin": 0.5, "end": 0.5}, "begin=0.5 and end=0.5 leave no steps.*below 1"),
        (program, {"beta1": 1.0}, "beta1 should be less than 1, found 1.0"),
    ],
)
def test_what_cannot_be_allocated(made: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        fit(made(), ROWS, "adalora", epochs=1, **QUICK, **settings)
