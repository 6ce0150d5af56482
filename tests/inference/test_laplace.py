"""Laplace's approximation where the exact posterior is known, and against dense curvature where it is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from pyro.distributions import StudentT
from scenarios import (
    VOCABULARY,
    Regression,
    awake,
    dense_jacobian,
    lora_regression,
    saved_base,
    text_program,
    text_rows,
    tiny_batch,
    tiny_bert,
    tiny_program,
    tiny_rows,
)
from torch import Tensor
from transformers import BertConfig, BertForMultipleChoice, GPT2Config, GPT2ForSequenceClassification

from bayeslora.adapters import Site
from bayeslora.errors import PosteriorError, SettingError, TrainingError
from bayeslora.inference import fit, laplace, load
from bayeslora.inference.curved import LaplacePosterior
from bayeslora.inference.evidence import log_evidence, scaled
from bayeslora.inference.priors import normal_prior
from bayeslora.likelihoods import Categorical
from bayeslora.models import Gaussian, MonteCLoRA
from bayeslora.passes import Rows, collator, encoded
from bayeslora.program import Program

#: One batch of all rows and a rate that falls to zero: the mode to six digits.
EXACT = {
    "batch_size": 40, "epochs": 800, "learning_rate": 0.1, "schedule": "cosine", "warmup": 0.02,
    "max_grad_norm": 1e9, "log_every": 100, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> Regression:
    return lora_regression(noise=2.0)


@pytest.fixture(scope="module", params=["full", "exact", "kron"])
def conjugate(request: pytest.FixtureRequest, known: Regression) -> LaplacePosterior:
    # The gradient on the side of the rank is the same for every row, so that one Kronecker product is exact here.
    posterior = fit(known.program, known.rows, "laplace", mode="train", curvature=request.param, tune="none", **EXACT)
    assert isinstance(posterior, LaplacePosterior)
    return posterior


def covariance_of(posterior: LaplacePosterior) -> Tensor:
    """Covariance of the flattened matrices, by the gradients of each entry."""
    size = posterior.curvature.size
    basis, (key,) = posterior.basis, posterior.curvature.layers
    root = posterior.prior.roots[key[0]][key[1]]
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *posterior.curvature.shapes[key[0]][1:]) @ root
    coordinates = basis.project(key, eye)
    gains = basis.gains(key)
    return eye.flatten(1) @ eye.flatten(1).mT - (coordinates * gains / (1 + gains)) @ coordinates.mT


def test_conjugate_mean_covariance_and_evidence(conjugate: LaplacePosterior, known: Regression) -> None:
    deviation = known.covariance.diagonal().sqrt()
    error = (conjugate.mean()["linear_3x1.A"].flatten().double() - known.mean) / deviation
    assert error.abs().max() < 1e-3
    found = covariance_of(conjugate)
    scale = deviation * deviation[:, None]
    torch.testing.assert_close(found / scale, known.covariance / scale, rtol=0, atol=1e-5)
    # An error of 1e-3 standard deviations in the mode costs 1e-6 nats.
    assert conjugate.log_evidence == pytest.approx(known.log_evidence, abs=1e-3)


def test_conjugate_predictive(conjugate: LaplacePosterior, known: Regression) -> None:
    rows = Rows(encoded(known.program, known.rows), collator(known.program), 7, False)
    mean, covariance = conjugate.linearised(rows)
    network = known.program.network
    layer = network.base_model.model.linear
    features = network.base_model.model.table.weight.double()
    design = torch.einsum("ni,j->nij", features, layer.lora_B["default"].weight[0].double()).reshape(len(features), -1)
    offset = features @ layer.base_layer.weight[0].double()
    torch.testing.assert_close(mean[:, 0], (offset + design @ known.mean).detach(), rtol=0, atol=1e-3)
    variance = torch.einsum("ni,ij,nj->n", design, known.covariance, design).detach()
    torch.testing.assert_close(covariance[:, 0, 0], variance, rtol=1e-4, atol=0)


def test_draws_and_density_are_those_of_the_exact_posterior(conjugate: LaplacePosterior, known: Regression) -> None:
    draws = conjugate.sample(1000)["linear_3x1.A"].flatten(1).double()
    whitener = torch.linalg.inv(torch.linalg.cholesky(known.covariance))
    z = (draws - known.mean) @ whitener.T
    # 1,000 draws: standard error 0.032 of a mean, at most 0.045 of an entry of the covariance.
    assert z.mean(0).abs().max() < 4 * 0.032
    assert (z.T @ z / 1000 - torch.eye(6)).abs().max() < 4 * 0.045
    exact = torch.distributions.MultivariateNormal(known.mean, known.covariance)
    for draw in draws[:3]:
        value = {"linear_3x1.A": draw.float().reshape(1, 3, 2)}
        torch.testing.assert_close(conjugate.log_prob(value), exact.log_prob(draw), rtol=0, atol=2e-2)


# Several tokens, padding and classes: against dense curvature


def tiny(**settings: object) -> Program:
    """A random transformer whose A and B both have a Gaussian prior."""
    return awake(tiny_program(Gaussian(sites="both", centre="zero"), **settings))


def given(program: Program, rows: Dataset, **settings: Any) -> LaplacePosterior:
    """Laplace's approximation around the weights as they are."""
    fixed = {"mode": "given", "tune": "none", "progress": False, "batch_size": 5} | settings
    posterior = fit(program, rows, "laplace", **fixed)
    assert isinstance(posterior, LaplacePosterior)
    return posterior


