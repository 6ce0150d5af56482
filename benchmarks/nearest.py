"""Which family of posteriors is nearest to the true one, that of the No-U-Turn sampler, on an adapter small enough.

    python benchmarks/nearest.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/nearest.py report

MRPC, 400 training rows: the base's vector of each row is computed once, and what is trained is LoRA of rank 2 on the
two dense layers of its classification head, 2,308 weights, all of them random. Families have the library's defaults but
for what `FAMILIES` says, and for the length of training, 50 epochs. The full covariance has a lower rate: at 1e-2, with
AdamW's own second moments, its 2.7 million entries blew up.
Nothing is chosen on the validation split, whose predictions are compared. All are of one prior, but for MonteCLoRA
and ScalaBL, which have their own; of the latter the singular values of A alone are random. Two chains of the sampler
say how near two samples of one law are. A family that is done is not done again. The report takes seconds: a Markdown
table, benchmarks/results/nearest.json and docs/images/nearest.png.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, markdown, say
from datasets import Dataset
from nearest_figure import draw
from torch import Tensor, nn

import bayeslora as bl
from bayeslora.diagnostics.convergence import prediction_ess, prediction_rhat
from bayeslora.diagnostics.guide import khat, khat_by_block
from bayeslora.diagnostics.loo import loo, loo_parts
from bayeslora.files import write_json
from bayeslora.inference.mixture import MixturePosterior
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predict.prediction import ClassPrediction

FIGURE = RESULTS.parent.parent / "docs" / "images" / "nearest.png"
DRAWS = 80
#: The prior: normal, around LoRA's start, for both matrices of both layers.
PRIOR = {"sites": "both", "scale": 1.5, "zero_scale": 0.2}
#: Of `svi`: the prior that all have, the rate of its means under it, and all rows, as of all others.
SAME = {"prior_mean": "model", "learning_rate": 2e-3, "heldout_size": 0}
REFERENCE = "nuts"


@dataclass(frozen=True)
class Family:
    """What a family of posteriors is fitted by.

    Attributes:
        backend: inference algorithm.
        settings: of it that are not its defaults.
        model: Pyro model of the weights, by default that of the common prior.
        prior: settings of that model.
    """

    backend: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = "gaussian"
    prior: Mapping[str, Any] = field(default_factory=lambda: PRIOR)


FAMILIES = {
    REFERENCE: Family("nuts", {"draws": 400, "warmup": 200, "max_tree_depth": 6}),
    "svi": Family("svi", SAME),
    "svi, flipout": Family("svi", SAME | {"estimator": "flipout"}),
    "svi, monteclora": Family("svi", SAME, model="monteclora"),
    "svi, entry": Family("svi", SAME | {"guide": "entry"}),
    "svi, entry, flipout": Family("svi", SAME | {"guide": "entry", "estimator": "flipout"}),
    "svi, scalabl": Family("svi", SAME, model="scalabl", prior={}),
    "svi, low-rank": Family("svi", SAME | {"guide": "low-rank"}),
    "svi, full": Family("svi", SAME | {"guide": "full", "scale_learning_rate": 1e-4}),
    "svi, inducing": Family("svi", SAME | {"guide": "inducing"}),
    "svi, inducing, flow": Family("svi", SAME | {"guide": "inducing", "guide_settings": {"flow": 16}}),
    "ivon": Family("ivon"),
    "laplace": Family("laplace", {"mode": "map", "tune": "none"}),
    "swag": Family("swag", {"prior_weight": 1.0}),
    "tfb": Family("tfb", {"prior_weight": 1.0}),
    "sgld": Family("sgld", {"draws": DRAWS, "warmup": DRAWS}),
}
CHAINS = 2
#: Settings to see that it works.
QUICK = {
    "nuts": {"draws": 40, "warmup": 5, "max_tree_depth": 2},
    "sgld": {"draws": 40, "warmup": 5, "thin": 1},
    "swag": {"snapshots": 2, "rank": 2},
}


@dataclass(frozen=True)
class Protocol:
    """What all families have in common."""

    task: str = "mrpc"
    train_size: int = 400
    heldout_size: int = 300
    rank: int = 2
    lora_alpha: int = 8
    epochs: int = 50
    batch_size: int = 32
    draws: int = DRAWS
    seed: int = 0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)


#: In seconds, to see that it works; its figures mean nothing.
SHORT = Protocol(train_size=32, heldout_size=16, epochs=1, batch_size=8, draws=40, settings=QUICK)


class Head(nn.Module):
    """The classification head of a base network, over vectors that were computed before."""

    def __init__(self, vectors: Tensor, pooler: nn.Linear) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(vectors)
        self.pooler = pooler
        self.classifier = nn.Linear(pooler.out_features, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """Logits of the rows of these numbers."""
        return SimpleNamespace(logits=self.classifier(self.pooler(self.table(input_ids).squeeze(1)).tanh()))


@cache
def vectors_of(base: str, data_dir: str | None, how: Protocol) -> tuple[Any, ...]:
    """Vectors of all rows, the layer that follows them, and the rows by number: for training, and to report on."""
    task = bl.load_task(how.task, data_dir, train_size=how.train_size, heldout_size=how.heldout_size, seed=how.seed)
    program = bl.Program.from_pretrained(base, task, seed=how.seed).eval()
    encoder = program.weights.base.base_model
    vectors, splits, first = [], [], 0
    for split in (task.train, task.validation):
        rows = Rows.of(program, split)
        found = torch.zeros(len(rows), program.weights.base.config.hidden_size)
        for batch, index in rows.batches(program.device):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                found[index] = encoder(**inputs).last_hidden_state[:, 0]
        numbers = [[first + row] for row in range(len(rows))]
        splits.append(Dataset.from_dict({"input_ids": numbers, "labels": rows.dataset["labels"][:]}))
        vectors.append(found)
        first += len(rows)
    return torch.cat(vectors), encoder.pooler.dense.get_base_layer(), *splits


def program_of(family: str, base: str, data_dir: str | None, how: Protocol) -> tuple[bl.Program, Dataset, Dataset]:
    """The program of one family, its training rows, and those to report on."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    vectors, pooler, train, other = vectors_of(base, data_dir, how)
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        lora = LoraConfig(r=how.rank, lora_alpha=how.lora_alpha, target_modules=["pooler", "classifier"])
        network = get_peft_model(Head(vectors, deepcopy(pooler)), lora)
    weights = bl.models.build(FAMILIES[family].model, **FAMILIES[family].prior)
    return bl.Program(network, bl.observations.Classes(2), weights), train, other


