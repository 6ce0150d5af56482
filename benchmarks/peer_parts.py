"""What `peers.py` measures: Laplace's approximation here, by laplace-torch and by bayesian-lora, on one network."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

import bayeslora as bl
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised
from bayeslora.observations import Classes, batches
from bayeslora.passes import Rows
from bayeslora.program import Program

#: Prior standard deviation of every entry; rank of the wide Kronecker factors.
SCALE, CURVATURE_RANK = 0.1, 16
#: Rows that a posterior is fitted to whose predictions are measured: their cost does not depend on it.
FEW_ROWS = 8
#: The small encoder, and its data.
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VOCABULARY, SMALL_ROWS, SMALL_CLASSES = 40, 40, 3
#: Curvature backends of laplace-torch that take a network of which some weights are fixed.
LAPLACE_BACKENDS = {"curvlinops": "CurvlinopsGGN", "asdl": "AsdlGGN"}

Action = Callable[[Dataset], object]


@dataclass(frozen=True)
class Subject:
    """What a part works on: a program whose adapter is away from its start, and tokenised rows."""

    program: Program
    train: Dataset
    test: Dataset


def subject(options: Namespace) -> Subject:
    """The same for every part with the same options."""
    if options.quick:
        program = small_program(2)
        train = test = Rows.of(program, small_rows(options.rows, 2)).dataset
    else:
        from peft import LoraConfig
        from transformers.utils import logging

        logging.set_verbosity_error()  # each process would report that the head is new
        task = bl.load_task(options.task, options.data_dir, train_size=options.rows, heldout_size=options.test_rows)
        assert task.heldout is not None
        lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
        program = Program.from_pretrained(options.base, task, lora=lora, model=prior())
        train, test = (Rows.of(program, split).dataset for split in (task.train, task.heldout))
    generator = torch.Generator().manual_seed(0)
    values = {
        site.name: 0.05 * torch.randn(site.initial.shape, generator=generator) if site.role == "B" else site.initial
        for site in program.sites
    }
    program.weights.write(values)  # where B is zero, so are all gradients of A
    return Subject(program.around(values), train, test)


def small_program(classes: int) -> Program:
    """A random encoder without dropout. Its attention is spelled out: one backend of laplace-torch needs that."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=VOCABULARY, num_labels=classes, initializer_range=0.3, **SMALL)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS")
        network = get_peft_model(BertForSequenceClassification(config), lora)
    return Program(network, Classes(classes), prior())


def small_rows(rows: int, classes: int) -> Dataset:
    """Sequences of random length, so that there is padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 10, (rows,), generator=generator).tolist()
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [sum(row) % classes for row in ids]})


def prior() -> bl.models.Gaussian:
    """An isotropic normal prior of both matrices around zero."""
    return bl.models.Gaussian(sites="both", centre="zero", deviation=SCALE)


def laplace_fit(program: Program, rows: Dataset, batch_size: int, curvature: str = "kron") -> LaplacePosterior:
    """Our approximation around the program's weights, under the prior as it is."""
    settings: dict[str, Any] = {"mode": "given", "tune": "none", "curvature": curvature}
    settings |= {"curvature_rank": CURVATURE_RANK, "batch_size": batch_size, "cpu": True}
    found = bl.fit(program, rows, "laplace", progress=False, **settings)
    assert isinstance(found, LaplacePosterior)
    return found


class Logits(nn.Module):
    """A network as laplace-torch wants it: from a batch with its labels to logits."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.network = trainable(program)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (examples, classes)."""
        return logits(self.network, batch)


class Loader(list[dict[str, Tensor]]):
    """Batches in memory, and the number of rows as laplace-torch asks for it."""

    @property
    def dataset(self) -> range:
        """As long as there are rows."""
        return range(sum(len(batch["labels"]) for batch in self))


def trainable(program: Program) -> Any:
    """The network as PEFT has it, without dropout, with gradients for the LoRA matrices alone."""
    program.weights.restore()
    for site in program.sites:
        for slot in program.weights.slots(site.name):
            slot.parameter.requires_grad_(site.role != "head")
    return program.network.eval()


