"""Ways to fine-tune by one word: each is fitted, saved and loaded; and which networks they are not for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from causal_scenarios import causal_base
from datasets import Dataset
from peft import LoraConfig
from scenarios import SPEC, saved_base, text_rows

from bayeslora.errors import AdapterError, DataError, SettingError
from bayeslora.inference import fit, load
from bayeslora.models import Gaussian
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.recipes import RECIPES, LoraSettings
from bayeslora.tasks import Split, Task, TaskSpec

ROWS = text_rows(8)
QUICK = {"epochs": 1, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


def made(base: Path, method: str, **settings: int) -> Program:
    lora = LoraSettings(method=method, **settings) if settings else method
    return Program.from_pretrained(base, Task(SPEC, train=ROWS), lora=lora, model=Gaussian(), max_length=16)


@pytest.mark.parametrize("method", RECIPES)
def test_a_word_is_a_way_to_fine_tune(base: Path, tmp_path: Path, method: str) -> None:
    program = made(base, method)
    trained = {name for name, value in program.network.named_parameters() if id(value) in program.weights.parameter_ids}
    # A prompt begins as it likes; all else leaves the network as it was.
    assert program.weights.fresh
    quick = {"epochs": 1, "batch_size": 4, "warmup": 0.0}
    posterior = fit(program, ROWS, "temperature", of_settings=quick, progress=False)
    mean = posterior.mean()
    for role in {site.role for site in program.sites} - {"A"}:  # which is told of the data by B, after the first step
        assert any(not torch.equal(mean[site.name], site.initial) for site in program.sites if site.role == role), role
    posterior.save(tmp_path)
    found, again = (each.predict(ROWS, progress=False).outputs for each in (posterior, load(tmp_path)))
    assert torch.equal(found, again)
    everything = dict(program.network.named_parameters()).keys()
    assert (trained == everything) == (method == "full")


def test_settings_of_a_way(base: Path) -> None:
    assert {site.initial.shape[-1] for site in made(base, "rslora", r=3).sites if site.stacked} == {3}
    (prompt,) = (site for site in made(base, "prompt-tuning", tokens=5).sites if site.role == "tensor")
    assert prompt.initial.shape == (5, 16)
    task = Task(SPEC, train=ROWS)
    mapped = Program.from_pretrained(base, task, lora={"method": "dora", "r": 3}).network.peft_config["default"]
    assert (mapped.use_dora, mapped.r) == (True, 3)
    with pytest.raises(SettingError, match="Unknown setting of lora 'rank'"):
        Program.from_pretrained(base, task, lora={"rank": 8})
    wrong: Any = 8
    with pytest.raises(SettingError, match="lora is 8, expected a name such as 'dora', settings such as"):
        Program.from_pretrained(base, task, lora=wrong)
    with pytest.raises(SettingError, match="'full' has no r, found lora.r=4"):
        made(base, "full", r=4)
    with pytest.raises(SettingError, match="Unknown way to fine-tune 'rora'"):
        made(base, "rora")


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("lora", {"use_rslora": False, "use_dora": False, "init_lora_weights": True, "r": 4}),
        ("rslora", {"use_rslora": True, "r": 4}),
        ("pissa", {"init_lora_weights": "pissa", "r": 4}),
        ("dora", {"use_dora": True, "r": 4}),
        ("adalora", {"init_r": 4, "target_r": 4}),
    ],
)
def test_matrices_have_the_scale_the_dropout_and_the_layers_that_are_said(method: str, own: dict[str, object]) -> None:
    settings = LoraSettings(method=method, r=4, alpha=12, dropout=0.25, target_modules=("query", "value"))
    found = settings.to_peft()
    assert found is not None
    expected = own | {"lora_alpha": 12, "lora_dropout": 0.25, "target_modules": {"query", "value"}}
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_word_is_the_end_of_a_layers_name_and_all_else_an_expression_of_names() -> None:
    for said, given in (("q_proj", ["q_proj"]), ("all-linear", "all-linear"), (r".*\.query", r".*\.query")):
        assert LoraSettings(target_modules=said).targets == given


def test_what_begins_at_the_weights_is_not_taken_for_trained(base: Path) -> None:
    program = made(base, "pissa")
    assert all(bool(site.initial.any()) for site in program.sites if site.stacked)
    posterior = fit(program, ROWS, "laplace", tune="none", **QUICK)
    assert posterior.record.history  # the mode was trained
    moved = {site.name: site.initial + 1 for site in program.sites}
    assert not program.around(moved).weights.fresh


def test_what_begins_at_matrices_found_by_chance_is_refused(base: Path) -> None:
    by_chance = LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterError, match="'pissa_niter_4' takes matrices off .* take 'pissa'"):
        Program.from_pretrained(base, Task(SPEC, train=ROWS), lora=by_chance)


def test_members_that_begin_at_the_weights_are_trained_as_the_first_is(base: Path) -> None:
    program = made(base, "pissa")
    program.weights.random = frozenset({"head.classifier.weight"})  # as of a base network without a head
    whole = fit(program, ROWS, "laplace", tune="none", chains=2, **QUICK)
    first, second = (chain.program.weights.sites for chain in whole.chains)
    assert not all(torch.equal(one.initial, two.initial) for one, two in zip(first, second, strict=True))
    assert all(chain.record.history for chain in whole.chains)


@pytest.mark.parametrize("method", ["lora", "pissa", "ia3", "adalora"])
def test_an_adapter_that_was_trained_is_not_taken_for_a_fresh_one(base: Path, tmp_path: Path, method: str) -> None:
    program = made(base, method)
    fit(program, ROWS, "mle", **QUICK | {"epochs": 2, "learning_rate": 1e-2}).save(tmp_path)
    again = Program.from_pretrained(base, Task(SPEC, train=ROWS), adapter=tmp_path, model=Gaussian(), max_length=16)
    assert program.weights.fresh and not again.weights.fresh


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "prefix-tuning"])
def test_a_prompt_before_the_text_takes_positions(base: Path, method: str) -> None:
    most = 32  # of the network
    program = made(base, method, tokens=most - 10)
    data = [Dataset.from_dict({"input_ids": [[5] * count], "labels": [0]}) for count in (10, 11)]
    with torch.no_grad():
        values = {site.name: site.initial for site in program.sites}
        assert Rows.of(program, data[0]).outputs(program, values).isfinite().all()
    with pytest.raises(DataError, match="has 11 tokens, and the network has positions for 10"):
        Rows.of(program, data[1])
    with pytest.raises(AdapterError, match=f"prompt of {most} tokens leaves texts no room .* positions for {most}"):
        made(base, method, tokens=most)


def test_a_prompt_before_choices_of_an_encoder_is_refused(base: Path) -> None:
    spec = TaskSpec("quiz", "multiple-choice", ("ask",), labels=("A", "B"), choices=("choices",))
    rows = Split(Dataset.from_dict({"ask": ["w1"], "choices": [["w2", "w3"]], "label": [0]}), spec)
    with pytest.raises(AdapterError, match="PEFT puts no PREFIX_TUNING before the texts of a BertForMultipleChoice"):
        Program.from_pretrained(base, Task(spec, train=rows), lora="prefix-tuning")


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning"])
def test_a_prompt_before_the_text_moves_what_a_head_reads_of_a_decoder(method: str) -> None:
    task = Task(SPEC, train=ROWS)
    with pytest.raises(AdapterError, match="_TUNING puts 20 places before each text.*observation='prompted'"):
        Program.from_pretrained(causal_base(), task, lora=method, max_length=64, observation="classes")
    prefix = Program.from_pretrained(causal_base(), task, lora="prefix-tuning", max_length=64, observation="classes")
    values = {site.name: site.initial for site in prefix.sites}
    with torch.no_grad():
        assert Rows.of(prefix, ROWS).outputs(prefix, values).isfinite().all()
