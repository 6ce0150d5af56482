"""IVON on a loss of which all is known, and beside the package of its authors."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeslora.inference.training.newton import OnlineNewton

ESS = 50.0
CENTRE = torch.tensor([1.0, -1.0, 0.5])
PRECISION = torch.tensor([2.0, 1.0, 4.0])
#: Loss per example: (w - AT)^T CURVATURE (w - AT) / 2.
CURVATURE = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 0.0]])
AT = torch.tensor([0.3, 0.8, -0.4])


def loss(place: Tensor) -> Tensor:
    return (place - AT) @ CURVATURE @ (place - AT) / 2


def newton(place: nn.Parameter, *more: dict[str, Any], lr: float = 0.1, seed: int = 0, **changed: Any) -> OnlineNewton:
    settings = {"ess": ESS, "hessian": 0.2, "betas": (0.9, 0.999), "radius": 1e9} | changed
    groups = [{"params": [place], "centre": CENTRE, "precision": PRECISION}, *more]
    return OnlineNewton(groups, lr, seed=seed, **settings)


def step(optimiser: OnlineNewton, place: nn.Parameter, parts: int = 1) -> None:
    optimiser.zero_grad()
    for _ in range(parts):
        with optimiser.context():
            (loss(place) / parts).backward()
    optimiser.step()


def test_mean_and_deviations_are_those_of_the_best_normal_law_with_independent_entries() -> None:
    place = nn.Parameter(CENTRE.clone())
    optimiser = newton(place)
    for number in range(4_000):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - number / 4_000)
        step(optimiser, place)
    precision = ESS * CURVATURE + PRECISION.diag()
    mean = torch.linalg.solve(precision, ESS * CURVATURE @ AT + PRECISION * CENTRE)
    # The curvature is a mean of some 1 / (1 - b2) steps, each off by its own size and that of its neighbours: 4 %.
    torch.testing.assert_close(optimiser.deviation(place) ** -2, precision.diagonal(), rtol=0.15, atol=0)
    # What is left of the noise at a rate that falls to zero; 0.02 was seen.
    assert ((place - mean).abs() * precision.diagonal().sqrt()).max() < 0.1


def test_the_update_is_that_of_its_authors() -> None:
    ivon = pytest.importorskip("ivon", reason="the authors' package")
    place, theirs = nn.Parameter(CENTRE.clone()), nn.Parameter(CENTRE.clone())
    optimiser = newton(place, radius=0.5)
    optimiser.param_groups[0] |= {"centre": torch.zeros(3), "precision": torch.ones(3)}
    other = ivon.IVON(
        [theirs], lr=0.1, ess=ESS, hess_init=0.2, beta2=0.999, weight_decay=1 / ESS, clip_radius=0.5, rescale_lr=False
    )
    for number in range(30):
        optimiser.zero_grad()
        other.zero_grad()
        with optimiser.context():
            loss(place).backward()
            noise = optimiser._noise[place] / optimiser.deviation(place)
        with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, standard=noise, **__: standard)
            with other.sampled_params(train=True):
                loss(theirs).backward()
        optimiser.step()
        other.step()
        # The same sums in another order.
        torch.testing.assert_close(place.data, theirs.data, rtol=1e-5, atol=1e-6, msg=f"step {number}")
    found = optimiser.state[place]
    torch.testing.assert_close(found["hessian"], other.param_groups[0]["hess"], rtol=1e-5, atol=1e-6)


def test_a_step_is_the_same_in_one_batch_and_in_several() -> None:
    one, several = nn.Parameter(CENTRE.clone()), nn.Parameter(CENTRE.clone())
    first, second = newton(one), newton(several)
    for _ in range(5):
        step(first, one)
        step(second, several, parts=4)
    torch.testing.assert_close(one.data, several.data)
    torch.testing.assert_close(first.deviation(one), second.deviation(several))


def test_noise_is_by_seed_and_step_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    seen = []
    for seed in (0, 0, 1):
        place = nn.Parameter(CENTRE.clone())
        optimiser = newton(place, seed=seed)
        for _ in range(2):
            with optimiser.context():
                seen.append((place.data - CENTRE).tolist())
            place.grad = torch.zeros(3)
            optimiser.step()
            with torch.no_grad():
                place.copy_(CENTRE)
    assert seen[:2] == seen[2:4] and seen[0] != seen[1] and seen[0] != seen[4]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"OnlineNewton\.step takes no closure"):
        newton(nn.Parameter(CENTRE.clone())).step(lambda: 0.0)


def test_the_mean_is_back_in_place_after_an_error() -> None:
    place = nn.Parameter(CENTRE.clone())
    optimiser = newton(place)
    with pytest.raises(RuntimeError, match="no memory"), optimiser.context():
        raise RuntimeError("no memory")
    assert torch.equal(place.data, CENTRE)


def test_a_saved_state_goes_on_to_the_last_digit() -> None:
    whole, resumed = nn.Parameter(CENTRE.clone()), nn.Parameter(CENTRE.clone())
    first, second = newton(whole), newton(resumed)
    for _ in range(3):
        step(first, whole)
    resumed.data = whole.data.clone()
    second.load_state_dict(deepcopy(first.state_dict()))
    for optimiser, place in ((first, whole), (second, resumed)):
        for _ in range(3):
            step(optimiser, place)
    assert torch.equal(whole, resumed) and torch.equal(first.deviation(whole), second.deviation(resumed))


def test_no_entry_moves_further_than_the_radius() -> None:
    place = nn.Parameter(CENTRE.clone())
    step(newton(place, radius=1e-3), place)
    assert 0 < (place - CENTRE).abs().max() <= 1.001e-4


def test_points_are_moved_by_adamw_and_have_no_noise() -> None:
    place, point, alone = (nn.Parameter(CENTRE.clone()) for _ in range(3))
    optimiser = newton(place, {"params": [point], "lr": 0.01})
    plain = torch.optim.AdamW([alone], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        with optimiser.context():
            assert torch.equal(point, alone)
            (loss(point) + loss(place)).backward()
        loss(alone).backward()
        optimiser.step()
        plain.step()
        optimiser.zero_grad()
        plain.zero_grad()
    assert torch.equal(point, alone) and not torch.equal(point, CENTRE)
