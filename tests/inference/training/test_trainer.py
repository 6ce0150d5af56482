from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scenarios import saved_base, text_program, text_rows, tiny_bert, tiny_program, tiny_rows
from torch import Tensor

import bayeslora
from bayeslora import files
from bayeslora.errors import DataError, PosteriorError, SettingError, TrainingError
from bayeslora.inference import fit, load
from bayeslora.inference.training.trainer import Schedule, _Steps
from bayeslora.inference.variational.elbo import NegativeELBO
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel
from bayeslora.observations import Classes
from bayeslora.posterior import Posterior
from bayeslora.program import Program

QUICK = {"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, "log_every": 1, "progress": False}


def parameters(posterior: Posterior) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in posterior.state().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def generators() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def after_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, at the end of a step of training."""
    on_step_end = _Steps.on_step_end

    def hooked(self: _Steps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            action()
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(_Steps, "on_step_end", hooked)


def test_a_fit_is_reproducible_by_seed_and_leaves_everything_as_it_was() -> None:
    program = tiny_program(dropout=0.1).eval()
    state = {name: value.clone() for name, value in program.network.state_dict().items()}
    before = generators()
    handler = signal.getsignal(signal.SIGINT)
    one = fit(program, tiny_rows(12), seed=3, **QUICK)
    assert generators() == before
    assert signal.getsignal(signal.SIGINT) is handler
    assert not program.network.training
    after = program.network.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    torch.rand(3)
    assert same(parameters(one), parameters(fit(program, tiny_rows(12), seed=3, **QUICK)))
    assert not same(parameters(one), parameters(fit(program, tiny_rows(12), seed=4, **QUICK)))


def test_bf16_trains_the_network_alone_and_does_not_outlive_its_fit() -> None:
    rows = tiny_rows(12)
    plain = fit(tiny_program(), rows, **QUICK)
    reduced = fit(tiny_program(MonteCLoRA(components=3, wishart_on="precision")), rows, bf16=True, **QUICK)
    assert all(value.dtype == torch.float32 for value in reduced.state().values())
    assert all(np.isfinite(entry["loss"]) for entry in reduced.record.history if "loss" in entry)
    assert same(parameters(plain), parameters(fit(tiny_program(), rows, **QUICK)))


def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path: Path) -> None:
    posterior = fit(
        tiny_program(), tiny_rows(12), "mle", output_dir=tmp_path / "run", keep_checkpoints=2, **QUICK | {"epochs": 3}
    )
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(folders) == 2
    states = [files.read_tensors(folder / "model.safetensors") for folder in folders]
    last = VariationalPosterior.from_state(posterior.program, posterior.record, states[1]).mean()
    assert all(value.equal(last[name]) for name, value in posterior.mean().items())
    assert any(not value.equal(states[1][name]) for name, value in states[0].items())


def test_gradient_checkpointing_gives_the_same_fit_and_is_off_after() -> None:
    found = {}
    for checkpointing in (False, True):
        program = tiny_program(dropout=0.1)
        found[checkpointing] = fit(program, tiny_rows(12), gradient_checkpointing=checkpointing, **QUICK)
        assert not program.network.get_base_model().is_gradient_checkpointing
    for name, value in parameters(found[True]).items():
        torch.testing.assert_close(value, parameters(found[False])[name])


class _FixedDraw:
    """The first draw of every pass again and again, so that passes over parts add up to one over all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = NegativeELBO.forward

        def seeded(loss: NegativeELBO, batch: dict[str, Tensor]) -> Tensor:
            torch.manual_seed(1)
            return forward(loss, batch)

        monkeypatch.setattr(NegativeELBO, "forward", seeded)


@pytest.mark.parametrize("rows", [12, 10])
def test_accumulated_batches_are_the_larger_batch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Passes of a step draw their weights anew, as they should: with the draw fixed the two fits must be one.
    _FixedDraw(monkeypatch)
    data = tiny_rows(rows)
    settings = {"epochs": 2, "learning_rate": 1e-2, "progress": False, "log_every": 1, "max_grad_norm": 1e-3}
    whole = fit(tiny_program(), data, batch_size=rows, **settings)
    parts = fit(tiny_program(), data, batch_size=rows // 2, gradient_accumulation_steps=2, **settings)
    losses = [[entry["loss"] for entry in each.record.history if "loss" in entry] for each in (whole, parts)]
    norms = [[entry["grad_norm"] for entry in each.record.history if "loss" in entry] for each in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_every_row_is_seen_once_an_epoch_the_last_batch_included(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    forward = NegativeELBO.forward
    monkeypatch.setattr(
        NegativeELBO,
        "forward",
        # Without gradients, it is the look at the finished weights.
        lambda loss, batch: (torch.is_grad_enabled() and seen.append(batch["index"].tolist()), forward(loss, batch))[1],
    )
    for group_by_length in (True, False):
        seen.clear()
        fit(tiny_program(), tiny_rows(13), **{**QUICK, "epochs": 2}, group_by_length=group_by_length)
        assert [len(batch) for batch in seen] == [5, 5, 3, 5, 5, 3]
        epochs = [[row for batch in seen[start : start + 3] for row in batch] for start in (0, 3)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(13))
        assert epochs[0] != epochs[1]


def interrupted(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch, data: Any, **settings: Any) -> None:
    with monkeypatch.context() as patched:
        after_step(step, lambda: os.kill(os.getpid(), signal.SIGINT), patched)
        with pytest.raises(KeyboardInterrupt):
            fit(text_program(folder.parent / "base"), data, output_dir=folder, **settings)


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_resumed_fit_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, grouped: bool
) -> None:
    # Stopped at the end of the first epoch (step 3) and inside the second (step 4).
    saved_base(tmp_path / "base", dropout=0.1)
    data, settings = text_rows(12), {**QUICK, "group_by_length": grouped, "kl_warmup": 0.5}
    whole = fit(text_program(tmp_path / "base"), data, **settings)
    interrupted(tmp_path / "run", step, monkeypatch, data, **settings)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    stopped = load(tmp_path / "run")
    assert not stopped.record.finished
    assert len([entry for entry in stopped.record.history if "loss" in entry]) == step
    # What a kill inside the next checkpoint leaves.
    (tmp_path / "run" / "checkpoints" / "checkpoint-5").mkdir()
    (tmp_path / "run" / "checkpoints" / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    resumed = fit(text_program(tmp_path / "base"), data, output_dir=tmp_path / "run", resume=True, **settings)
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(resumed)[name], value, rtol=1e-6, atol=1e-7)
    one, two, three = (
        each.predict(data, draws=2, progress=False).logits for each in (whole, resumed, load(tmp_path / "run"))
    )
    torch.testing.assert_close(one, two)
    assert torch.equal(two, three)
    assert load(tmp_path / "run").record == resumed.record
    assert resumed.record.finished
    losses = [entry["loss"] for entry in resumed.record.history if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in whole.record.history if "loss" in entry])


def test_a_resumed_mode_has_the_same_gaussian_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_base(tmp_path / "base", dropout=0.1)
    data, settings = text_rows(12), {**QUICK, "backend": "laplace"}
    whole = fit(text_program(tmp_path / "base"), data, **settings)
    interrupted(tmp_path / "run", 4, monkeypatch, data, **settings)
    resumed = fit(text_program(tmp_path / "base"), data, output_dir=tmp_path / "run", resume=True, **settings)
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(resumed)[name], value, rtol=1e-5, atol=1e-6)
    assert same(parameters(load(tmp_path / "run")), parameters(resumed))
    assert resumed.record.finished and "tuning" in resumed.record.history[-1]


def test_an_infinite_loss_stops_training_and_keeps_the_last_posterior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_base(tmp_path / "base")
    program, data = text_program(tmp_path / "base").eval(), text_rows(12)
    before = generators()
    forward = NegativeELBO.forward
    calls = iter(range(100))
    with monkeypatch.context() as patched:
        patched.setattr(
            NegativeELBO,
            "forward",
            lambda loss, batch: (
                forward(loss, batch) * (torch.nan if torch.is_grad_enabled() and next(calls) == 4 else 1)
            ),
        )
        with pytest.raises(TrainingError, match=r"The loss is nan at step 5\. Try a lower learning rate"):
            fit(program, data, output_dir=tmp_path / "run", **QUICK)
    assert generators() == before
    assert not program.network.training
    left = load(tmp_path / "run")
    assert not left.record.finished
    assert all(torch.isfinite(value).all() for value in left.state().values())
    assert torch.isfinite(left.predict(data, draws=1, progress=False).logits).all()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_weights_that_the_last_step_broke_are_not_saved(tmp_path: Path) -> None:
    """The only loss is finite: the step after it overflows the network."""
    with pytest.raises(TrainingError, match="after step"):
        fit(
            tiny_program(), tiny_rows(10), output_dir=tmp_path, epochs=1, batch_size=10, warmup=0.0,
            schedule="constant", scale_learning_rate=1e30, progress=False,
        )  # fmt: skip
    assert not (tmp_path / "posterior").exists()
    assert not list(tmp_path.rglob("checkpoint-*"))


def script(folder: Path, body: str) -> list[str]:
    tests = Path(__file__).parents[2]
    path = folder / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(tests)!r})\n" + textwrap.dedent(body))
    return [str(path)]