def logits(network: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (examples, classes) of a batch that may have labels."""
    found: Tensor = network(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return found


def loader(program: Program, rows: Dataset, batch_size: int) -> Loader:
    """The batches that our own passes have."""
    made = batches(rows, program.observation.collator(program.padding), batch_size)
    return Loader({name: value for name, value in batch.items() if name != "index"} for batch in made)


def laplace_torch(program: Program, backend: str, structure: str) -> Any:
    """laplace-torch's approximation of the LoRA matrices under our prior, not yet fitted."""
    import laplace
    import laplace.curvature

    kind = getattr(laplace.curvature, LAPLACE_BACKENDS[backend])
    settings = {"hessian_structure": structure, "prior_precision": SCALE**-2, "backend": kind}
    return laplace.Laplace(Logits(program), "classification", subset_of_weights="all", **settings)


def agreement(backend: str) -> dict[str, float]:
    """Relative differences between our figures and laplace-torch's, where both are exact."""
    program = small_program(SMALL_CLASSES)
    rows = Rows.of(program, small_rows(SMALL_ROWS, SMALL_CLASSES)).dataset
    trained = bl.fit(program, rows, "map", progress=False, cpu=True, epochs=5, batch_size=8, learning_rate=1e-2)
    program.weights.write(trained.mean())
    ours = laplace_fit(program.around(trained.mean()), rows, 8, curvature="full")
    _, (covariances,) = linearised(ours, Rows.of(program, rows, SMALL_ROWS), torch.ones(1))
    theirs = laplace_torch(program, backend, "full")
    theirs.fit(loader(program, rows, 8))
    place = places(ours, theirs.params)
    (batch,) = batches(rows, program.observation.collator(program.padding), SMALL_ROWS)
    index = batch.pop("index")
    jacobian, _ = theirs.backend.jacobians(batch)
    return {
        "GGN": relative(ours.curvature.tensors()["matrix"], theirs.H[place][:, place]),
        "log evidence": relative(ours.mode_evidence(ours.prior), theirs.log_marginal_likelihood()),
        "variance of the logits": relative(covariances[index], theirs.functional_variance(jacobian)),
    }


def places(ours: LaplacePosterior, parameters: Sequence[nn.Parameter]) -> Tensor:
    """For each of our weights, its place among all entries of ``parameters``."""
    sizes = [each.numel() for each in parameters]
    numbers = torch.arange(sum(sizes)).split(sizes)
    known = {id(each): number.view_as(each) for each, number in zip(parameters, numbers, strict=True)}
    slots = [slot for site in ours.sites for slot in ours.program.weights.slots(site.name)]
    found = [(known[id(slot.parameter)], slot.transposed) for slot in slots]
    return torch.cat([(number.mT if transposed else number).flatten() for number, transposed in found])


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over that of theirs."""
    theirs = theirs.detach().double()
    return float(torch.linalg.norm(ours.double() - theirs) / torch.linalg.norm(theirs))


def map_epoch(found: Subject, batch_size: int) -> Action:
    """One epoch of training."""
    return lambda rows: bl.fit(found.program, rows, "map", progress=False, epochs=1.0, batch_size=batch_size, cpu=True)


def our_fit(found: Subject, batch_size: int) -> Action:
    """The pass that gives the curvature."""
    program = found.program
    return lambda rows: laplace_fit(program, rows, batch_size)


def our_prediction(method: str) -> Callable[[Subject, int], Action]:
    """A prediction by one of our methods."""

    def prepare(found: Subject, batch_size: int) -> Action:
        posterior = laplace_fit(found.program, found.train.select(range(FEW_ROWS)), FEW_ROWS)
        return lambda rows: posterior.predict(rows, method=method, batch_size=batch_size, progress=False)

    return prepare


def laplace_torch_fit(backend: str) -> Callable[[Subject, int], Action]:
    """laplace-torch's Kronecker factors and their eigenvectors."""

    def prepare(found: Subject, batch_size: int) -> Action:
        theirs = laplace_torch(found.program, backend, "kron")
        return lambda rows: theirs.fit(loader(found.program, rows, batch_size))

    return prepare


def laplace_torch_prediction(found: Subject, batch_size: int) -> Action:
    """laplace-torch's linearised prediction, through the same link as ours."""
    theirs = laplace_torch(found.program, "curvlinops", "kron")
    theirs.fit(loader(found.program, found.train.select(range(FEW_ROWS)), FEW_ROWS))

    def predict(rows: Dataset) -> None:
        for batch in loader(found.program, rows, batch_size):
            theirs(batch, pred_type="glm", link_approx="probit")

    return predict


def bayesian_lora_factors(program: Program, rows: Dataset, batch_size: int) -> Any:
    """bayesian-lora's low-rank Kronecker factors, the small ones as Cholesky factors."""
    import bayesian_lora

    network, threshold = trainable(program), rank_of(program) + 1
    matrices = [name for name, _ in network.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))]
    factors = bayesian_lora.calculate_kronecker_factors(
        network,
        logits,
        loader(program, rows, batch_size),
        CURVATURE_RANK,
        threshold,
        # It takes the last token of what enters a layer, and a pooler's input has no tokens.
        [name for name in matrices if ".pooler." not in name],
    )
    return bayesian_lora.cholesky_decompose_small_factors(factors, threshold, "cpu", torch.float32)


