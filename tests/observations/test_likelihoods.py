from __future__ import annotations

import math

import pytest
import torch

from bayeslora.errors import SettingError
from bayeslora.observations.likelihoods import Categorical, Likelihood, Normal, build_likelihood, to_dict


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


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_curvature_root_is_that_of_the_multinomial_covariance(classes: int) -> None:
    logits = 4 * torch.randn(20, classes, dtype=torch.float64)
    logits[0, 1] = -torch.inf  # a choice that the row lacks
    logits[1] = torch.tensor([60.0] + [0.0] * (classes - 1))
    roots = Categorical(classes).curvature_root(logits)
    assert roots.shape == (classes - 1, 20, classes)
    p = logits.softmax(-1)
    expected = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    torch.testing.assert_close(torch.einsum("knc,knd->ncd", roots, roots), expected)
    assert torch.isfinite(Categorical(classes).curvature_root(logits.float())).all()


@pytest.mark.parametrize("likelihood", [Categorical(3), Normal(0.5)])
def test_scores_and_curvature_are_derivatives_of_the_density(likelihood: Likelihood) -> None:
    logits = torch.randn(5, likelihood.outputs, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0]) if likelihood.name == "categorical" else torch.randn(5).double()
    (score,) = torch.autograd.grad(likelihood.distribution(logits).log_prob(labels).sum(), logits)
    torch.testing.assert_close(likelihood.score(logits.detach(), labels), score)
    hessian = torch.autograd.functional.hessian(
        lambda row: -likelihood.distribution(row[None]).log_prob(labels[:1]).sum(), logits[0].detach()
    )
    roots = likelihood.curvature_root(logits.detach())[:, 0]
    torch.testing.assert_close(roots.mT @ roots, hessian)


@pytest.mark.parametrize("likelihood", [Categorical(3), Normal(0.5)])
def test_no_logits_gain_more_than_the_gain(likelihood: Likelihood) -> None:
    logits = torch.randn(6, likelihood.outputs, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    gain = likelihood.gain(logits, labels)
    assert gain.shape == (6,) and (gain > 0).all()
    # The best logits there are: nearly all mass on the label, or the label itself.
    best = 60 * torch.eye(3)[labels] if likelihood.outputs == 3 else labels.unsqueeze(-1)
    rise = likelihood.distribution(best.double()).log_prob(labels) - likelihood.distribution(logits).log_prob(labels)
    torch.testing.assert_close(gain, rise)
