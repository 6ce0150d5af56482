from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyro
import pytest
import torch
from scenarios import sentence_pairs, write_rows

torch.set_num_threads(1)
# Tests send this signal, which programs under `nohup` ignore, and all that they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections: every fit asks for a full one, which then takes no time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """The same random numbers for every test, and nothing left in Pyro's global store by any."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    left = list(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert not left, f"left in Pyro's global store: {left}"


@pytest.fixture
def mrpc(tmp_path: Path) -> Path:
    """A data folder with a small MRPC."""
    write_rows(tmp_path / "mrpc/train.jsonl", sentence_pairs(20))
    write_rows(tmp_path / "mrpc/validation.jsonl", sentence_pairs(6))
    return tmp_path
