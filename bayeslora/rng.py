"""Random numbers: torch's generators seeded for a while and put back, and seeds that are made of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derived_seed", "derived_short_seed", "isolated", "seeded"]


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits, as torch's generators take, that is as good as independent of those of other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def derived_short_seed(*numbers: int) -> int:
    """The same of 32 bits, as many as the seed of a fit has."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


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
