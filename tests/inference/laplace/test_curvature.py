"""Curvature of several tokens, padding and classes against the dense generalised Gauss-Newton matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from curvature_scenarios import given, matrix_of, relative, tiny
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from scenarios import (
    VOCABULARY,
    awake,
    dense_jacobian,
    saved_base,
    text_program,
    text_rows,
    tiny_batch,
    tiny_choices,
    tiny_rows,
)
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from bayeslora.errors import TrainingError
from bayeslora.inference.laplace.curvature import Kronecker, nystrom
from bayeslora.inference.laplace.gaussian import log_det
from bayeslora.models import Gaussian
from bayeslora.observations import Classes
from bayeslora.program import Program
from bayeslora.sites import Site


def dense_curvature(program: Program, rows: Dataset) -> Tensor:
    """The generalised Gauss-Newton matrix of the A and B matrices, by autograd on one row at a time without padding."""
    sites = [site for site in program.sites if site.role != "head"]
    total: Tensor | float = 0.0
    for number in range(len(rows)):
        batch = tiny_batch(program, rows.select([number]))
        jacobian = dense_jacobian(program, batch)
        flat = torch.cat([jacobian[site.name][0].flatten(1) for site in sites], dim=1).double()
        p = program.outputs({site.name: site.initial for site in program.sites}, batch)[0].double().softmax(-1)
        total = total + flat.mT @ (p.diag() - torch.outer(p, p)) @ flat
    assert isinstance(total, Tensor)
    return total


def site(columns: int) -> Site:
    """One matrix A of rank 2."""
    return Site("A", "A", "group", torch.zeros(1, columns, 2), ("layer",), (1.0,))


SHARINGS = [{"curvature": "kron", "sharing": sharing} for sharing in ("sum", "expand")]


@pytest.fixture(scope="module")
def transformer() -> tuple[Program, Dataset, Tensor]:
    program, rows = tiny(), tiny_rows(12)
    return program, rows, dense_curvature(program, rows)


def curvature_shapes(program: Program) -> list[tuple[int, ...]]:
    """Shape of every matrix, in the order of the curvature."""
    sites = [site for site in program.sites if site.role != "head"]
    return [tuple(site.initial.shape) for site in sites for _ in range(len(site.initial))]


@pytest.mark.parametrize("kind", ["full", "exact"])
def test_full_and_dual_curvature_are_the_dense_one(kind: str, transformer: tuple[Program, Dataset, Tensor]) -> None:
    program, rows, expected = transformer
    assert relative(matrix_of(given(program, rows, curvature=kind)), expected) < 1e-5


def test_diagonal_curvature_is_the_dense_diagonal(transformer: tuple[Program, Dataset, Tensor]) -> None:
    program, rows, expected = transformer
    found = matrix_of(given(program, rows, curvature="diag"))
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sharing", ["sum", "expand"])
def test_a_kronecker_product_of_full_rank_is_exact_for_one_token(sharing: str) -> None:
    rows = tiny_rows(1).map(lambda row: {"input_ids": row["input_ids"][:1], "attention_mask": [1]})
    # Two classes: the likelihood's curvature has one vector, and one row and token make one outer product.
    program = tiny(classes=2)
    expected = dense_curvature(program, rows)
    found = matrix_of(given(program, rows, curvature="kron", curvature_rank=24, sharing=sharing))
    sizes = [shape[1] * shape[2] for shape in curvature_shapes(program)]
    blocks = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    assert relative(found, torch.where(blocks, expected, 0.0)) < 1e-5


def test_what_enters_counts_once_for_all_vectors() -> None:
    # Three classes have two vectors: for one row of one token they share what entered, and the product is exact.
    rows = tiny_rows(1).map(lambda row: {"input_ids": row["input_ids"][:1], "attention_mask": [1]})
    program = tiny()
    expected = dense_curvature(program, rows)
    found = matrix_of(given(program, rows, curvature="kron", curvature_rank=24, sharing="expand"))
    blocks = torch.block_diag(
        *(torch.ones(shape[1] * shape[2], shape[1] * shape[2]) for shape in curvature_shapes(program))
    )
    assert relative(found, blocks * expected) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_empirical_curvature_is_of_the_labels_that_are_given(temperature: float) -> None:
    program, rows = tiny(), tiny_rows(9)
    batch = tiny_batch(program, rows)
    jacobian = dense_jacobian(program, batch)
    posterior = given(program, rows, curvature="full", fisher="empirical", temperature=temperature)
    flat = torch.cat([jacobian[name].flatten(2) for name in posterior.curvature.shapes], dim=2).double()
    logits = program.outputs({site.name: site.initial for site in program.sites}, batch).detach().double()
    score = torch.nn.functional.one_hot(batch["labels"], 3) - logits.softmax(-1)
    gradients = torch.einsum("ncp,nc->np", flat, score)
    assert relative(matrix_of(posterior), gradients.mT @ gradients / temperature) < 1e-5


def test_sampled_labels_depend_on_the_seed() -> None:
    program, rows = tiny(), tiny_rows(9)
    one, same, other = (matrix_of(given(program, rows, curvature="full", fisher="mc", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and relative(one, other) > 1e-3


@pytest.mark.parametrize("form", [{"curvature": "full"}, {"curvature": "diag"}, *SHARINGS])
def test_curvature_does_not_depend_on_batches_padding_or_order(form: dict[str, str]) -> None:
    program, rows = tiny(), tiny_rows(11)
    expected = matrix_of(given(program, rows, **form))
    assert relative(matrix_of(given(program, rows, batch_size=1, **form)), expected) < 1e-4
    assert relative(matrix_of(given(program, rows, batch_size=11, **form)), expected) < 1e-4
    turned = rows.select(list(reversed(range(11))))
    assert relative(matrix_of(given(program, turned, **form)), expected) < 1e-4
    twice = concatenate_datasets([rows, rows])
    assert relative(matrix_of(given(program, twice, **form)), 2 * expected) < 1e-4


def test_whole_examples_have_the_trace_of_the_whole_matrix_and_are_nearest_to_it(
    transformer: tuple[Program, Dataset, Tensor],
) -> None:
    program, rows, exact = transformer
    sizes = [shape[1] * shape[2] for shape in curvature_shapes(program)]
    blocks = torch.block_diag(*(torch.ones(size, size) for size in sizes)) * exact
    errors = {}
    for form in SHARINGS:
        found = matrix_of(given(program, rows, curvature_rank=24, **form))
        errors[form["sharing"]] = relative(found, blocks)
        if form["sharing"] == "sum":
            assert float(found.trace()) == pytest.approx(float(exact.trace()), rel=1e-4)
    assert errors["sum"] < errors["expand"]


def test_dropout_is_off_while_curvature_is_measured() -> None:
    rows = tiny_rows(8)
    still, noisy = (given(tiny(dropout=rate).train(), rows, curvature="diag") for rate in (0.0, 0.5))
    assert noisy.program.network.training
    torch.testing.assert_close(matrix_of(still), matrix_of(noisy))
    torch.testing.assert_close(still.log_evidence, noisy.log_evidence)


def test_a_bfloat16_base_has_the_curvature_in_single_precision(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = Gaussian(sites="both", centre="zero")
    whole, half = (awake(text_program(base, model, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    found, expected = (given(program, text_rows(), head=True) for program in (half, whole))
    assert next(half.network.parameters()).dtype == torch.bfloat16
    assert all(value.dtype in (torch.float32, torch.float64) for value in found.curvature.tensors().values())
    # Activations have 8 bits: a relative error of 2^-9 in each of some ten layers, and F is of second order in them.
    assert relative(matrix_of(found), matrix_of(expected)) < 2 * 10 * 2**-9
    assert found.log_evidence == pytest.approx(expected.log_evidence, rel=0.05)


def test_sampled_labels_have_the_exact_curvature_on_average() -> None:
    program, rows = tiny(), tiny_rows(8)
    exact = float(matrix_of(given(program, rows, curvature="full")).trace())
    many = concatenate_datasets([rows] * 400)
    found = float(matrix_of(given(program, many, curvature="full", fisher="mc", batch_size=400)).trace()) / 400
    # The trace of one row has a standard deviation of the order of its mean: 3,200 draws have it to 2 %.
    assert found == pytest.approx(exact, rel=0.1)
    biased = float(matrix_of(given(program, rows, curvature="full", fisher="empirical")).trace())
    assert not biased == pytest.approx(exact, rel=0.1)


def test_a_layer_that_the_network_leaves_out_keeps_its_prior() -> None:
    program = tiny()
    encoder = program.network.base_model.model.bert.encoder
    encoder.layer = encoder.layer[:1]
    for kind in ("full", "exact", "diag", "kron"):
        posterior = given(program, tiny_rows(6), curvature=kind)
        key = ("linear_24x16.B", 1)  # of the second layer
        coordinates = posterior.basis.project(key, torch.ones(1, 16, 2, dtype=torch.float64))
        assert float((posterior.basis.gains(key) * coordinates**2).sum()) == pytest.approx(0, abs=1e-6)


def test_tokens_of_all_choices_count() -> None:
    program = tiny_choices(Gaussian(sites="both", centre="zero"))
    ids = torch.randint(1, VOCABULARY, (6, 3, 5), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": [0, 1, 2, 0, 1, 2]})
    exact = matrix_of(given(program, rows, curvature="full")).trace()
    for sharing in ("sum", "expand"):
        found = matrix_of(given(program, rows, curvature="kron", curvature_rank=24, sharing=sharing)).trace()
        assert 0.05 < float(found / exact) < 20


def test_a_head_that_scores_every_token_counts_the_one_that_is_looked_at() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
    network = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=2, pad_token_id=0, initializer_range=0.3))
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True)
    program = awake(Program(get_peft_model(network, lora), Classes(2), Gaussian()))
    last = {"subset": "last-layer", "curvature_rank": 8}
    exact = matrix_of(given(program, tiny_rows(1), curvature="full", **last))
    for sharing in ("sum", "expand"):
        found = matrix_of(given(program, tiny_rows(1), curvature="kron", sharing=sharing, **last))
        assert relative(found, exact) < 1e-5


def test_curvature_that_overflows_is_refused() -> None:
    program = tiny()
    program = program.around({site.name: site.initial * 1e15 for site in program.sites})
    with pytest.raises(TrainingError, match="curvature is not finite"):
        given(program, tiny_rows(6))


@pytest.mark.parametrize("kind", ["kron", "diag", "full", "exact"])
def test_gains_are_the_eigenvalues_where_a_prior_with_correlations_is_standard(kind: str) -> None:
    posterior = given(tiny(), tiny_rows(6), curvature=kind, curvature_rank=24)
    generator = torch.Generator().manual_seed(0)
    roots, blocks = {}, []
    for name, (layers, columns, rank) in posterior.curvature.shapes.items():
        roots[name] = torch.randn(layers, rank, rank, generator=generator).double().tril()
        blocks += [torch.kron(torch.eye(columns).double(), root) for root in roots[name]]
    whole = torch.block_diag(*blocks)
    expected = torch.linalg.eigvalsh(whole.mT @ matrix_of(posterior) @ whole)
    found = posterior.curvature.gains(roots).sort().values
    torch.testing.assert_close(found, expected[-len(found) :], rtol=1e-4, atol=1e-5 * float(expected[-1]))
    torch.testing.assert_close(
        log_det(posterior.curvature.basis(roots), posterior.curvature.layers), expected.clamp(min=0).log1p().sum()
    )


def test_a_sketch_is_not_far_from_the_best_approximation_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    values = 1 / torch.arange(1, 201).square()
    matrix = (vectors * values) @ vectors.mT
    curvature = Kronecker([site(200)], rank=8)
    test = curvature._test[200]
    found, sizes = nystrom(matrix @ test, test, 8)
    # 1.6 times the least error; of a sketch of as many directions as the rank it is 3 to 5 times as large.
    assert torch.linalg.norm(matrix - (found * sizes) @ found.mT) < 2 * torch.linalg.norm(values[8:])


def test_a_sketch_is_not_divided_by_what_rounding_leaves() -> None:
    # As products in single precision leave it: symmetric but for rounding, and all but nothing in one direction.
    sketch = torch.tensor([[1.0, 1e-7], [-1e-7, 1e-14]])
    vectors, values = nystrom(sketch, torch.eye(2), 2)
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vectors[:, 0].abs(), torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
