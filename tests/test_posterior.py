from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from harness_scenarios import posterior_of
from pyro import poutine
from safetensors.torch import load_file
from scenarios import generators, plain_logits, saved_base, text_program, text_rows, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.errors import DataError, PosteriorError, SettingError
from bayeslora.inference import SVI, fit
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import MonteCLoRA
from bayeslora.models.guides.auto import make_guide
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.record import Record


def untrained(program: Program, kind: str = "structured") -> VariationalPosterior:
    """The posterior of a guide away from its start, without the time of a fit."""
    guide = make_guide(kind, program.model, program.sites, 0.1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return VariationalPosterior(program, Record("svi", {"guide": kind}, n_data=24), guide)


@pytest.fixture
def posterior() -> Posterior:
    return untrained(tiny_program(dropout=0.3).eval())


def logits(posterior: Posterior, rows: Dataset, **settings: object) -> Tensor:
    return posterior.predict(rows, progress=False, **settings).logits


def test_of_several_processes_the_main_one_writes(
    posterior: Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    posterior.save(tmp_path / "posterior")
    assert not list(tmp_path.iterdir())


def test_draws_are_stacked_and_reproducible(posterior: Posterior) -> None:
    before = generators()
    draws = posterior.sample(3, seed=1)
    assert generators() == before
    for site in posterior.program.sites:
        assert draws[site.name].shape == (3, *site.initial.shape)
    assert draws["linear_16x16.A.scale_tril"].shape == (3, 9, 2, 2)
    again, other = posterior.sample(3, seed=1), posterior.sample(3, seed=2)
    assert all(torch.equal(draws[name], again[name]) for name in draws)
    assert not torch.equal(draws["linear_16x16.A"], other["linear_16x16.A"])
    assert not torch.equal(draws["linear_16x16.A"][0], draws["linear_16x16.A"][1])
    for wrong in (0, -1, 2.5, "many"):
        with pytest.raises(SettingError, match="^n "):
            posterior.sample(wrong)
        with pytest.raises(SettingError, match="^n "):
            next(posterior.draws(wrong))


@pytest.mark.parametrize("many", [5, 40])
def test_the_first_draws_do_not_depend_on_their_number(posterior: Posterior, many: int) -> None:
    few, all_draws = posterior.sample(2, seed=4), posterior.sample(many, seed=4)
    assert all(torch.equal(few[name], all_draws[name][:2]) for name in few)
    rows = tiny_rows(5)
    assert torch.equal(logits(posterior, rows, draws=2), logits(posterior, rows, draws=5)[:2])


@pytest.mark.parametrize("model", [MonteCLoRA(components=3), MonteCLoRA(components=3, collapse=False)])
def test_predictions_are_those_of_the_draws(model: MonteCLoRA) -> None:
    posterior = untrained(tiny_program(model).eval())
    rows = tiny_rows(5)
    found = logits(posterior, rows, draws=2, method="sample", seed=3)
    draws = posterior.sample(2, seed=3)
    ids = [torch.tensor([row]) for row in rows["input_ids"]]
    with torch.no_grad():
        for number in range(2):
            weights = {site.name: draws[site.name][number] for site in posterior.program.sites}
            alone = torch.cat([posterior.program.outputs(weights, {"input_ids": row}) for row in ids])
            torch.testing.assert_close(found[number], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guide", ["structured", "mean-field"])
def test_the_density_is_that_of_the_guides_trace(guide: str) -> None:
    posterior = untrained(tiny_program(), guide)
    torch.manual_seed(6)
    trace = poutine.trace(posterior.guide).get_trace()
    values = {name: trace.nodes[name]["value"].detach() for name in trace.stochastic_nodes}
    latent = {name for name in values if not trace.nodes[name]["infer"].get("is_auxiliary")}
    density = posterior.log_prob({name: values[name] for name in latent})
    random_sites = posterior.program.model.stochastic(posterior.program.sites)
    expected = trace.log_prob_sum(lambda name, site: name in random_sites or name not in latent)
    torch.testing.assert_close(density, expected.detach(), rtol=1e-4, atol=1e-2)
    assert not density.requires_grad
    elsewhere = {name: value + 0.1 if name.endswith(".A") else value for name, value in values.items()}
    assert posterior.log_prob(elsewhere) < density


def test_a_point_estimate_has_one_draw_and_no_density() -> None:
    posterior = untrained(tiny_program(), "delta")
    with pytest.raises(PosteriorError, match="no density"):
        posterior.log_prob(posterior.mean())
    assert logits(posterior, tiny_rows(2), draws=5).shape == (1, 2, 3)  # which all draws are


def test_predictions_and_metrics_do_not_depend_on_the_batch_size(posterior: Posterior) -> None:
    rows = tiny_rows(24)
    found = {size: posterior.predict(rows, draws=3, batch_size=size, progress=False) for size in (1, 7, 24)}
    whole = found[24]
    assert whole.logits.shape == (3, 24, 3)
    for size in (1, 7):
        # Padding changes the order of float32 sums.
        torch.testing.assert_close(found[size].logits, whole.logits, rtol=1e-4, atol=1e-5)
        metrics, expected = (each.metrics(intervals=False) for each in (found[size], whole))
        for name in expected:
            one, other = (getattr(m[name], "value", m[name]) for m in (metrics, expected))
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6), name
    assert torch.equal(whole.labels, torch.tensor(rows["labels"]))


def test_predictions_are_in_the_order_of_the_rows(posterior: Posterior) -> None:
    rows = tiny_rows(9)
    order = [4, 0, 8, 2]
    torch.testing.assert_close(
        logits(posterior, rows.select(order), draws=2),
        logits(posterior, rows, draws=2)[:, order],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("training", [True, False])
def test_prediction_is_without_dropout_and_restores_the_mode(posterior: Posterior, training: bool) -> None:
    rows = tiny_rows(6)
    network = posterior.program.network
    keys, state = list(network.state_dict()), {name: value.clone() for name, value in network.state_dict().items()}
    network.train(training)
    before = generators()
    assert torch.equal(logits(posterior, rows, method="mean"), logits(posterior, rows, method="mean"))
    assert torch.equal(logits(posterior, rows, draws=2), logits(posterior, rows, draws=2))
    assert generators() == before
    assert network.training is training
    assert list(network.state_dict()) == keys
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_wide_posterior_flattens_the_prediction(posterior: Posterior) -> None:
    rows = tiny_rows(12)
    narrow, wide = (untrained(tiny_program(MonteCLoRA(components=3, eps=eps))) for eps in (1e-3, 3.0))
    mutual = [each.predict(rows, draws=8, progress=False).mutual_information.mean() for each in (narrow, wide)]
    assert mutual[0] < 1e-3 < mutual[1]


def test_bad_arguments_of_prediction_are_refused(posterior: Posterior) -> None:
    with pytest.raises(PosteriorError, match="Unknown method of prediction 'average'. Known: mean, pairs, sample"):
        posterior.predict(tiny_rows(2), method="average")
    with pytest.raises(DataError, match="no rows"):
        posterior.predict(tiny_rows(2).select([]))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"draws": 0},
        {"draws": 1.5},
        {"draws": "a"},
        {"seed": -1},
        {"seed": "a"},
    ],
)
def test_numbers_that_a_prediction_cannot_take_are_refused(posterior: Posterior, settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        posterior.predict(tiny_rows(4), progress=False, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": SVI}, "backend is .* expected a name"),
        ({"backend": 5}, "backend is 5"),
        ({"start": "runs/mle"}, "start is 'runs/mle', expected a posterior"),
        ({"seed": "a"}, "seed"),
        ({"chains": "two"}, "chains"),
    ],
)
def test_what_a_fit_cannot_take_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        fit(tiny_program(), tiny_rows(4), progress=False, **settings)


