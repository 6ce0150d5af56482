"""A fit that is stopped and gone on with, or shared by processes, is the one that is not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import saved_base, text_program, text_rows, tiny_program, tiny_rows
from torch import Tensor

import bayeslora
from bayeslora.errors import PosteriorError
from bayeslora.inference import fit, load
from bayeslora.inference.training.trainer import _Steps
from bayeslora.posterior import Posterior

QUICK = {"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, "log_every": 1, "progress": False}


def parameters(posterior: Posterior) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in posterior.state().items()}


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the log without what depends on the clock."""
    clock = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return {name: value for name, value in entry.items() if name not in clock}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def after_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, at the end of a step of training."""
    on_step_end = _Steps.on_step_end

    def hooked(self: _Steps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            action()
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(_Steps, "on_step_end", hooked)


def interrupted(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch, data: Any, **settings: Any) -> None:
    with monkeypatch.context() as patched:
        after_step(step, lambda: os.kill(os.getpid(), signal.SIGINT), patched)
        with pytest.raises(KeyboardInterrupt):
            fit(text_program(folder.parent / "base"), data, output_dir=folder, **settings)


@pytest.mark.parametrize(("step", "estimator"), [(3, "draw"), (4, "flipout")])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_resumed_fit_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, estimator: str, grouped: bool
) -> None:
    # Stopped at the end of the first epoch (step 3) and inside the second (step 4).
    saved_base(tmp_path / "base", dropout=0.1)
    data = text_rows(12)
    settings = {**QUICK, "group_by_length": grouped, "kl_warmup": 0.5, "estimator": estimator}
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
    for one, two in zip(whole.record.history, resumed.record.history, strict=True):
        assert untimed(one) == pytest.approx(untimed(two))


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
    # Where tabulate is installed, torch imports it at exit, and Python then forgets which exception it ends of.
    body = f"""
        import sys
        sys.modules["tabulate"] = None
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
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert err.decode().rstrip().endswith("KeyboardInterrupt")
    assert out == b""
    left = load(tmp_path / "run")
    assert not left.record.finished
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 0


def side_by_side(
    command: list[str], then: Callable[[list[subprocess.Popen[bytes]]], None] = lambda processes: None
) -> list[tuple[int, bytes]]:
    """Two processes with the variables that launchers set: their exit codes and what they said on standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = environment() | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    own = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, env=each, **pipes)) for each in own]
        try:
            then(processes)
            said = [process.communicate(timeout=120)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
    return [(process.returncode, each) for process, each in zip(processes, said, strict=True)]


def launched(command: list[str]) -> list[tuple[int, bytes]]:
    """The same by the launcher of accelerate."""
    # With --cpu it would ask for MPI; with the flag for GPUs and none allowed it takes gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    own = environment() | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *command[1:]], env=own, capture_output=True, timeout=300, check=False)
    return [(done.returncode, done.stderr)]


@pytest.mark.parametrize("start", [side_by_side, pytest.param(launched, marks=pytest.mark.slow)])
def test_two_processes_train_one_posterior(
    tmp_path: Path, start: Callable[[list[str]], list[tuple[int, bytes]]]
) -> None:
    saved_base(tmp_path / "base", dropout=0.1)
    body = f"""
        import json, os, torch
        from pathlib import Path
        from scenarios import text_program, text_rows
        from bayeslora.inference import fit
        from bayeslora.inference.variational.loss import NegativeELBO
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
    for code, said in start([sys.executable, *script(tmp_path, body)]):
        assert code == 0, said.decode()
    (one, rows_one), (two, rows_two) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    for epoch in range(3):
        batches = rows_one[2 * epoch : 2 * epoch + 2] + rows_two[2 * epoch : 2 * epoch + 2]
        assert sorted(row for batch in batches for row in batch) == list(range(12))
    saved = load(tmp_path / "run")
    assert saved.record.finished
    assert {name: float(value.double().sum()) for name, value in saved.state().items()} == one


def test_processes_stop_together_whichever_was_told_to(tmp_path: Path) -> None:
    saved_base(tmp_path / "base")
    body = f"""
        from pathlib import Path
        from scenarios import text_program, text_rows
        from bayeslora.inference import fit
        fit(text_program(Path({str(tmp_path / "base")!r})), text_rows(12), output_dir={str(tmp_path / "run")!r},
            epochs=5000, batch_size=3, progress=False, cpu=True)
    """

    def stop_the_second(processes: list[subprocess.Popen[bytes]]) -> None:
        while not (tmp_path / "run" / "posterior" / "posterior.json").exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)

    for _, said in side_by_side([sys.executable, *script(tmp_path, body)], stop_the_second):
        assert "stopped by SIGTERM" in said.decode()
    left = load(tmp_path / "run")
    assert not left.record.finished
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 0


def test_resuming_where_nothing_was_begun_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match="no checkpoint to resume from"):
        fit(tiny_program(), tiny_rows(4), output_dir=tmp_path, resume=True, progress=False)
