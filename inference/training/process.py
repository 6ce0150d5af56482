"""What training does to the process that it runs in, and puts back: generators, the network's state, peaks."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np
import psutil
import torch

from bayeslora.program import Program
from bayeslora.rng import isolated

__all__ = [
    "available",
    "cost_of",
    "cost_since",
    "device_of",
    "peak",
    "reset_peak",
    "restored_generators",
    "restored_network",
]


@contextmanager
def restored_generators(device: torch.device) -> Iterator[None]:
    """The Trainer seeds Python, numpy and torch for all: put their states back at the end."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with isolated(0, device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def restored_network(program: Program, checkpointing: bool) -> Iterator[None]:
    """Leave the network as it was found: with PEFT's own parameters, in its mode, without gradient checkpointing."""
    network, was_training = program.network, program.network.training
    if checkpointing:
        program.weights.base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            program.weights.base.gradient_checkpointing_disable()
        network.train(was_training)
        program.weights.restore()


def reset_peak() -> None:
    """Forget the peaks so far, of the process and of each GPU in use."""
    for number in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(number)
    with suppress(OSError):  # Linux alone lets a process forget its peak
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU's allocator; else of the process, on Linux since `reset_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource
    import sys

    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(high if sys.platform == "darwin" else high * 1024)


def device_of(cpu: bool) -> str:
    """Where a fit takes place: on the GPU, if there is one and it is not to stay on the CPU."""
    return "cuda" if torch.cuda.is_available() and not cpu else "cpu"


def available(device: torch.device) -> int:
    """Bytes of memory that can still be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def cost_of(program: Program, seconds: float, peak_bytes: int, learned: int | None = None) -> dict[str, float]:
    """What a fit took, as a record has it; as many parameters are ``learned`` as there are weights, if left out."""
    weights = sum(site.initial.numel() for site in program.sites)
    learned = weights if learned is None else learned
    return {
        "seconds": seconds,
        "peak_memory_bytes": float(peak_bytes),
        "parameters": float(learned),
        "extra_parameters": float(learned - weights),
    }


def cost_since(program: Program, begun: float, before: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
    """What a fit took until now.

    Args:
        program: that was fitted, on the device whose peak counts since `reset_peak`.
        begun: when the fit began, by `time.monotonic`.
        before: what it says itself that it took: time and memory may be more than now, over several sittings, and
            all else is as it says.
    """
    own = cost_of(program, time.monotonic() - begun, peak(program.device))
    grown = {name: max(own[name], before.get(name, 0.0)) for name in ("seconds", "peak_memory_bytes")}
    return own | dict(before) | grown
