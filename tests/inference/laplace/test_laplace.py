"""The backend: which weights it takes as the mode, over which sites, and what it refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from curvature_scenarios import given, tiny
from peft import LoraConfig, get_peft_model
from scenarios import VOCABULARY, awake, tiny_batch, tiny_bert, tiny_program, tiny_rows
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bayeslora.errors import AdapterError, PosteriorError, SettingError
from bayeslora.inference import fit
from bayeslora.inference.laplace import laplace
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.observations import Classes, Observation
from bayeslora.program import Program


def test_a_given_adapter_keeps_its_prediction() -> None:
    program, rows = tiny(), tiny_rows(12)
    batch = tiny_batch(program, rows)
    with torch.no_grad():
        before = program.outputs({site.name: site.initial for site in program.sites}, batch)
    found = given(program, rows).predict(rows, method="mean", progress=False)
    torch.testing.assert_close(found.outputs[0][batch["index"]], before)


def test_given_are_the_weights_of_the_program_or_those_to_start_from() -> None:
    program, rows = tiny(), tiny_rows(6)
    first = {site.name: site.initial.clone() for site in program.sites}
    start = fit(program, rows, "map", epochs=4, progress=False)
    program.weights.write({name: value + 1 for name, value in first.items()})
    found = given(program, rows).mean()
    assert all(torch.equal(value, first[name]) for name, value in found.items())
    around, mean = given(program, rows, start=start), start.mean()
    assert all(torch.equal(value, mean[name]) for name, value in around.mean().items())
    assert not torch.equal(mean["linear_16x16.A"], first["linear_16x16.A"])
    # The prior stays where it was.
    assert torch.equal(around.prior.roots["linear_16x16.A"], given(program, rows).prior.roots["linear_16x16.A"])


@pytest.mark.parametrize("targets", [["query"], ["word_embeddings", "query"]])
def test_a_fresh_adapter_is_trained_and_no_other(targets: list[str]) -> None:
    lora = LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS")
    fresh = Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian(zero_scale=1.0))
    settings = {"epochs": 2, "batch_size": 8, "progress": False, "tune": "none"}
    trained = fit(fresh, tiny_rows(16), "laplace", **settings)
    assert trained.record.history
    assert trained.cost["seconds"] > 0 and trained.cost["peak_memory_bytes"] > 0
    assert not fit(awake(fresh), tiny_rows(16), "laplace", **settings).record.history


def test_only_the_last_layer() -> None:
    program, rows = tiny(), tiny_rows(12)
    posterior = given(program, rows, subset="last-layer", curvature="full")
    assert [site.name for site in posterior.sites] == ["head.classifier.weight", "head.classifier.bias"]
    assert posterior.curvature.size == 16 * 3 + 3


def test_a_trained_mode_is_that_of_map() -> None:
    rows, settings = tiny_rows(24), {"epochs": 2, "batch_size": 8, "progress": False, "seed": 3, "cpu": True}
    mode = fit(tiny_program(Gaussian(sites="both")), rows, "map", prior_mean="model", **settings).mean()
    found = fit(tiny_program(Gaussian(sites="both")), rows, "laplace", mode="map", **settings).mean()
    assert all(torch.equal(mode[name], found[name]) for name in mode)


def test_a_mode_whose_prior_is_tuned_is_that_of_maximum_likelihood() -> None:
    rows, settings = tiny_rows(24), {"epochs": 2, "batch_size": 8, "progress": False, "seed": 3, "cpu": True}
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    program = Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian(sites="both", deviation=0.1))
    modes = (("auto", "mle", {}), ("mode-evidence", "mle", {}), ("none", "map", {"prior_mean": "model"}))
    for tune, backend, own in modes:
        mode = fit(program, rows, backend, **settings, **own).mean()
        found = fit(program, rows, "laplace", tune=tune, **settings).mean()
        assert all(torch.equal(mode[name], found[name]) for name in mode)


def test_a_rate_of_zero_leaves_the_points_of_any_mode_where_they_are() -> None:
    settings = {"epochs": 1, "batch_size": 8, "tune": "none", "point_learning_rate": 0.0, "progress": False}
    program = tiny_program(Gaussian())
    for mode in ("map", "mle"):
        found = fit(program, tiny_rows(16), "laplace", mode=mode, **settings).mean()
        moved = {site.role for site in program.sites if not torch.equal(found[site.name], site.initial)}
        assert moved == {"A"}


def test_the_record_says_which_sites_stay_at_the_mode() -> None:
    posterior = given(awake(tiny_program(MonteCLoRA())), tiny_rows(6))
    kept = {name.rpartition(".")[2] for name in posterior.record.point_sites}
    assert kept == {"scale_tril", "mixture", "B", "weight", "bias"}
    draws = posterior.sample(2)
    assert all(draws[name][0].equal(draws[name][1]) for name in posterior.record.point_sites)


def test_a_prior_around_the_given_weights_cannot_be_tuned() -> None:
    program = awake(tiny_program(Gaussian(sites="both")))
    with pytest.raises(SettingError, match="prior of site .* is centred on the very weights"):
        given(program, tiny_rows(6), tune="mode-evidence")
    assert math.isfinite(given(program, tiny_rows(6), tune="evidence").log_evidence)


def test_settings_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(SettingError, match="sharing='expand' is for curvature='kron'"):
        given(tiny(), tiny_rows(6), sharing="expand", curvature="full")


def test_what_was_saved_before_does_not_decide_whether_to_train(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    program = Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian(sites="both", deviation=0.1))
    settings = {"epochs": 2, "batch_size": 8, "log_every": 1, "progress": False}
    first = fit(program, tiny_rows(16), "laplace", output_dir=tmp_path / "first", **settings)
    second = fit(program, tiny_rows(16), "laplace", seed=1, output_dir=tmp_path / "second", **settings)
    assert second.record.history[0]["loss"] != first.record.history[0]["loss"]
    again = fit(program, tiny_rows(16), "laplace", **settings)
    assert all(torch.equal(value, again.mean()[name]) for name, value in first.mean().items())


def test_a_layer_that_cannot_be_split_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraConfig(r=2, target_modules=["position_embeddings", "query"], task_type="SEQ_CLS")
    program = Program(get_peft_model(tiny_bert(), lora), Classes(3), Gaussian(deviation=0.1))
    monkeypatch.setattr(laplace, "mode_of", lambda *_, **__: pytest.fail("it was trained"))
    expected = r"1 layers see .* cannot be split .*position_embeddings'. Give .*target_modules=\['query'\]"
    with pytest.raises(AdapterError, match=expected):
        fit(program, tiny_rows(6), "laplace", progress=False)


def test_layers_that_see_relative_positions_are_named_with_what_is_left() -> None:
    config = DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3,
        max_position_embeddings=32, position_buckets=8, relative_attention=True, pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    )  # fmt: skip
    base = DebertaV2ForSequenceClassification(config)

    def program(targets: Any) -> Program:
        lora = LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
        return Program(get_peft_model(deepcopy(base), lora), Classes(3), Gaussian(deviation=0.1))

    with pytest.raises(AdapterError, match=r"4 layers .* lora.target_modules=dense,value_proj\)"):
        fit(program("all-linear"), tiny_rows(6), "laplace", progress=False)
    assert fit(program(["dense", "value_proj"]), tiny_rows(6), "laplace", epochs=1, progress=False).random


def test_a_mode_that_is_worse_than_chance_is_said() -> None:
    program, rows = tiny(), tiny_rows(12)
    posterior = fit(program, rows, "mle", epochs=60, learning_rate=1e-2, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The mode explains")
        fit(program, rows, "laplace", start=posterior, tune="none", progress=False)
    swapped = rows.map(lambda row: {"labels": (row["labels"] + 1) % 3})
    with pytest.warns(UserWarning, match="far worse than chance .* and -1.10 by guessing"):
        fit(program, swapped, "laplace", start=posterior, tune="none", progress=False)


class Flat(Observation):
    """Classes that do not say how their log-likelihood curves."""

    name = "flat"
    outputs = 3
    # Abstract methods that the refusal comes before.
    of = distribution = predicted = None

    def check(self, labels: Sequence[Any]) -> None:
        pass


def test_an_observation_without_curvature_is_named() -> None:
    program = tiny()
    program.observation = Flat()
    with pytest.raises(PosteriorError, match="observation 'flat' does not say how its log-likelihood curves"):
        given(program, tiny_rows(6))


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"curvature_rank": 0}, {"curvature": "krn"}])
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        given(tiny(), tiny_rows(6), **setting)


@pytest.mark.parametrize("kind", ["full", "exact"])
def test_too_little_memory_is_said_before_the_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplace, "available", lambda device: 2**20)
    with pytest.raises(SettingError, match=rf"curvature='{kind}' needs .* for 896 weights and 600 rows, and 0.0 GiB"):
        given(tiny(), tiny_rows(600), curvature=kind)


def test_the_published_evidence_is_the_one_that_is_maximised() -> None:
    program, rows = tiny(), tiny_rows(24)
    published = given(program, rows, tune="mode-evidence")
    best = float(published.mode_evidence(published.prior))
    for step in (-0.1, 0.1):
        wider = published.prior.scaled(torch.tensor([step], dtype=torch.float64))
        assert float(published.mode_evidence(wider)) < best
    linear = given(program, rows, tune="evidence")
    assert float(published.mode_evidence(linear.prior)) < best - 0.01


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_tempered_mode_is_that_of_map_at_the_temperature(temperature: float) -> None:
    rows, settings = tiny_rows(24), {"epochs": 2, "batch_size": 8, "progress": False, "temperature": temperature}
    model = Gaussian(sites="both", deviation=0.1)
    mode = fit(tiny_program(model), rows, "map", prior_mean="model", **settings)
    found = fit(tiny_program(model), rows, "laplace", mode="map", **settings)
    assert all(torch.equal(value, found.mean()[name]) for name, value in mode.mean().items())
    assert found.record.temperature == temperature
    other = fit(tiny_program(model), rows, "map", prior_mean="model", **settings | {"temperature": 1.0}).mean()
    assert not torch.equal(other["linear_16x16.A"], mode.mean()["linear_16x16.A"])


def test_the_last_layer_of_a_head_of_two() -> None:
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    network = get_peft_model(RobertaForSequenceClassification(config), lora)
    posterior = given(awake(Program(network, Classes(3), Gaussian())), tiny_rows(12), subset="last-layer")
    assert [site.name for site in posterior.sites] == [
        "head.classifier.out_proj.weight",
        "head.classifier.out_proj.bias",
    ]


def test_an_adapter_with_one_layer_at_its_start_is_not_fresh() -> None:
    program = awake(tiny_program(Gaussian(sites="both", deviation=0.1)))
    values = {site.name: site.initial.clone() for site in program.sites}
    values["linear_16x16.B"][0] = 0
    assert not fit(program.around(values), tiny_rows(8), "laplace", tune="none", progress=False).record.history