def dense_curvature(program: Program, rows: Dataset) -> Tensor:
    """The generalised Gauss-Newton matrix of the A and B matrices, by autograd on one row at a time without padding."""
    sites = [site for site in program.sites if site.role != "head"]
    total: Tensor | float = 0.0
    for number in range(len(rows)):
        batch = tiny_batch(program, rows.select([number]))
        jacobian = dense_jacobian(program, batch)
        flat = torch.cat([jacobian[site.name][0].flatten(1) for site in sites], dim=1).double()
        p = program.logits({site.name: site.initial for site in program.sites}, batch)[0].double().softmax(-1)
        total = total + flat.mT @ (p.diag() - torch.outer(p, p)) @ flat
    assert isinstance(total, Tensor)
    return total


@pytest.fixture(scope="module")
def transformer() -> tuple[Program, Dataset, Tensor]:
    program, rows = tiny(), tiny_rows(12)
    return program, rows, dense_curvature(program, rows)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def matrix_of(posterior: LaplacePosterior) -> Tensor:
    """F as one matrix, from any of its forms."""
    curvature, tensors = posterior.curvature, posterior.curvature.tensors()
    if curvature.kind == "full":
        return tensors["matrix"].double()
    if curvature.kind == "exact":
        return tensors["jacobian"].double().mT @ tensors["jacobian"].double()
    if curvature.kind == "diag":
        return torch.cat([tensors[name].flatten() for name in curvature.shapes]).double().diag()
    blocks = []
    for name, (layers, _, _) in curvature.shapes.items():
        for place in range(layers):
            vectors, values = tensors[f"{name}.vectors"][place], tensors[f"{name}.values"][place]
            blocks.append(torch.kron((vectors * values) @ vectors.mT, tensors[f"{name}.narrow"][place].double()))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("kind", ["full", "exact"])
def test_full_and_dual_curvature_are_the_dense_one(kind: str, transformer: tuple[Program, Dataset, Tensor]) -> None:
    program, rows, expected = transformer
    assert relative(matrix_of(given(program, rows, curvature=kind)), expected) < 1e-5


