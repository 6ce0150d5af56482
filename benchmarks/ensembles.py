"""What an ensemble's training takes: members side by side in one stacked network, and one after another.

    python benchmarks/ensembles.py

Plain LoRA on the embedded demo, two epochs: one fit, five members stacked, five one after another, of several sizes,
in alternating rounds. Times are of the processor, medians of rounds, relative to the one fit; the first round warms up.
Prints a table and writes benchmarks/results/ensembles.json.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, environment, markdown

import bayeslora as bl
from bayeslora.files import write_json

#: Training rows and rows of a batch.
SIZES = ((96, 8), (400, 8), (96, 32))
ARMS: dict[str, dict[str, Any]] = {
    "one fit": {"backend": "mle"},
    "five stacked": {"backend": "ensemble", "members": 5, "stacked": True},
    "five one by one": {"backend": "ensemble", "members": 5, "stacked": False},
}


def seconds(arm: str, rows: int, batch_size: int) -> float:
    """Processor time of one fit."""
    task = bl.load_task("demo", train_size=rows)
    program = bl.Program.from_pretrained("demo", task, model=bl.models.Gaussian())
    settings = {"epochs": 2, "batch_size": batch_size}
    of = {"of_settings": settings} if ARMS[arm]["backend"] == "ensemble" else settings
    begun = time.process_time()
    bl.fit(program, task.train, progress=False, **ARMS[arm], **of)
    return time.process_time() - begun


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = ArgumentParser(description="What an ensemble's training takes.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "ensembles.json")
    options = parser.parse_args(arguments)
    table, found = [], []
    for rows, batch_size in SIZES:
        rounds = [{arm: seconds(arm, rows, batch_size) for arm in ARMS} for _ in range(options.rounds + 1)][1:]
        times = {arm: median(each[arm] for each in rounds) for arm in ARMS}
        ratios = {arm: median(each[arm] / each["one fit"] for each in rounds) for arm in ARMS}
        found.append({"rows": rows, "batch_size": batch_size, "seconds": times, "ratios": ratios})
        table.append([f"{rows} rows, batches of {batch_size}", *(f"{ratio:.2f}" for ratio in ratios.values())])
    print(markdown(["", *ARMS], table))
    device = bl.Program.from_pretrained("demo", bl.load_task("demo", train_size=8)).device
    write_json(options.results, {"environment": environment(device), "found": found})


if __name__ == "__main__":
    main()
