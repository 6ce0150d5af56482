"""Slots: a tensor or a function in the place of a matrix, wherever its layer is."""

from __future__ import annotations

import copy

import pytest
import torch
from scenarios import awake, tiny_method, tiny_program
from torch import Tensor, nn

from bayeslora.errors import AdapterError
from bayeslora.sites import Map, Slot, pairs, short
from bayeslora.weights import Weights

BATCH = {
    "input_ids": torch.tensor([[3, 7, 1, 9], [3, 7, 1, 9]]),
    "attention_mask": torch.ones(2, 4, dtype=torch.long),
}
NAME = "linear_16x16.A"


def maps(value: Tensor) -> list[Map]:
    """x -> x W^T of each layer, of a site's value (layers, columns, rank)."""
    return [lambda inputs, row=row: inputs @ row for row in value]


def test_matrices_of_the_same_layers_are_pairs() -> None:
    sites = tiny_program().sites
    found = pairs(reversed(sites))
    assert {a.name for a, _ in found} == {site.name for site in sites if site.role == "A"}
    assert all((b.role, b.group, b.layers) == ("B", a.group, a.layers) for a, b in found)
    assert short(found[0][0].layers[0]).startswith("bert.encoder.") and short("bert.pooler") == "bert.pooler"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_function_equal_to_the_map_gives_the_same_outputs_and_gradients(checkpointing: bool) -> None:
    program = awake(tiny_program()).train()
    if checkpointing:
        program.weights.base.gradient_checkpointing_enable({"use_reentrant": False})
    values = {site.name: site.initial.clone().requires_grad_() for site in program.sites}
    found = []
    for given in (values, values | {NAME: maps(values[NAME])}):
        outputs = program.outputs(given, BATCH)
        found.append([outputs, *torch.autograd.grad(outputs.square().sum(), list(values.values()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


# Layers after it round the last bit of a sum to one of 256 steps of a bfloat16.
@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.03), (torch.float64, 1e-5)])
def test_a_function_is_given_single_precision_whatever_the_adapter_is_in(dtype: torch.dtype, off: float) -> None:
    program = awake(tiny_program())
    program.network.to(dtype)
    values = {site.name: site.initial for site in program.sites}
    with torch.no_grad():
        expected = program.outputs(values, BATCH)
        beside = program.outputs(values | {NAME: maps(values[NAME])}, BATCH)
    torch.testing.assert_close(beside, expected, rtol=0, atol=off)


def test_a_head_keeps_its_bias_beside_a_function() -> None:
    program = awake(tiny_program())
    values = {site.name: site.initial for site in program.sites}
    weight = values["head.classifier.weight"]
    with torch.no_grad():
        expected = program.outputs(values, BATCH)
        given = values | {"head.classifier.weight": [lambda inputs: inputs @ weight.mT]}
        torch.testing.assert_close(program.outputs(given, BATCH), expected)
        moved = given | {"head.classifier.bias": values["head.classifier.bias"] + 1}
        torch.testing.assert_close(program.outputs(moved, BATCH), expected + 1)


def test_noise_by_row_differs_by_row_and_is_the_same_when_a_pass_is_repeated() -> None:
    program = awake(tiny_program()).train()
    values = {site.name: site.initial.clone().requires_grad_() for site in program.sites}

    def noisy(row: Tensor) -> Map:
        return lambda inputs: inputs @ row * (1 + torch.randn(len(inputs), 1, 1)) if inputs.dim() == 3 else inputs @ row

    given = values | {NAME: [noisy(row) for row in values[NAME]]}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            program.weights.base.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs = program.outputs(given, BATCH)
            assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
            gradients.append(torch.autograd.grad(outputs.square().sum(), list(values.values())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


def test_restoring_and_tensors_undo_a_function_and_leave_other_forwards() -> None:
    program = awake(tiny_program())
    values = {site.name: site.initial for site in program.sites}
    module = program.weights.slots(NAME)[0].module
    calls: list[int] = []
    hooked = module.forward

    def forward(inputs: Tensor) -> Tensor:
        calls.append(1)
        return hooked(inputs)

    module.forward = forward  # as accelerate has it
    given = values | {NAME: maps(values[NAME])}
    with torch.no_grad():
        for undo in (lambda: program.weights.restore(), lambda: program.weights.install(values)):
            for _ in range(2):
                program.outputs(given, BATCH)
            assert module.forward is not forward
            undo()
            assert module.forward is forward
    program.network(**BATCH)
    assert calls
    copy.deepcopy(program.network)


def test_a_function_is_refused_where_there_is_no_linear_map() -> None:
    for program, name in ((tiny_program(targets=["word_embeddings"]), "A"), (tiny_method("dora"), "A")):
        values = {site.name: site.initial for site in program.sites}
        site = next(site for site in program.sites if site.role == name)
        with pytest.raises(AdapterError, match="A function cannot stand for"):
            program.outputs(values | {site.name: maps(site.initial)}, BATCH)
    with pytest.raises(AdapterError, match="'bias' of a Linear"):
        linear = nn.Linear(2, 2)
        Slot(linear, "bias", linear.bias).install(lambda inputs: inputs)


def test_a_layer_may_be_on_another_device_than_its_stack() -> None:
    program = tiny_program()
    slots = program.weights.slots(NAME)
    weights = program.weights
    far = Slot(slots[1].module, "weight", nn.Parameter(slots[1].parameter.to("meta")), transposed=True)
    weights._slots[NAME] = (slots[0], far, *slots[2:])
    weights.to(torch.device("cpu"))
    values = {site.name: site.initial.clone().requires_grad_() for site in program.sites}
    weights.install(values)
    assert [slot.module.weight.device.type for slot in weights.slots(NAME)][:3] == ["cpu", "meta", "cpu"]
    weights.slots(NAME)[0].module.weight.sum().backward()
    assert values[NAME].grad is not None


def test_a_size_that_is_first_asked_for_in_inference_mode_may_be_in_a_graph_later() -> None:
    site = tiny_program().sites[0]
    with torch.inference_mode():
        assert not site.size.is_inference()


def test_a_network_that_is_split_stays_where_it_is() -> None:
    program = tiny_program()
    program.weights.base.hf_device_map = {"bert": 0, "classifier": "cpu"}
    assert program.to("meta").device.type == "cpu"
    program.weights.base.hf_device_map = {"": "cpu"}
    assert Weights(program.network).sites
    assert program.to("meta").device.type == "meta" and all(site.initial.is_meta for site in program.sites)