def bayesian_lora_fit(found: Subject, batch_size: int) -> Action:
    """bayesian-lora's factors."""
    return lambda rows: bayesian_lora_factors(found.program, rows, batch_size)


def bayesian_lora_prediction(found: Subject, batch_size: int) -> Action:
    """Means and variances of the logits, as bayesian-lora's README has them."""
    from bayesian_lora.main import jacobian_mean, variance
    from transformers import BatchEncoding

    factors = bayesian_lora_factors(found.program, found.train.select(range(FEW_ROWS)), FEW_ROWS)
    # After the factors, which leave the network in training mode.
    network, rank, scale = trainable(found.program), rank_of(found.program), torch.tensor(SCALE**2)

    def predict(rows: Dataset) -> None:
        for batch in loader(found.program, rows, batch_size):
            inputs = BatchEncoding({name: value for name, value in batch.items() if name != "labels"})
            jacobian, mean = jacobian_mean(network, inputs, output_callback=lambda output: output.logits)
            variance(inputs, jacobian, factors, scale, mean.shape[-1], rank, CURVATURE_RANK, "cpu")

    return predict


def rank_of(program: Program) -> int:
    """Rank of the LoRA matrices."""
    return program.sites[0].initial.shape[-1]


@dataclass(frozen=True)
class Part:
    """What is measured.

    Attributes:
        title: what the tables call it.
        prepare: gives what is timed, for a number of rows a batch.
        fits: whether it takes the training rows; else those to predict.
        rival: of a peer's part, the name of ours that it is compared with.
        small: whether its batches are of `--small-batch` rows; else of `--batch-size`.
    """

    title: str
    prepare: Callable[[Subject, int], Action]
    fits: bool = False
    rival: str = ""
    small: bool = False


COSTS = {
    "map": Part("bayeslora: an epoch of MAP", map_epoch, fits=True),
    "fit": Part("bayeslora: Laplace fit", our_fit, fits=True),
    "laplace-torch-fit-curvlinops": Part(
        "laplace-torch: fit, curvlinops", laplace_torch_fit("curvlinops"), fits=True, rival="fit"
    ),
    "laplace-torch-fit-asdl": Part("laplace-torch: fit, asdl", laplace_torch_fit("asdl"), fits=True, rival="fit"),
    "bayesian-lora-fit": Part("bayesian-lora: fit", bayesian_lora_fit, fits=True, rival="fit"),
    "plain": Part("bayeslora: plain forward pass", our_prediction("mean")),
    "predict": Part("bayeslora: prediction", our_prediction("probit")),
    "laplace-torch-predict": Part("laplace-torch: prediction", laplace_torch_prediction, rival="predict"),
    "bayesian-lora-predict": Part("bayesian-lora: prediction", bayesian_lora_prediction, rival="predict"),
    "predict-small": Part("bayeslora: prediction, small batches", our_prediction("probit"), small=True),
    "laplace-torch-predict-small": Part(
        "laplace-torch: prediction, small batches", laplace_torch_prediction, rival="predict-small", small=True
    ),
    "bayesian-lora-predict-small": Part(
        "bayesian-lora: prediction, small batches", bayesian_lora_prediction, rival="predict-small", small=True
    ),
}
AGREEMENTS = {f"agreement-{backend}": backend for backend in LAPLACE_BACKENDS}
