"""Estimators with noise of each row's own: every row passes by a draw of the guide, and the bound is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from causal_scenarios import causal_base
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import FixedB, LinearNetwork, awake, tiny_batch, tiny_choices, tiny_method, tiny_program, tiny_rows
from torch import Tensor

from bayeslora.errors import AdapterError, SettingError
from bayeslora.inference import fit
from bayeslora.inference.training.objective import State
from bayeslora.inference.variational.elbo import ELBOS
from bayeslora.inference.variational.estimators import Draw, NoiseWarmup, make_estimator
from bayeslora.inference.variational.loss import NegativeELBO
from bayeslora.inference.variational.svi import SVI
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel
from bayeslora.models.guides.auto import make_guide
from bayeslora.models.guides.base import Guide
from bayeslora.observations import Value
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

A, B = "linear_16x16.A", "linear_16x16.B"
KINDS = ["draw", "flipout", "local"]
QUICK = {"epochs": 1, "batch_size": 6, "progress": False}


def spread_guide(program: Program) -> Guide:
    """The structured guide, its parameters away from where they started."""
    guide = make_guide("structured", program.model, program.sites)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return guide


def functions(
    program: Program, kind: str, rows: int, sequences: int = 1
) -> tuple[dict[str, Any], dict[str, Tensor], Guide]:
    """What an estimator puts into the network, the draw that it is made of, and the guide."""
    guide = spread_guide(program)
    estimator = make_estimator(kind, program, guide)
    draw = program.model.weights(guide())
    shape = (rows, 5) if sequences == 1 else (rows, sequences, 5)
    return estimator(draw, {"input_ids": torch.zeros(shape, dtype=torch.long)}), draw, guide


def matrices(function: Callable[[Tensor], Tensor], inputs: int, sequences: int) -> Tensor:
    """The matrix W^T (sequences, inputs, outputs) by which each sequence passes: the images of the unit vectors."""
    return function(torch.eye(inputs).expand(sequences, inputs, inputs))


@pytest.mark.parametrize("model", [Gaussian(noise="entry", sites="both"), Gaussian(), MonteCLoRA(collapse=False)])
def test_flipout_gives_each_row_the_draw_with_signs_of_its_own(model: WeightModel) -> None:
    torch.manual_seed(0)
    program: Program = tiny_program(model)
    found, draw, guide = functions(program, "flipout", rows=8)
    for name in (A, B) if model.sites == "both" else (A,):
        for layer, function in enumerate(found[name]):
            mean, own = guide.spreads()[name].mean[layer], draw[name][layer]
            seen = matrices(function, 16 if name == A else 2, 8)
            ratio = ((seen if name == A else seen.mT) - mean) / (own - mean)  # (rows, columns, rank)
            torch.testing.assert_close(ratio.abs(), torch.ones_like(ratio), rtol=1e-3, atol=1e-3)
            signs = ratio.round()
            # One sign for each input times one for each output; of dependent entries one for each column.
            torch.testing.assert_close(signs, signs[:, :, :1] * signs[:, :1] * signs[:, :1, :1])
            assert bool((signs[:, :, 0] == signs[:, :, 1]).all()) == isinstance(model, MonteCLoRA)
            assert len({tuple(row.flatten().tolist()) for row in signs}) == 8  # of 2^17 that there are
    assert found[B] is draw[B] or model.sites == "both"


@pytest.mark.parametrize("noise", ["entry", "rank", "layer"])
@pytest.mark.parametrize("name", [A, B])
def test_local_noise_is_a_draw_of_the_guide_for_each_row(noise: str, name: str) -> None:
    torch.manual_seed(0)
    rows, inputs = 2000, 16 if name == A else 2
    program: Program = tiny_program(Gaussian(noise=noise, sites="both"))
    found, _, guide = functions(program, "local", rows)
    spread = guide.spreads()[name]
    seen = matrices(found[name][3], inputs, rows).detach()
    seen = seen if name == A else seen.mT
    standard = (seen - spread.mean[3]) / spread.deviation.expand_as(spread.mean)[3]
    # Means and covariances of 2,000 standard normal vectors, to five standard errors.
    assert standard.mean(0).abs().max() < 5 / rows**0.5
    covariance = standard.flatten(1).T @ standard.flatten(1) / rows
    assert (covariance - torch.eye(len(covariance))).abs().max() < 5 * (2 / rows) ** 0.5
    # A row of one vector, and one of two that are alike: noise of the same law, and not of a token's own.
    x = torch.randn(inputs)
    one = found[name][3](x.expand(rows, inputs)).detach()
    two = found[name][3](x.expand(rows, 2, inputs)).detach()
    torch.testing.assert_close(two[:, 0], two[:, 1])
    torch.testing.assert_close(one.mean(0), two[:, 0].mean(0), rtol=0, atol=float(8 * one.std() / rows**0.5))
    torch.testing.assert_close(one.std(0), two[:, 0].std(0), rtol=0.12, atol=0)


class Alternating(LinearNetwork):
    """The outputs of the one layer at the tokens of a row, added with signs that alternate."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        outputs = self.linear(self.table(input_ids)).squeeze(-1)
        signs = (-1.0) ** torch.arange(outputs.shape[1])
        return SimpleNamespace(logits=(outputs * signs).sum(1, keepdim=True))


