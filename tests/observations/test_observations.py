from __future__ import annotations

import math

import pytest
import torch

from bayeslora.errors import SettingError, TaskError
from bayeslora.observations import Choices, Classes, Observation, Prompted, Value, build
from bayeslora.tasks import TaskSpec


def test_class_labels_have_the_density_of_a_softmax() -> None:
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    observation = Classes(3)
    assert observation.outputs == 3
    log_prob = observation.distribution(logits).log_prob(labels)
    torch.testing.assert_close(log_prob, logits.log_softmax(-1)[torch.arange(4), labels])


def test_an_impossible_choice_leaves_a_finite_density_and_gradient() -> None:
    logits = torch.tensor([[0.3, -0.2, -torch.inf]], requires_grad=True)
    log_prob = Classes(3).distribution(logits).log_prob(torch.tensor([1]))
    log_prob.sum().backward()
    assert log_prob.item() == pytest.approx(-math.log(1 + math.exp(0.5)))
    assert torch.isfinite(logits.grad).all()


def test_real_labels_have_one_output_and_normal_noise() -> None:
    outputs, labels = torch.randn(5, 1), torch.randn(5)
    observation = Value(0.5)
    assert observation.outputs == 1
    log_prob = observation.distribution(outputs).log_prob(labels)
    assert log_prob.shape == (5,)
    expected = -((labels - outputs[:, 0]) ** 2) / (2 * 0.25) - math.log(0.5) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_prob, expected)


@pytest.mark.parametrize("observation", [Classes(4), Value(0.3, 3.0, 2.0), Choices(3)])
def test_a_observation_survives_as_plain_data(observation: Observation) -> None:
    assert build(observation.to_dict()) == observation


def test_fewer_than_two_classes_are_none() -> None:
    with pytest.raises(SettingError, match=r"Classes\(1\): an observation of classes has at least two"):
        Classes(1)


@pytest.mark.parametrize("observation", [Classes, Prompted])
def test_a_task_without_classes_says_how_to_name_them(observation: type[Classes]) -> None:
    with pytest.raises(TaskError, match="'mine' has no classes: .* no split 'train' .*--set task.train=.*labels="):
        observation.of(TaskSpec("mine"))
    assert type(observation.of(TaskSpec("mine", labels=("no", "yes")))) is observation


def test_an_unknown_observation_is_refused() -> None:
    with pytest.raises(SettingError, match="Unknown observation 'valu'. Did you mean 'value'"):
        build({"name": "valu"})


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_curvature_root_is_that_of_the_multinomial_covariance(classes: int) -> None:
    logits = 4 * torch.randn(20, classes, dtype=torch.float64)
    logits[0, 1] = -torch.inf  # a choice that the row lacks
    logits[1] = torch.tensor([60.0] + [0.0] * (classes - 1))
    roots = Classes(classes).curvature_root(logits)
    assert roots.shape == (classes - 1, 20, classes)
    p = logits.softmax(-1)
    expected = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    torch.testing.assert_close(torch.einsum("knc,knd->ncd", roots, roots), expected)
    assert torch.isfinite(Classes(classes).curvature_root(logits.float())).all()


@pytest.mark.parametrize("observation", [Classes(3), Value(0.5), Value(0.5, 3.0, 2.0)])
def test_scores_and_curvature_are_derivatives_of_the_density(observation: Observation) -> None:
    logits = torch.randn(5, observation.outputs, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0]) if isinstance(observation, Classes) else torch.randn(5).double()
    (score,) = torch.autograd.grad(observation.distribution(logits).log_prob(labels).sum(), logits)
    torch.testing.assert_close(observation.score(logits.detach(), labels), score)
    hessian = torch.autograd.functional.hessian(
        lambda row: -observation.distribution(row[None]).log_prob(labels[:1]).sum(), logits[0].detach()
    )
    roots = observation.curvature_root(logits.detach())[:, 0]
    torch.testing.assert_close(roots.mT @ roots, hessian)


@pytest.mark.parametrize("observation", [Classes(3), Value(0.5), Value(0.5, 3.0, 2.0)])
def test_no_logits_gain_more_than_the_gain(observation: Observation) -> None:
    logits = torch.randn(6, observation.outputs, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    gain = observation.gain(logits, labels)
    assert gain.shape == (6,) and (gain > 0).all()
    # The best logits there are: nearly all mass on the label, or the label itself.
    if isinstance(observation, Value):
        best = ((labels - observation.mean) / observation.unit).unsqueeze(-1)
    else:
        best = 60 * torch.eye(3)[labels]
    rise = observation.distribution(best.double()).log_prob(labels) - observation.distribution(logits).log_prob(labels)
    torch.testing.assert_close(gain, rise)


def test_the_best_constant_outputs_are_base_rates() -> None:
    labels = torch.tensor([0, 2, 2, 2])
    classes = Classes(3)
    assert classes.constant(labels).softmax(-1).tolist() == pytest.approx([0.25, 0.0, 0.75])
    values = torch.tensor([1.0, 2.0, 6.0])
    assert Value().constant(values).tolist() == [3.0]
    assert Value(0.5, 2.0, 4.0).constant(values).tolist() == [0.25]
