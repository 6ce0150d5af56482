"""What draws say of texts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from bayeslora.generation import Generation

LOGS = torch.tensor([[-1.0, -1.0], [-2.0, -math.inf], [-3.0, -4.0]]).double()
FOUND = Generation("How many?", (" 4", " 5 ", "4 "), ((1,), (2,), (3,)), LOGS, "draw", True)


def test_probabilities_are_averaged() -> None:
    exact = [-1.0, math.log(math.exp(-2) / 2), math.log((math.exp(-3) + math.exp(-4)) / 2)]
    assert FOUND.log_probability.tolist() == pytest.approx(exact)
    assert FOUND.entropy == pytest.approx(-sum(exact) / 3)


def test_information_is_what_a_text_says_of_the_draws() -> None:
    weight = math.exp(-3) / (math.exp(-3) + math.exp(-4))
    last = math.log(2) + weight * math.log(weight) + (1 - weight) * math.log(1 - weight)
    assert FOUND.information.tolist() == pytest.approx([0, math.log(2), last])
    assert FOUND.mutual_information == pytest.approx((math.log(2) + last) / 3)


def test_texts_vote() -> None:
    assert FOUND.vote() == ("4", pytest.approx(2 / 3))
    assert FOUND.vote(lambda text: text.strip() if "5" in text else None) == ("5", pytest.approx(1 / 3))
    assert FOUND.vote(lambda _: None) == (None, 0)


def test_plain_data() -> None:
    found = json.loads(json.dumps(FOUND.to_dict()))
    assert [each["text"] for each in found["texts"]] == list(FOUND) and found["agreement"] == pytest.approx(2 / 3)
    assert found["sampled"] and not replace(FOUND, sampled=False).to_dict()["sampled"]
    assert repr(FOUND) == "Generation('How many?', 3 texts by 'draw', 2 draws)"
