from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scenarios import saved_base, text_program, text_rows, tiny_bert, tiny_program, tiny_rows, untrained_program
from transformers import BertForSequenceClassification

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit, load
from bayeslora.inference.mixture import MixturePosterior
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import Gaussian
from bayeslora.observations import Classes
from bayeslora.passes import Rows, undisturbed
from bayeslora.posterior import Posterior
from bayeslora.predictors import Outputs
from bayeslora.program import Program

SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"epochs": 1, "batch_size": 4},
    "svi": {"epochs": 1, "batch_size": 4},
    "laplace": {"mode": "map", "epochs": 1, "batch_size": 4},
    "sgld": {"draws": 4, "warmup": 1, "thin": 1},
}
ROWS = tiny_rows(12)


def program() -> Program:
    return tiny_program(Gaussian(deviation=0.1))


@pytest.mark.parametrize("backend", SETTINGS)
def test_chains_are_the_fits_with_consecutive_seeds(backend: str, tmp_path: Path) -> None:
    settings = SETTINGS[backend] | {"progress": False}
    posterior = fit(program(), ROWS, backend, seed=3, chains=2, output_dir=tmp_path / "run", **settings)
    assert isinstance(posterior, MixturePosterior) and posterior.record.chains == 2
    for number, member in enumerate(posterior.members):
        alone = fit(program(), ROWS, backend, seed=3 + number, **settings)
        assert member.record.seed == 3 + number
        for name, value in alone.state().items():
            # This adapter was not fresh: all members start from it.
            torch.testing.assert_close(member.state()[name], value)
    costs = [member.cost for member in posterior.members]
    assert posterior.cost["seconds"] == pytest.approx(sum(cost["seconds"] for cost in costs))
    assert posterior.cost["peak_memory_bytes"] == max(cost["peak_memory_bytes"] for cost in costs)
    means = [member.mean()["linear_16x16.A"] for member in posterior.members]
    assert not torch.equal(*means)
    torch.testing.assert_close(posterior.mean()["linear_16x16.A"], (means[0] + means[1]) / 2)


def test_outputs_by_draws_are_those_of_the_draws_in_their_order() -> None:
    posterior = fit(program(), ROWS, "svi", chains=2, progress=False, **SETTINGS["svi"])
    rows = Rows.of(posterior.program, tiny_rows(4, seed=9))
    found = posterior.predict(rows, 4, "sample", seed=1, progress=False).outputs
    with torch.no_grad(), undisturbed(posterior.program):
        each = torch.stack([rows.outputs(posterior.program, draw) for draw in posterior.draws(4, seed=1)])
    torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)  # several draws may be in one pass


def test_predictions_say_how_many_draws_of_all_members_they_are_averages_of() -> None:
    posterior = fit(
        untrained_program(),
        tiny_rows(24),
        "temperature",
        chains=2,
        of="svi",
        progress=False,
        of_settings=SETTINGS["svi"],
    )
    assert posterior.predict(tiny_rows(4, seed=9), 6, progress=False).metrics().draws == 6


def fresh(**lora: Any) -> Program:
    settings = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS", **lora}
    return Program(get_peft_model(tiny_bert(), LoraConfig(**settings)), Classes(3), Gaussian())


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_members_have_initial_matrices_of_their_own_as_peft_draws_them(init: bool | str) -> None:
    here = fresh(init_lora_weights=init, target_modules=["word_embeddings", "query", "dense"])
    before = {name: value.clone() for name, value in here.network.state_dict().items()}
    state = torch.get_rng_state()
    posterior = fit(here, ROWS, "mle", seed=5, chains=3, epochs=1, learning_rate=1e-9, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in here.network.state_dict().items())
    alone = fit(here, ROWS, "mle", seed=5, epochs=1, learning_rate=1e-9, progress=False)
    first, second, third = (member.mean() for member in posterior.chains)
    assert all(torch.equal(value, first[name]) for name, value in alone.mean().items())
    for site in here.sites:
        drawn = site.role == ("B" if site.group.startswith("embedding") else "A")
        one, *others = (mean[site.name] for mean in (first, second, third))
        for other in others:
            assert torch.allclose(other, one, atol=1e-6) is not drawn, site.name
            if drawn:
                assert float(other.std() / one.std()) == pytest.approx(1, abs=0.25)
                assert abs(float(torch.cosine_similarity(other.flatten(), one.flatten(), 0))) < 0.25
        assert torch.allclose(*others, atol=1e-6) is not drawn


def test_members_that_are_told_where_to_start_have_one_prior() -> None:
    here = fresh()
    start = fit(here, ROWS, "mle", epochs=1, progress=False)
    found = fit(here, ROWS, "map", chains=2, start=start, epochs=1, learning_rate=1e-9, progress=False)
    for member in found.chains:
        assert member.program is here
        for name, value in start.mean().items():
            torch.testing.assert_close(member.mean()[name], value, rtol=0, atol=1e-6)


