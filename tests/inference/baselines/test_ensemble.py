"""Ensembles: members of their own, whose probabilities are averaged."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import saved_base, text_program, text_rows, tiny_bert, tiny_choices, tiny_method, tiny_rows
from torch import nn

from bayeslora.errors import SettingError
from bayeslora.inference import Ensemble, fit, load
from bayeslora.inference.baselines.ensemble import seed_of_member
from bayeslora.inference.mixture import MixturePosterior
from bayeslora.inference.training.trainer import _Steps
from bayeslora.models import Gaussian
from bayeslora.observations import Classes
from bayeslora.program import Program

OF: dict[str, Any] = {"epochs": 1, "batch_size": 4}
ROWS = tiny_rows(8)


def fresh(rank: int = 8) -> Program:
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="SEQ_CLS")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian())


def test_members_have_matrices_order_and_seed_of_their_own() -> None:
    posterior = fit(fresh(), ROWS, "ensemble", members=3, of_settings=OF, progress=False)
    assert isinstance(posterior, MixturePosterior) and posterior.record.backend == "ensemble"
    assert posterior.record.settings["of_settings"]["weight_decay"] == 0.01  # all settings are told
    assert len({member.record.seed for member in posterior.members}) == 3
    starts = []
    for member in posterior.members:
        starts.append(torch.cat([site.initial.flatten() for site in member.program.sites if site.role == "A"]))
    # Of independent matrices with 1,500 entries and more, the cosine has a standard deviation below .026.
    assert len(starts[0]) > 1500
    for one, two in [(0, 1), (0, 2), (1, 2)]:
        assert abs(float(torch.cosine_similarity(starts[one], starts[two], 0))) < 0.1
    each = [member.predict(ROWS, progress=False).probabilities for member in posterior.members]
    torch.testing.assert_close(posterior.predict(ROWS, 3, progress=False).probabilities, torch.stack(each).mean(0))
    alone = fit(fresh(), ROWS, "mle", **OF, progress=False)  # the first member is the fit by itself
    assert torch.equal(posterior.members[0].mean()["linear_16x16.A"], alone.mean()["linear_16x16.A"])


def test_ensembles_of_neighbouring_seeds_share_no_member() -> None:
    seeds = [seed_of_member(seed, number) for seed in range(4) for number in range(5)]
    assert len(set(seeds)) == 20 and seeds[::5] == [0, 1, 2, 3]


def test_finished_members_are_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayeslora.inference.variational.point import MLE

    base, rows, folder = saved_base(tmp_path / "base"), text_rows(8), tmp_path / "run"
    settings = {"backend": "ensemble", "members": 2, "of_settings": OF, "output_dir": folder, "progress": False}
    whole = fit(text_program(base), rows, **settings)
    shutil.rmtree(folder / "posterior")
    shutil.rmtree(folder / "chain-1")  # stopped after the first
    fits, again = [], MLE.fit
    monkeypatch.setattr(MLE, "fit", lambda *given: fits.append(given) or again(*given))
    resumed = fit(text_program(base), rows, **settings, resume=True)
    assert len(fits) == 1
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name


def test_what_it_is_of() -> None:
    assert Ensemble(of="laplace").default_model[0] == "gaussian"
    with pytest.raises(SettingError, match="Unknown setting of mle 'epocs'"):
        Ensemble(of_settings={"epocs": 3})


@pytest.mark.parametrize("accumulated", [1, 2])
def test_side_by_side_they_are_what_they_are_one_after_another(accumulated: int) -> None:
    # The last batch is smaller, and gradients are shortened, each member's by itself.
    of = {"epochs": 2, "batch_size": 3, "max_grad_norm": 0.5, "gradient_accumulation_steps": accumulated}
    settings: dict[str, Any] = {"backend": "ensemble", "members": 3, "of_settings": of, "progress": False}
    rows = tiny_rows(14)
    one, two = (fit(fresh(), rows, stacked=stacked, seed=4, **settings) for stacked in (False, True))
    for alone, beside in zip(one.members, two.members, strict=True):
        assert beside.record.seed == alone.record.seed and beside.record.point_sites == alone.record.point_sites
        for name, value in alone.mean().items():
            # AdamW makes a step as long as the rate of a gradient that is but rounding.
            torch.testing.assert_close(beside.mean()[name], value, rtol=1e-3, atol=1e-4)
            start = next(site.initial for site in alone.program.sites if site.name == name)
            assert name.endswith(".A") or not torch.allclose(value, start, atol=2e-4)
    found = [each.predict(ROWS, 3, progress=False).probabilities for each in (one, two)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_side_by_side_of_choices_whose_rows_have_several_sequences() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        awake = tiny_choices(Gaussian())
    for module in awake.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    program = awake.around({site.name: site.initial * (site.role != "B") for site in awake.sites})
    ids = [[[2, 3, 4], [5, 6]], [[7, 8], [9], [10, 11]], [[12], [13, 14]], [[15, 16], [17]], [[18], [19], [20]]]
    mask = [[[1] * len(choice) for choice in row] for row in ids]
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "labels": [0, 2, 1, 0, 1]})
    settings: dict[str, Any] = {"members": 2, "of_settings": {"epochs": 2, "batch_size": 4}, "progress": False}
    one, two = (fit(program, rows, "ensemble", stacked=stacked, **settings) for stacked in (False, True))
    for alone, beside in zip(one.members, two.members, strict=True):
        for name, value in alone.mean().items():
            if name != "head.classifier.bias":  # which all choices have in common: its gradient is but rounding
                torch.testing.assert_close(beside.mean()[name], value, rtol=1e-3, atol=1e-4)


def test_side_by_side_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows, folder = saved_base(tmp_path / "base", dropout=0.1), text_rows(8), tmp_path / "run"
    of = {"epochs": 2, "batch_size": 4}
    settings: dict[str, Any] = {"members": 2, "stacked": True, "of_settings": of, "progress": False}
    whole = fit(text_program(base), rows, "ensemble", **settings)
    on_step_end = _Steps.on_step_end

    def hooked(self: _Steps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:  # of four
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_Steps, "on_step_end", hooked)
        fit(text_program(base), rows, "ensemble", output_dir=folder, **settings)
    assert not load(folder).record.finished
    with pytest.raises(SettingError, match="epochs"):
        other = {**settings, "of_settings": {**of, "epochs": 3}}
        fit(text_program(base), rows, "ensemble", output_dir=folder, resume=True, **other)
    resumed = fit(text_program(base), rows, "ensemble", output_dir=folder, resume=True, **settings)
    assert resumed.record.finished
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name


def test_what_is_not_trained_side_by_side() -> None:
    with pytest.raises(SettingError, match="members of 'mle' side by side, found of='map'"):
        Ensemble(of="map", stacked=True)
    with pytest.raises(SettingError, match="more than LoRA matrices"):
        fit(tiny_method("dora"), ROWS, "ensemble", stacked=True, of_settings=OF, progress=False)