def test_two_posteriors_of_one_program_do_not_disturb_each_other(tmp_path: Path) -> None:
    program = tiny_program().eval()
    one, two = untrained(program), untrained(program, "mean-field")
    rows = tiny_rows(6)
    first = logits(one, rows, draws=2)
    second = logits(two, rows, draws=2)
    two.save(tmp_path)
    assert torch.equal(logits(one, rows, draws=2), first)
    assert torch.equal(logits(two, rows, draws=2), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("adapter", ["default", "second"])
def test_the_saved_adapter_is_plain_lora_at_the_mean(tmp_path: Path, adapter: str) -> None:
    base = saved_base(tmp_path / "base")
    program = text_program(base)
    if adapter != "default":
        network = program.network
        network.add_adapter(adapter, replace(network.peft_config["default"]))
        network.set_adapter(adapter)
        program = Program(network, program.observation, encoder=program.encoder)
    posterior = untrained(program)
    rows = text_rows(6)
    expected = logits(posterior, rows, method="mean")[0]
    posterior.save(tmp_path / "posterior")
    torch.testing.assert_close(
        plain_logits(base, tmp_path / "posterior", program, rows), expected, rtol=1e-4, atol=1e-5
    )


def test_a_saved_posterior_has_no_pickle_and_no_noise(tmp_path: Path) -> None:
    program = tiny_program()
    posterior = untrained(program)
    plain = {name: value.shape for name, value in program.network.state_dict().items()}
    logits(posterior, tiny_rows(4), draws=1)
    posterior.save(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "adapter_config.json", "adapter_model.safetensors", "config.json", "posterior.json", "posterior.safetensors",
    ]  # fmt: skip
    assert {name: value.shape for name, value in program.network.state_dict().items()} == plain
    state = {name for name in posterior.state()}
    assert state == set(make_guide("structured", program.model, program.sites).state_dict())


def test_embeddings_that_lora_is_on_are_not_saved_with_it(tmp_path: Path) -> None:
    posterior_of("llama", "bytes-bos", "embed_tokens").save(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_fit_says_what_it_cost() -> None:
    program = tiny_program()
    posterior = fit(program, tiny_rows(12), epochs=1, batch_size=6, progress=False)
    cost = posterior.cost
    learned = sum(site.initial.numel() for site in program.sites)
    assert cost["parameters"] == learned + cost["extra_parameters"]
    assert cost["extra_parameters"] == 13 * (2 + 3)  # v and alpha of each layer
    assert 0 < cost["seconds"] < 120
    assert 2**26 < cost["peak_memory_bytes"] < 2**36
    assert (posterior.record.backend, posterior.record.n_data, posterior.record.finished) == ("svi", 12, True)
    point = fit(program, tiny_rows(12), "map", epochs=1, batch_size=6, progress=False)
    assert point.cost["extra_parameters"] == 0


def test_a_program_can_be_fitted_without_text_and_names() -> None:
    prediction = untrained(tiny_program()).predict(tiny_rows(3).remove_columns("labels"), draws=1, progress=False)
    assert prediction.labels is None
    assert prediction.label_names == ()