def fitted(family: str, program: bl.Program, train: Dataset, how: Protocol) -> Posterior:
    """The posterior of one family; of the reference, all of its chains."""
    backend, settings = FAMILIES[family].backend, dict(FAMILIES[family].settings)
    if "epochs" in bl.inference.BACKENDS[backend].__dataclass_fields__:
        settings = settings | {"epochs": how.epochs, "batch_size": how.batch_size}
    settings = {**settings, **how.settings.get(backend, {})}
    seeds = [how.seed + chain for chain in range(CHAINS if family == REFERENCE else 1)]
    found = [bl.fit(program, train, backend, seed=seed, progress=False, **settings) for seed in seeds]
    return found[0] if len(found) == 1 else MixturePosterior(found, found[0].record)


def run(options: Namespace) -> None:
    """Fit the families that are not done, predict, and ask each how near it is by itself."""
    how = SHORT if options.quick else Protocol()
    torch.set_num_threads(options.threads)
    for family in options.families:
        folder = options.output / family
        if (folder / "record.json").exists():
            say(f"{family}: done before")
            continue
        program, train, other = program_of(family, options.base, options.data_dir, how)
        posterior = fitted(family, program, train, how)
        for place, chain in enumerate(posterior.chains):
            count = chain.differing(min(how.draws, chain.most_draws or how.draws))
            prediction = chain.predict(other, count, seed=how.seed + place, progress=False)
            prediction.save(folder / f"chain{place}.safetensors")
        shown = posterior.predict(other, chain.differing(how.draws), progress=False).metrics(intervals=False)
        record = {
            "protocol": asdict(how) | {"weights": sum(site.initial.numel() for site in program.sites)},
            "metrics": {name: shown[name].value for name in ("accuracy", "nll", "ece_15")},
            "diagnosis": diagnosed(posterior, train, how.draws),
            "seconds": sum(chain.cost["seconds"] for chain in posterior.chains),
            "history": [chain.record.history[-1] for chain in posterior.chains],
            "environment": environment(program.device),
        }
        write_json(folder / "record.json", record)
        say(f"{family}: NLL {shown['nll'].value:.3f} ({record['seconds']:.0f} s)")


