"""The arms of speed.py: a step of PEFT LoRA, of PEFT MonteCLoRA, and of our families as `bayeslora.fit` composes it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim import Optimizer

import bayeslora as bl
from bayeslora.inference.presets import PRESETS, Preset
from bayeslora.inference.training.objective import Objective
from bayeslora.inference.variational import learning
from bayeslora.inference.variational.svi import SVI
from bayeslora.observations import Classes

__all__ = ["ARMS", "CLASSES", "FAMILIES", "adapted", "make_work"]

CLASSES, EXAMPLES, LEARNING_RATE = 2, 1000, 1e-3
#: Steps between two looks at the parts of the bound, as in training.
LOG_EVERY = SVI().log_every
#: Our families by name; those without a paper are settings of `svi` and `map`.
FAMILIES: dict[str, Preset] = {
    "map": Preset(name="map", paper="", backend="map", model="monteclora"),
    "flipout": Preset(name="flipout", paper="", settings={"estimator": "flipout"}, model="monteclora"),
    "inducing": Preset(name="inducing", paper="", settings={"guide": "inducing"}),
    **{name: PRESETS[name] for name in ("bayesian-lora", "blob", "scalabl", "ivon-lora", "c-lora")},
}
OURS = {"svi": Preset(name="svi", paper="", settings={"heldout_size": 0}, model="monteclora"), **FAMILIES}
ARMS = {"lora": "PEFT LoRA", "monteclora": "PEFT MonteCLoRA"} | {name: f"bayeslora {name}" for name in OURS}


class _Composed(Exception):
    """What a backend gives to its training."""

    def __init__(self, objective: Objective, optimiser: Optimizer) -> None:
        super().__init__()
        self.objective, self.optimiser = objective, optimiser


def adapted(base: Any, arm: str, options: Namespace) -> Any:
    """The network with LoRA of the arm's kind on all linear layers, in training mode."""
    from peft import LoraConfig, MontecloraConfig, get_peft_model

    # Noise is drawn ahead for 150 steps, which a look at whether this works need not wait for.
    settings = MontecloraConfig(buffer_size=2) if options.quick else MontecloraConfig()
    kind = {"monteclora_config": settings} if arm == "monteclora" else {}
    config = LoraConfig(
        task_type="SEQ_CLS", r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", **kind
    )
    return get_peft_model(base, config).train()


def make_work(arm: str, base: Any, options: Namespace, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One step of an arm: forward, backward and the optimiser's."""
    wrapped = adapted(base, arm, options)
    if arm in OURS:
        return _ours(OURS[arm], wrapped, batch)
    learned = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=LEARNING_RATE)

    def work() -> None:
        loss: Tensor = wrapped(**batch).loss
        (loss + wrapped.base_model._get_monteclora_loss() if arm == "monteclora" else loss).backward()
        _step(optimiser)

    return work


def _ours(family: Preset, wrapped: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    composed = _composed(family, wrapped)
    objective, optimiser = composed.objective.to(batch["input_ids"].device).train(), composed.optimiser
    around = getattr(optimiser, "context", nullcontext)
    steps = count(1)

    def work() -> None:
        objective.keep_parts = next(steps) % LOG_EVERY == 0
        with around():
            objective(batch).backward()
        _step(optimiser)

    return work


def _composed(family: Preset, wrapped: Any) -> _Composed:
    """Objective and optimiser that the backend would train by, on rows that nothing is read of but their number."""

    def stop(objective: Objective, optimiser: Optimizer, *_: Any) -> None:
        raise _Composed(objective, optimiser)

    program = bl.Program(wrapped, Classes(CLASSES), family.build_model())
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * EXAMPLES, "labels": [0, 1] * (EXAMPLES // 2)})
    with patch.object(learning, "train", stop):
        try:
            bl.fit(program, rows, family.build_backend(), progress=False)
        except _Composed as found:
            return found
    raise AssertionError(f"{family.name} does not train by gradients.")


def _step(optimiser: Optimizer) -> None:
    optimiser.step()
    # At the end, as transformers' Trainer has it: else the step of the next arm finds these gradients in memory.
    optimiser.zero_grad()