class Known:
    """A regression on rows of several tokens, whose bound is known: (y - m)^2 + v in place of (y - f)^2."""

    def __init__(self, tokens: int, rows: int = 12, columns: int = 4) -> None:
        generator = torch.Generator().manual_seed(2)
        features = torch.randn(30, columns, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            lora = LoraConfig(r=2, lora_alpha=2, target_modules=["linear"])
            network = get_peft_model(Alternating(features), lora)
            torch.nn.init.normal_(network.base_model.model.linear.lora_B["default"].weight)
        self.program = Program(network, Value(0.7), FixedB(noise="entry", scale=1.5))
        self.guide = spread_guide(self.program)
        ids = torch.randint(30, (rows, tokens), generator=generator)
        self.batch = {"input_ids": ids, "labels": torch.randn(rows, generator=generator), "index": torch.arange(rows)}
        signs = (-1.0) ** torch.arange(tokens)
        self.seen = (features[ids] * signs[:, None]).sum(1)  # of which the output is linear, whatever the tokens
        self.offset = self.seen @ network.base_model.model.linear.base_layer.weight[0]
        self.b = network.base_model.model.linear.lora_B["default"].weight[0].detach()

    def objective(self, kind: str) -> NegativeELBO:
        estimator = make_estimator(kind, self.program, self.guide)
        elbo = ELBOS["mean-field"](num_particles=1)
        return NegativeELBO(self.program, self.guide, elbo, len(self.seen), kl_weight=1e-9, estimator=estimator)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(self.guide.parameters()))])

    def exact(self) -> tuple[Tensor, Tensor]:
        mean, deviation = self.guide.spreads()["linear_4x1.A"]
        found = self.offset + self.seen @ mean[0] @ self.b
        variance = self.seen.square() @ deviation[0].square() @ self.b.square()
        square = (self.batch["labels"] - found).square() + variance
        loss = (square / (2 * 0.7**2) + math.log(0.7) + math.log(2 * math.pi) / 2).mean()
        return loss.detach(), self.gradient(loss)


@pytest.mark.parametrize("tokens", [1, 3])
def test_all_estimate_the_same_bound_and_gradient_and_those_by_row_with_less_variance(tokens: int) -> None:
    torch.manual_seed(0)
    known, passes, spread = Known(tokens), 200, {}
    loss, gradient = known.exact()
    expected = torch.cat([loss[None], gradient])
    for kind in KINDS:
        objective, found = known.objective(kind), []
        for _ in range(passes):
            value = objective(known.batch)
            found.append(torch.cat([value.detach()[None], known.gradient(value)]))
        each = torch.stack(found)
        # Of 17 numbers none lies further off than four standard errors; noise by token would, in the loss itself.
        z = (each.mean(0) - expected) / each.std(0) * passes**0.5
        assert z.abs().max() < 4, kind
        spread[kind] = float(each[:, 1:].var(0).sum())
    # 12 rows are averaged; a fifth is the error of 200 passes.
    assert spread["flipout"] < spread["draw"] / 2
    assert spread["local"] < 1.2 * spread["flipout"]


@pytest.mark.parametrize("kind", ["flipout", "local"])
def test_rows_that_are_alike_differ_and_tokens_of_a_row_that_are_alike_do_not(kind: str) -> None:
    torch.manual_seed(0)
    program = awake(tiny_program(Gaussian(sites="both"))).eval()
    found, _, _ = functions(program, kind, rows=2)
    batch = {"input_ids": torch.tensor([[5, 5, 7, 5]] * 2), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    with torch.no_grad():
        outputs = program.outputs(found, batch)
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
        tokens = found[A][0](torch.randn(16).expand(2, 4, 16))
    torch.testing.assert_close(tokens, tokens[:, :1].expand(2, 4, 2))
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["flipout", "local"])
def test_all_choices_of_a_row_pass_by_one_draw(kind: str) -> None:
    torch.manual_seed(0)
    program = tiny_choices(Gaussian())
    found, _, _ = functions(program, kind, rows=4, sequences=3)
    seen = matrices(found[A][0], 16, 12).unflatten(0, (4, 3))
    torch.testing.assert_close(seen, seen[:, :1].expand_as(seen))
    assert not torch.allclose(seen[0, 0], seen[1, 0], atol=1e-3)


