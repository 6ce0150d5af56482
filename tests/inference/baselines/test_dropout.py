"""MC dropout: what is dropped, for whom it is the same, and what cannot be said of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scenarios import awake, tiny_batch, tiny_method, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.errors import AdapterError, PosteriorError, SettingError
from bayeslora.inference import fit
from bayeslora.inference.baselines.masks import Columns, Kept, RowMasks, Tokens
from bayeslora.models import Gaussian
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.rng import isolated

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 4, "progress": False}
ROWS = tiny_rows(8)


def program() -> Program:
    return awake(tiny_program(Gaussian()))


def masks(rows: list[int], lengths: list[int], rate: float = 0.25, **changed: int) -> Any:
    attended = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    return RowMasks(rate, changed.get("seed", 0), changed.get("draw", 0), rows, attended, ["first", "second"])


def test_masks_are_the_rows_own_whatever_else_is_in_the_batch() -> None:
    inputs = torch.ones(2, 5, 400)
    both = masks([7, 3], [5, 3])(1, inputs)
    assert torch.equal(masks([3], [3])(1, inputs[:1, :3])[0], both[1, :3])  # without the padding
    assert both[1, 3:].all()  # nothing is drawn for padding
    # Standard error of the part that is dropped of 2,000 entries: 0.01.
    assert (~both[0]).float().mean() == pytest.approx(0.25, abs=0.04)
    others = [masks([7, 3], [5, 3])(0, inputs), masks([7, 3], [5, 3], seed=1)(1, inputs)]
    others += [masks([7, 3], [5, 3], draw=1)(1, inputs), masks([8, 3], [5, 3])(1, inputs)]
    for other in others:
        assert not torch.equal(other[0], both[0])
    assert not torch.equal(both[0, 0], both[0, 1])  # each token has its own


def test_left_padding_and_texts_of_one_row() -> None:
    inputs = torch.ones(1, 5, 400)
    right = masks([0], [3])(0, inputs[:, :3])
    left = RowMasks(0.25, 0, 0, [0], torch.tensor([[False, False, True, True, True]]), ["first"])(0, inputs)
    assert torch.equal(left[:, 2:], right)
    texts = RowMasks(0.25, 0, 0, [0, 1], torch.ones(4, 5, dtype=torch.bool), ["first"])(0, inputs.expand(4, -1, -1))
    assert len({tuple(each.flatten().tolist()) for each in texts}) == 4
    with pytest.raises(AdapterError, match="'first' is given inputs of shape"):
        masks([0], [3])(0, torch.ones(7, 3, 400))


@pytest.mark.parametrize("kept", [None, masks([0, 1], [100, 100])])
def test_what_is_kept_of_tokens_makes_up_for_what_is_dropped(kept: Kept | None) -> None:
    with isolated(0, torch.device("cpu")):
        found = Tokens([], 0.25, kept).dropped(0, torch.full((2, 100, 400), 3.0))
    assert found.unique().tolist() == [0.0, 4.0]
    # Standard error of the mean of 80,000 entries of deviation sqrt(3): 0.006.
    assert float(found.mean()) == pytest.approx(3.0, abs=0.025)


def test_columns_are_dropped_for_a_whole_pass_and_their_mean_is_the_weights() -> None:
    here = program()
    weights = {site.name: site.initial for site in here.sites}
    sites = [site for site in here.sites if site.role == "A"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [Columns(sites, 0.25)(weights) for _ in range(200)]
    for site in sites:
        ratios = torch.stack([each[site.name] for each in drawn]) / site.initial  # (draws, layers, columns, rank)
        assert torch.equal(ratios[..., :1].expand_as(ratios), ratios) or torch.allclose(ratios[..., :1], ratios)
        kept = ratios[..., 0].ne(0).double()
        assert torch.allclose(ratios[..., 0].double(), kept / 0.75, rtol=1e-5)
        # Standard error of the part that is dropped: sqrt(3 / 16 / draws), less for several columns.
        assert float(kept.mean()) == pytest.approx(0.75, abs=4 * math.sqrt(3 / 16 / kept.numel()))
    assert all(torch.equal(drawn[0][site.name], site.initial) for site in here.sites if site.role != "A")


def test_equal_tokens_stay_equal_by_column_and_do_not_by_token() -> None:
    here = program()
    site = next(site for site in here.sites if site.role == "A")
    weights = {each.name: each.initial for each in here.sites}
    batch = tiny_batch(here, ROWS)
    same = torch.ones(1, 2, site.initial.shape[1])  # two tokens
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = Tokens([site], 0.5)(weights, batch)[site.name]
        assert not isinstance(found, Tensor)
        by_token, by_column = found[0](same)[0], (same @ Columns([site], 0.5)(weights)[site.name][0])[0]
    assert not torch.allclose(*by_token) and torch.equal(*by_column)


@pytest.mark.parametrize("by", ["token", "column"])
def test_dropout_is_on_in_training_and_in_predictions(by: str) -> None:
    plain, dropped = fit(program(), ROWS, "mle", **QUICK), fit(program(), ROWS, "mc-dropout", by=by, **QUICK)
    assert any(not torch.equal(plain.mean()[name], dropped.mean()[name]) for name in plain.mean())
    found = dropped.predict(ROWS, 3, progress=False)
    assert found.draws == 3 and not torch.equal(found.outputs[0], found.outputs[1])
    mean = dropped.predict(ROWS, method="mean", progress=False).outputs[0]
    assert torch.equal(mean, Rows.of(dropped.program, ROWS).outputs(dropped.program, dropped.mean()).detach())


def test_by_column_passes_are_draws_of_the_weights() -> None:
    posterior = fit(program(), ROWS, "mc-dropout", by="column", rate=0.4, **QUICK)
    rows = Rows.of(posterior.program, ROWS)
    with torch.no_grad():
        by_hand = torch.stack([rows.outputs(posterior.program, draw) for draw in posterior.draws(2, seed=5)])
    torch.testing.assert_close(posterior.predict(ROWS, 2, seed=5, progress=False).outputs, by_hand)
    found = posterior.to_inference_data(ROWS, draws=2, prior_draws=0, progress=False)
    assert "posterior" in found and found.attrs["draws_are"] == "independent" and "log_q" not in found["sample_stats"]
    with pytest.raises(PosteriorError, match="no density"):
        posterior.log_prob(posterior.draw())


def test_by_token_there_is_no_draw_of_the_weights() -> None:
    posterior = fit(program(), ROWS, "mc-dropout", **QUICK)
    with pytest.raises(PosteriorError, match="not a distribution over weights.*by='column' has draws"):
        posterior.draw()
    found = posterior.to_inference_data(ROWS, draws=2, prior_draws=0, progress=False)
    assert "posterior" not in found and found.attrs["draws_are"] == "passes of the network"


def test_what_cannot_be_dropped() -> None:
    with pytest.raises(SettingError, match=r"lora_dropout=0.1.*lora.dropout=0"):
        twice = program()
        twice.network.peft_config["default"].lora_dropout = 0.1
        fit(twice, ROWS, "mc-dropout", **QUICK)
    for rate in (0.0, 1.0):
        with pytest.raises(SettingError, match="rate"):
            fit(program(), ROWS, "mc-dropout", rate=rate)


@pytest.mark.parametrize("program", [tiny_program(Gaussian(), targets=["word_embeddings"]), tiny_method("dora")])
def test_by_token_layers_that_are_not_linear_are_refused(program: Program) -> None:
    message = r"Dropout by token .* '.*(word_embeddings|query)' is none.*by='column'"
    with pytest.raises(SettingError, match=message):
        fit(program, ROWS, "mc-dropout", **QUICK)
    fit(program, ROWS, "mc-dropout", by="column", **QUICK)
