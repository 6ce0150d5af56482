"""Random numbers: torch's generators seeded for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["isolated", "seeded"]


def seeded(n: int, seed: int, device: torch.device) -> Iterator[int]:
    """Yield 0 ... n - 1, each with torch's generators seeded anew for the caller; restore them between and after."""
    seeds = torch.randint(2**62, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    for number, each in enumerate(seeds):
        with isolated(each, device):
            yield number


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators inside, and put them back after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
