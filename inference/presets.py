"""Published settings by name: a backend and a model of the weights, each with its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bayeslora.registry import Registry
from bayeslora.settings import Count, Settings

if TYPE_CHECKING:
    from bayeslora.inference.base import Backend
    from bayeslora.models.base import WeightModel

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset(Settings):
    """What a paper runs.

    Attributes:
        name: of the preset.
        paper: that it is of.
        note: what the published run is beside that, and what is otherwise here.
        backend: inference algorithm.
        settings: of the backend.
        model: Pyro model of the weights.
        model_settings: of the model.
        draws: of the weights that a published prediction averages over; None: it takes none, or the paper does not say.
    """

    name: str
    paper: str
    note: str = ""
    backend: str = "svi"
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "gaussian"
    model_settings: dict[str, Any] = field(default_factory=dict)
    draws: Count | None = None

    def build_backend(self, **settings: Any) -> Backend:
        """The backend, with the preset's settings where no others are given.

        Raises:
            SettingError: a setting is unknown, or has a value that it cannot take.
        """
        from bayeslora.inference import BACKENDS

        algorithm: Backend = BACKENDS.build(self.backend, over(self.settings, settings))
        return algorithm

    def build_model(self, **settings: Any) -> WeightModel:
        """The model, with the preset's settings where no others are given.

        Raises:
            SettingError: a setting is unknown, or has a value that it cannot take.
        """
        from bayeslora.models import build

        return build(self.model, **over(self.model_settings, settings))


#: The deviation of A's prior is 0.1 / sqrt(columns), where LoRA's start has 1 / sqrt(3 columns); B's is of rank 8.
BAYESIAN_LORA = Preset(
    name="bayesian-lora",
    paper="Lin et al., arXiv 2601.21003, ICML 2026",
    note=(
        "Published with LoRA of rank 8, alpha 8 and dropout 0.05. The weight of the divergence is 0.1 / "
        "(batches an epoch) beside a mean loss, which is a temperature of 0.6 at 6 rows a batch, and zero in the first "
        "two of six epochs. Otherwise here: the rates fall linearly, not to a tenth after epochs 2 and 4; no weight "
        "decay (0.027), label smoothing (0.05) or reward of entropy (0.05); the prior is around LoRA's start, from "
        "which the mean learns as LoRA's; all LoRA matrices are random. In the released run q_proj and lm_head are, "
        "v_proj has plain LoRA; A and B are both drawn anew, so that it does not begin at the base network; inducing "
        "values explain all but a millionth of their directions; lam ends where it starts, 1e-3 (1.2e-3, by the logged "
        "losses), noise of 2e-6 in A; and it is evaluated with dropout of LoRA and of the flow on, from which nearly "
        "all differences between its draws come. Its best epoch is chosen on the rows that are reported."
    ),
    settings={
        "guide": "inducing",
        "guide_settings": {"m": 9, "sd": 1e-3, "lam": 1e-3, "explained": 0.999, "flow": 16},
        "noise_warmup": 0.0,
        "prior_mean": "model",
        "epochs": 6.0,
        "batch_size": 6,
        "learning_rate": 7.39e-4,
        "scale_learning_rate": 7.39e-4,
        "point_learning_rate": 7.39e-4,
        "warmup": 0.0,
        "max_grad_norm": 1e9,
        "temperature": 0.6,
        "heldout_size": 0,
        "beta2": 0.999,
        "kl_warmup": 1 / 3,
        "kl_schedule": "step",
    },
    model_settings={"sites": "both", "scale": 0.1 * math.sqrt(3), "zero_scale": 0.1 / math.sqrt(8)},
    draws=4,
)

#: Published rho, the root of the deviation, starts uniform between 0.05 / sqrt(2) and 0.05; the mean of its square is
#: `eps` times the deviation of the prior.
BLOB = Preset(
    name="blob",
    paper="Wang et al., NeurIPS 2024, arXiv 2406.11675 (BLoB)",
    note=(
        "Published with LoRA of rank 8, alpha 16, without dropout, on q_proj, v_proj and lm_head, for 5,000 steps of "
        "AdamW, here 20 epochs, which are as many at 1,000 rows; with RoBERTa at a rate of 5e-4, 32 rows a step and "
        "alpha 8. Otherwise here: the signs of flipout are a row's own, where those of the released code "
        "are each token's, so that no pass is by a draw of the weights. The divergence is part of the one loss with a "
        "weight of 1. In the released code it has steps of SGD to itself (rate 0.01, with RoBERTa 0.002), weighted by "
        "2^i / (2^(M + 1) - 1) in cycles of M steps, half of it all in the last step of each; and M is 100 N^(pi / 8) "
        "over the rows a step, not the number of steps an epoch. A deviation is learned by its logarithm, not by its "
        "root, at a rate that moves it as far at the start, and all start at the mean of where they do."
    ),
    settings={
        "estimator": "flipout",
        "noise_warmup": 0.0,
        "prior_mean": "model",
        "epochs": 20.0,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "scale_learning_rate": 4.7e-3,
        "point_learning_rate": 1e-4,
        "heldout_size": 0,
        "beta2": 0.999,
        "max_grad_norm": 1e9,
    },
    model_settings={"noise": "entry", "centre": "zero", "deviation": 0.2, "eps": 9.2e-3},
    draws=10,
)

#: Published deviations start uniform between 0.05 / sqrt(2) and 0.05.
SCALABL = Preset(
    name="scalabl",
    paper="Samplawski et al., UAI 2025, arXiv 2506.21408 (ScalaBL)",
    note=(
        "Published with LoRA of rank 8, alpha 16, without dropout, on q_proj, v_proj and lm_head, for 5,000 steps of "
        "AdamW, here 20 epochs, which are as many at 1,000 rows. Otherwise here: the divergence is "
        "KL(q || p) in the one loss, with a weight of 1; in the released code it is KL(p || q), in steps of SGD to "
        "itself with the weights of BLoB at a rate of 0.2. The singular values are learned, not their logarithms, and "
        "all deviations start at the mean of where they do."
    ),
    settings={
        "noise_warmup": 0.0,
        "prior_mean": "model",
        "epochs": 20.0,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "scale_learning_rate": 1e-4,
        "point_learning_rate": 1e-4,
        "heldout_size": 0,
        "beta2": 0.999,
        "max_grad_norm": 1e9,
    },
    model="scalabl",
    model_settings={"centre": "zero", "deviation": 1.0, "eps": 0.043},
    draws=10,
)

#: The deviation of the prior is so wide that it has no part in a step, as if there were none.
IVON_LORA = Preset(
    name="ivon-lora",
    paper="Cong et al., arXiv 2411.04421 and 2506.14280 (IVON-LoRA)",
    note=(
        "Published with LoRA of rank 8, alpha 16 and dropout 0.1, for 10,000 steps of 4 rows, "
        "here 40 epochs, which are as many at 1,000 rows. Its effective sample size is set by hand: 1e6 "
        "(ARC, OpenBookQA), 1e7 (BoolQ, small WinoGrande) or 1e8, with h0 at 1e-3 or, at the larger two, 3e-4. The "
        "temperature of 1e-3 is that of ARC-Challenge, with its 1,119 rows; on small WinoGrande it is 6.4e-5. There is "
        "no weight decay, and so no prior; and at its beta2 the curvature stays within a tenth of its start, noise of "
        "one width for all, unless the loss is far more curved than that. Otherwise here: a head that is trained in "
        "full is a point, and all batches of one step share their noise."
    ),
    backend="ivon",
    settings={
        "temperature": 1e-3,
        "learning_rate": 0.03,
        "curvature": 1e-3,
        "beta2": 0.99999,
        "clip_radius": 1e-3,
        "epochs": 40.0,
        "batch_size": 4,
        "warmup": 0.0,
    },
    model_settings={"sites": "both", "deviation": 1.0},
    draws=10,
)

C_LORA = Preset(
    name="c-lora",
    paper="Rahmati et al., NeurIPS 2025, arXiv 2505.17773 (C-LoRA)",
    note=(
        "Published with LoRA of rank 8, alpha 16, without dropout, for 1,500 to 2,000 steps of 4 rows, here 8 epochs, "
        "which are as many as the latter at 1,000 rows, of which a fifth is held back. The released code "
        "keeps the checkpoint of the best accuracy and calibration on held-back rows, evaluates it without noise, and "
        "counts the likelihood two to four times on some tasks. What it does with noise and divergence, and what here, "
        "is said of the backend. Its networks have steps of SGD of their own (rate 0.02), here AdamW's "
        "as the weights; weights have no prior, here one that is as good as none."
    ),
    backend="c-lora",
    settings={
        "hidden": 64,
        "deviation": 0.2,
        "epochs": 8.0,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "scale_learning_rate": 1e-4,
        "max_grad_norm": 1e9,
    },
    model_settings={"deviation": 10.0, "weight_scale": 10.0, "head_scale": 10.0},
    draws=10,
)

#: The prior starts with a precision of 1; its width does not matter, since the evidence chooses among its multiples.
LAPLACE_LORA = Preset(
    name="laplace-lora",
    paper="Yang et al., ICLR 2024, arXiv 2308.13111 (Laplace-LoRA)",
    note=(
        "Published with LoRA of rank 8, alpha 16 and dropout 0.1 on q_proj, v_proj and lm_head, for 10,000 steps, here "
        "40 epochs, which are as many at 1,000 rows; with RoBERTa 32 rows a step; predicted by the link mc-joint of "
        "100,000 draws, here 1,000 that have the moments exactly. Otherwise here: the wide factors are sketched in one "
        "pass, not by an SVD a batch; the evidence is maximised by L-BFGS, not by 100 steps of Adam. The first released"
        " code keeps the wide factors whole; the second minimises a thing with the wrong signs for the evidence, looks "
        "at the last token alone, divides by the batch size, and averages logits, by which the posterior has no effect."
    ),
    backend="laplace",
    settings={
        "mode": "mle",
        "tune": "mode-evidence",
        "sharing": "expand",
        "curvature_rank": 10,
        "epochs": 40.0,
        "batch_size": 4,
        "learning_rate": 5e-5,
        "warmup": 0.0,
    },
    model_settings={"sites": "both", "centre": "zero", "deviation": 1.0},
)

#: Of a network with a head the last layer is the head's.
LLLA = Preset(
    name="llla",
    paper="Yang et al., ICLR 2024, arXiv 2308.13111 (last-layer Laplace)",
    note=(
        "As 'laplace-lora', but that the last layer alone is random: published, LoRA of lm_head; here, the last layer "
        "of the head that is trained in full."
    ),
    backend="laplace",
    settings={**LAPLACE_LORA.settings, "subset": "last-layer"},
    model_settings=LAPLACE_LORA.model_settings,
)

SWAG_LORA = Preset(
    name="swag-lora",
    paper="Onal et al., AABI 2024, arXiv 2405.03425 (SWAG-LoRA)",
    note=(
        "Published with LoRA of rank 8, alpha 16 and dropout 0.1 on query and value. The covariance is "
        "twice that of Maddox et al., and in the test after training four times (a scale of 2). Otherwise here: "
        "collecting begins with the weights after epoch 8, not with those of the lowest loss on a fifth of the rows, "
        "which is held back; its rate is a tenth from the first step on, where the released code falls to that "
        "linearly over all of its epochs; five snapshots are taken, not a sixth; and the moments are those of `Swag`."
    ),
    backend="swag",
    settings={
        "epochs": 13.0,
        "collect_from": 8 / 13,
        "snapshots": 5,
        "rank": 5,
        "scale": 1.0,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "collecting_rate": 0.1,
        "weight_decay": 0.0,
        "warmup": 0.06,
        "max_grad_norm": 1e9,
    },
    draws=15,
)

TFB = Preset(
    name="tfb",
    paper="Shi et al., NeurIPS 2025, arXiv 2412.05723 (TFB)",
    note=(
        "Published with LoRA of rank 8, alpha 16, without dropout, on q_proj, v_proj and lm_head, around adapters that "
        "were trained for 5,000 steps of plain LoRA, here 20 epochs, which are as many at 1,000 rows. "
        "What the search in the released code does otherwise is said of the backend."
    ),
    backend="tfb",
    settings={
        "tolerance": 3e-3,
        "draws": 10,
        "search_rows": 500,
        "epochs": 20.0,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "warmup": 0.06,
        "max_grad_norm": 1e9,
    },
    draws=10,
)

#: Every preset by its name.
PRESETS: Registry[Preset] = Registry(
    "preset",
    {each.name: each for each in (BAYESIAN_LORA, BLOB, SCALABL, IVON_LORA, C_LORA, SWAG_LORA, TFB, LAPLACE_LORA, LLLA)},
)


def preset(name: str) -> Preset:
    """The preset of a name, whose parts go into a program and a fit.

    ``p = preset(name)``, then ``Program.from_pretrained(base, task, model=p.build_model())``, ``posterior =
    fit(program, task.train, p.build_backend(epochs=3))`` and ``posterior.predict(task.validation, p.draws or 10)``.

    Raises:
        SettingError: there is none.
    """
    return PRESETS[name]


def over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those that were given put over them; settings of one guide are none of another."""
    merged = {**settings, **given}
    if "guide_settings" in settings and merged.get("guide") == settings.get("guide"):
        merged["guide_settings"] = {**settings["guide_settings"], **given.get("guide_settings", {})}
    elif "guide_settings" in settings:
        merged["guide_settings"] = given.get("guide_settings", {})
    return merged
