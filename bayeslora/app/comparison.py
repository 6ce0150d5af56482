"""Compare inference algorithms: every one with every seed, in folders that a stopped comparison goes on from.

A run is finished when its folder has ``metrics.json``, which is written last. Started again, a comparison keeps the
finished runs, resumes the one that was stopped from its last checkpoint, and evaluates again, without fitting, where
only the way of evaluation has changed. A folder with a run of other settings is an error, never overwritten.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bayeslora import files, store
from bayeslora.app import runs
from bayeslora.app.config import RunConfig, named, resolve
from bayeslora.app.terminal import say
from bayeslora.errors import SettingError
from bayeslora.predict.measure import measure, true_probabilities
from bayeslora.predict.metrics import Metrics, number_to_json
from bayeslora.predict.plots import COLOURS, reliability_diagram, save_figure
from bayeslora.predict.prediction import Prediction
from bayeslora.progress import track
from bayeslora.store import METRICS, PREDICTIVE

__all__ = ["Comparison", "Evaluation", "Outcome", "compare"]

#: Columns of the table, those that a comparison has.
COLUMNS = {
    "accuracy": "accuracy",
    "mcc": "MCC",
    "rmse": "RMSE",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "nll": "NLL",
    "perplexity": "perplexity",
    "brier": "Brier",
    "ece_15": "ECE (15 bins)",
    "kl": "KL from truth",
    "ece_true": "ECE against truth",
}
COSTS = {
    "seconds": ("seconds", 1.0, ".1f"),
    "peak_memory_bytes": ("peak memory (MiB)", 2.0**20, ",.0f"),
    "parameters": ("parameters", 1.0, ",.0f"),
    "extra_parameters": ("over LoRA", 1.0, ",.0f"),
}


@dataclass(frozen=True)
class Evaluation:
    """How predictions are made.

    Attributes:
        split: rows to predict, by name.
        draws: number of weight draws.
        method: one of the posterior's, by default each posterior's own.
    """

    split: str = "validation"
    draws: int = 10
    method: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        seed: of the run.
        metrics: on the split that was evaluated; with ``kl`` and ``ece_true`` where the truth is known.
        cost: ``seconds``, ``peak_memory_bytes``, ``parameters`` and ``extra_parameters`` of the fit.
    """

    seed: int
    metrics: Metrics
    cost: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What all runs came to.

    Attributes:
        config: what the arms share.
        evaluation: how predictions were made.
        outcomes: of every arm, one a seed.
    """

    config: RunConfig
    evaluation: Evaluation
    outcomes: Mapping[str, Sequence[Outcome]]

    def summary(self, arm: str, metric: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds; the latter is NaN for a single seed."""
        return _summary([outcome.metrics[metric].value for outcome in self.outcomes[arm]])

    def cost(self, arm: str, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a cost over seeds."""
        return _summary([outcome.cost.get(name, math.nan) for outcome in self.outcomes[arm]])

    def rows(self) -> list[list[str]]:
        """The table, its header first."""
        known = next(iter(self.outcomes.values()))[0].metrics
        shown = [name for name in COLUMNS if name in known]
        header = ["", *(COLUMNS[name] for name in shown), *(title for title, _, _ in COSTS.values())]
        table = [header]
        for arm in self.outcomes:
            cells = [_cell(self.summary(arm, name)) for name in shown]
            costs = [format(self.cost(arm, name)[0] / unit, style) for name, (_, unit, style) in COSTS.items()]
            table.append([arm, *cells, *costs])
        return table

    def to_markdown(self) -> str:
        """The table with what it rests on."""
        first = next(iter(self.outcomes.values()))
        header, *body = self.rows()
        size = self.config.train_size or "all"
        lines = [
            f"# {self.config.task}, {self.config.base}",
            "",
            f"{size} training rows; split '{self.evaluation.split}' of {first[0].metrics.n} rows; "
            f"seeds {', '.join(str(outcome.seed) for outcome in first)}; prediction by "
            + (self.evaluation.method or "each posterior's own method")
            + ("." if self.evaluation.method == "mean" else f", {self.evaluation.draws} draws of weights."),
            "Values are means over seeds" + (" ± their standard deviation." if len(first) > 1 else ": there is one."),
            "",
            "| " + " | ".join(header) + " |",
            "|---" + "|---:" * (len(header) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in body),
        ]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        arms = {}
        for arm, outcomes in self.outcomes.items():
            quality = {name: self.summary(arm, name) for name in outcomes[0].metrics}
            costs = {name: self.cost(arm, name) for name in outcomes[0].cost}
            arms[arm] = {
                "metrics": {name: _plain(found) for name, found in quality.items()},
                "cost": {name: _plain(found) for name, found in costs.items()},
                "runs": [
                    {"seed": outcome.seed, "metrics": outcome.metrics.to_dict(), "cost": outcome.cost}
                    for outcome in outcomes
                ],
            }
        return {"config": self.config.to_dict(), "evaluation": vars(self.evaluation), "arms": arms}

    def save(self, folder: str | Path) -> None:
        """Write comparison.json and comparison.md, each in one step."""
        files.write_json(Path(folder) / "comparison.json", self.to_dict())
        files.write_text(Path(folder) / "comparison.md", self.to_markdown())


def compare(
    config: RunConfig,
    arms: Sequence[str] | Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    output: str | Path,
    *,
    evaluation: Evaluation | None = None,
    progress: bool = True,
) -> Comparison:
    """Fit and evaluate every arm with every seed, and write what came of it into a folder.

    A seed chooses the training rows, the initial weights and the fit, the same for every arm.

    Args:
        config: what the arms share; its seed and output do not count.
        arms: names of backends or presets; or the fields of `RunConfig` that each arm changes, by the arm's name.
            Mappings, such as ``settings``, are put over those of ``config``.
        seeds: of the runs.
        output: folder; gets a folder for each run, comparison.json, comparison.md and, for classes, reliability.png.
        evaluation: how predictions are made.
        progress: show bars.

    Raises:
        SettingError: no arms or seeds, a wrong setting (before anything is fitted), or a run of other settings in
            ``output``; or another process is writing there.
    """
    evaluation = evaluation or Evaluation()
    output = Path(output)
    changes = arms if isinstance(arms, Mapping) else {name: named(name) for name in arms}
    _check(changes, seeds)
    configs = {name: resolve(_changed(config, each)) for name, each in changes.items()}
    shared = resolve(replace(config, output=None))
    task = runs.task_of(replace(shared, seed=seeds[0]))
    task.split(evaluation.split)  # before anything is fitted
    if progress:
        say(*task.notes)
    planned = [(name, seed) for seed in seeds for name in configs]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in configs}
    with store.opened(output):
        for name, seed in track(planned, "runs", show=progress):
            run, folder = replace(configs[name], seed=seed, output=None), _folder(output, name, seed)
            with store.opened(folder):
                outcomes[name].append(_run(run, folder, evaluation, progress))
        found = Comparison(shared, evaluation, outcomes)
        _draw(found, output)
        found.save(output)
    return found


def _check(arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> None:
    if not arms or not seeds:
        raise SettingError(f"A comparison needs arms and seeds, found {len(arms)} and {len(seeds)}.")
    if len(set(seeds)) < len(seeds):
        raise SettingError(f"A seed is given twice: {', '.join(map(str, seeds))}.")
    for name in arms:
        if not re.fullmatch(r"[\w.+=-]+", name):
            raise SettingError(f"'{name}' cannot name a folder: use letters, digits and . _ + = -")


def _changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    values = config.to_dict()
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    return RunConfig.from_dict(values)


def _folder(output: Path, name: str, seed: int) -> Path:
    return output / f"{name}-seed{seed}"


def _run(config: RunConfig, folder: Path, evaluation: Evaluation, progress: bool) -> Outcome:
    """Fit and evaluate one run, as far as that is not done yet."""
    if (folder / METRICS).exists():
        runs.check_same(folder, config)
        done = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        if done["evaluation"] == vars(evaluation) and (folder / PREDICTIVE).exists():
            return Outcome(config.seed, Metrics.from_dict(done["metrics"]), done["cost"])
    posterior = runs.fit(config, folder, resume=True, progress=progress)
    split = runs.saved_task(posterior).split(evaluation.split)
    prediction = posterior.predict(split, evaluation.draws, evaluation.method, seed=config.seed, progress=progress)
    outcome = Outcome(config.seed, measure(prediction, split), posterior.cost)
    prediction.save(folder / PREDICTIVE)
    record = {"evaluation": vars(evaluation), "metrics": outcome.metrics.to_dict(), "cost": outcome.cost}
    files.write_json(folder / METRICS, record)
    return outcome


def _draw(found: Comparison, output: Path) -> None:
    """Reliability of the arms at the first seed, over each other; as many arms as there are colours."""
    if "accuracy" not in next(iter(found.outcomes.values()))[0].metrics:
        return
    arms = list(found.outcomes)[: len(COLOURS)]
    seed = found.outcomes[arms[0]][0].seed
    predictions = {arm: Prediction.load(_folder(output, arm, seed) / PREDICTIVE) for arm in arms}
    split = runs.task_of(replace(found.config, seed=seed)).split(found.evaluation.split)
    title = f"{found.config.task}, {found.evaluation.split}, seed {seed}"
    truth = true_probabilities(split, predictions[arms[0]])
    figure = reliability_diagram(predictions, truth=truth, title=title)
    save_figure(figure, output / "reliability.png")


def _summary(values: Sequence[float]) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):  # infinite less infinite has no spread
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread


def _cell(summary: tuple[float, float]) -> str:
    mean, spread = summary
    return f"{mean:.4f}" + ("" if math.isnan(spread) else f" ± {spread:.4f}")


def _plain(summary: tuple[float, float]) -> dict[str, float | str]:
    return {"mean": number_to_json(summary[0]), "spread": number_to_json(summary[1])}
