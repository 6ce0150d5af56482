from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from scenarios import Regression, lora_regression, tiny_program, tiny_rows, untrained_program
from torch import Tensor

from bayeslora import inference
from bayeslora.diagnostics import Ranks, plots, sbc
from bayeslora.errors import SettingError

SIMULATIONS = 200


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(n=8, columns=2, rank=1, noise=2.0)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inference.BACKENDS._homes, "exact", "scenarios:ExactRegression")


def entries(draw: Any, logits: Tensor) -> dict[str, float]:
    return {f"a{place}": float(value) for place, value in enumerate(draw["linear_2x1.A"].flatten())}


def test_ranks_of_the_exact_posterior_are_uniform(known: Regression) -> None:
    found = sbc(known.program, "exact", known.rows, SIMULATIONS, 19, quantities=entries, progress=False)
    assert set(found.ranks) == {"a0", "a1"} and found.draws == 19
    # Four tests of a hypothesis that is true: one is below 0.002 by chance once in a hundred.
    assert min(found.uniformity(5).values()) > 0.002 and min(found.symmetry().values()) > 0.002


def test_a_posterior_that_is_too_narrow_is_rejected(known: Regression) -> None:
    found = sbc(known.program, "exact", known.rows, SIMULATIONS, 19, quantities=entries, progress=False, factor=0.5)
    assert max(found.uniformity(5).values()) < 0.002
    assert min(found.symmetry().values()) > 0.002  # it has no bias


def test_laplace_is_the_exact_posterior_of_a_regression(known: Regression) -> None:
    settings = {"mode": "map", "curvature": "full", "tune": "none", "epochs": 60, "batch_size": 8, "warmup": 0.0}
    settings |= {"learning_rate": 0.2, "schedule": "cosine", "max_grad_norm": 1e9}
    one, other = (
        sbc(known.program, backend, known.rows, 6, 50, quantities=entries, progress=False, **each)
        for backend, each in (("exact", {}), ("laplace", settings))
    )
    for name, ranks in one.ranks.items():
        # Ranks of the same truth among 50 draws each: their difference has a deviation of at most sqrt(50 / 2) = 5.
        assert np.abs(ranks - other.ranks[name]).max() < 4 * 5


def test_quantities_see_every_latent_site(known: Regression) -> None:
    def wishart(draw: Any, logits: Tensor) -> dict[str, float]:
        return {"scale": float(draw["linear_16x24.A.scale_tril"].norm())}

    settings = {"prior_mean": "model", "heldout_size": 0, "epochs": 1}
    found = sbc(tiny_program(), "svi", tiny_rows(4), 2, 3, quantities=wishart, progress=False, **settings)
    assert all(0 <= rank <= 3 for rank in found.ranks["scale"])


def test_quantities_by_default(known: Regression) -> None:
    found = sbc(known.program, "exact", known.rows.remove_columns("labels"), 2, 3, progress=False)
    assert set(found.ranks) == {"log-likelihood", "logit of row 0", "logit of row 1", "logit of row 2"}
    assert all(0 <= rank <= 3 for ranks in found.ranks.values() for rank in ranks)
    again = sbc(known.program, "exact", known.rows, 2, 3, progress=False)
    assert all((again.ranks[name] == ranks).all() for name, ranks in found.ranks.items())


def test_a_bias_is_no_symmetry() -> None:
    generator = np.random.default_rng(0)
    ranks = Ranks({"up": generator.integers(8, 20, 100), "fair": generator.integers(0, 20, 100)}, 19)
    assert ranks.symmetry()["up"] < 1e-6 and ranks.uniformity(4)["up"] < 1e-6
    assert ranks.symmetry()["fair"] > 0.005 and ranks.uniformity(4)["fair"] > 0.005


def test_ranks_in_the_middle_are_symmetric() -> None:
    assert Ranks({"even": np.full(30, 10), "bias": np.full(30, 11)}, 20).symmetry() == {
        "even": 1.0,
        "bias": pytest.approx(0.0, abs=1e-6),
    }


def test_symmetry_errs_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    ends = generator.choice([0, 1, 18, 19], (1000, 60))
    wide = np.where(generator.random((1000, 60)) < 0.8, ends, generator.integers(0, 20, (1000, 60)))
    below = np.mean([Ranks({"narrow": ranks}, 19).symmetry()["narrow"] < 0.05 for ranks in wide])
    # The share has a standard error of sqrt(0.05 * 0.95 / 1000) = 0.007.
    assert 0.05 - 3 * 0.007 < below < 0.05 + 3 * 0.007


def test_uniformity_counts_bins_of_unequal_size_right() -> None:
    ranks = Ranks({"all": np.tile(np.arange(10), 30)}, 9)
    assert math.isclose(ranks.uniformity(4)["all"], 1.0)
    assert math.isclose(Ranks({"all": np.tile(np.arange(4), 30)}, 3).uniformity(10)["all"], 1.0)  # of four ranks


def test_a_picture_of_ranks_counts_every_simulation() -> None:
    ranks = Ranks({"fair": np.tile(np.arange(20), 5), "low": np.zeros(100, dtype=int)}, 19)
    fair, low = plots.rank_histograms(ranks, 10).axes
    assert fair.get_title() == "fair\nuniform p 1, symmetric p 1" and re.match(
        r"low\nuniform p \S+e-188,", low.get_title()
    )
    assert fair.patches[-1].get_data().values.tolist() == [10] * 10
    assert low.patches[-1].get_data().values.tolist() == [100] + [0] * 9
    # Of a binomial of 100 trials at 1/10: mean 10, deviation 3.
    assert {(bar.get_y(), bar.get_y() + bar.get_height()) for bar in fair.patches[:-1]} == {(5.0, 16.0)}


def test_mistakes_are_told(known: Regression) -> None:
    with pytest.raises(SettingError, match="at least 1, found 0 and 99"):
        sbc(known.program, "exact", known.rows, 0)
    with pytest.raises(SettingError, match="of all 24 rows, and svi sets 8 of them aside: give heldout_size=0"):
        sbc(untrained_program(), "svi", tiny_rows(24), 1, 9, heldout_size=8, epochs=1, progress=False)