def test_diagonal_curvature_is_the_dense_diagonal(transformer: tuple[Program, Dataset, Tensor]) -> None:
    program, rows, expected = transformer
    found = matrix_of(given(program, rows, curvature="diag"))
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_kronecker_product_of_full_rank_is_exact_for_one_token(sharing: str) -> None:
    rows = tiny_rows(1).map(lambda row: {"input_ids": row["input_ids"][:1], "attention_mask": [1]})
    # Two classes: the likelihood's curvature has one vector, and one row and token make one outer product.
    program = tiny(classes=2)
    expected = dense_curvature(program, rows)
    found = matrix_of(given(program, rows, curvature="kron", curvature_rank=24, sharing=sharing))
    sizes = [shape[1] * shape[2] for shape in curvature_shapes(program)]
    blocks = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    assert relative(found, torch.where(blocks, expected, 0.0)) < 1e-5


def curvature_shapes(program: Program) -> list[tuple[int, ...]]:
    """Shape of every matrix, in the order of the curvature."""
    sites = [site for site in program.sites if site.role != "head"]
    return [tuple(site.initial.shape) for site in sites for _ in range(len(site.initial))]


@pytest.mark.parametrize("kind", ["full", "diag", "kron"])
def test_curvature_does_not_depend_on_batches_padding_or_order(kind: str) -> None:
    program, rows = tiny(), tiny_rows(11)
    expected = matrix_of(given(program, rows, curvature=kind))
    assert relative(matrix_of(given(program, rows, curvature=kind, batch_size=1)), expected) < 1e-4
    assert relative(matrix_of(given(program, rows, curvature=kind, batch_size=11)), expected) < 1e-4
    turned = rows.select(list(reversed(range(11))))
    assert relative(matrix_of(given(program, turned, curvature=kind)), expected) < 1e-4
    twice = concatenate_datasets([rows, rows])
    assert relative(matrix_of(given(program, twice, curvature=kind)), 2 * expected) < 1e-4


def test_dropout_is_off_while_curvature_is_measured() -> None:
    rows = tiny_rows(8)
    still, noisy = (given(tiny(dropout=rate), rows, curvature="diag") for rate in (0.0, 0.5))
    torch.testing.assert_close(matrix_of(still), matrix_of(noisy))


def test_sampled_labels_have_the_exact_curvature_on_average() -> None:
    program, rows = tiny(), tiny_rows(8)
    exact = float(matrix_of(given(program, rows, curvature="full")).trace())
    many = concatenate_datasets([rows] * 400)
    found = float(matrix_of(given(program, many, curvature="full", fisher="mc", batch_size=400)).trace()) / 400
    # The trace of one row has a standard deviation of the order of its mean: 3,200 draws have it to 2 %.
    assert found == pytest.approx(exact, rel=0.1)
    biased = float(matrix_of(given(program, rows, curvature="full", fisher="empirical")).trace())
    assert not biased == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_predictive_draws_and_density_follow_from_the_curvature(kind: str) -> None:
    program, rows = tiny(), tiny_rows(12)
    posterior = given(program, rows, curvature=kind, curvature_rank=24)
    precision = matrix_of(posterior)
    prior = torch.cat(
        [
            (root @ root.mT)
            .inverse()
            .diagonal(dim1=-2, dim2=-1)
            .unsqueeze(1)
            .expand(posterior.curvature.shapes[name])
            .flatten()
            for name, root in posterior.prior.roots.items()
        ]
    )
    expected = torch.linalg.inv(precision + prior.diag())
    jacobian = dense_jacobian(program, tiny_batch(program, rows))
    flat = torch.cat([jacobian[name].flatten(2) for name in posterior.curvature.shapes], dim=2).double()
    order = tiny_batch(program, rows)["index"]
    _, found = posterior.linearised(Rows(encoded(program, rows), collator(program), 5, False))
    torch.testing.assert_close(found[order], flat @ expected @ flat.mT, rtol=1e-3, atol=1e-5)
    draws = posterior.sample(300)
    names = list(posterior.curvature.shapes)
    errors = torch.cat([(draws[name] - posterior.latents[name]).flatten(1) for name in names], dim=1).double()
    # |z|^2 of P weights has the mean P and, over 300 draws, a standard error of sqrt(2 P / 300).
    whitened = errors @ torch.linalg.cholesky(precision + prior.diag())
    size = posterior.curvature.size
    assert float(whitened.square().sum(1).mean()) == pytest.approx(size, abs=4 * math.sqrt(2 * size / 300))
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(size).double(), precision_matrix=precision + prior.diag()
    )
    value = {name: draws[name][0] for name in names}
    assert float(posterior.log_prob(value)) == pytest.approx(float(exact.log_prob(errors[0])), rel=1e-4)
    mode = torch.cat([posterior.latents[name].flatten() for name in names]).double()
    determinants = torch.linalg.slogdet(precision + prior.diag())[1] - prior.log().sum()
    evidence = posterior.log_likelihood - float((mode.square() * prior).sum() + determinants) / 2
    assert posterior.log_evidence == pytest.approx(evidence, rel=1e-4)


