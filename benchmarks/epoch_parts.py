"""Laplace's approximation around the weights of one epoch: fits, predictions and shifts for epochs.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from common import Run
from torch import Tensor

import bayeslora as bl
from bayeslora.inference.laplace.heldout import best_width
from bayeslora.inference.laplace.likeliest import tuned_width
from bayeslora.inference.laplace.posterior import LaplacePosterior, linearised, linked
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import best_temperature, tempered

#: Arms at every epoch that is looked at, and at the last alone.
CURVES = {
    "mle": "plain LoRA",
    "mle+temperature": "plain LoRA, temperature scaled",
    "la": "Laplace",
    "la-mode": "Laplace, evidence as published",
    "llla": "Laplace, last layer",
}
LINKS = ("mc-indep", "probit", "bridge")
LAST = {f"la-{link}": f"Laplace, link {link}" for link in LINKS} | {
    "la-sample": "Laplace, 10 draws of the weights",
    "la-heldout": "Laplace, prior by held-out rows",
}
#: Rows that a task's posterior predicts after its last epoch, so many at most: their task and split by name.
SHIFTED_ROWS = 300
SHIFTS = {
    "cola": {"CoLA, other domains": ("cola", "validation_ood")},
    "openbookqa": {
        "ARC-Easy": ("ai2_arc/easy", "validation"),
        "ARC-Challenge": ("ai2_arc/challenge", "validation"),
        "MMLU college biology": ("mmlu/college_biology", "test"),
        "MMLU econometrics": ("mmlu/econometrics", "test"),
    },
}


def metrics_of(arms: Mapping[str, ClassPrediction]) -> dict[str, Any]:
    """Every metric of every arm, as plain data."""
    return {arm: found.metrics().to_dict() for arm, found in arms.items()}


@dataclass(frozen=True)
class Fitted:
    """The posteriors of one epoch.

    Attributes:
        run: which.
        plain: plain LoRA.
        temperature: of plain LoRA, fitted to held-out rows.
        laplace: around it, over all matrices, under the prior of largest evidence.
        published: how many times as wide the prior is that the published evidence finds.
        last_layer: over the head's last layer.
    """

    run: Run
    plain: Posterior
    temperature: float
    laplace: LaplacePosterior
    published: float
    last_layer: LaplacePosterior

    @classmethod
    def around(cls, plain: Posterior, task: bl.Task, run: Run) -> Fitted:
        """Lay Gaussians around a point estimate."""
        assert task.heldout is not None
        temperature = best_temperature(plain.predict(task.heldout, method="mean", progress=False))
        settings = {"start": plain, "seed": run.seed, "progress": False, "batch_size": run.batch_size}
        settings |= {"tune": "evidence"} | run.settings
        laplace, last_layer = (
            bl.fit(plain.program, task.train, "laplace", subset=subset, **settings) for subset in ("all", "last-layer")
        )
        assert isinstance(laplace, LaplacePosterior) and isinstance(last_layer, LaplacePosterior)
        _, trace = tuned_width(laplace.mode_evidence, laplace.prior)
        published = max(trace, key=lambda row: row["log_evidence"])["scale"]
        return cls(run, plain, temperature, laplace, published, last_layer)

    @property
    def evidence(self) -> dict[str, float]:
        """Log evidence, and the standard deviations of the priors."""
        root = next(iter(self.laplace.prior.roots.values()))
        width = float(root[0, 0, 0])
        return {"log_evidence": self.laplace.log_evidence, "la": width, "la-mode": width * self.published}

    def predict(
        self, rows: bl.Split, more: Mapping[str, tuple[float, str]] | None = None
    ) -> dict[str, ClassPrediction]:
        """The arms of `CURVES`, and more by multiple of the prior's width and link."""
        plain = self.plain.predict(rows, method="mean", progress=False)
        arms = {"la": (1.0, "mc-joint"), "la-mode": (self.published, "mc-joint"), **(more or {})}
        return {
            "mle": plain,
            "mle+temperature": tempered(plain, self.temperature),
            **self._linearised(rows, arms),
            "llla": self.last_layer.predict(rows, progress=False),
        }

    def predict_last(self, task: bl.Task) -> dict[str, ClassPrediction]:
        """The arms of `CURVES` and of `LAST`."""
        assert task.heldout is not None
        rows = task.split(self.run.split)
        heldout = Rows.of(self.plain.program, task.heldout).dataset
        trace = best_width(self.laplace, heldout, self.run.batch_size, False).trace
        width = min(trace, key=lambda row: row["heldout_nll"])["multiple"]
        arms = {f"la-{link}": (1.0, link) for link in LINKS} | {"la-heldout": (width, "mc-joint")}
        drawn = self.laplace.predict(rows, method="sample", draws=self.run.samples, seed=self.run.seed, progress=False)
        return self.predict(rows, arms) | {"la-sample": drawn}

    def _linearised(self, rows: bl.Split, arms: Mapping[str, tuple[float, str]]) -> dict[str, ClassPrediction]:
        """Predictions under priors so many times as wide, by a link each, in one pass."""
        over = Rows.of(self.plain.program, rows, self.run.batch_size)
        widths = sorted({width for width, _ in arms.values()})
        means, covariances = linearised(self.laplace, over, torch.tensor(widths, dtype=torch.float64))
        found = {}
        for arm, (width, link) in arms.items():
            outputs, aleatoric = linked(over.observation, means, covariances[widths.index(width)], link, 0)
            found[arm] = cast("ClassPrediction", over.predicted(outputs, link, aleatoric))
        return found


def shifted(run: Run, fitted: Fitted, known: Mapping[str, ClassPrediction], data_dir: str | None) -> dict[str, Any]:
    """Metrics on rows of other tasks or domains, and how well uncertainty tells them from the known ones."""
    shifts = {}
    for title, (name, split) in SHIFTS.get(run.task, {}).items():
        rows = bl.load_task(name, data_dir).split(split)
        rows = rows.select(list(range(min(len(rows), SHIFTED_ROWS))))
        arms = fitted.predict(rows)
        shifts[title] = {
            arm: {
                **found.metrics().to_dict(),
                "auroc_entropy": _auroc(known[arm].entropy, found.entropy),
                "auroc_information": _auroc(known[arm].mutual_information, found.mutual_information),
            }
            for arm, found in arms.items()
        }
    return shifts


def _auroc(known: Tensor, other: Tensor) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    truth = torch.cat([torch.zeros(len(known)), torch.ones(len(other))])
    return {"value": float(roc_auc_score(truth, torch.cat([known, other])))}
