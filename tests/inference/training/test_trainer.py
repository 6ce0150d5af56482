from __future__ import annotations

import re
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scenarios import generators, saved_base, text_program, text_rows, tiny_bert, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.errors import DataError, SettingError, TrainingError
from bayeslora.inference import fit, load
from bayeslora.inference.variational.loss import NegativeELBO
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
    states = [load_file(folder / "model.safetensors") for folder in folders]
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


@pytest.mark.parametrize("rows", [12, 10, 7])  # of 7 the second batch has 3
def test_accumulated_batches_are_the_larger_batch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Passes of a step draw their weights anew, as they should: with the draw fixed the two fits must be one.
    _FixedDraw(monkeypatch)
    data = tiny_rows(rows)
    settings = {"epochs": 2, "learning_rate": 1e-2, "progress": False, "log_every": 1, "max_grad_norm": 1e-3}
    whole = fit(tiny_program(), data, batch_size=rows, **settings)
    parts = fit(tiny_program(), data, batch_size=-(-rows // 2), gradient_accumulation_steps=2, **settings)
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
        with pytest.raises(TrainingError, match=r"The loss is nan at step 5\. Try a lower learning rate") as told:
            fit(program, data, output_dir=tmp_path / "run", **QUICK)
    assert "KL" not in str(told.value)  # which few backends have
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


@pytest.mark.parametrize("model", [Gaussian(scale=1e8), Gaussian(scale=1e-30), MonteCLoRA(scale=1e8)])
@pytest.mark.parametrize("backend", ["svi", "map", "laplace"])
def test_a_prior_that_lets_nothing_be_learned_is_said(model: WeightModel, backend: str) -> None:
    # B of a fresh adapter is zero: the loss is finite however large A is.
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    program, rows = Program(get_peft_model(tiny_bert(), lora), Classes(3), model), tiny_rows(12)
    start = {site.name: site.initial.clone() for site in program.sites}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            posterior = fit(program, rows, backend, **QUICK)
        except (TrainingError, SettingError) as error:
            assert "prior" in str(error) and model.scale < 1
            return
    assert model.scale > 1
    unmoved = [name for name, value in posterior.mean().items() if torch.equal(value, start[name])]
    assert all(name.endswith(".A") for name in unmoved) and bool(unmoved) == (backend == "svi")
    messages = [str(each.message) for each in said if "Nothing was learned" in str(each.message)]
    expected = f"Nothing was learned of {', '.join(unmoved)}: .*narrower prior"
    assert [bool(re.match(expected, message)) for message in messages] == [True] * bool(unmoved)