# The prior's tuning


def test_the_tuned_scale_has_the_largest_exact_evidence() -> None:
    known = lora_regression(noise=2.0)
    posterior = fit(known.program, known.rows, "laplace", mode="train", curvature="full", **EXACT)
    assert isinstance(posterior, LaplacePosterior)
    steps = [row for row in posterior.record.history if "tuning" in row]
    assert max(row["log_evidence"] for row in steps) == pytest.approx(posterior.log_evidence, abs=1e-6)
    assert posterior.log_evidence > steps[0]["log_evidence"]
    tuned = float(posterior.prior.roots["linear_3x1.A"][0, 0, 0])
    basis = posterior.prior
    # Around the tuned scale the evidence of the mode that was found falls to both sides.
    for factor in (0.9, 1.1):
        other = scaled(basis, {"linear_3x1.A": torch.tensor([math.log(factor)]).double()})
        matrices = {"linear_3x1.A": posterior.latents["linear_3x1.A"]}
        assert (
            float(log_evidence(posterior.log_likelihood, other, matrices, posterior.curvature)) < posterior.log_evidence
        )
    assert 0.1 < tuned < 10


@pytest.mark.parametrize("scales", ["all", "site", "layer"])
@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_tuning_raises_the_evidence(kind: str, scales: str) -> None:
    program, rows = tiny(), tiny_rows(12)
    fixed = given(program, rows, curvature=kind)
    tuned = given(program, rows, curvature=kind, tune="evidence", scales=scales)
    assert tuned.log_evidence > fixed.log_evidence + 1
    ratios = {name: tuned.prior.roots[name][:, 0, 0] / fixed.prior.roots[name][:, 0, 0] for name in tuned.prior.roots}
    spread = [float(value.max() / value.min()) for value in ratios.values()]
    assert all(abs(value - 1) < 1e-6 for value in spread) == (scales != "layer")
    assert (len({round(float(value[0]), 6) for value in ratios.values()}) == 1) == (scales == "all")


@pytest.mark.parametrize("wishart_on", ["covariance", "precision"])
def test_hyper_sites_are_tuned_under_their_own_priors(wishart_on: str) -> None:
    program, rows = awake(tiny_program(MonteCLoRA(centre="zero", wishart_on=wishart_on, components=3))), tiny_rows(12)
    fixed = given(program, rows)
    tuned = given(program, rows, tune="evidence", scales="hyper")
    steps = [row for row in tuned.record.history if "tuning" in row]
    best = max(steps, key=lambda row: row["log_evidence"] + row["log_hyperprior"])
    assert best["log_evidence"] + best["log_hyperprior"] > steps[0]["log_evidence"] + steps[0]["log_hyperprior"] + 1
    assert tuned.log_evidence == pytest.approx(best["log_evidence"], abs=1e-2)
    moved = [name for name in tuned.latents if not torch.equal(tuned.latents[name], fixed.latents[name])]
    assert moved and all(name.endswith(("scale_tril", "mixture")) for name in moved)
    again = normal_prior(program, tuned.sites, tuned.latents)
    for name, root in tuned.prior.roots.items():
        torch.testing.assert_close(root, again.roots[name])


