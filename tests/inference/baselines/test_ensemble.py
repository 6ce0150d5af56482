"""Ensembles: members of their own, whose probabilities are averaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scenarios import saved_base, text_program, text_rows, tiny_bert, tiny_rows

from bayeslora.errors import SettingError
from bayeslora.inference import Ensemble, fit
from bayeslora.inference.baselines.ensemble import seed_of_member
from bayeslora.inference.mixture import MixturePosterior
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
