from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from scenarios import Regression, lora_regression, tiny_program, tiny_rows

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit
from bayeslora.inference.training.objective import State
from bayeslora.inference.variational import point
from bayeslora.inference.variational.loss import ProgramLoss
from bayeslora.models import MonteCLoRA, build
from bayeslora.models.guides.base import Guide
from bayeslora.observations import Classes
from bayeslora.passes import Rows
from bayeslora.program import Program

EXACT = {
    "batch_size": 40, "epochs": 250, "learning_rate": 0.1, "schedule": "cosine", "warmup": 0.0, "max_grad_norm": 1e9,
    "log_every": 50, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(noise=2.0)


def system(known: Regression) -> tuple[torch.Tensor, torch.Tensor]:
    """Precision of the likelihood, and its product with the solution, of the regression with a unit prior."""
    precision = torch.linalg.inv(known.covariance)
    return precision - torch.eye(len(precision)), precision @ known.mean


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_mode_of_a_normal_posterior_is_its_mean(known: Regression, temperature: float) -> None:
    posterior = fit(known.program, known.rows, "map", temperature=temperature, prior_mean="model", **EXACT)
    likelihood, target = system(known)
    # The loss has no noise: what is left is Adam's distance from the optimum, 5e-5 in a trial.
    exact = torch.linalg.solve(likelihood + temperature * torch.eye(len(likelihood)), target)
    found = posterior.mean()["linear_3x1.A"].reshape(-1).double()
    torch.testing.assert_close(found, exact, rtol=0, atol=3e-3)
    assert posterior.record.temperature == temperature


def test_maximum_likelihood_is_least_squares(known: Regression) -> None:
    posterior = fit(known.program, known.rows, "mle", weight_decay=0.0, **EXACT)
    likelihood, target = system(known)
    # A alone is not identified, A b is: the gradient of the squared error must vanish.
    found = posterior.mean()["linear_3x1.A"].reshape(-1).double()
    torch.testing.assert_close(likelihood @ found, target, rtol=0, atol=2e-2)
    assert posterior.record.temperature == 0  # no prior: the limit of a cold posterior


def test_hyper_sites_stay_and_are_not_counted() -> None:
    program = tiny_program(MonteCLoRA(components=3))
    posterior = fit(program, tiny_rows(12), "map", epochs=2, batch_size=6, progress=False)
    draw = posterior.draw()
    initial = program.model.initial(program.sites)
    for name, value in initial.items():
        if name.endswith(("scale_tril", "mixture")):
            torch.testing.assert_close(draw[name], value)
        else:
            assert not torch.allclose(draw[name], value)
    assert posterior.cost["extra_parameters"] == 0
    with pytest.raises(PosteriorError, match="no density"):
        posterior.log_prob(draw)


def test_a_point_is_predicted_once_at_its_mean() -> None:
    posterior = fit(tiny_program(), tiny_rows(12), "map", epochs=1, batch_size=6, progress=False)
    found = posterior.predict(tiny_rows(4), draws=3, progress=False).logits
    assert found.shape == (1, 4, 3)
    assert torch.equal(found, posterior.predict(tiny_rows(4), method="mean", progress=False).logits)


@pytest.mark.parametrize(("backend", "setting", "value"), [("map", "temperature", 0.0), ("mle", "weight_decay", -0.1)])
def test_impossible_settings_are_refused(backend: str, setting: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"{setting} .*found {value}"):
        fit(tiny_program(), tiny_rows(4), backend, progress=False, **{setting: value})


def test_draws_of_a_point_are_no_parameters() -> None:
    posterior = fit(tiny_program(), tiny_rows(12), "map", epochs=1, progress=False)
    assert not any(value.requires_grad for value in [*posterior.draw().values(), *posterior.sample(2).values()])


@pytest.mark.parametrize(("rate", "learned"), [(0.1, True), (1e-9, False)])
def test_a_fit_no_better_than_the_base_rate_is_said(rate: float, learned: bool) -> None:
    known = lora_regression(noise=0.5)
    # The network is near labels of the one sign at its start, and far from those of the other.
    labels = [-label for label in known.rows["labels"]]
    rows = known.rows.remove_columns("labels").add_column("labels", labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(known.program, rows, "mle", **{**EXACT, "learning_rate": rate, "epochs": 30})
    said = [str(each.message) for each in caught if "no better than the base rate" in str(each.message)]
    assert len(said) == (not learned)
    if said:
        values = torch.tensor(labels)
        deviations = (values - values.mean()) / known.program.observation.scale
        density = -deviations.square() / 2 - math.log(known.program.observation.scale * math.sqrt(2 * math.pi))
        assert f"{density.mean():.3f}" in said[0]
        # At this rate nothing moves: in every epoch the rows are as likely as at the start.
        program, over = known.program, Rows.of(known.program, rows)
        outputs = over.outputs(program, {site.name: site.initial for site in program.sites})
        assert f"{program.observation.log_prob(outputs, values).mean():.3f} a row" in said[0]


@pytest.mark.parametrize(
    ("nats", "said"),
    [
        (-0.7, "no better than the base rate: .*-0.700"),
        (-0.69, "hardly better than the base rate, by less than 0.01 nats"),
    ],
)
def test_a_fit_within_the_margin_of_the_base_rate_is_called_hardly_better(nats: float, said: str) -> None:
    from bayeslora.inference.variational.learning import _Explained  # the margin is narrower than what a fit can aim at

    loss = ProgramLoss()
    loss.program = cast(Program, SimpleNamespace(observation=Classes(2)))
    with pytest.warns(UserWarning, match=f"The fit ends {said}.* is -0.693"):
        _Explained(loss, nats).warn([0, 1])


def test_only_the_last_epoch_is_compared_with_the_base_rate(known: Regression) -> None:
    """A fit that has explained its labels and loses that again is said to have."""
    from bayeslora.inference.variational.learning import _Explained  # no public way leads to a fit that dies

    loss = ProgramLoss()
    loss.program, loss.size = known.program, len(known.rows)
    said = _Explained(loss)
    for found in (0.0, -1e6):
        for _ in range(3):  # batches, of which several may be a step
            loss.count(torch.tensor(found * loss.size))
        said.on_epoch(State(3, 9, 1.0))
        assert said.nats == found
    with pytest.warns(UserWarning, match="no better than the base rate"):
        said.warn(known.rows["labels"][:])


def test_what_is_not_random_has_a_rate_of_its_own() -> None:
    """A prior holds A where it is from the first step: at a rate for it, B and the head still learn; not under mle."""

    def moved(backend: str, **own: str) -> set[str]:
        program = tiny_program()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = {"epochs": 1, "warmup": 0.0, "learning_rate": 1e-30, "progress": False}
            posterior = fit(program, tiny_rows(12), backend, **settings, **own)
        return {
            site.role
            for site in program.sites
            if not torch.allclose(posterior.mean()[site.name], site.initial, rtol=0, atol=1e-20)
        }

    assert moved("map", prior_mean="model") == {"B", "head"}
    assert not moved("mle")


def test_a_prior_that_no_learned_mean_is_of_holds_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[str, float] = {}
    plain = point.groups_of

    def seen(guide: Guide, learning_rate: float, points: float, **more: float) -> list[dict[str, Any]]:
        rates[name] = points
        return plain(guide, learning_rate, points, **more)

    monkeypatch.setattr(point, "groups_of", seen)
    for name in ("monteclora", "scalabl"):
        fit(tiny_program(build(name)), tiny_rows(4), "map", epochs=1, progress=False)
    assert rates == {"monteclora": 5e-4, "scalabl": 2e-3}
