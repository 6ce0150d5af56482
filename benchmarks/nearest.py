"""Which family of posteriors is nearest to the true one, that of the No-U-Turn sampler, on an adapter small enough.

    python benchmarks/nearest.py run --base sentence-transformers/all-MiniLM-L6-v2 --threads 1
    python benchmarks/nearest.py report

MRPC, 400 training rows: the base's vector of each row is computed once, and what is trained is LoRA of rank 2 on the
two dense layers of its classification head, 2,308 weights, all of them random. Families have the library's defaults but
for the length of training, 50 epochs, and for the rate of the full covariance: at 1e-2 its 2.7 million entries blow up.
Nothing is chosen on the validation split, whose predictions are compared. All are of one prior, but for MonteCLoRA,
which has its own. Two chains of the sampler say how near two samples of one law are. The report takes seconds: a
Markdown table, benchmarks/results/nearest.json and docs/images/nearest.png.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import RESULTS, Run, command_line, environment, markdown, read_runs, work
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
TASK, ROWS, EPOCHS, DRAWS = "mrpc", 400, 50, 80
#: The prior: normal, around LoRA's start, for both matrices of both layers.
PRIOR = {"sites": "both", "scale": 1.5, "zero_scale": 0.2}
#: Of `svi`: the prior that all have, and the rate of its means under it.
SAME = {"prior_mean": "model", "learning_rate": 2e-3}
REFERENCE = "nuts"
#: Families: backend, and the settings that are not its defaults.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("nuts", {"draws": 100, "warmup": 100, "max_tree_depth": 6}),
    "svi": ("svi", SAME),
    "svi, monteclora": ("svi", SAME),
    "svi, entry": ("svi", SAME | {"guide": "entry"}),
    "svi, low-rank": ("svi", SAME | {"guide": "low-rank"}),
    "svi, full": ("svi", SAME | {"guide": "full", "scale_learning_rate": 1e-4}),
    "svi, inducing": ("svi", SAME | {"guide": "inducing"}),
    "ivon": ("ivon", {}),
    "laplace": ("laplace", {"mode": "map", "tune": "none"}),
    "swag": ("swag", {"prior_weight": 1.0}),
    "tfb": ("tfb", {"prior_weight": 1.0}),
    "sgld": ("sgld", {"draws": DRAWS, "warmup": DRAWS}),
}
CHAINS = 2
#: Settings to see that it works.
QUICK = {"nuts": {"draws": 40, "warmup": 5, "max_tree_depth": 2}, "sgld": {"draws": 40, "warmup": 5, "thin": 1}}


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
def vectors_of(base: str, data_dir: str | None, size: int, heldout: int, seed: int) -> tuple[Any, ...]:
    """Vectors of all rows, the layer that follows them, and the rows by number: for training, and to report on."""
    task = bl.load_task(TASK, data_dir, train_size=size, heldout_size=heldout, seed=seed)
    program = bl.Program.from_pretrained(base, task, seed=seed).eval()
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


def program_of(run: Run, base: str, data_dir: str | None) -> tuple[bl.Program, Dataset, Dataset]:
    """The program of one run, its training rows, and those to report on."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    vectors, pooler, train, other = vectors_of(base, data_dir, run.train_size, run.heldout_size, run.seed)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        lora = LoraConfig(r=run.rank, lora_alpha=run.lora_alpha, target_modules=["pooler", "classifier"])
        network = get_peft_model(Head(vectors, deepcopy(pooler)), lora)
    name = "monteclora" if run.backend.endswith("monteclora") else "gaussian"
    return bl.Program(network, bl.observations.Classes(2), bl.models.build(name, **PRIOR)), train, other


def fitted(run: Run, program: bl.Program, train: Dataset) -> Posterior:
    """The posterior of one family; of the reference, all of its chains."""
    backend, settings = FAMILIES[run.backend]
    if "epochs" in bl.inference.BACKENDS[backend].__dataclass_fields__:
        settings = settings | {"epochs": run.epochs, "batch_size": run.batch_size}
    if run.samples < DRAWS and backend in QUICK:
        settings = QUICK[backend]
    seeds = [run.seed + chain for chain in range(CHAINS if run.backend == REFERENCE else 1)]
    found = [bl.fit(program, train, backend, seed=seed, progress=False, **settings) for seed in seeds]
    return found[0] if len(found) == 1 else MixturePosterior(found, found[0].record)


