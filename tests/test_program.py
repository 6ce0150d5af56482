from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pyro import poutine
from safetensors.torch import load_file, save_file
from scenarios import (
    SPEC,
    generators,
    saved_base,
    text_program,
    text_rows,
    tiny_batch,
    tiny_bert,
    tiny_choices,
    tiny_program,
    tiny_rows,
)
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from bayeslora.errors import AdapterError, SettingError, TaskError
from bayeslora.inference import fit
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.observations import Classes, Value
from bayeslora.program import Program
from bayeslora.tasks import Task


@pytest.mark.parametrize("task", ["demo", Task(SPEC, train=text_rows()).train])
def test_what_is_no_task_is_refused_before_a_network_is_loaded(task: Any) -> None:
    with pytest.raises(
        TaskError, match=r"task is ('demo'|Split\('data' of 'counting', .*\)), expected a Task, such as"
    ):
        Program.from_pretrained("nowhere", task)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("rows", [1, 5, 24])
def test_the_plate_scales_a_batch_up_to_the_data(rows: int) -> None:
    program = tiny_program().eval()
    batch = {key: value[:rows] for key, value in tiny_batch(program, tiny_rows(24)).items()}
    trace = poutine.trace(program).get_trace(batch, 24)
    logits = trace.nodes["_RETURN"]["value"]
    log_likelihood = logits.log_softmax(-1)[torch.arange(rows), batch["labels"]].sum()
    torch.testing.assert_close(trace.log_prob_sum(lambda name, site: name == "y"), log_likelihood * 24 / rows)
    assert trace.nodes["y"]["is_observed"]


def test_rows_need_no_numbers() -> None:
    program = tiny_program().eval()
    batch = tiny_batch(program, tiny_rows(6))
    numbered, bare = (
        poutine.trace(poutine.seed(program, 0)).get_trace(given, 24)
        for given in (batch, {key: value for key, value in batch.items() if key != "index"})
    )
    assert torch.equal(numbered.log_prob_sum(), bare.log_prob_sum())


def test_the_prior_gives_a_weight_for_every_site() -> None:
    program = tiny_program()
    trace = poutine.trace(program.prior).get_trace()
    weights = trace.nodes["_RETURN"]["value"]
    assert {name: value.shape for name, value in weights.items()} == {s.name: s.initial.shape for s in program.sites}
    assert program.model.stochastic(program.sites) <= set(trace.stochastic_nodes)


def test_one_draw_serves_all_rows_and_tokens_of_a_pass() -> None:
    program = tiny_program().eval()
    batch = tiny_batch(program, tiny_rows(1))
    twice = {key: value.expand(4, *value.shape[1:]) for key, value in batch.items() if key != "index"}
    seen: list[Tensor] = []
    embeddings = program.network.get_base_model().bert.embeddings
    embeddings.register_forward_hook(lambda module, inputs, output: output[:, :1].expand_as(output))
    query = program.network.get_base_model().bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = [program(twice, 24) for _ in range(2)]
    torch.testing.assert_close(logits[0], logits[0][:1].expand(4, -1))
    # All token vectors are alike here, and so are the layer's outputs; another pass has another draw.
    torch.testing.assert_close(seen[0], seen[0][:1, :1].expand_as(seen[0]))
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_logits_stay_in_place_until_others_are_set() -> None:
    program = tiny_program().eval()
    batch = tiny_batch(program, tiny_rows(4))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = program.outputs(program.prior(), batch)
        assert torch.equal(program.network(**inputs).logits, logits)


def test_a_program_around_its_own_values_is_itself() -> None:
    program = tiny_program()
    own = {site.name: site.initial.clone() for site in program.sites}
    assert program.around(own) is program  # which moves with its user's
    other = program.around({name: value + 1 for name, value in own.items()})
    assert all(torch.equal(site.initial, own[site.name] + 1) for site in other.sites)
    assert all(torch.equal(site.initial, own[site.name]) for site in program.sites)


def test_a_program_moves_with_the_parameters_of_peft() -> None:
    program = tiny_program()
    before = program.network.state_dict().keys()
    program.outputs(program.prior(), {"input_ids": torch.tensor([[1, 2]])})
    program.to(torch.float64)
    found = program.network.state_dict()
    assert found.keys() == before
    assert {value.dtype for value in found.values() if value.is_floating_point()} == {torch.float64}


def test_choices_that_do_not_exist_are_impossible() -> None:
    program = tiny_choices()
    ids = [[[1, 2], [3, 4, 5], [6]], [[7, 8], [9]]]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [2, 0]})
    batch = tiny_batch(program, rows)
    with torch.no_grad():
        logits = program.outputs({site.name: site.initial for site in program.sites}, batch)
    assert logits.shape == (2, 3)
    assert torch.isinf(logits).tolist() == [[False] * 3, [False, False, True]]


def test_the_summary_counts_what_is_learned() -> None:
    program = tiny_program(Gaussian(noise="layer"))
    lines = program.summary().splitlines()
    assert lines[1].split() == ["linear_16x16.A", "9x16x2", "288", "distribution"]
    assert ["head.classifier.bias", "3", "3", "point"] in [line.split() for line in lines]
    # 896 numbers in LoRA matrices and 51 in the head; one noise scale for each of 13 layers.
    assert lines[-1] == "LoRA and head: 947 parameters; structured guide: 13 more."


def test_from_pretrained_is_reproducible_by_seed_and_leaves_the_generators(base: Path) -> None:
    before = generators()
    one, same, other = (text_program(base, seed=seed) for seed in (1, 1, 2))
    assert generators() == before
    assert [site.name for site in one.sites] == [site.name for site in other.sites]
    assert all(torch.equal(a.initial, b.initial) for a, b in zip(one.sites, same.sites, strict=True))
    assert not torch.equal(one.sites[0].initial, other.sites[0].initial)
    assert isinstance(one.model, MonteCLoRA)
    assert one.observation == Classes(3)
    assert "head.classifier.weight" in [site.name for site in one.sites]