TEXTS = TaskSpec("quiz", "multiple-choice", ("ask",), "label", ("A", "B", "C"), choices=("choices",))
ROWS: dict[str, list[Any]] = {
    "ask": ["Is the film good", "Which stone is it"],
    "choices": [["yes", "it is not good"], ["the dull one", "moon stone", "(sun)"]],
    "label": [0, 2],
}


def text_choices(packed: bool, targets: list[str]) -> tuple[Program, dict[str, Tensor]]:
    """A causal language model that chooses among texts, and a batch of two rows."""
    split = Split(Dataset.from_dict(ROWS), TEXTS)
    program = Program.from_pretrained(
        str(causal_base()), Task(TEXTS, split), lora=LoraConfig(r=2, target_modules=targets),
        model=Gaussian(sites="both"), observation="text-choices", observation_settings={"packed": packed},
    )  # fmt: skip
    return awake(program), next(Rows.of(program, split).batches(program.device))[0]


@pytest.mark.parametrize("kind", ["flipout", "local"])
@pytest.mark.parametrize("network", ["encoder", "choices", "packed", "apart"])
def test_the_outputs_of_a_row_are_those_of_a_draw_of_its_own(kind: str, network: str) -> None:
    torch.manual_seed(0)
    if network in ("packed", "apart"):
        program, batch = text_choices(network == "packed", ["q_proj", "down_proj"])
    else:
        program = {"encoder": lambda: awake(tiny_program(targets=["key", "value"])), "choices": tiny_choices}[network]()
        rows = batch_of_choices() if network == "choices" else tiny_batch(program, tiny_rows(3))
        batch = {name: value for name, value in rows.items() if name != "labels"}
    program.model = Gaussian(sites="both")
    guide, count = spread_guide(program), len(batch["input_ids"])
    draw = {name: value.detach() for name, value in guide().items()}
    with torch.no_grad():
        found = make_estimator(kind, program, guide)(draw, batch)
        outputs = program.outputs(found, batch)
        sequences = batch["input_ids"].flatten(0, -2).shape[0]
        for row in range(count):
            own = dict(draw)
            for site in program.model.split(program.sites)[0]:
                columns, rank = site.initial.shape[1:]
                inputs = columns if site.role == "A" else rank
                each = torch.stack([matrices(function, inputs, sequences) for function in found[site.name]])
                value = each[:, row * sequences // count]
                own[site.name] = value if site.role == "A" else value.mT
            torch.testing.assert_close(program.outputs(own, batch)[row], outputs[row], rtol=1e-3, atol=1e-4)
            assert not torch.allclose(program.outputs(draw, batch)[row], outputs[row], atol=1e-3)


def batch_of_choices() -> dict[str, Tensor]:
    """Two rows of three choices, each of four tokens."""
    ids = torch.randint(1, 30, (2, 3, 4))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "choice_mask": torch.ones(2, 3, dtype=torch.bool),
    }


def test_a_head_that_is_given_the_tokens_of_all_rows_is_refused() -> None:
    program, batch = text_choices(True, ["q_proj", "lm_head"])
    guide = spread_guide(program)
    with torch.no_grad(), pytest.raises(AdapterError, match=r"lm_head' is given inputs of shape .* 2 sequences"):
        program.outputs(make_estimator("local", program, guide)(guide(), batch), batch)


@pytest.mark.parametrize("kind", ["flipout", "local"])
def test_activations_that_are_computed_again_see_the_same_noise(kind: str) -> None:
    def fitted(checkpointing: bool) -> dict[str, Tensor]:
        program = tiny_program(Gaussian(sites="both"), targets=["value"], dropout=0.1)
        settings = {"estimator": kind, "gradient_checkpointing": checkpointing, **QUICK}
        return fit(program, tiny_rows(12), **settings).state()

    one, two = fitted(False), fitted(True)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["flipout", "local"])
