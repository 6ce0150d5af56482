"""Programs that are small enough to know all about, and one whose posterior is known exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import BertConfig, BertForMultipleChoice, BertForSequenceClassification, PreTrainedTokenizerFast

from bayeslora.inference.base import Run
from bayeslora.inference.laplace.jacobians import as_matrices
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel
from bayeslora.models.guides.base import Guide, GuideList
from bayeslora.networks import NetworkSettings
from bayeslora.observations import Choices, Classes, Value, batches, encode
from bayeslora.passes import Rows
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.program import Program
from bayeslora.sites import Site
from bayeslora.tasks import Split, Task, TaskSpec

VOCABULARY = 40


def tiny_bert(classes: int = 3, dropout: float = 0.0) -> BertForSequenceClassification:
    """A random two-layer encoder of 16 dimensions."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=classes,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def tiny_program(
    model: WeightModel | None = None,
    classes: int = 3,
    rank: int = 2,
    alpha: int = 4,
    targets: str | list[str] = "all-linear",
    dropout: float = 0.0,
    seed: int = 0,
) -> Program:
    """LoRA on all linear layers of `tiny_bert`, with B away from its zero start so that A matters at once."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = tiny_bert(classes, dropout)
        network = get_peft_model(
            base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="SEQ_CLS")
        )
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return Program(network, Classes(classes), model or MonteCLoRA(components=3))


#: Ways to train that are not plain LoRA: PEFT's configuration of each; None trains the whole network.
METHODS: dict[str, PeftConfig | None] = {
    "dora": LoraConfig(r=2, target_modules=["query", "value"], use_dora=True, task_type="SEQ_CLS"),
    "ia3": IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"),
    "adalora": AdaLoraConfig(init_r=2, target_modules=["query", "value"], total_step=10, task_type="SEQ_CLS"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="SEQ_CLS"),
    "bias": LoraConfig(r=2, target_modules=["query"], bias="lora_only", lora_bias=True, task_type="SEQ_CLS"),
    "full": None,
}


def tiny_method(method: str, model: WeightModel | None = None) -> Program:
    """`tiny_bert` by one of `METHODS`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, config = tiny_bert(), METHODS[method]
        network = network if config is None else get_peft_model(network, deepcopy(config))
    return Program(network, Classes(3), model or Gaussian())


SPEC = TaskSpec("counting", labels=("none", "one", "more"))


def saved_base(folder: Path, dropout: float = 0.0, seed: int = 0) -> Path:
    """`tiny_bert` on disk, with a tokenizer whose words are w0, w1, ..."""
    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(VOCABULARY - 2))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny_bert(len(SPEC.labels), dropout).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def plain_logits(base: Path, adapter: Path, program: Program, rows: Split) -> Tensor:
    """Logits (rows, classes) of a saved adapter as plain PEFT loads it, row by row, without padding."""
    network = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base, num_labels=3), adapter)
    encoded = encode(rows, program.observation, program.encoder)["input_ids"]
    with torch.no_grad():
        return torch.cat([network.eval()(input_ids=torch.tensor([row])).logits for row in encoded])


def class_prediction(n: int = 300, draws: int = 4, seed: int = 0) -> tuple[ClassPrediction, Tensor]:
    """A prediction of three classes, whose draws are noise around what is true, and the true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    true = 1.5 * torch.randn(n, 3, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator).squeeze(1)
    noise = torch.randn(draws, n, 3, generator=generator)
    return ClassPrediction(true + noise, labels), true.softmax(-1)


def text_program(folder: Path, model: WeightModel | None = None, dtype: str = "float32", **settings: Any) -> Program:
    """A program over `saved_base`, with an encoder, as `bayeslora.load` can rebuild it."""
    rows = text_rows()
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    task = Task(SPEC, train=rows)
    base = NetworkSettings(str(folder), dtype)
    return Program.from_pretrained(base, task, lora=lora, model=model, max_length=16, **settings)


def text_rows(n: int = 12) -> Split:
    """`tiny_rows` in words."""
    rows = tiny_rows(n)
    words = [" ".join(f"w{token}" for token in ids) for ids in rows["input_ids"]]
    return Split(Dataset.from_dict({"text": words, "label": list(rows["labels"])}), SPEC)


def tiny_batch(program: Program, rows: Dataset) -> dict[str, Tensor]:
    """All rows as one batch."""
    over = Rows.of(program, rows)
    return next(batches(over.dataset, over.collate, len(over)))


def untrained_program() -> Program:
    """A `tiny_program` around an adapter that was not trained: B is zero."""
    program = tiny_program(Gaussian())
    return program.around({site.name: site.initial * (site.role != "B") for site in program.sites})


def awake(program: Program) -> Program:
    """With no matrix at its zero start, so that every gradient matters."""
    generator = torch.Generator().manual_seed(0)
    values = {site.name: 0.3 * torch.randn(site.initial.shape, generator=generator) for site in program.sites}
    return program.around(values).eval()


def dense_jacobian(program: Program, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """d logits / d weights by autograd: (examples, outputs, layers, columns, rank) by site."""
    weights = {site.name: site.initial for site in program.sites}

    def logits(*values: Tensor) -> Tensor:
        return program.outputs(dict(zip(weights, values, strict=True)), batch)

    found = torch.autograd.functional.jacobian(logits, tuple(weights.values()))
    return {
        site.name: torch.stack([torch.stack([as_matrices(site, row) for row in example]) for example in jacobian])
        for site, jacobian in zip(program.sites, found, strict=True)
    }


def tiny_choices(model: WeightModel | None = None) -> Program:
    """LoRA on a random one-layer encoder that chooses among up to three texts, with no matrix at its zero start."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["query", "dense"], modules_to_save=["classifier"])
    return awake(Program(get_peft_model(BertForMultipleChoice(config), lora), Choices(3), model or MonteCLoRA()))