def environment() -> dict[str, str]:
    root = str(Path(bayeslora.__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}


def test_ctrl_c_leaves_a_posterior_and_exits_as_ctrl_c_does(tmp_path: Path) -> None:
    saved_base(tmp_path / "base")
    body = f"""
        from pathlib import Path
        from scenarios import text_program, text_rows
        from bayeslora.inference import fit
        fit(text_program(Path({str(tmp_path / "base")!r})), text_rows(12), output_dir={str(tmp_path / "run")!r},
            epochs=5000, batch_size=6, progress=False)
    """
    process = subprocess.Popen(
        [sys.executable, *script(tmp_path, body)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (tmp_path / "run" / "posterior" / "posterior.json").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert err.decode().rstrip().endswith("KeyboardInterrupt")
    assert out == b""
    left = load(tmp_path / "run")
    assert not left.record.finished
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 0


def test_two_processes_train_one_posterior(tmp_path: Path) -> None:
    saved_base(tmp_path / "base", dropout=0.1)
    body = f"""
        import json, os, torch
        from pathlib import Path
        from scenarios import text_program, text_rows
        from bayeslora.inference import fit
        from bayeslora.inference.variational.elbo import NegativeELBO
        seen, forward = [], NegativeELBO.forward
        NegativeELBO.forward = lambda loss, batch: (
            # Without gradients, it is the look at the weights before a checkpoint.
            torch.is_grad_enabled() and seen.append(batch["index"].tolist()), forward(loss, batch))[1]
        folder, rank = Path({str(tmp_path)!r}), os.environ["RANK"]
        posterior = fit(text_program(folder / "base"), text_rows(12), output_dir=folder / "run", epochs=3,
                        batch_size=3, progress=False, cpu=True)
        sums = {{name: float(value.double().sum()) for name, value in posterior.state().items()}}
        (folder / f"rank{{rank}}.json").write_text(json.dumps([sums, seen]))
    """
    # With --cpu it would ask for MPI; with the flag for GPUs and none allowed it takes gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, *script(tmp_path, body)],
        env=environment() | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    (one, rows_one), (two, rows_two) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    for epoch in range(3):
        batches = rows_one[2 * epoch : 2 * epoch + 2] + rows_two[2 * epoch : 2 * epoch + 2]
        assert sorted(row for batch in batches for row in batch) == list(range(12))
    saved = load(tmp_path / "run")
    assert saved.record.finished
    assert {name: float(value.double().sum()) for name, value in saved.state().items()} == one


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


def test_resuming_where_nothing_was_begun_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match="no checkpoint to resume from"):
        fit(tiny_program(), tiny_rows(4), output_dir=tmp_path, resume=True, progress=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3, 0], "Row 2 has label 3; expected a class number from 0 to 2"),
        ([0, -1, 1, 0], "Row 1 has label -1"),
        ([0.0, 1.0, 1.5, 0.0], "Row 2 has label 1.5"),
        ([0, None, 1, 0], "Row 1 .*None"),
    ],
)
def test_a_label_that_cannot_be_is_named_by_its_row(labels: list[Any], message: str) -> None:
    data = tiny_rows(4).remove_columns("labels").add_column("labels", labels)
    with pytest.raises(DataError, match=message):
        fit(tiny_program(), data, progress=False)