def test_members_of_an_epoch_of_svi_are_as_far_apart_as_those_of_other_programs(tmp_path: Path) -> None:
    here = fresh(r=8)
    posterior = fit(here, ROWS, "svi", chains=2, epochs=1, batch_size=4, progress=False, output_dir=tmp_path / "run")
    one, two = (member.mean()["linear_16x16.A"].flatten() for member in posterior.chains)
    assert abs(float(torch.cosine_similarity(one, two, 0))) < 0.1
    # Each prior is around its own matrices, also after a load.
    expected, found = posterior.sample(4, seed=1), load(tmp_path / "run", program=here)
    assert all(torch.equal(value, expected[name]) for name, value in found.sample(4, seed=1).items())
    for member, loaded in zip(posterior.chains, found.chains, strict=True):
        draw = member.draw()
        assert {k: float(v) for k, v in member.log_prior(draw).items()} == {
            k: float(v) for k, v in loaded.log_prior(draw).items()
        }
        centre = member.program.sites[0].initial
        assert torch.equal(centre, loaded.program.sites[0].initial)
        assert float((member.mean()["linear_16x16.A"] - centre).std()) < 0.1 * float(centre.std())
    expected_outputs = posterior.predict(ROWS, draws=4, progress=False).outputs
    assert torch.equal(found.predict(ROWS, draws=4, progress=False).outputs, expected_outputs)


