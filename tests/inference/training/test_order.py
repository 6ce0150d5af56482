from __future__ import annotations

import torch
from scenarios import tiny_program, tiny_rows

from bayeslora.inference.training.order import Order
from bayeslora.passes import Rows


def test_rows_of_like_length_share_a_batch() -> None:
    data = Rows.of(tiny_program(), tiny_rows(200)).dataset
    spread = {}
    for grouped in (True, False):
        order = list(Order(data, 5, seed=0, group_by_length=grouped))
        lengths = torch.tensor(list(data["length"]))[order].view(-1, 5).float()
        spread[grouped] = float((lengths.max(1).values - lengths.min(1).values).mean())
    assert spread[True] < spread[False] / 3


def test_rows_of_the_short_batch_are_of_any_length() -> None:
    # They weigh more than the others: short ones alone would tilt the likelihood.
    data = Rows.of(tiny_program(), tiny_rows(48)).dataset
    order = Order(data, 5, seed=0, group_by_length=True)
    lengths = torch.tensor(list(data["length"])).float()
    rows = []
    for order.epoch in range(200):
        rows += list(order)[-3:]
    # Four standard errors of the mean of 600 draws.
    assert abs(float(lengths[rows].mean() - lengths.mean())) < 4 * float(lengths.std()) / 600**0.5
