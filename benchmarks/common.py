"""What the benchmarks beside the studies share: where results are kept, on what they were made, tables, and a clock."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """What figures of time and the last digits depend on."""
    packages = ("torch", "pyro-ppl", "transformers", "peft", "bayeslora")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def say(message: str) -> None:
    """One line with the time of day, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)
