"""What PEFT trains becomes a site, or is refused by name."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scenarios import METHODS, tiny_bert, tiny_method, tiny_program, tiny_rows
from transformers import BertConfig, BertForMaskedLM

from bayeslora.errors import AdapterError
from bayeslora.inference import fit, load
from bayeslora.models import Gaussian
from bayeslora.observations import Classes
from bayeslora.program import Program
from bayeslora.weights import Weights

ROWS = tiny_rows(12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["mle", "map"])
def test_every_method_is_fitted_saved_and_loaded(method: str, backend: str, tmp_path: Path) -> None:
    program = tiny_method(method)
    frozen = {name: value.clone() for name, value in program.network.state_dict().items()}
    settings = {"epochs": 12, "batch_size": 4, "learning_rate": 2e-2, "log_every": 1, "progress": False}
    posterior = fit(program, ROWS, backend, output_dir=tmp_path / "run", **settings)
    losses = [row["log_likelihood"] for row in posterior.record.history if "log_likelihood" in row]
    assert sum(losses[-6:]) > sum(losses[:6])
    moved = {site.name for site in program.sites if not torch.equal(posterior.mean()[site.name], site.initial)}
    assert {site.name for site in program.sites} - moved <= {"tensor.bert.embeddings.token_type_embeddings.weight"}
    expected = posterior.predict(ROWS, progress=False).outputs
    assert torch.equal(
        load(tmp_path / "run", program=tiny_method(method)).predict(ROWS, progress=False).outputs, expected
    )
    assert all(torch.equal(value, frozen[name]) for name, value in program.network.state_dict().items())


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"dora", "bias"}))
def test_without_lora_matrices_nothing_is_random(method: str) -> None:
    program = tiny_method(method)
    assert "tensor" in {site.role for site in program.sites} and not any(site.stacked for site in program.sites)
    assert "structured guide: 0 more" in program.summary()
    for backend in ("svi", "laplace", "sgld", "nuts"):
        with pytest.raises(AdapterError, match="Nothing is random in this program: .* Choose 'map' or 'mle'"):
            fit(program, ROWS, backend, progress=False)


def test_dora_has_random_matrices_and_a_magnitude_that_is_learned() -> None:
    program = tiny_method("dora")
    roles = {site.name: site.role for site in program.sites}
    assert roles["dora_linear_16x16.A"] == "A"
    assert roles["tensor.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector.weight"] == "tensor"
    posterior = fit(program, ROWS, "svi", epochs=4, learning_rate=1e-2, progress=False)
    outputs = posterior.predict(ROWS, draws=2, progress=False).outputs
    assert not torch.equal(*outputs)
    with pytest.raises(AdapterError, match="query' is a DoRA layer"):
        fit(program, ROWS, "laplace", mode="map", epochs=1, progress=False)


def test_a_tensor_is_what_peft_itself_would_use() -> None:
    program = tiny_method("ia3").eval()
    values = {site.name: site.initial + 0.3 for site in program.sites}
    batch = {"input_ids": torch.tensor([[3, 7, 1]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        found = program.outputs(values, batch)
        program.weights.write(values)
        assert torch.equal(program.network(**batch).logits, found)


def test_an_adapter_that_was_loaded_for_inference_has_the_same_sites(tmp_path: Path) -> None:
    from peft import PeftModel

    for method in ("dora", "ia3", "adalora"):
        program = tiny_method(method)
        fit(program, ROWS, "mle", epochs=1, progress=False).save(tmp_path / method)
        network = PeftModel.from_pretrained(tiny_bert(), tmp_path / method)
        assert [site.name for site in Weights(network).sites] == [site.name for site in program.sites]


def test_a_prior_of_tensors_is_around_where_they_were() -> None:
    program = tiny_method("ia3", Gaussian(weight_scale=0.5))
    site = next(site for site in program.sites if site.role == "tensor")
    law = program.model._point_prior(site)
    assert torch.equal(law.mean, site.initial) and float(law.variance.sqrt().mean()) == pytest.approx(0.5)


def test_a_tied_tensor_is_one_site_with_two_places() -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    network = BertForMaskedLM(config).eval()
    weights = Weights(network)
    tied = [site for site in weights.sites if len(weights.slots(site.name)) > 1]
    assert "tensor.bert.embeddings.word_embeddings.weight" in [site.name for site in tied]
    values = {site.name: site.initial + 0.1 * torch.randn_like(site.initial) for site in weights.sites}
    with torch.no_grad():
        weights.install(values)
        found = network(torch.tensor([[1, 2, 3]])).logits
        weights.write(values)
        assert torch.equal(network(torch.tensor([[1, 2, 3]])).logits, found)


def test_a_module_that_is_named_twice_is_trained_in_full_alone() -> None:
    lora = LoraConfig(r=2, target_modules=["query", "classifier"], modules_to_save=["classifier"])
    network = get_peft_model(tiny_bert(), lora)
    sites = {site.name: site for site in Program(network, Classes(3)).sites}
    assert "head.classifier.weight" in sites
    assert not any("classifier" in layer for site in sites.values() if site.stacked for layer in site.layers)


def test_lora_matrices_that_are_shared_are_refused() -> None:
    network = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    attention = network.base_model.model.bert.encoder.layer[0].attention.self
    attention.value.lora_A["default"].weight = attention.query.lora_A["default"].weight
    with pytest.raises(AdapterError, match="value' shares its LoRA matrices with '.*query'"):
        Weights(network)


def test_programs_and_sites_are_one_line() -> None:
    program = tiny_program(Gaussian())
    assert repr(program).endswith(", 13 LoRA layers, gaussian, classes)")
    assert repr(program.sites[0]) == "Site(linear_16x16.A, 9x16x2)"
    assert "linear_16x16.A" in repr(deepcopy(program).weights)