def test_a_bfloat16_base_has_float32_sites_and_works(base: Path) -> None:
    program = text_program(base, dtype="bfloat16").eval()
    assert next(program.network.parameters()).dtype == torch.bfloat16
    weights = program.prior()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    batch = tiny_batch(program, text_rows(6))
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    logits = program.outputs(weights, batch)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(value.grad.dtype == torch.float32 and torch.isfinite(value.grad).all() for value in weights.values())


def test_a_target_that_does_not_exist_is_an_error(base: Path) -> None:
    with pytest.raises(AdapterError, match=r"BertForSequenceClassification.*nowhere"):
        Program.from_pretrained(base, Task(SPEC, train=text_rows()), lora=LoraConfig(target_modules=["nowhere"]))


def test_the_users_lora_config_is_not_changed(base: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])
    Program.from_pretrained(base, Task(SPEC, train=text_rows()), lora=lora)
    assert lora.task_type is None
    assert lora.modules_to_save is None


def test_a_model_goes_by_its_name(base: Path) -> None:
    task = Task(SPEC, train=text_rows())
    assert Program.from_pretrained(base, task, model="scalabl").model.name == "scalabl"
    network = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert Program(network, Classes(3), "gaussian").model == Gaussian()
    with pytest.raises(SettingError, match="Unknown model 'monteclara'. Did you mean 'monteclora'"):
        Program.from_pretrained("nobody/nothing", task, model="monteclara")  # told before anything is loaded
    for wrong in ({}, 0, Gaussian):
        with pytest.raises(SettingError, match="expected a name such as 'gaussian', or a model such as"):
            Program.from_pretrained("nobody/nothing", task, model=wrong)


def test_what_is_no_program_is_told() -> None:
    wrong: Any = "demo"
    with pytest.raises(
        SettingError, match=r"program is 'demo', expected a Program, such as bl\.Program\.from_pretrained"
    ):
        fit(wrong, text_rows(), "mle")


def test_two_programs_over_one_network_do_not_disturb_each_other() -> None:
    network = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).eval()
    one = Program(network, Classes(3))
    two = Program(network, Value(), Gaussian())
    batch = tiny_batch(one, tiny_rows(4))
    values = {site.name: site.initial + 1 for site in one.sites}
    with torch.no_grad():
        first = one.outputs(values, batch)
        two.outputs({site.name: site.initial - 1 for site in two.sites}, batch)
        assert torch.equal(one.outputs(values, batch), first)


def test_an_adapter_is_loaded_in_place_of_a_fresh_one(base: Path, tmp_path: Path) -> None:
    first = Program.from_pretrained(base, Task(SPEC, text_rows()), seed=1)
    first.weights.write({site.name: site.initial + 1 for site in first.sites})
    first.network.save_pretrained(tmp_path / "adapter")
    second = Program.from_pretrained(base, Task(SPEC, text_rows()), adapter=tmp_path / "adapter", seed=2)
    for one, two in zip(first.sites, second.sites, strict=True):
        assert one.name == two.name
        torch.testing.assert_close(two.initial, one.initial + 1)


def test_an_adapter_without_the_head_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    network = BertForSequenceClassification.from_pretrained(base)
    network.bert.save_pretrained(tmp_path / "headless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "headless" / name).write_bytes((base / name).read_bytes())
    get_peft_model(network, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    # The base network itself has a head of its own, which the adapter was trained with.
    Program.from_pretrained(base, Task(SPEC, text_rows()), adapter=tmp_path / "adapter")
    with pytest.raises(AdapterError, match="neither has 'classifier.bias' \\(2 such weights\\), which would be drawn"):
        Program.from_pretrained(tmp_path / "headless", Task(SPEC, text_rows()), adapter=tmp_path / "adapter")


def test_an_adapter_of_another_network_is_refused(base: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query"])
    other = Program.from_pretrained(saved_base(tmp_path / "other", seed=1), Task(SPEC, text_rows()), lora=lora)
    other.network.save_pretrained(tmp_path / "adapter")
    config = BertConfig.from_pretrained(base, hidden_size=32)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "wide" / name).write_bytes((base / name).read_bytes())
    with pytest.raises(AdapterError, match="(?s)adapter' does not fit '.*wide'.*size mismatch"):
        Program.from_pretrained(tmp_path / "wide", Task(SPEC, text_rows()), adapter=tmp_path / "adapter")
    with pytest.raises(AdapterError, match="nothing' does not fit"):
        Program.from_pretrained(base, Task(SPEC, text_rows()), adapter=tmp_path / "nothing")
    short = BertForSequenceClassification(BertConfig.from_pretrained(base, num_hidden_layers=1))
    short.save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match="it holds '.*layer.1.*' \\(2 such weights\\), for which there is no place"):
        Program.from_pretrained(tmp_path / "wide", Task(SPEC, text_rows()), adapter=tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    for lacking, message in (("classifier", "it lacks .*classifier.weight"), ("lora_B", "missing adapter keys")):
        save_file({name: value for name, value in weights.items() if lacking not in name}, path)
        with pytest.raises(AdapterError, match=message):
            Program.from_pretrained(base, Task(SPEC, text_rows()), adapter=tmp_path / "adapter")
    save_file({name: value.int() for name, value in weights.items()}, path)
    with pytest.raises(AdapterError, match=r"adapter' holds '.*' of torch.int32 \(\d+ such weights\): expected floats"):
        Program.from_pretrained(base, Task(SPEC, text_rows()), adapter=tmp_path / "adapter")
