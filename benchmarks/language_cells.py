"""The cells of language_study.py: a fit of one backend on one task with one seed, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from common import MODEL, SETTINGS, Run, environment

import bayeslora as bl
from bayeslora.inference.laplace.heldout import best_width
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised, linked
from bayeslora.networks import NetworkSettings
from bayeslora.passes import Rows, undisturbed
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import best_temperature, tempered


@dataclass(frozen=True)
class Study:
    """What differs between tasks.

    Attributes:
        name: in tables.
        train_size: rows for training.
        reported: rows of the validation split, at most.
        observation: of the labels, and its settings.
    """

    name: str
    train_size: int
    reported: int
    observation: str
    settings: Mapping[str, Any]


STUDIES = {
    "sst2": Study("SST-2", 150, 200, "prompted", {}),
    "openbookqa": Study("OpenBookQA", 100, 150, "text-choices", {"likelihood": "byte"}),
    "ai2_arc/easy": Study("ARC-Easy", 100, 150, "text-choices", {"likelihood": "byte"}),
}
#: Rows that posteriors of OpenBookQA predict besides, by the variant of a run: name in tables, task and split.
SHIFTS = {
    "arc": ("ARC-Challenge", "ai2_arc/challenge", "validation"),
    "biology": ("MMLU college biology", "mmlu/college_biology", "test"),
    "econometrics": ("MMLU econometrics", "mmlu/econometrics", "test"),
}
SHIFTED_ROWS = 60
#: Variant of the runs that choose a rate: they see the held-back rows alone.
RATE = "rate"
EPOCHS, BATCH, DRAWS, HELDOUT = 3, 4, 5, 60


def run_of(task: str, seed: int, backend: str, rate: float, variant: str = "") -> Run:
    """One cell of the study."""
    return Run(
        task.replace("/", "_"), backend, seed, STUDIES[task].train_size, heldout_size=HELDOUT, epochs=EPOCHS,
        batch_size=BATCH, learning_rate=rate, samples=DRAWS, variant=variant,
    )  # fmt: skip


def task_of(run: Run) -> str:
    """Name of a run's task; names of files have no slash."""
    return next(task for task in STUDIES if task.replace("/", "_") == run.task)


def program_of(run: Run, base: str, task: bl.Task) -> bl.Program:
    """LoRA on queries and values, under the prior that the backend is used with."""
    from peft import LoraConfig

    study = STUDIES[task_of(run)]
    lora = LoraConfig(r=run.rank, lora_alpha=run.lora_alpha, target_modules=["q_proj", "v_proj"])
    weights = bl.models.build(**MODEL)
    if run.backend in ("mle", "laplace"):
        weights = bl.models.build("gaussian", sites="both", centre="zero", deviation=0.1)
    return bl.Program.from_pretrained(
        # On short rows, with one thread, fused attention takes longer than its parts.
        NetworkSettings(base, attention="eager"), task, lora=lora, model=weights, seed=run.seed,
        observation=study.observation, observation_settings=study.settings,
    )  # fmt: skip


def measured(run: Run, base: str, data_dir: str | None, output: Path) -> dict[str, Any]:
    """Fit one backend and evaluate it; or evaluate a fit on rows of another task."""
    task = bl.load_task(task_of(run), data_dir, train_size=run.train_size, heldout_size=run.heldout_size, seed=run.seed)
    rows = reported(run, task, data_dir)
    fitted: dict[str, Any] = {"seconds": {"fit": 0.0}}
    if run.backend == "zero-shot":
        arms = {"zero-shot": untrained(program_of(run, base, task), rows)}
    else:
        posterior = fit(run, base, task, output)
        fitted = {"seconds": {"fit": posterior.cost["seconds"]}, "history": posterior.record.history}
        if run.backend == "laplace":
            arms = by_widths(posterior, rows, task.heldout, run)
        else:
            arms = {run.backend: _predict(posterior, rows, run)}
    if run.backend == "mle":
        fitted["temperature"] = best_temperature(_predict(posterior, task.heldout, run))
        arms["mle+temperature"] = tempered(arms["mle"], fitted["temperature"])
    for arm, found in arms.items():
        found.save(output / run.name / f"{arm}.safetensors")
    metrics = {arm: found.metrics().to_dict() for arm, found in arms.items()}
    return fitted | {"run": asdict(run), "arms": metrics, "environment": environment(torch.device("cpu"))}


def reported(run: Run, task: bl.Task, data_dir: str | None) -> bl.Split:
    """The rows that a run predicts."""
    if run.variant == RATE:
        assert task.heldout is not None
        return task.heldout
    if run.variant:
        _, other, split = SHIFTS[run.variant]
        return first(bl.load_task(other, data_dir).split(split), SHIFTED_ROWS)
    return first(task.split(run.split), STUDIES[task_of(run)].reported)


def fit(run: Run, base: str, task: bl.Task, output: Path) -> bl.Posterior:
    """The fit of a run: trained and saved, or what was saved before."""
    folder = output / run_of(task_of(run), run.seed, run.backend, run.learning_rate).name / "posterior"
    if folder.exists():
        return bl.load(folder, base=base)
    common = {"seed": run.seed, "progress": False, "batch_size": run.batch_size}
    if run.backend == "laplace":
        around = fit(run_of(task_of(run), run.seed, "mle", run.learning_rate), base, task, output)
        fitted = bl.fit(around.program, task.train, "laplace", start=around, tune="evidence", **common)
    else:
        # What `svi` learns first is B, at a rate of its own; that of A's mean stays at its default.
        rate = "point_learning_rate" if run.backend == "svi" else "learning_rate"
        common |= {"learning_rate": 2e-3, "epochs": run.epochs, rate: run.learning_rate} | SETTINGS.get(run.backend, {})
        fitted = bl.fit(program_of(run, base, task), task.train, run.backend, **common)
    fitted.save(folder)
    return fitted


def _predict(posterior: bl.Posterior, rows: bl.Split | None, run: Run) -> ClassPrediction:
    found = posterior.predict(rows, draws=run.samples, seed=run.seed, batch_size=8, progress=False)
    return cast("ClassPrediction", found)


def by_widths(
    posterior: bl.Posterior, rows: bl.Split, heldout: bl.Split | None, run: Run
) -> dict[str, ClassPrediction]:
    """Laplace's prediction under the prior of largest evidence, and under the one that held-back rows like best."""
    assert isinstance(posterior, LaplacePosterior)
    tokens = Rows.of(posterior.program, heldout).dataset
    trace = best_width(posterior, tokens, run.batch_size, False).trace
    width = min(trace, key=lambda row: row["heldout_nll"])["multiple"]
    over = Rows.of(posterior.program, rows, run.batch_size)
    means, covariances = linearised(posterior, over, torch.tensor([1.0, width], dtype=torch.float64))
    found = {}
    for arm, covariance in zip(("laplace", "laplace+heldout"), covariances, strict=True):
        outputs, aleatoric = linked(over.observation, means, covariance, "mc-joint", run.seed)
        found[arm] = cast("ClassPrediction", over.predicted(outputs, "mc-joint", aleatoric))
    return found


def untrained(program: bl.Program, rows: bl.Split) -> ClassPrediction:
    """What the network says as it comes."""
    over = Rows.of(program, rows, 8)
    with undisturbed(program), torch.no_grad():
        outputs = over.outputs(program, {site.name: site.initial for site in program.sites})
    return cast("ClassPrediction", over.predicted(outputs.unsqueeze(0), "mean"))


def first(rows: bl.Split, number: int) -> bl.Split:
    """The first rows, so many at most."""
    return rows.select(list(range(min(len(rows), number))))