def tiny_rows(n: int = 24, classes: int = 3, seed: int = 0, longest: int = 9) -> Dataset:
    """Tokenised rows of random length whose label is how often a token below 8 occurs, up to the number of classes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (n,), generator=generator).tolist()
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    labels = [min(sum(token < 8 for token in row), classes - 1) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})


def generators() -> tuple[object, ...]:
    """State of every global generator."""
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence_pairs(size: int) -> list[dict[str, Any]]:
    """Rows in the columns of MRPC."""
    return [{"sentence1": f"first {row}", "sentence2": f"second {row}", "label": row % 2} for row in range(size)]


class LinearNetwork(nn.Module):
    """y = W0 x + s B A x, for rows x that token ids look up in a table."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(features, freeze=True)
        self.linear = nn.Linear(features.shape[1], 1, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.table(input_ids).squeeze(1)))


class KnownB(WeightModel):
    """A model of A alone, with B known."""

    def sample(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        chosen, others = self.split(sites)
        return {site.name: self.sample_weight(site) for site in chosen} | {site.name: site.initial for site in others}

    def initial(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return super().initial(self.split(sites)[0])

    def guide(self, sites: Sequence[Site]) -> Guide:
        return GuideList([self.site_guide(site) for site in self.split(sites)[0]])


@dataclass(frozen=True, kw_only=True)
class FixedB(KnownB, Gaussian):
    """Gaussian columns of A with B known: Bayesian linear regression."""

    name = "fixed-b"


@dataclass(frozen=True)
class Regression:
    """Bayesian linear regression through a LoRA layer, and its exact answers."""

    program: Program
    rows: Dataset
    mean: Tensor  # of the columns of A, flattened (columns * rank)
    covariance: Tensor
    log_evidence: float


def lora_regression(
    n: int = 40, columns: int = 3, rank: int = 2, noise: float = 0.5, prior: float = 1.0, copies: int = 1
) -> Regression:
    """y = W0 x + s B A x + noise with B fixed; a ~ N(0, prior^2 I): the posterior of vec(A) is normal.

    Several ``copies`` have columns and rows of their own, with the same features: independent, and of one covariance.
    """
    generator = torch.Generator().manual_seed(3)
    features = torch.block_diag(*[torch.randn(n, columns, generator=generator)] * copies)
    n, columns = features.shape
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = get_peft_model(
            LinearNetwork(features), LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
        )
    b = torch.tensor([[0.8, -0.5]])[:, :rank]
    layer = network.base_model.model.linear
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(b)
        offset = features @ layer.base_layer.weight[0]
    truth = torch.randn(columns, rank, generator=generator)
    # y = offset + sum_ij x_i b_j a_ij: the design matrix of vec(A) has rows x (x) b.
    design = torch.einsum("ni,j->nij", features, b[0]).reshape(n, -1)
    y = offset + design @ truth.reshape(-1) + noise * torch.randn(n, generator=generator)

    scale = prior / float(layer.lora_A["default"].weight.detach().square().mean().sqrt())
    program = Program(network, Value(noise), FixedB(sites="A", centre="zero", scale=scale))
    precision = design.T @ design / noise**2 + torch.eye(columns * rank) / prior**2
    covariance = torch.linalg.inv(precision.double())
    mean = covariance @ (design.T @ (y - offset)).double() / noise**2
    marginal = torch.distributions.MultivariateNormal(
        offset.double(), (prior**2 * design @ design.T + noise**2 * torch.eye(n)).double()
    )
    rows = Dataset.from_dict({"input_ids": [[i] for i in range(n)], "labels": y.tolist()})
    return Regression(program, rows, mean, covariance, float(marginal.log_prob(y.double())))


@dataclass(frozen=True)
class ExactRegression:
    """The exact posterior of `lora_regression`, as a backend: independent draws, ``factor`` times as wide."""

    name = "exact"
    paper = ""

    factor: float = 1.0

    def fit(self, program: Program, data: Dataset, run: Run) -> EmpiricalPosterior:
        site = next(site for site in program.sites if site.role == "A")
        offset, design = linear_parts(program, data)
        noise, deviation = program.observation.scale, program.model.sigma0(site).double().mean()
        labels = torch.as_tensor(data["labels"][:]).double()
        precision = design.T @ design / noise**2 + torch.eye(design.shape[1]) / deviation**2
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        mean = root @ root.T @ design.T @ (labels - offset) / noise**2
        generator = torch.Generator().manual_seed(run.seed)
        draws = mean + self.factor * torch.randn(100, len(mean), generator=generator, dtype=torch.float64) @ root.T
        record = run.record(self.name, {}, len(data), temperature=1.0, point_sites=())
        return EmpiricalPosterior(program, record, {site.name: draws.float().reshape(100, *site.initial.shape)})


def linear_parts(program: Program, data: Dataset) -> tuple[Tensor, Tensor]:
    """Offset (examples,) and design (examples, weights) of a regression that is linear in A."""
    over = Rows.of(program, data, len(data))
    weights = {site.name: site.initial for site in program.sites}
    site = next(site for site in program.sites if site.role == "A")

    def outputs(value: Tensor) -> Tensor:
        with torch.no_grad():
            return over.outputs(program, weights | {site.name: value}).double().squeeze(-1)

    offset = outputs(torch.zeros_like(site.initial))
    units = torch.eye(site.initial.numel()).reshape(-1, *site.initial.shape)
    return offset, torch.stack([outputs(unit) - offset for unit in units], dim=1)
