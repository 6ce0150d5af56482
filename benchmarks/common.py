"""What benchmarks beside the studies share: one fit as one JSON file, and processes that share the work.

A run is a fit of one backend on one task with one seed, and what is measured of it. Its files under the output folder
are ``NAME.json``, written last and at once, and ``NAME/ARM.safetensors``, the logits of each arm. A run whose JSON is
there is finished and not repeated. Processes that are started with the same command share the runs: each is held by a
file lock, which the system drops when its process ends, however it ends. Needs a POSIX system.
"""

from __future__ import annotations

import json
import os
import platform
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bayeslora.errors import TrainingError
from bayeslora.files import write_json

#: Settings that are not the defaults: most figures were made before noise was warmed up and prior means were learned.
SETTINGS: dict[str, dict[str, Any]] = {
    "svi": {"noise_warmup": 0.0, "prior_mean": "model"},
    "map": {"prior_mean": "model"},
}
#: The model of the weights of that time.
MODEL: dict[str, Any] = {"name": "monteclora", "scale": 1.5}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One fit; its seed is that of the program's start, of the choice of training rows, and of the fit.

    ``precision`` is PyTorch's float32 matmul precision, the same for every arm: at "medium" products are of bfloat16
    factors, summed in float32, which takes two thirds of the time on CPUs with matrix units.
    """

    task: str
    backend: str
    seed: int
    train_size: int
    heldout_size: int = 300
    epochs: float = 10.0
    batch_size: int = 32
    learning_rate: float = 2e-3
    rank: int = 8
    lora_alpha: int = 16
    samples: int = 10
    base: str = ""
    split: str = "validation"
    precision: str = "medium"
    variant: str = ""
    program: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run's files."""
        suffix = f"-{self.variant}" if self.variant else ""
        return f"{self.task}-{self.backend}-seed{self.seed}-lr{self.learning_rate:g}{suffix}"

    def quick(self) -> Run:
        """The same in seconds, to see that it works; its figures mean nothing."""
        return replace(self, train_size=32, heldout_size=16, epochs=1, batch_size=8, samples=2)


#: What does a run, given the base network, the folder of the data and that of the results: what its JSON holds.
Measure = Callable[[Run, str, str | None, Path], dict[str, Any]]


def command_line(
    description: str, name: str, report: Callable[[Namespace], None], figure: Path | None = None
) -> tuple[ArgumentParser, ArgumentParser]:
    """The commands ``run`` and ``report`` of a benchmark that is made of runs.

    Args:
        description: of the benchmark.
        name: of the folder of its runs and of the file of its results.
        report: what the second command does; the first one is for the caller to say (``do``).
        figure: default place of the picture, if there is one.

    Returns:
        The parser, and that of ``run``.
    """
    parser = ArgumentParser(description=description)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="do the runs that are not finished")
    running.add_argument("--base", required=True, help="folder or hub name of the base network")
    running.add_argument("--data-dir", help="folder with a folder of files for each task; the hub by default")
    running.add_argument("--threads", type=int, help="threads of this process")
    running.add_argument("--quick", action="store_true", help="32 rows, one epoch: to see that it works")
    reporting = commands.add_parser("report", help="tables and figures of the runs that are there")
    reporting.add_argument("--results", type=Path, default=RESULTS / f"{name}.json", help="figures that are kept")
    if figure is not None:
        reporting.add_argument("--figure", type=Path, default=figure, help="picture")
    reporting.set_defaults(do=report)
    for each in (running, reporting):
        each.add_argument("--output", type=Path, default=Path("runs") / name, help="where the runs are")
    return parser, running


def work(runs: Iterable[Run], options: Namespace, measure: Measure) -> None:
    """Do every run that is not finished and that no other process holds; ``measure`` says what a run is."""
    from transformers.utils import logging

    # Every run loads the base network anew and would report each time that its head is new.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    for run in runs:
        run = replace(run, base=Path(options.base).name)
        run = run.quick() if options.quick else run
        with claimed(options.output / ".locks" / f"{run.name}.lock") as mine:
            if not mine:
                say(f"{run.name}: another process has it")
            elif finished(run, options.output):
                say(f"{run.name}: finished before")
            else:
                _attempt(run, options, measure)


def _attempt(run: Run, options: Namespace, measure: Measure) -> None:
    say(f"{run.name}: started")
    try:
        record = execute(run, options.base, options.data_dir, options.output, measure)
    except TrainingError as error:
        say(f"{run.name}: no result. {error}")
        return
    for arm, found in record["arms"].items():
        names = [name for name in ("accuracy", "nll", "ece_15", "perplexity") if name in found]
        shown = ", ".join(f"{name} {float(found[name]['value']):.3f}" for name in names)
        say(f"{run.name}: {arm}: {shown} ({record['seconds']['fit']:.0f} s)")


def execute(run: Run, model: str, data_dir: str | None, output: Path, measure: Measure) -> dict[str, Any]:
    """Do one run and write its JSON; return what that holds."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(run.precision)
    try:
        record = measure(run, model, data_dir, output)
    finally:
        torch.set_float32_matmul_precision(before)
    write_json(output / f"{run.name}.json", record)
    return record


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


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Hold ``lock`` while the block runs, if no living process does; yields whether it is held."""
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield True


def finished(run: Run, output: Path) -> bool:
    """Whether the run's result is there.

    Raises:
        SystemExit: the result is of a run with other settings.
    """
    path = output / f"{run.name}.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["run"]
    differing = {key: (found.get(key), value) for key, value in asdict(run).items() if found.get(key) != value}
    if differing:
        raise SystemExit(f"{path} is of another run (there, here): {differing}. Choose another --output.")
    return True


def read_runs(output: Path) -> list[dict[str, Any]]:
    """All finished runs in a folder.

    Raises:
        SystemExit: there is none.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*.json"))]
    if not records:
        raise SystemExit(f"There are no finished runs in {output}.")
    return records


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def say(message: str) -> None:
    """One line with the time of day, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)