def diagnosed(posterior: Posterior, train: Dataset, draws: int) -> dict[str, Any]:
    """K-hat, by layer too, leave-one-out, and convergence, as far as the family has them."""
    found: dict[str, Any] = {}
    if not posterior.random:
        return found
    chain = posterior.chains[0]
    most = chain.most_draws or draws
    count = most if chain.markov else min(draws, most)  # whether a chain has come to rest, all of it tells
    data = posterior.to_inference_data(train, draws=count, prior_draws=0, progress=False)
    if posterior.dense and "log_q" in data["sample_stats"]:
        stats = data["sample_stats"]
        found["khat"] = khat(stats["log_p"].values, stats["log_q"].values)
        if posterior.independent_layers:
            blocks = {name: {name} for site in posterior.program.sites for name in site.layers}
            found["khat_by_layer"] = khat_by_block(posterior, train, max(draws // 2, 40), blocks=blocks, progress=False)
    if posterior.dense or chain.markov:
        total, error, shapes, good = loo_parts(loo(data))
        found |= {"elpd_loo": total, "elpd_loo_error": error, "pareto_k_bad": int((shapes.values > good).sum())}
    if chain.markov:
        found |= {
            "rhat": float(np.quantile(prediction_rhat(data), 0.95)),
            "rhat_most": float(prediction_rhat(data).max()),
        }
        found |= {"ess": float(prediction_ess(data).median()), "ess_least": float(prediction_ess(data).min())}
    return found


def compared(found: Sequence[ClassPrediction], reference: Sequence[ClassPrediction]) -> dict[str, float]:
    """How far predictions are from those of the reference: probabilities, and the spread of logits, if there is one."""
    (mine, spread), (true, wide) = (_moments(each) for each in (found, reference))
    distance = {"variation": float((mine - true).abs().sum(-1).mean() / 2)}
    if not spread.isfinite().all():
        return distance
    ratios = spread / wide
    low, middle, high = (float(ratios.quantile(part)) for part in (0.1, 0.5, 0.9))
    return distance | {"spread": middle, "spread_low": low, "spread_high": high}


def _moments(found: Sequence[ClassPrediction]) -> tuple[Tensor, Tensor]:
    """Mean probabilities (examples, classes); deviation of the logits' difference (examples,), infinite of one draw."""
    logits = torch.cat([each.logits for each in found]).double()
    difference = logits[..., 1] - logits[..., 0]
    spread = difference.std(0) if len(logits) > 1 else torch.full_like(difference[0], torch.inf)
    return logits.softmax(-1).mean(0), spread


def report(options: Namespace) -> None:
    """Print the table, draw the picture, and write the figures that are kept."""
    folders = {name: options.output / name for name in FAMILIES if (options.output / name / "record.json").exists()}
    if REFERENCE not in folders:
        raise SystemExit(f"The reference is not there: run --families {REFERENCE}.")
    records = {name: json.loads((folder / "record.json").read_text()) for name, folder in folders.items()}
    predictions = {name: _predictions(folder) for name, folder in folders.items()}
    first, reference = records.pop(REFERENCE), predictions.pop(REFERENCE)
    summary = {name: compared(predictions[name], reference) | _kept(record) for name, record in records.items()}
    floor = compared(reference[:1], reference[1:])
    order = sorted(summary, key=lambda name: float(summary[name]["variation"]))
    print(table(summary | {REFERENCE: floor | _kept(first)}, order))
    draw({name: summary[name] for name in order}, _kept(first), floor, options.figure)
    kept = {
        "protocol": first["protocol"],
        "environment": first["environment"],
        "reference": _kept(first) | {"between_chains": floor},
        "summary": summary,
    }
    write_json(options.results, kept)
    print(convergence(first["diagnosis"]))
    print(f"\nWrote {options.results} and {options.figure}.")


def convergence(found: Mapping[str, Any]) -> str:
    """What the reference is worth."""
    return (
        f"\nProbabilities by {REFERENCE}: R-hat {found['rhat']:.3f} for 95 % of the rows, {found['rhat_most']:.3f} at "
        f"most; {found['ess']:.0f} draws are effective for the median row, {found['ess_least']:.0f} for the worst."
    )


def _predictions(folder: Path) -> list[ClassPrediction]:
    return [ClassPrediction.load(path) for path in sorted(folder.glob("chain*.safetensors"))]


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record["diagnosis"], **record["metrics"], "seconds": record["seconds"], "history": record["history"]}


def table(rows: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    """One row a family, the nearest first, below that of the reference."""
    return markdown(
        [
            "",
            "total variation",
            "spread of logits",
            "k-hat",
            "k-hat by layer",
            "elpd_loo",
            "rows with high k",
            "NLL",
            "fit, s",
        ],
        [
            [
                f"`{name}`" if name != REFERENCE else f"`{name}`, one chain and the other",
                f"{row['variation']:.3f}",
                f"{row['spread']:.2f} ({row['spread_low']:.2f} to {row['spread_high']:.2f})" if "spread" in row else "",
                f"{row['khat']:.1f}" if "khat" in row else "",
                ", ".join(f"{each:.1f}" for each in row.get("khat_by_layer", {}).values()),
                f"{row['elpd_loo']:.1f} ± {row['elpd_loo_error']:.1f}" if "elpd_loo" in row else "",
                str(row.get("pareto_k_bad", "")),
                f"{row['nll']:.3f}",
                f"{row['seconds']:.0f}",
            ]
            for name, row in ((name, rows[name]) for name in (REFERENCE, *order))
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser = ArgumentParser(description="Which family is nearest to the posterior.")
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="fit the families that are not done")
    running.add_argument("--base", required=True, help="folder or hub name of the base network")
    running.add_argument("--data-dir", help="folder with a folder of files for each task; the hub by default")
    running.add_argument("--threads", type=int, default=1, help="threads of this process")
    running.add_argument("--quick", action="store_true", help="32 rows, one epoch: to see that it works")
    running.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    running.set_defaults(do=run)
    reporting = commands.add_parser("report", help="table and picture of the families that are done")
    reporting.add_argument("--results", type=Path, default=RESULTS / "nearest.json", help="figures that are kept")
    reporting.add_argument("--figure", type=Path, default=FIGURE, help="picture")
    reporting.set_defaults(do=report)
    for each in (running, reporting):
        each.add_argument("--output", type=Path, default=Path("runs") / "nearest", help="where the families are")
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
