"""The optimiser that allocates ranks, against the equations of the paper entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from bayeslora.inference.training.allocation import Allocating, Triplets

BETA1, BETA2, LR, DECAY = 0.7, 0.6, 0.02, 0.1
#: Of each step: how many singular values of 21 are kept, None for all that there are; the last two are not measured.
BUDGETS = (None, 21, 17, None, 13, None, 8, 7, 7, 7)
MEASURED = 8


def updates(seed: int = 0) -> list[Triplets]:
    """Two updates of ranks 12 and 9."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator))

    return [
        Triplets("one", drawn(5, 12), drawn(12, 1), drawn(12, 6)),
        Triplets("two", drawn(2, 9), drawn(9, 1), drawn(9, 4)),
    ]


def loss(found: Sequence[Sequence[Tensor]], head: Tensor, number: int) -> Tensor:
    """A loss whose gradients differ from step to step."""
    generator = torch.Generator().manual_seed(100 + number)
    total = head.square().sum()
    for p, e, q in found:
        target = torch.randn(len(p), q.shape[1], generator=generator)
        total = total + (p @ (e * q) - target).square().mean()
    return total


def by_hand(number_of_steps: int) -> list[tuple[list[Tensor], list[list[float]]]]:
    """Weights and their importance after each step: AdamW of torch, and equations 6 to 11 in loops over entries."""
    weights = [[value.detach().clone().requires_grad_() for value in each[1:]] for each in updates()]
    head = torch.ones(2, requires_grad=True)
    everything = [value for each in weights for value in each] + [head]
    adam = torch.optim.AdamW(everything, lr=LR, weight_decay=DECAY)
    smooth = {id(value): [0.0] * value.numel() for value in everything}
    uncertain = {id(value): [0.0] * value.numel() for value in everything}
    history = []
    for number in range(number_of_steps):
        adam.zero_grad()
        loss(weights, head, number).backward()
        if number < MEASURED:
            for value in everything[:-1]:
                pairs = zip(value.flatten().tolist(), value.grad.flatten().tolist(), strict=True)
                for place, (weight, gradient) in enumerate(pairs):
                    sensitivity = abs(weight * gradient)
                    average, spread = smooth[id(value)], uncertain[id(value)]
                    average[place] = BETA1 * average[place] + (1 - BETA1) * sensitivity
                    spread[place] = BETA2 * spread[place] + (1 - BETA2) * abs(sensitivity - average[place])
        adam.step()
        importance = [
            [average * spread for average, spread in zip(smooth[id(value)], uncertain[id(value)], strict=True)]
            for value in everything[:-1]
        ]
        if (budget := BUDGETS[number]) is not None:
            scores = {}
            for which, (p, _, q) in enumerate(weights):
                (outputs, rank), columns = p.shape, q.shape[1]
                in_p, in_e, in_q = importance[3 * which : 3 * which + 3]
                for place in range(rank):
                    of_p = sum(in_p[row * rank + place] for row in range(outputs)) / outputs
                    of_q = sum(in_q[place * columns + column] for column in range(columns)) / columns
                    scores[which, place] = in_e[place] + of_p + of_q
            best = sorted(scores, key=lambda key: -scores[key])[:budget]
            with torch.no_grad():
                for which, place in scores:
                    if (which, place) not in best:
                        weights[which][1][place] = 0.0
        history.append(([value.detach().clone() for value in everything], importance))
    return history


def optimiser(found: list[Triplets], head: nn.Parameter) -> Allocating:
    parameters = [value for each in found for value in each[1:]] + [head]
    return Allocating([{"params": parameters, "weight_decay": DECAY}], LR, found, beta1=BETA1, beta2=BETA2)


def step(made: Allocating, found: list[Triplets], head: nn.Parameter, number: int) -> None:
    made.measuring, made.budget = number < MEASURED, BUDGETS[number]
    made.zero_grad()
    loss([each[1:] for each in found], head, number).backward()
    made.step()


def test_weights_are_those_of_the_papers_equations() -> None:
    found, head = updates(), nn.Parameter(torch.ones(2))
    made, expected = optimiser(found, head), by_hand(len(BUDGETS))
    places, kept = [value for each in found for value in each[1:]], []
    for number, (after, importance) in enumerate(expected):
        step(made, found, head, number)
        for value, other in zip([*places, head], after, strict=True):
            torch.testing.assert_close(value.data, other, rtol=1e-5, atol=1e-6, msg=f"step {number}")
        for value, other in zip(places, importance, strict=True):
            of_value = made._importance(value).flatten()
            torch.testing.assert_close(of_value, torch.tensor(other), rtol=1e-4, atol=1e-9, msg=f"step {number}")
        kept.append(sum(int(each.e.count_nonzero()) for each in found))
    # A zero learns until the next allocation, and may come back; after the last one the same ones stay.
    assert kept == [21, 21, 17, 21, 13, 21, 8, 7, 7, 7]
    zeros = [[(value == 0).tolist() for value in (after[1], after[4])] for after, _ in expected]
    assert zeros[7] == zeros[8] == zeros[9] and zeros[4] != zeros[6]


@pytest.mark.parametrize("stop", [3, 7, 9])
def test_its_state_is_all_that_a_later_step_depends_on(stop: int) -> None:
    whole, head = updates(), nn.Parameter(torch.ones(2))
    made = optimiser(whole, head)
    for number in range(stop):
        step(made, whole, head, number)
    again = updates(seed=1)
    other = optimiser(again, other_head := nn.Parameter(torch.zeros(2)))
    other.load_state_dict(deepcopy(made.state_dict()))
    pairs = [pair for one, two in zip(whole, again, strict=True) for pair in zip(one[1:], two[1:], strict=True)]
    for value, copied in [*pairs, (head, other_head)]:
        copied.data = value.data.clone()
    for number in range(stop, len(BUDGETS)):
        step(made, whole, head, number)
        step(other, again, other_head, number)
    assert all(torch.equal(value, copied) for value, copied in pairs)


def test_a_closure_is_evaluated_once_before_the_step() -> None:
    (one, one_head), (two, two_head) = ((updates(), nn.Parameter(torch.ones(2))) for _ in range(2))
    by_step, by_closure, seen = optimiser(one, one_head), optimiser(two, two_head), []

    def closure() -> float:
        by_closure.zero_grad()
        found = loss([each[1:] for each in two], two_head, 0)
        found.backward()
        seen.append(found.item())
        return seen[-1]

    step(by_step, one, one_head, 0)
    by_closure.budget = BUDGETS[0]
    assert by_closure.step(closure) == seen[0] and len(seen) == 1
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x[1:], y[1:], strict=True))
    importance = [made._importance(found[0].p) for made, found in ((by_step, one), (by_closure, two))]
    assert torch.equal(*importance) and bool(importance[0].any())


def test_what_has_no_gradient_has_no_importance() -> None:
    found, head = updates(), nn.Parameter(torch.ones(2))
    made = optimiser(found, head)
    made.budget = 12
    loss([found[0][1:]], head, 0).backward()
    made.step()
    assert [int(each.e.count_nonzero()) for each in found] == [12, 0]
