from __future__ import annotations

import math

import pytest
import torch

from bayeslora.errors import SettingError
from bayeslora.likelihoods import Categorical, Likelihood, Normal, build_likelihood, to_dict


def test_class_labels_have_the_density_of_a_softmax() -> None:
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    likelihood = Categorical(3)
    assert likelihood.outputs == 3
    log_prob = likelihood.distribution(logits).log_prob(labels)
    torch.testing.assert_close(log_prob, logits.log_softmax(-1)[torch.arange(4), labels])
    torch.testing.assert_close(likelihood.probabilities(logits), logits.softmax(-1))


def test_an_impossible_choice_leaves_a_finite_density_and_gradient() -> None:
    logits = torch.tensor([[0.3, -0.2, -torch.inf]], requires_grad=True)
    log_prob = Categorical(3).distribution(logits).log_prob(torch.tensor([1]))
    log_prob.sum().backward()
    assert log_prob.item() == pytest.approx(-math.log(1 + math.exp(0.5)))
    assert torch.isfinite(logits.grad).all()


def test_real_labels_have_one_output_and_normal_noise() -> None:
    outputs, labels = torch.randn(5, 1), torch.randn(5)
    likelihood = Normal(0.5)
    assert likelihood.outputs == 1
    log_prob = likelihood.distribution(outputs).log_prob(labels)
    assert log_prob.shape == (5,)
    expected = -((labels - outputs[:, 0]) ** 2) / (2 * 0.25) - math.log(0.5) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_prob, expected)
    assert torch.equal(likelihood.probabilities(outputs), outputs)


@pytest.mark.parametrize("likelihood", [Categorical(4), Normal(0.3)])
def test_a_likelihood_survives_as_plain_data(likelihood: Likelihood) -> None:
    assert build_likelihood(to_dict(likelihood)) == likelihood


def test_an_unknown_likelihood_is_refused() -> None:
    with pytest.raises(SettingError, match="Unknown likelihood 'norml'. Did you mean 'normal'"):
        build_likelihood({"name": "norml"})