def test_noise_does_not_come_from_the_random_numbers_of_a_pass_that_is_repeated(kind: str) -> None:
    program = awake(tiny_program(Gaussian())).eval()
    found, _, _ = functions(program, kind, rows=3)
    inputs, state = torch.randn(3, 4, 16), torch.get_rng_state()
    assert torch.equal(found[A][0](inputs), found[A][0](inputs))
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_dropout_comes_before_the_noise() -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        program = tiny_program(Gaussian())
    layer = program.network.get_submodule(next(site for site in program.sites if site.name == A).layers[0])
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    found, seen = functions(program, "flipout", rows=3)[0], []
    program.weights.install(found | {B: program.sites[1].initial})
    stand_in = layer.lora_A["default"].forward.function
    layer.lora_A["default"].forward.function = lambda inputs: (seen.append(inputs), stand_in(inputs))[1]
    layer.train()(torch.ones(3, 4, 16))
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("kind", ["flipout", "local"])
def test_a_fit_by_rows_predicts_by_draws_and_its_seed_counts(kind: str) -> None:
    def predicted(**settings: Any) -> Tensor:
        program = tiny_program(Gaussian(), targets=["value"])
        posterior = fit(program, tiny_rows(12), estimator=kind, **QUICK, **settings)
        one, *others = (
            posterior.predict(tiny_rows(5), draws=3, batch_size=size, progress=False).logits for size in (5, 2)
        )
        torch.testing.assert_close(others[0], one, rtol=1e-4, atol=1e-4)
        return one

    assert torch.equal(predicted(), predicted())
    assert not torch.equal(predicted(seed=1), predicted())


@pytest.mark.parametrize("elbo", ["trace", "renyi"])
def test_a_bound_that_asks_for_a_draw_is_refused(elbo: str) -> None:
    with pytest.raises(SettingError, match="estimator='flipout' needs elbo='mean-field'"):
        SVI(estimator="flipout", elbo=elbo, particles=2)


@pytest.mark.parametrize(
    ("kind", "guide", "model"),
    [("local", "structured", MonteCLoRA()), ("flipout", "mean-field", Gaussian()), ("local", "full", Gaussian())],
)
def test_a_guide_of_which_too_little_is_known_is_refused(kind: str, guide: str, model: WeightModel) -> None:
    program = tiny_program(model, targets=["query"])
    with pytest.raises(SettingError, match=rf"estimator='{kind}' needs a guide .* 'linear_16x16.A' has none"):
        fit(program, tiny_rows(4), estimator=kind, guide=guide, **QUICK)


@pytest.mark.parametrize("program", [tiny_program(Gaussian(), targets=["word_embeddings"]), tiny_method("dora")])
def test_layers_that_are_not_linear_are_refused(program: Program) -> None:
    with pytest.raises(SettingError, match=r"needs linear layers, and '.*(word_embeddings|query)' is none"):
        fit(program, tiny_rows(4), estimator="flipout", **QUICK)


def test_a_layer_that_is_not_given_one_part_for_each_row_is_refused() -> None:
    program = tiny_program(Gaussian())
    function = functions(program, "flipout", rows=3)[0][A][0]
    for shape in ((12, 16), (5, 3, 16), (16,)):
        with pytest.raises(AdapterError, match=r"query' is given inputs of shape .* and a batch has 3 sequences"):
            function(torch.ones(shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_noise_is_shown_in_part_around_the_same_mean(kind: str, share: float) -> None:
    torch.manual_seed(0)
    program: Program = tiny_program(Gaussian(noise="entry"))
    guide = spread_guide(program)
    estimator = make_estimator(kind, program, guide)
    draw, batch = program.model.weights(guide()), {"input_ids": torch.zeros((3, 5), dtype=torch.long)}

    def seen(part: float) -> Tensor:
        estimator.share = part
        torch.manual_seed(1)
        found = estimator(draw, batch)[A]
        return found if isinstance(found, Tensor) else torch.stack([matrices(each, 16, 3) for each in found])

    mean, whole = guide.spreads()[A].mean, seen(1.0)
    mean = mean if kind == "draw" else mean.unsqueeze(1)
    torch.testing.assert_close(seen(share) - mean, share * (whole - mean), rtol=1e-4, atol=1e-5)


def test_noise_rises_in_the_first_part_of_training() -> None:
    estimator = Draw(make_guide("structured", Gaussian(), tiny_program().sites))
    warmup, shares = NoiseWarmup(estimator, 0.5), []
    for step in range(8):
        warmup.before_step(State(step, 8, 0.0))
        shares.append(estimator.share)
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_training_sees_the_noise_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    call = Draw.__call__
    monkeypatch.setattr(Draw, "__call__", lambda self, *given: shares.append(self.share) or call(self, *given))
    fit(tiny_program(), tiny_rows(12), "svi", noise_warmup=0.5, **{**QUICK, "epochs": 2})
    assert shares[:4] == [0.5, 1.0, 1.0, 1.0]
    shares.clear()
    fit(tiny_program(), tiny_rows(12), "svi", noise_warmup=0.0, **QUICK)
    assert set(shares) == {1.0}
