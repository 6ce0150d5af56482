"""Laplace's approximation here against laplace-torch and bayesian-lora: whether they agree, and what they cost.

    pip install bayeslora[peers]
    python benchmarks/peers.py --base MODEL --task mrpc --data-dir DATA
    python benchmarks/peers.py --quick                          # no file needed; its figures mean nothing

With a build of PyTorch for CPUs alone, take torchvision away again (`pip uninstall torchvision`): laplace-torch asks
for it and does not import it, the one on PyPI needs CUDA, and transformers does not start where it is broken.

Agreement, on a small encoder with LoRA adapters that are trained a little: the generalised Gauss-Newton matrix of the
LoRA matrices in full, the log evidence under the same prior, and the variance of the logits of the linearised network.
laplace-torch is exact there as well. bayesian-lora has nothing to compare: it sees one token of each sequence.

Cost, on the CPU (Linux): every part runs in a process of its own, with no more than `--memory-limit`, and works on one
batch before it is measured. Memory is the peak over what the process held just before. Batches are the same for all,
padded as little as may be. laplace-torch fits its Kronecker factors by either backend that takes PEFT networks; it
predicts by the Jacobian of torch.func in any case, as does bayesian-lora, whose time and memory for a row grow with the
rows of a batch: hence predictions in small batches, too, which suit both better. bayesian-lora's factors are of
the same low rank as ours; layers without tokens (the pooler) are beyond it and left out of its factors. `--peer-rows`
limits the rows of the peers: ratios of time are of the time per row, which few rows overstate where a fit ends in a
decomposition whose time does not depend on them. Writes benchmarks/results/peers.json.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import resource
import subprocess
import sys
import time
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from common import RESULTS, environment, markdown, say
from peer_parts import AGREEMENTS, COSTS, CURVATURE_RANK, SCALE, Part, agreement, subject

from bayeslora.files import write_json
from bayeslora.inference.training.process import peak, reset_peak

#: The targets. What is computed in single precision agrees to six digits; one more is left to what cancels.
AGREEMENT, FIT_TIME, FIT_MEMORY, PREDICT_TIME, BETTER = 1e-5, 1.15, 1.05, 4.0, 10.0
PACKAGES = ("laplace-torch", "curvlinops-for-pytorch", "asdfghjkl", "bayesian-lora")
MEASURES = {"time": "seconds_per_row", "memory": "bytes"}
STATES = {True: "met", False: "NOT met", None: "not judged"}
Figures = dict[str, dict[str, Any]]


def perform(name: str, options: Namespace) -> dict[str, float]:
    """The figures of one part, measured in this process."""
    if name in AGREEMENTS:
        return agreement(AGREEMENTS[name])
    part, found = COSTS[name], subject(options)
    rows, batch_size = (found.train if part.fits else found.test), batch_of(part, options)
    if part.rival and options.peer_rows:
        rows = rows.select(range(min(options.peer_rows, len(rows))))
    action = part.prepare(found, batch_size)
    action(rows.select(range(min(batch_size, len(rows)))))
    gc.collect()
    with suppress(AttributeError):  # glibc alone can give back what is free, where a peak would hide
        ctypes.CDLL(None).malloc_trim(0)
    before, device = psutil.Process().memory_info().rss, torch.device("cpu")
    reset_peak()
    start = time.perf_counter()
    action(rows)
    seconds = time.perf_counter() - start
    # The system counts in pages, and what fits into free ones not at all.
    size = max(peak(device) - before, mmap.PAGESIZE)
    return {"seconds": seconds, "bytes": float(size), "rows": float(len(rows))}


def batch_of(part: Part, options: Namespace) -> int:
    """Rows a batch."""
    found: int = options.small_batch if part.small else options.batch_size
    return found


def attempt(name: str, options: Namespace) -> dict[str, Any]:
    """The figures of one part from a process of its own, or why there are none."""
    if options.quick:  # a process takes longer to start than all parts
        try:
            return perform(name, options)
        except Exception as error:  # whatever a peer raises is its result
            return {"error": traceback.format_exception_only(error)[-1].strip()}
    command = [sys.executable, __file__, *options.arguments, "--part", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=options.time_limit)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {options.time_limit:g} s"}
    if done.returncode:
        killed = f"killed by signal {-done.returncode}: " if done.returncode < 0 else ""
        return {"error": killed + (done.stderr.strip().splitlines() or ["no message"])[-1]}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(options: Namespace) -> Iterator[Figures]:
    """What is known of all parts after each round; in rounds, so that a slow spell of the machine hits every part."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.parts}
    for number in range(options.repeats):
        for name, done in runs.items():
            # Agreement is the same each time; a failure is not tried again.
            if not number or not (name in AGREEMENTS or "error" in done[-1]):
                done.append(attempt(name, options))
                say(f"round {number + 1}, {name}: " + ", ".join(f"{key} {found}" for key, found in done[-1].items()))
        yield {name: summary(done) for name, done in runs.items()}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the runs, or the error of the last one; and the runs themselves."""
    if "error" in runs[-1]:
        return runs[-1] | {"runs": list(runs)}
    medians = {key: median(run[key] for run in runs) for key in runs[0]}
    if "rows" in medians:
        medians["seconds_per_row"] = medians["seconds"] / medians["rows"]
    return medians | {"runs": list(runs)}


def ratio(found: Figures, one: str, other: str, key: str) -> float | None:
    """One part's figure over another's, if both are there."""
    above, below = (found.get(name, {}).get(key) for name in (one, other))
    return None if above is None or below is None else above / below


def verdicts(found: Figures) -> list[dict[str, Any]]:
    """Each target, what was found, and whether it is met; None where a figure is missing."""
    judged = []
    for name, backend in AGREEMENTS.items():
        for what in ("GGN", "log evidence", "variance of the logits"):
            target = f"{what}: difference from laplace-torch ({backend}) at most {AGREEMENT:g}"
            judged.append(_at_most(AGREEMENT, found.get(name, {}).get(what), target))
    for limit, one, other, key, target in (
        (FIT_TIME, "fit", "map", "seconds_per_row", "time of a fit at most {} of an epoch's"),
        (FIT_MEMORY, "fit", "map", "bytes", "memory of a fit at most {} of an epoch's"),
        (PREDICT_TIME, "predict", "plain", "seconds_per_row", "time of a prediction at most {} of a plain pass's"),
    ):
        judged.append(_at_most(limit, ratio(found, one, other, key), target.format(f"{limit:g}")))
    for name, part in COSTS.items():
        if part.rival:
            ratios = {what: ratio(found, name, part.rival, key) for what, key in MEASURES.items()}
            best = None if None in ratios.values() else max(each for each in ratios.values() if each is not None)
            target = f"{BETTER:g} times faster or smaller than {part.title}"
            met = None if best is None else best >= BETTER
            judged.append({"target": target, "found": best, "met": met, **ratios})
    return judged


def _at_most(limit: float, value: float | None, target: str) -> dict[str, Any]:
    return {"target": target, "found": value, "met": None if value is None else value <= limit}


def agreement_table(found: Figures) -> str:
    """Relative differences from laplace-torch; a failure stands where they would."""
    rows = [
        [AGREEMENTS[name], key, _cell(figure) if key == "error" else f"{figure:.1e}"]
        for name in AGREEMENTS
        for key, figure in found.get(name, {}).items()
        if key != "runs"
    ]
    return markdown(["laplace-torch by", "figure", "relative difference"], rows)


def cost_table(found: Figures, options: Namespace) -> str:
    """Time and memory of all parts; a failure stands where they would."""
    rows = []
    for name, part in COSTS.items():
        figures, title = found.get(name), [part.title, str(batch_of(part, options))]
        if figures is None:
            continue
        if "error" in figures:
            rows.append([*title, f"failed: {_cell(figures['error'])}", *[""] * 5])
            continue
        time_ratio, memory_ratio = (
            ratio(found, name, "map" if part.fits else "plain", key) for key in MEASURES.values()
        )
        row = [f"{figures['rows']:.0f}", f"{figures['seconds']:.2f}", f"{1000 * figures['seconds_per_row']:.2f}"]
        row += [_ratio(time_ratio), f"{figures['bytes'] / 2**20:,.0f}", _ratio(memory_ratio)]
        rows.append(title + row)
    header = ["part", "rows a batch", "rows", "s", "ms a row", "ratio", "peak MiB", "ratio"]
    return markdown(header, rows) + "\n\nRatios are to an epoch of MAP, and to a plain forward pass."


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def installed(package: str) -> str | None:
    """Its version, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Options of the command line."""
    parts = [*AGREEMENTS, *COSTS]
    parser = ArgumentParser(description="Laplace's approximation here against laplace-torch and bayesian-lora.")
    parser.add_argument("--base", help="folder or hub name of the base network")
    parser.add_argument("--task", default="mrpc", help="name of a task of classification")
    parser.add_argument("--data-dir", help="folder with a folder of files for each task; the hub by default")
    parser.add_argument("--rows", type=int, default=1000, help="rows to fit")
    parser.add_argument("--test-rows", type=int, default=500, help="rows to predict, cut off the training split")
    parser.add_argument("--peer-rows", type=int, help="at most so many rows for the peers; all by default")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA matrices")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--small-batch", type=int, default=2, help="the best for the peers; bayesian-lora takes no 1")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each part")
    parser.add_argument("--time-limit", type=float, default=900, help="seconds of a process")
    parser.add_argument("--memory-limit", type=float, default=8, help="GiB of a process")
    parser.add_argument("--threads", type=int, help="threads of each process")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--quick", action="store_true", help="a tiny network in this process: to see that it works")
    parser.add_argument("--part", choices=parts, help=SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if options.quick:
        options.rows, options.batch_size, options.repeats = 24, 8, 1
    elif not options.base:
        parser.error("--base is needed, unless with --quick.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.part:
        limit = int(options.memory_limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(json.dumps(perform(options.part, options)))
        return
    names = ("task", "rows", "test_rows", "peer_rows", "rank", "batch_size", "small_batch", "repeats", "quick")
    settings = {name: getattr(options, name) for name in (*names, "time_limit", "memory_limit")}
    settings |= {"model": Path(options.base or "tiny").name, "prior_scale": SCALE, "curvature_rank": CURVATURE_RANK}
    surroundings = environment(torch.device("cpu"))
    surroundings["versions"] |= {package: installed(package) for package in PACKAGES}
    for found in measure(options):
        judged = verdicts(found)
        measured = {"settings": settings, "environment": surroundings, "results": found, "verdicts": judged}
        write_json(options.results, measured)  # after each round: a long measurement may be cut off
    print(f"\n{agreement_table(found)}\n\n{cost_table(found, options)}\n")
    for verdict in judged:
        figure = "no figure" if verdict["found"] is None else f"{verdict['found']:.3g}"
        print(f"- {STATES[verdict['met']]}: {verdict['target']}. Found: {figure}.")
    print(f"\nWrote {options.results}.")


if __name__ == "__main__":
    main()