# What comes back, and what is refused


@pytest.mark.parametrize("kind", ["full", "exact", "diag", "kron"])
def test_a_loaded_posterior_predicts_the_same(kind: str, tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"), Gaussian(sites="both"))
    posterior = fit(
        program, text_rows(), "laplace", epochs=4, batch_size=4, curvature=kind, head=True, progress=False, cpu=True
    )
    posterior.save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.record == posterior.record
    for method in posterior.methods:
        one, two = (each.predict(text_rows(), samples=2, method=method, progress=False) for each in (posterior, loaded))
        assert torch.equal(one.logits, two.logits)
        assert one.method == method
        # What more data would not remove is no more than the whole, but for draws of the logits.
        assert (one.expected_entropy <= one.entropy + 0.02).all()


def test_a_given_adapter_keeps_its_prediction() -> None:
    program, rows = tiny(), tiny_rows(12)
    with torch.no_grad():
        before = program.network(**{k: v for k, v in tiny_batch(program, rows).items() if k not in ("labels", "index")})
    order = tiny_batch(program, rows)["index"]
    found = given(program, rows).predict(rows, method="mean", progress=False)
    torch.testing.assert_close(found.logits[0][order], before.logits)


def test_given_are_the_weights_that_the_network_has() -> None:
    program = tiny()
    moved = {site.name: site.initial + 1 for site in program.sites}
    program.adapters.write(moved)
    posterior = given(program, tiny_rows(6))
    assert all(torch.equal(value, moved[name]) for name, value in posterior.mean().items())


@pytest.mark.parametrize("targets", [["query"], ["word_embeddings", "query"]])
def test_a_fresh_adapter_is_trained_and_no_other(targets: list[str]) -> None:
    lora = LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS")
    fresh = Program(get_peft_model(tiny_bert(), lora), Categorical(3), Gaussian(zero_scale=1.0))
    settings = {"epochs": 2, "batch_size": 8, "progress": False, "tune": "none"}
    trained = fit(fresh, tiny_rows(16), "laplace", **settings)
    assert trained.record.history
    assert trained.cost["seconds"] > 0 and trained.cost["peak_memory_bytes"] > 0
    assert not fit(awake(fresh), tiny_rows(16), "laplace", **settings).record.history


def test_a_layer_that_the_network_leaves_out_keeps_its_prior() -> None:
    program = tiny()
    encoder = program.network.base_model.model.bert.encoder
    encoder.layer = encoder.layer[:1]
    for kind in ("full", "exact", "diag", "kron"):
        posterior = given(program, tiny_rows(6), curvature=kind)
        key = ("linear_24x16.B", 1)  # of the second layer
        coordinates = posterior.basis.project(key, torch.ones(1, 16, 2, dtype=torch.float64))
        assert float((posterior.basis.gains(key) * coordinates**2).sum()) == pytest.approx(0, abs=1e-6)


def test_reduced_tokens_are_those_of_one_choice() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["query", "dense"], modules_to_save=["classifier"])
    model = Gaussian(sites="both", centre="zero")
    program = awake(Program(get_peft_model(BertForMultipleChoice(config), lora), Categorical(3), model))
    ids = torch.randint(1, VOCABULARY, (6, 3, 5), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": [0, 1, 2, 0, 1, 2]})
    exact = matrix_of(given(program, rows, curvature="full")).trace()
    for sharing in ("expand", "reduce"):
        found = matrix_of(given(program, rows, curvature="kron", curvature_rank=24, sharing=sharing)).trace()
        assert 0.05 < float(found / exact) < 20


def test_a_head_that_scores_every_token_counts_the_one_that_is_looked_at() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
    network = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=2, pad_token_id=0, initializer_range=0.3))
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True)
    program = awake(Program(get_peft_model(network, lora), Categorical(2), Gaussian()))
    last = {"subset": "last-layer", "curvature_rank": 8}
    exact = matrix_of(given(program, tiny_rows(1), curvature="full", **last))
    for sharing in ("expand", "reduce"):
        found = matrix_of(given(program, tiny_rows(1), curvature="kron", sharing=sharing, **last))
        assert relative(found, exact) < 1e-5


