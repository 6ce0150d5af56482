from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scenarios import VOCABULARY, tiny_bert, tiny_program
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from bayeslora.errors import AdapterError
from bayeslora.weights import Weights

BATCH = {
    "input_ids": torch.tensor([[3, 7, 1, 9], [5, 2, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def tiny_gpt2() -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def bert(**lora: object) -> PeftModel:
    config = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", **lora}
    return get_peft_model(tiny_bert(), LoraConfig(**config)).eval()


NETWORKS = {
    "linear": lambda: bert(),
    "linear, rslora": lambda: bert(use_rslora=True, r=3),
    "linear, ranks and scales by layer": lambda: bert(rank_pattern={"query": 3}, alpha_pattern={"key": 9}),
    "embedding": lambda: bert(target_modules=["word_embeddings", "value"]),
    "embedding alone": lambda: bert(target_modules=["word_embeddings"]),
    "conv1d": lambda: get_peft_model(
        tiny_gpt2(),
        LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="SEQ_CLS"),
    ).eval(),
}


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(**BATCH).logits


def other_values(adapters: Weights) -> dict[str, Tensor]:
    return {site.name: site.initial + 0.5 * torch.randn_like(site.initial) for site in adapters.sites}


@pytest.mark.parametrize("kind", NETWORKS)
def test_installed_values_act_as_the_same_values_in_pefts_parameters(kind: str) -> None:
    network = NETWORKS[kind]()
    before = logits(network)
    adapters = Weights(network)
    values = other_values(adapters)
    adapters.install(values)
    installed = logits(network)
    adapters.restore()
    assert torch.equal(logits(network), before)
    adapters.write(values)
    torch.testing.assert_close(installed, logits(network))
    assert not torch.allclose(installed, before, atol=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_single_value_reaches_the_network_and_its_gradient_comes_back(kind: str) -> None:
    adapters = Weights(network := NETWORKS[kind]())
    values = {name: value.requires_grad_() for name, value in other_values(adapters).items()}
    adapters.install(values)
    network(**BATCH).logits.square().sum().backward()
    for name, value in values.items():
        dead = (value.grad.flatten(1) == 0).all(1) if "head" not in name else value.grad.sum() == 0
        assert not dead.any(), name  # no layer of the stack is without gradient


@pytest.mark.parametrize("kind", NETWORKS)
def test_installing_and_writing_leave_pefts_keys_and_parameters(kind: str) -> None:
    network = NETWORKS[kind]()
    keys, parameters = list(network.state_dict()), dict(network.named_parameters())
    adapters = Weights(network)
    values = other_values(adapters)
    for _ in range(2):
        adapters.install(values)
        adapters.write(values)
    assert sorted(network.state_dict()) == sorted(keys)
    assert all(value is parameters[name] for name, value in network.named_parameters())
    stored = {site.name: site.initial for site in Weights(network).sites}
    assert stored.keys() == values.keys()
    assert all(torch.equal(stored[name], values[name]) for name in values)
    copy.deepcopy(network)  # nothing that hangs on a graph is left in it


def test_initial_values_do_not_follow_the_parameters() -> None:
    adapters = Weights(bert())
    before = {site.name: site.initial.clone() for site in adapters.sites}
    adapters.write(other_values(adapters))
    assert all(torch.equal(site.initial, before[site.name]) for site in adapters.sites)


def test_initial_values_of_another_network_are_refused() -> None:
    adapters = tiny_program(rank=2).weights
    others = {site.name: site.initial for site in tiny_program(rank=3).weights.sites}
    with pytest.raises(AdapterError, match=r"do not fit the network: found .*3\).* expected .*2\)"):
        adapters.around(others)


def test_layers_of_equal_shape_are_one_site_in_their_order() -> None:
    network = bert()
    sites = {site.name: site for site in Weights(network).sites}
    # Two layers of four 16 x 16 attention matrices and two of the feed-forward block; the pooler is 16 x 16 too.
    assert {name: tuple(site.initial.shape) for name, site in sites.items()} == {
        "linear_16x16.A": (9, 16, 2),
        "linear_16x16.B": (9, 16, 2),
        "linear_16x24.A": (2, 16, 2),
        "linear_16x24.B": (2, 24, 2),
        "linear_24x16.A": (2, 24, 2),
        "linear_24x16.B": (2, 16, 2),
        "head.classifier.weight": (3, 16),
        "head.classifier.bias": (3,),
    }
    site = sites["linear_24x16.A"]
    layer = network.get_submodule(site.layers[1])
    assert torch.equal(site.initial[1], layer.lora_A["default"].weight.detach().T)
    assert {site.role for site in sites.values()} == {"A", "B", "head"}
    assert {sites[name].group for name in sites if name.startswith("linear_24x16")} == {"linear_24x16"}


def test_the_rank_is_named_where_one_shape_has_several() -> None:
    sites = {site.name: site for site in Weights(bert(rank_pattern={"query": 3})).sites}
    assert sites["linear_16x16_r3.A"].initial.shape == (2, 16, 3)
    assert sites["linear_16x16_r2.A"].initial.shape == (7, 16, 2)
    assert sites["linear_16x24.A"].initial.shape == (2, 16, 2)


def test_embeddings_have_a_group_of_their_own() -> None:
    sites = {site.name: site for site in Weights(NETWORKS["embedding"]()).sites}
    assert sites[f"embedding_{VOCABULARY}x16.A"].initial.shape == (1, VOCABULARY, 2)
    assert sites[f"embedding_{VOCABULARY}x16.B"].initial.shape == (1, 16, 2)


def test_a_second_adapter_is_not_disturbed() -> None:
    network = bert()
    network.add_adapter(
        "second", LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    )
    network.set_adapter("second")
    before, state = logits(network), copy.deepcopy(network.state_dict())
    network.set_adapter("default")
    adapters = Weights(network)
    assert all("r3" not in site.name for site in adapters.sites)
    values = other_values(adapters)
    adapters.install(values)
    logits(network)
    adapters.write(values)
    network.set_adapter("second")
    assert torch.equal(logits(network), before)
    after = network.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state if "second" in name)


def test_the_base_is_frozen_and_a_low_precision_base_keeps_float32_sites() -> None:
    base = tiny_bert().to(torch.bfloat16)
    network = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")).eval()
    adapters = Weights(network)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {site.initial.dtype for site in adapters.sites} == {torch.float32}
    values = other_values(adapters)
    adapters.install(values)
    installed = logits(network)
    adapters.write(values)
    assert torch.equal(installed, logits(network))
    assert network.get_base_model().classifier.modules_to_save["default"].weight.dtype == torch.bfloat16


class Zoo(nn.Module):
    """One layer of each kind that is not supported."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Conv2d(3, 4, 3)
        self.looker = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)


def test_a_layer_that_cannot_be_stochastic_is_named() -> None:
    network = get_peft_model(Zoo(), LoraConfig(r=2, target_modules=["looker", "linear"]))
    with pytest.raises(AdapterError, match=r"looker.*cannot be made stochastic"):
        Weights(network)


def test_a_variant_of_lora_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match="query.*variant"):
        Weights(bert(target_modules=["query"], alora_invocation_tokens=[1]))


def test_other_networks_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"Expected a peft.PeftModel.*Zoo"):
        Weights(Zoo())
    with pytest.raises(AdapterError, match=r"Nothing is trained in this BertForSequenceClassification"):
        Weights(tiny_bert().requires_grad_(False))


def test_a_merged_adapter_is_refused() -> None:
    network = bert()
    network.merge_adapter()
    with pytest.raises(AdapterError, match="query.*merged"):
        Weights(network)


def test_two_active_adapters_are_refused() -> None:
    network = bert(task_type=None)
    network.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    network.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match=r"found \['default', 'second'\]"):
        Weights(network)


def test_a_trainable_weight_that_would_be_lost_is_named() -> None:
    network = bert()
    network.base_model.model.bert.embeddings.LayerNorm.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"embeddings.LayerNorm.weight' is trainable.*modules_to_save"):
        Weights(network)


def disable(network: PeftModel) -> None:
    network.base_model.disable_adapter_layers()


def choose_second(network: PeftModel) -> None:
    network.add_adapter("second", LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    network.set_adapter("second")


def rescale(network: PeftModel) -> None:
    network.base_model.model.bert.encoder.layer[0].attention.self.query.scale_layer(2.0)


CHANGES = {
    "disabled": (disable, r"disabled: call network.base_model.enable_adapter_layers"),
    "merged": (lambda network: network.merge_adapter(), r"merged.*unmerge_adapter"),
    "unloaded": (lambda network: network.unload(), r"not part of it any more"),
    "another adapter": (choose_second, r"uses \['second'\]: call network.set_adapter\('default'\)"),
    "rescaled": (rescale, r"multiplies by 4.0, and did by 2.0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_through_peft_does_not_change_outputs_silently(change: str) -> None:
    program = tiny_program().eval()
    act, message = CHANGES[change]
    act(program.network)
    with pytest.raises(AdapterError, match=f"(?s)changed through PEFT.*{message}"):
        program.outputs({site.name: site.initial for site in program.sites}, BATCH)


def test_what_is_undone_or_trained_through_peft_changes_no_output() -> None:
    program = tiny_program().eval()
    values = {site.name: site.initial for site in program.sites}
    with torch.no_grad():
        before = program.outputs(values, BATCH)
        program.weights.restore()
        with program.network.disable_adapter():
            pass
        choose_second(program.network)
        program.network.set_adapter("default")
        for name, parameter in program.network.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.add_(1.0)
        assert torch.equal(program.outputs(values, BATCH), before)


def test_a_second_program_over_a_network_finds_what_the_first_found() -> None:
    network = tiny_bert().eval()
    network.bert.embeddings.requires_grad_(False)
    one = Weights(network)
    values = other_values(one)
    one.install(values)
    two = Weights(network)
    assert [site.name for site in two.sites] == [site.name for site in one.sites]
    assert all(torch.equal(b.initial, a.initial) for a, b in zip(one.sites, two.sites, strict=True))
    assert not any("embeddings" in site.name for site in two.sites)  # what was frozen stays so
    two.install({site.name: site.initial for site in two.sites})
    logits(network)
    one.install(values)
    expected = logits(network)
    one.write(values)
    assert torch.equal(logits(network), expected)


def test_a_second_program_may_be_of_another_adapter() -> None:
    network = bert()
    Weights(network)
    choose_second(network)
    layers = {layer for site in Weights(network).sites if site.stacked for layer in site.layers}
    assert layers and all(layer.endswith("query") for layer in layers)


def test_the_base_is_the_network_without_peft() -> None:
    adapted, plain = bert(), tiny_bert()
    assert Weights(adapted).base is adapted.get_base_model() and Weights(plain).base is plain


def test_initial_values_move_and_the_network_stays() -> None:
    weights = Weights(network := bert())
    weights.to(torch.device("meta"))
    assert all(site.initial.is_meta for site in weights.sites)
    assert not any(value.is_meta for value in network.parameters())


def test_fresh_matrices_and_random_heads_are_drawn_anew_by_seed() -> None:
    weights = Weights(network := bert(), new=True, drawn=["classifier.weight"])
    assert weights.random == {"head.classifier.weight"}
    before, state = torch.get_rng_state(), copy.deepcopy(network.state_dict())
    first = {site.name: site.initial.clone() for site in weights.sites}
    one, again, two = ({site.name: site.initial for site in weights.redrawn(seed).sites} for seed in (1, 1, 2))
    for name, value in first.items():
        new = name.endswith(".A") or name in weights.random
        assert torch.equal(one[name], again[name])
        assert torch.equal(one[name], value) != new and torch.equal(one[name], two[name]) != new
        # The spread of PEFT's draws and of BERT's; the smallest has 48 values, a standard error of a tenth.
        assert not new or float(one[name].std()) == pytest.approx(float(value.std()), rel=0.4)
    assert all(torch.equal(site.initial, first[site.name]) for site in weights.sites)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