def test_the_saved_adapter_is_the_first_members_mean(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    posterior = fit(text_program(base), text_rows(), "mle", chains=2, epochs=1, learning_rate=0.03, progress=False)
    posterior.save(tmp_path / "saved")
    plain = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    found = Program(PeftModel.from_pretrained(plain, tmp_path / "saved").eval(), Classes(3))
    first, second = posterior.means()
    for site in found.sites:
        assert torch.equal(site.initial, first[site.name])
    assert not all(torch.equal(value, first[name]) for name, value in second.items())


def test_what_starts_from_weights_is_given_one_fit() -> None:
    here = fresh()
    start = fit(here, ROWS, "mle", chains=2, epochs=1, progress=False)
    with pytest.raises(SettingError, match=r"start is of 2 independent fits, .* start\.chains\[0\]"):
        fit(here, ROWS, "laplace", start=start, progress=False)
    around = fit(here, ROWS, "laplace", start=start.chains[0], tune="none", progress=False)
    for name, value in start.chains[0].mean().items():
        torch.testing.assert_close(around.mean()[name], value)


def test_a_head_that_was_drawn_at_random_is_drawn_for_each_member(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    network = BertForSequenceClassification.from_pretrained(base)
    network.bert.save_pretrained(base)  # without its head
    posterior = fit(text_program(base), text_rows(), "mle", chains=2, epochs=1, learning_rate=1e-9, progress=False)
    one, two = (member.mean()["head.classifier.weight"] for member in posterior.chains)
    assert abs(float(torch.cosine_similarity(one.flatten(), two.flatten(), 0))) < 0.5
    assert float(two.std() / one.std()) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("backend", SETTINGS)
def test_the_mixture_comes_back_from_disk(backend: str, tmp_path: Path) -> None:
    settings = SETTINGS[backend] | {"progress": False, "chains": 2, "output_dir": tmp_path / "run"}
    here = program()
    posterior = fit(here, ROWS, backend, **settings)
    expected = posterior.predict(ROWS, draws=4, progress=False)
    for found in (load(tmp_path / "run", program=here), fit(here, ROWS, backend, resume=True, **settings)):
        assert isinstance(found, MixturePosterior) and found.record == posterior.record
        assert [member.record for member in found.members] == [member.record for member in posterior.members]
        torch.testing.assert_close(found.predict(ROWS, draws=4, progress=False).logits, expected.logits)


def test_predictions_average_the_probabilities_of_the_members() -> None:
    posterior = fit(program(), ROWS, "map", chains=3, epochs=1, progress=False)
    assert isinstance(posterior, MixturePosterior)
    members = [member.predict(ROWS, progress=False).probabilities for member in posterior.members]
    found = posterior.predict(ROWS, draws=1, progress=False)  # one of each, so that all weigh the same
    assert found.draws == 3
    torch.testing.assert_close(found.probabilities, torch.stack(members).mean(0))


class OneNumber:
    """A way to predict of one's own: the fit's seed."""

    by_draws = False

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        return Outputs(torch.full((1, len(rows), 3), float(posterior.record.seed)))


def test_a_way_to_predict_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VariationalPosterior, "predictors", {"one": OneNumber()})
    posterior = fit(program(), ROWS, "map", chains=2, epochs=1, progress=False)
    found = posterior.predict(ROWS, progress=False)
    assert found.method == "one" and found.outputs.unique(dim=1).squeeze(1).tolist() == [[0.0] * 3, [1.0] * 3]


def test_a_link_is_averaged_too() -> None:
    posterior = fit(program(), ROWS, "laplace", chains=2, epochs=1, progress=False)
    assert isinstance(posterior, MixturePosterior) and posterior.predictor()[0] == "mc-joint"
    members = [member.predict(ROWS, progress=False, seed=place) for place, member in enumerate(posterior.members)]
    found = posterior.predict(ROWS, progress=False)
    torch.testing.assert_close(found.probabilities, torch.stack([each.probabilities for each in members]).mean(0))
    torch.testing.assert_close(found.expected_entropy, torch.stack([each.expected_entropy for each in members]).mean(0))


def test_the_density_is_the_mixtures_and_draws_take_turns() -> None:
    posterior = fit(program(), ROWS, "svi", chains=2, epochs=1, progress=False)
    assert isinstance(posterior, MixturePosterior)
    value = posterior.draw()
    each = [float(member.log_prob(value)) for member in posterior.members]
    assert float(posterior.log_prob(value)) == pytest.approx(
        max(each) + math.log1p(math.exp(min(each) - max(each))) - math.log(2), abs=1e-3
    )
    name = "linear_16x16.A"
    drawn = posterior.sample(3, seed=5)[name]
    first, second = posterior.members
    torch.testing.assert_close(drawn[::2], first.sample(2, seed=5)[name])
    torch.testing.assert_close(drawn[1], second.sample(1, seed=6)[name][0])


def test_as_many_draws_are_had_as_of_every_member_alike() -> None:
    posterior = fit(program(), ROWS, "sgld", chains=2, draws=2, warmup=1, thin=1, progress=False)
    assert posterior.most_draws == len(posterior.sample(4)["linear_16x16.A"]) == 4
    assert posterior.predict(ROWS, draws=3, progress=False).draws == 4  # of one no more than of another
    with pytest.raises(PosteriorError, match="has 2 draws, and 3 were asked for"):
        posterior.sample(5)
    assert fit(program(), ROWS, "map", chains=2, epochs=1, progress=False).most_draws is None


def test_as_many_draws_differ_as_the_members_have_together() -> None:
    settings = {"checkpoints": 3, "epochs": 3, "progress": False}
    posterior = fit(program(), ROWS, "checkpoint-ensemble", chains=2, **settings)
    assert [posterior.differing(draws) for draws in (1, 5, 10)] == [1, 5, 6]
    assert len(posterior.sample(posterior.differing(10))["linear_16x16.A"]) == 6
    dense = fit(program(), ROWS, "svi", chains=2, epochs=1, progress=False)
    assert [dense.differing(draws) for draws in (1, 5, 10)] == [1, 5, 10]


def test_members_have_priors_of_their_own_and_the_whole_has_none() -> None:
    posterior = fit(program(), ROWS, "svi", chains=2, epochs=1, progress=False)
    with pytest.raises(PosteriorError, match="no prior in common: ask one of its chains"):
        posterior.log_prior(posterior.draw())
    assert posterior.chains[0].log_prior(posterior.chains[0].draw())


def test_fits_whose_densities_are_known_with_values_of_their_own_have_none_together() -> None:
    settings: dict[str, Any] = {"guide": "inducing", "guide_settings": {"m": 2, "flow": 4}, "epochs": 1}
    posterior = fit(tiny_program(Gaussian()), ROWS, "svi", chains=2, progress=False, **settings)
    draw = posterior.draw()
    assert posterior.auxiliary and not posterior.dense
    with pytest.raises(PosteriorError, match="known with values of its own alone .*: ask one of its chains"):
        posterior.log_prob(draw)
    assert posterior.chains[0].dense and posterior.chains[0].log_prob(draw).isfinite()


def test_points_have_no_density() -> None:
    posterior = fit(program(), ROWS, "map", chains=2, epochs=1, progress=False)
    with pytest.raises(PosteriorError, match="no density"):
        posterior.log_prob(posterior.draw())


def test_a_stopped_fit_goes_on_with_the_next_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS["sgld"] | {"progress": False, "chains": 3}
    whole = fit(program(), ROWS, "sgld", **settings)
    from bayeslora.inference.mcmc.sgld import SGLD

    chain, begun = SGLD.chain, []

    def stopped(self: SGLD, *args: Any) -> Any:
        begun.append(1)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return chain(self, *args)

    monkeypatch.setattr(SGLD, "chain", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(program(), ROWS, "sgld", output_dir=tmp_path / "run", **settings)
    found = fit(program(), ROWS, "sgld", output_dir=tmp_path / "run", resume=True, **settings)
    assert len(begun) == 4  # the first chain was not run again
    for name, value in whole.state().items():
        torch.testing.assert_close(found.state()[name], value)


def test_another_number_of_chains_is_another_fit(tmp_path: Path) -> None:
    settings = {"epochs": 1, "progress": False, "output_dir": tmp_path / "run"}
    fit(program(), ROWS, "map", chains=2, **settings)
    with pytest.raises(SettingError, match="chains"):
        fit(program(), ROWS, "map", resume=True, **settings)
    with pytest.raises(SettingError, match="at least 1"):
        fit(program(), ROWS, "map", chains=0, epochs=1)
