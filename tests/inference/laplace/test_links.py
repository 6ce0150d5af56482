"""Links from Gaussian logits to probabilities against draws and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayeslora.inference.laplace import links
from bayeslora.inference.laplace.posterior import linked
from bayeslora.observations import TextChoices


def gaussian(scale: float, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, classes, generator=generator, dtype=torch.float64)
    root = scale * torch.randn(6, classes, classes, generator=generator, dtype=torch.float64)
    return mean, root @ root.mT


def test_joint_draws_have_the_covariance_and_independent_ones_its_diagonal() -> None:
    mean, covariance = gaussian(1.0)
    for joint in (True, False):
        drawn = links.draws(mean, covariance, joint, 20_000, seed=1)
        expected = covariance if joint else covariance.diagonal(dim1=-2, dim2=-1).diag_embed()
        found = torch.einsum("sni,snj->nij", drawn - mean, drawn - mean) / len(drawn)
        # 20,000 draws: an entry has a relative standard error of at most sqrt(2 / 20000) = 1 % of the variances.
        bound = 0.05 * covariance.diagonal(dim1=-2, dim2=-1).max(-1).values[:, None, None]
        assert ((found - expected).abs() < bound).all()


def test_draws_have_the_moments_that_are_asked_for() -> None:
    mean, covariance = gaussian(2.0, classes=4)
    drawn = links.draws(mean, covariance, True, 100, seed=7)
    torch.testing.assert_close(drawn.mean(0), mean)
    torch.testing.assert_close(torch.einsum("sni,snj->nij", drawn - mean, drawn - mean) / 100, covariance)


def test_averages_do_not_depend_on_how_many_examples_there_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, covariance = gaussian(1.0)
    logs, entropies = links.averaged(mean, covariance, True, 500, seed=0)
    drawn = links.draws(mean, covariance, True, 500, seed=0).log_softmax(-1)
    torch.testing.assert_close(logs.exp(), drawn.exp().mean(0))
    torch.testing.assert_close(entropies, -(drawn.exp() * drawn).sum(-1).mean(0))
    monkeypatch.setattr(links, "CHUNK", 2 * 500 * 3)
    again = links.averaged(mean, covariance, True, 500, seed=0)
    torch.testing.assert_close(again, (logs, entropies))


def test_all_links_agree_with_the_softmax_without_uncertainty() -> None:
    mean, covariance = gaussian(1e-3)
    expected = mean.softmax(-1)
    torch.testing.assert_close(links.probit(mean, covariance).softmax(-1), expected, rtol=1e-4, atol=0)
    joint = links.draws(mean, covariance, True, 1000, seed=0)
    torch.testing.assert_close(joint.softmax(-1).mean(0), expected, rtol=1e-3, atol=0)


def test_the_bridge_is_the_softmax_for_two_classes_and_the_published_map_for_more() -> None:
    mean, covariance = gaussian(0.5, classes=2)
    mean = mean - mean.mean(-1, keepdim=True)
    concentration = links.bridge(mean, covariance)
    torch.testing.assert_close(concentration / concentration.sum(-1, keepdim=True), mean.softmax(-1))
    mean, _ = gaussian(0.5)
    mean = mean - mean.mean(-1, keepdim=True)
    variance = 0.3 * (1 - 1 / 3)
    expected = (1 - 2 / 3 + mean.exp() / 9 * (-mean).exp().sum(-1, keepdim=True)) / variance
    torch.testing.assert_close(links.bridge(mean, 0.3 * torch.eye(3).double().expand(6, 3, 3)), expected)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_bridge_of_logits_whose_sum_is_certain(classes: int) -> None:
    mean, covariance = gaussian(1.0, classes)
    centring = torch.eye(classes).double() - 1 / classes
    covariance = centring @ covariance @ centring  # up to rounding, the sum has no variance
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    f = mean - mean.mean(-1, keepdim=True)
    inverse = (-f).exp().sum(-1, keepdim=True)
    expected = (1 - 2 / classes + f.exp() / classes**2 * inverse) / variance
    torch.testing.assert_close(links.bridge(mean, covariance), expected)
    rounded = links.bridge(mean, covariance.float().double())
    torch.testing.assert_close(rounded, expected, rtol=1e-4, atol=1e-6)


def test_the_bridge_of_one_choice_is_certain() -> None:
    mean = torch.tensor([[0.3, -torch.inf, -torch.inf]]).double()
    found = links.bridge(mean, torch.eye(3).double().unsqueeze(0))
    assert found.tolist() == [[1.0, 0.0, 0.0]]


def test_probit_is_close_to_the_average_over_draws_for_two_classes() -> None:
    mean = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64)).expand(4, 2, 2)
    average = links.draws(mean, covariance, True, 50_000, seed=0).softmax(-1).mean(0)[:, 0]
    # MacKay's formula is off by at most 0.02 for one uncertain logit.
    assert (links.probit(mean, covariance).softmax(-1)[:, 0] - average).abs().max() < 0.02


def test_probit_of_two_classes_is_of_the_difference_of_their_logits() -> None:
    mean, covariance = torch.tensor([[1.0, -1.0]]).double(), torch.eye(2).double().unsqueeze(0)
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    exact = float((weights / (1 + np.exp(-2 - math.sqrt(2) * points))).sum() / weights.sum())
    assert exact == pytest.approx(0.8161, abs=1e-4)  # the difference is 2, with a variance of 2
    found = float(links.probit(mean, covariance).exp()[0, 0])
    assert found == pytest.approx(1 / (1 + math.exp(-2 / math.sqrt(1 + math.pi / 4))), rel=1e-12)
    assert found == pytest.approx(0.8171, abs=5e-5)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_probit_does_not_see_what_all_logits_have_in_common(classes: int) -> None:
    mean, covariance = gaussian(1.0, classes)
    expected = links.probit(mean, covariance)
    torch.testing.assert_close(expected.exp().sum(-1), torch.ones(6).double())
    torch.testing.assert_close(links.probit(mean + 50, covariance), expected)
    torch.testing.assert_close(links.probit(mean, covariance + 9), expected)


@pytest.mark.parametrize("classes", [3, 10])
def test_probit_of_more_classes_is_nearer_to_the_average_over_draws_than_no_noise_and_the_published_link(
    classes: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = 2 * torch.randn(200, classes, generator=generator, dtype=torch.float64)
    root = 3 * torch.randn(200, classes, classes, generator=generator, dtype=torch.float64) / classes**0.5
    covariance = root @ root.mT
    average = links.averaged(mean, covariance, True, 2000, seed=0)[0].exp()
    published = mean / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()
    # On average over rows and classes; 2,000 draws leave each probability an error of 0.01 at most.
    found, plain, other = (
        float((each - average).abs().mean())
        for each in (links.probit(mean, covariance).exp(), mean.softmax(-1), published.softmax(-1))
    )
    assert found < other and found < 0.7 * plain


def test_a_wide_gaussian_flattens_every_link() -> None:
    mean, covariance = torch.tensor([[4.0, 0.0, 0.0]]).double(), 400 * torch.eye(3).double().unsqueeze(0)
    sure = float(mean.softmax(-1).max())
    drawn = links.draws(mean, covariance, True, 1000, seed=0).softmax(-1).mean(0)
    assert float(drawn.max()) < 0.6 < sure
    assert float(links.probit(mean, covariance).softmax(-1).max()) < 0.6
    concentration = links.bridge(mean, covariance)
    assert float(links.dirichlet_entropy(concentration)) < 0.1  # it knows nothing, so that draws are at the corners


def test_entropy_of_a_dirichlet_is_the_average_over_draws() -> None:
    concentration = torch.tensor([[0.5, 2.0, 3.0], [10.0, 1.0, 1.0]], dtype=torch.float64)
    drawn = torch.distributions.Dirichlet(concentration).sample((20_000,))
    average = torch.special.entr(drawn).sum(-1).mean(0)
    torch.testing.assert_close(links.dirichlet_entropy(concentration), average, rtol=0.02, atol=0)


def test_choices_that_a_row_lacks_have_no_probability() -> None:
    mean = torch.tensor([[1.0, 0.5, -torch.inf]]).double()
    covariance = torch.zeros(1, 3, 3).double()
    covariance[0, :2, :2] = torch.tensor([[1.0, 0.2], [0.2, 0.5]])
    assert links.probit(mean, covariance).softmax(-1)[0, 2] == 0
    assert links.draws(mean, covariance, True, 10, seed=0).softmax(-1)[:, 0, 2].max() == 0
    concentration = links.bridge(mean, covariance)
    assert concentration[0, 2] == 0 and torch.isfinite(concentration).all()
    two = links.bridge(mean[:, :2], covariance[:, :2, :2])
    torch.testing.assert_close(concentration[:, :2], two)
    assert torch.isfinite(links.dirichlet_entropy(concentration)).all()


@pytest.mark.parametrize("link", links.LINKS)
def test_what_all_texts_of_a_row_have_in_common_does_not_count(link: str) -> None:
    root = torch.randn(4, 3, 3, dtype=torch.float64)
    mean, covariance = torch.randn(4, 3, dtype=torch.float64), root @ root.mT
    mean[1, 2], covariance[1, 2], covariance[1, :, 2] = -torch.inf, 0.0, 0.0
    likely = (mean - 50, covariance + 9 * (mean.isfinite().unsqueeze(-1) & mean.isfinite().unsqueeze(-2)))
    expected, found = (linked(TextChoices(3), *each, link, 0) for each in ((mean, covariance), likely))
    torch.testing.assert_close(found[0].softmax(-1), expected[0].softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1])


def test_centred_logits_make_the_same_draws_of_probabilities() -> None:
    root = torch.randn(1, 3, 3, dtype=torch.float64)
    mean, covariance = torch.randn(1, 3, dtype=torch.float64), root @ root.mT
    gaussians = (mean, covariance), links.centred(mean, covariance)
    one, other = (links.draws(*each, True, 100_000, 0).softmax(-1) for each in gaussians)
    torch.testing.assert_close(one.mean(0), other.mean(0), rtol=0.02, atol=5e-3)
    torch.testing.assert_close(one.var(0), other.var(0), rtol=0.05, atol=5e-3)