def test_rows_without_labels_and_no_rows_are_errors() -> None:
    with pytest.raises(DataError, match="no column 'labels'"):
        fit(tiny_program(), tiny_rows(4).remove_columns("labels"), progress=False)
    with pytest.raises(DataError, match="no rows"):
        fit(tiny_program(), tiny_rows(4).select([]), progress=False)


@pytest.mark.parametrize("model", [Gaussian(scale=1e30), Gaussian(scale=1e-30), MonteCLoRA(scale=1e30)])
@pytest.mark.parametrize("backend", ["svi", "map", "laplace"])
def test_a_prior_that_lets_nothing_be_learned_is_said(model: WeightModel, backend: str) -> None:
    # B of a fresh adapter is zero: the loss is finite however large A is.
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    program, rows = Program(get_peft_model(tiny_bert(), lora), Classes(3), model), tiny_rows(12)
    start = {site.name: site.initial.clone() for site in program.sites}
    try:
        posterior = fit(program, rows, backend, **QUICK)
    except (TrainingError, SettingError) as error:
        assert "prior" in str(error)
    else:  # as a point, A may be anywhere under so wide a prior
        moved = [name for name, value in posterior.mean().items() if not torch.equal(value, start[name])]
        assert model.scale > 1 and backend == "map" and len(moved) == len(start)