def test_only_the_last_layer() -> None:
    program, rows = tiny(), tiny_rows(12)
    posterior = given(program, rows, subset="last-layer", curvature="full")
    assert [site.name for site in posterior.sites] == ["head.classifier.weight", "head.classifier.bias"]
    assert posterior.curvature.size == 16 * 3 + 3


def test_a_trained_mode_is_that_of_map() -> None:
    rows, settings = tiny_rows(24), {"epochs": 2, "batch_size": 8, "progress": False, "seed": 3, "cpu": True}
    mode = fit(tiny_program(Gaussian(sites="both")), rows, "map", **settings).mean()
    found = fit(tiny_program(Gaussian(sites="both")), rows, "laplace", mode="train", **settings).mean()
    assert all(torch.equal(mode[name], found[name]) for name in mode)


def test_a_prior_of_a_sum_is_named() -> None:
    program = awake(tiny_program(MonteCLoRA(collapse=False, components=2)))
    with pytest.raises(PosteriorError, match="Site 'linear_16x16.A' is a sum of draws.*collapse=True"):
        given(program, tiny_rows(6))


def test_a_prior_that_is_not_normal_is_named() -> None:
    class Heavy(Gaussian):
        def sample_weight(self, site: Site) -> Tensor:
            law = StudentT(3.0).expand(site.initial.shape).to_event(3)
            return pyro.sample(site.name, law)

    with pytest.raises(PosteriorError, match="prior of site .linear_16x16.A. is a StudentT; .* needs a ColumnNormal"):
        given(awake(tiny_program(Heavy())), tiny_rows(6))


def test_a_prior_around_the_given_weights_cannot_be_tuned() -> None:
    program = awake(tiny_program(Gaussian(sites="both")))
    with pytest.raises(SettingError, match="prior of site .* is centred on the very weights"):
        given(program, tiny_rows(6), tune="evidence")


def test_a_model_without_hyper_sites_cannot_tune_them() -> None:
    with pytest.raises(SettingError, match="needs a model with hyper-sites, and 'gaussian' has none"):
        given(tiny(), tiny_rows(6), tune="evidence", scales="hyper")


def test_a_likelihood_without_curvature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Categorical, "curvature_root")
    with pytest.raises(PosteriorError, match="likelihood 'categorical' has no curvature_root"):
        given(tiny(), tiny_rows(6))


def test_curvature_that_overflows_is_refused() -> None:
    program = tiny()
    program.adapters.write({site.name: site.initial * 1e15 for site in program.sites})
    with pytest.raises(TrainingError, match="curvature is not finite"):
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


def test_links_to_probabilities_are_for_classes(known: Regression) -> None:
    posterior = fit(known.program, known.rows, "laplace", mode="given", tune="none", progress=False)
    for method in ("probit", "bridge"):
        with pytest.raises(PosteriorError, match=f"link '{method}' is one to class probabilities"):
            posterior.predict(known.rows, method=method, progress=False)
    joint = posterior.predict(known.rows, progress=False)
    exact, _ = posterior.linearised(Rows(encoded(known.program, known.rows), collator(known.program), 8, False))
    # 1,000 draws: the mean has a standard error of a thirtieth of the spread of the outputs.
    assert ((joint.mean - exact[:, 0]).abs() < 5 * (joint.variance / 1000).sqrt()).all()