def measured(run: Run, base: str, data_dir: str | None, output: Path) -> dict[str, Any]:
    """Fit one family, predict, and ask it how near it is by itself."""
    program, train, other = program_of(run, base, data_dir)
    posterior = fitted(run, program, train)
    draws = max(run.samples, 40)
    for place, chain in enumerate(posterior.chains):
        count = chain.differing(min(draws, chain.most_draws or draws))
        prediction = chain.predict(other, count, seed=run.seed + place, progress=False)
        prediction.save(output / run.name / f"chain{place}.safetensors")
    shown = posterior.predict(other, chain.differing(draws), progress=False).metrics(intervals=False).to_dict()
    return {
        "run": asdict(run),
        "arms": {run.backend: shown},
        "diagnosis": diagnosed(run.backend, posterior, train, draws),
        "seconds": {"fit": sum(chain.cost["seconds"] for chain in posterior.chains)},
        "history": [chain.record.history[-1] for chain in posterior.chains],
        "weights": sum(site.initial.numel() for site in program.sites),
        "environment": environment(program.device),
    }


def diagnosed(name: str, posterior: Posterior, train: Dataset, draws: int) -> dict[str, Any]:
    """K-hat, by layer too, leave-one-out, and convergence, as far as the family has them."""
    found: dict[str, Any] = {}
    if not posterior.random:
        return found
    count = min(draws, posterior.chains[0].most_draws or draws)
    data = posterior.to_inference_data(train, draws=count, prior_draws=0, progress=False)
    if posterior.dense and "log_q" in data["sample_stats"]:
        stats = data["sample_stats"]
        found["khat"] = khat(stats["log_p"].values, stats["log_q"].values)
        if posterior.independent_layers:
            blocks = {name: {name} for site in posterior.program.sites for name in site.layers}
            found["khat_by_layer"] = khat_by_block(posterior, train, max(draws // 2, 40), blocks=blocks, progress=False)
    if posterior.dense or posterior.chains[0].markov:
        total, error, shapes, good = loo_parts(loo(data))
        found |= {"elpd_loo": total, "elpd_loo_error": error, "pareto_k_bad": int((shapes > good).sum())}
    if posterior.chains[0].markov:
        found |= {
            "rhat": float(np.quantile(prediction_rhat(data), 0.95)),
            "rhat_most": float(prediction_rhat(data).max()),
        }
        found |= {"ess": float(prediction_ess(data).median()), "ess_least": float(prediction_ess(data).min())}
    return found


def plan(families: Sequence[str]) -> list[Run]:
    """One run for each family, the reference first."""
    return [
        Run(TASK, family, 0, ROWS, epochs=EPOCHS, rank=2, lora_alpha=8, samples=DRAWS, precision="highest")
        for family in families
    ]


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
    records = {record["run"]["backend"]: record for record in read_runs(options.output)}
    if REFERENCE not in records:
        raise SystemExit(f"The reference is not there: run --families {REFERENCE}.")
    predictions = {name: _predictions(options.output / record_name(record)) for name, record in records.items()}
    reference = predictions.pop(REFERENCE)
    summary = {
        name: compared(predictions[name], reference) | _kept(records[name]) for name in FAMILIES if name in predictions
    }
    floor = compared(reference[:1], reference[1:])
    order = sorted(summary, key=lambda name: float(summary[name]["variation"]))
    print(table(summary | {REFERENCE: floor | _kept(records[REFERENCE])}, order))
    draw({name: summary[name] for name in order}, _kept(records[REFERENCE]), floor, options.figure)
    first = records[REFERENCE]
    kept = {
        "protocol": {key: item for key, item in first["run"].items() if key != "backend"}
        | {"weights": first["weights"]},
        "environment": first["environment"],
        "reference": _kept(first) | {"between_chains": floor},
        "summary": summary,
    }
    write_json(options.results, kept)
    print(convergence(records[REFERENCE]["diagnosis"]))
    print(f"\nWrote {options.results} and {options.figure}.")


def convergence(found: Mapping[str, Any]) -> str:
    """What the reference is worth."""
    return (
        f"\nProbabilities by {REFERENCE}: R-hat {found['rhat']:.3f} for 95 % of the rows, {found['rhat_most']:.3f} at "
        f"most; {found['ess']:.0f} draws are effective for the median row, {found['ess_least']:.0f} for the worst."
    )


def record_name(record: Mapping[str, Any]) -> str:
    """Name of a run's folder."""
    return Run(**record["run"]).name


def _predictions(folder: Path) -> list[ClassPrediction]:
    return [ClassPrediction.load(path) for path in sorted(folder.glob("chain*.safetensors"))]


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    (arm,) = record["arms"].values()
    scores = {name: float(arm[name]["value"]) for name in ("accuracy", "nll", "ece_15")}
    return {**record["diagnosis"], **scores, "seconds": record["seconds"]["fit"], "history": record["history"]}


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
    parser, running = command_line("Which family is nearest to the posterior.", "nearest", report, FIGURE)
    running.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    running.set_defaults(do=lambda options: work(plan(options.families), options, measured))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
