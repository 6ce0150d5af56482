"""Backends for studies of cells that take no time: one that works and notes each fit, and others that end otherwise."""

from __future__ import annotations

import os
import signal
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

import bayeslora as bl
from bayeslora.errors import TrainingError
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.settings import Settings


@bl.register
@dataclass(frozen=True)
class Quick(Settings):
    """Noise around the weights at which learning would begin, or from which the fit starts.

    Attributes:
        learning_rate: how wide the noise is.
        epochs: nothing.
        seconds: that a fit takes at least.
        log: file that gets a line for each fit.
    """

    name: ClassVar[str] = "quick"
    paper: ClassVar[str] = ""
    default_model: ClassVar[tuple[str, dict[str, Any]]] = ("gaussian", {})

    learning_rate: float = 1e-3
    epochs: float = 1.0
    seconds: float = 0.0
    log: str = ""

    def fit(self, program: Any, data: Any, run: Any) -> EmpiricalPosterior:
        time.sleep(self.seconds)
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{self.name} {run.seed} {self.learning_rate} {bool(run.start)}\n")
        start = program.model.initial(run.sites(program))
        generator = torch.Generator().manual_seed(run.seed)
        draws = {
            name: value + self.learning_rate * torch.randn(10, *value.shape, generator=generator)
            for name, value in start.items()
        }
        settings = {"learning_rate": self.learning_rate, "epochs": self.epochs, "seconds": self.seconds}
        record = run.record(self.name, settings | {"log": self.log}, len(data), 1.0, ())
        # More memory than there is, since what is measured counts where it is more, and differs from fit to fit.
        record.cost.update(seconds=1.5, peak_memory_bytes=2.0**40, parameters=10.0, extra_parameters=0.0)
        return EmpiricalPosterior(program, replace(record, finished=True), draws)


@bl.register
@dataclass(frozen=True)
class Hungry(Quick):
    """One that finds no memory."""

    name: ClassVar[str] = "hungry"

    def fit(self, program: Any, data: Any, run: Any) -> EmpiricalPosterior:
        raise MemoryError("no room for 80 GiB")


@bl.register
@dataclass(frozen=True)
class Diverging(Quick):
    """One that diverges."""

    name: ClassVar[str] = "diverging"

    def fit(self, program: Any, data: Any, run: Any) -> EmpiricalPosterior:
        raise TrainingError("The loss is not a number.")


@bl.register
@dataclass(frozen=True)
class Deadly(Quick):
    """One whose process is killed, as by a system without memory."""

    name: ClassVar[str] = "deadly"

    def fit(self, program: Any, data: Any, run: Any) -> EmpiricalPosterior:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@bl.register
@dataclass(frozen=True)
class Doubtful(Quick):
    """One that warns: its own words with figures that differ, for odd seeds alone, and another package's."""

    name: ClassVar[str] = "doubtful"

    def fit(self, program: Any, data: Any, run: Any) -> EmpiricalPosterior:
        if run.seed % 2:
            warnings.warn(f"It ends at {0.5 + run.seed} nats |, which is\nno mode.", stacklevel=2)
            warnings.warn(f"It ends at {0.5 + run.seed} nats |, which is\nno mode.", stacklevel=2)
        warnings.warn_explicit("A word of others.", UserWarning, "/somewhere/else.py", 1)
        return super().fit(program, data, run)
