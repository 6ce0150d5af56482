"""Processes that share the cells of a study: on this machine, on Slurm, or on a cluster of Ray.

Each does what `bayeslora.app.studies.running.settle` does, with locks on the cells: they need nothing but one folder in
common, whose file system has locks. Options of a launcher:

- ``local``: none. Devices go round: the first process has the first, and so on; cores are split, unless the
  environment says how many threads a process has (OMP_NUM_THREADS).
- ``submitit``: ``cluster`` ("slurm" where there is one, or "local"), and parameters of its executor, such as
  ``timeout_min=600``, ``slurm_partition=gpu``, ``gpus_per_node=1``. A job that comes to its time limit leaves
  checkpoints; the same command goes on.
- ``ray``: ``address`` of a cluster, one on this machine if left out; ``num_cpus`` and ``num_gpus`` of each process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from bayeslora.app.studies.cells import Cell
from bayeslora.app.studies.expansion import Target
from bayeslora.app.studies.results import Results
from bayeslora.app.studies.study import cells_of
from bayeslora.app.studies.work import Job, work
from bayeslora.errors import SettingError, unknown

__all__ = ["LAUNCHERS", "Worker", "launch"]

#: Seconds between two looks at the processes.
PAUSE = 0.2
#: What a process does. Until `main` acts on Ctrl-C, which whoever started it is told as well, that ends it without the
#: traceback of its imports.
PROGRAM = f"import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from {work.__module__} import main; main()"


class Worker(Protocol):
    """A process that works on a study."""

    def ended(self) -> bool:
        """Whether it has come to an end, of whatever kind."""

    def failure(self) -> str:
        """Why it ended before the study did; empty if it did not, or was stopped."""

    def killed(self) -> bool:
        """Whether it ended as a process does that the system has no memory for."""

    def stop(self) -> None:
        """End it."""


#: Starts processes with a job, those of such numbers among so many, by options.
Launcher = Callable[[Job, Sequence[int], int, Mapping[str, str]], "list[Worker]"]


def launch(
    job: Job,
    targets: Sequence[Target],
    results: Results,
    launcher: str,
    workers: int,
    options: Mapping[str, str],
    told: Callable[[Target], None],
) -> None:
    """Start processes, and wait until they have come to the end of all lines.

    The cell of a process that was killed, as one is when there is no memory left, is recorded as failed, and another
    process takes its place, with its device and as many cores.

    Args:
        job: what each is given.
        targets: its lines.
        results: where they are.
        launcher: what starts them, one of `LAUNCHERS`.
        workers: how many.
        options: of the launcher.
        told: called with each line that has come to its end.

    Raises:
        SettingError: there is no such launcher, or processes ended before the study did.
    """
    if launcher not in LAUNCHERS:
        raise SettingError(unknown("launcher", launcher, LAUNCHERS))
    start, failures = LAUNCHERS[launcher], []
    left, cells = list(targets), cells_of(targets)
    for cell in cells:
        with results.left(cell):  # by a process of some other time, which is no reason not to try again
            pass
    running = dict(enumerate(start(job, range(workers), workers, options)))
    try:
        while running:
            time.sleep(PAUSE)
            gone = {number: worker for number, worker in running.items() if worker.ended()}
            for number, worker in gone.items():
                del running[number]
                failures += [worker.failure()] if worker.failure() else []
                if worker.killed() and _record_killed(cells, results):
                    (running[number],) = start(job, [number], workers, options)
            left = _tell(left, results, told)
    finally:
        for worker in running.values():
            worker.stop()
    if left:
        said = "; ".join(dict.fromkeys(failures)) or "they were stopped"
        raise SettingError(
            f"{len(left)} of {len(targets)} lines are left, and no process is at them ({said}): the same command goes "
            "on with them."
        )


def _tell(left: Sequence[Target], results: Results, told: Callable[[Target], None]) -> list[Target]:
    waiting = []
    for target in left:
        if results.settled(target) == "open":
            waiting.append(target)
        else:
            told(target)
    return waiting


def _record_killed(cells: Sequence[Cell], results: Results) -> bool:
    """Record what processes that were killed had; whether there was something."""
    found = False
    for cell in cells:
        with results.left(cell) as held:
            if held:
                results.write_end(cell, "The process was killed: there may have been no memory left.")
            found |= held
    return found


class _Process:
    """A process on this machine."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-c", PROGRAM, job.to_json()]
        self.process = subprocess.Popen(command, env=os.environ | dict(environment))

    def ended(self) -> bool:
        return self.process.poll() is not None

    def failure(self) -> str:
        return _failure(self.process.returncode)

    def killed(self) -> bool:
        return bool(self.process.returncode < 0)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def _failure(code: int) -> str:
    """Why a process with such a status has ended; empty if it came to its end or was stopped."""
    stopped = code - 128 in signal.valid_signals()  # it says nothing of a signal
    return f"a process ended with {code}, see above" if code and not stopped else ""


def _local(job: Job, numbers: Sequence[int], workers: int, options: Mapping[str, str]) -> list[Worker]:
    if options:
        raise SettingError(f"The launcher 'local' has no options, found {', '.join(options)}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    shared = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    devices = _devices()
    pins = [{"CUDA_VISIBLE_DEVICES": devices[each % len(devices)]} if devices else {} for each in numbers]
    return [_Process(job, shared | pin) for pin in pins]


def _devices() -> list[str]:
    """Devices that this process may use, as the environment names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


class _SlurmJob:
    """A job of submitit."""

    #: States of jobs that are not at fault: the same command goes on with their cells.
    stopped = ("TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL")

    def __init__(self, submitit: Any, job: Any) -> None:
        self.submitit, self.job = submitit, job

    def ended(self) -> bool:
        return bool(self.job.done())

    def failure(self) -> str:
        error = self.job.exception()
        return "" if error is None else f"job {self.job.job_id}: {str(error).strip().splitlines()[-1]}"

    def killed(self) -> bool:
        no_result = isinstance(self.job.exception(), self.submitit.core.utils.UncompletedJobError)
        return no_result and not self.job.state.startswith(self.stopped)

    def stop(self) -> None:
        self.job.cancel()


def _submitit(job: Job, numbers: Sequence[int], workers: int, options: Mapping[str, str]) -> list[Worker]:
    submitit = _extra("submitit", "slurm")
    parameters: dict[str, Any] = dict(options)
    cluster = parameters.pop("cluster", None)
    executor = submitit.AutoExecutor(folder=str(Path(job.folder) / "jobs" / "%j"), cluster=cluster)
    executor.update_parameters(**{name: int(text) if text.isdigit() else text for name, text in parameters.items()})
    return [_SlurmJob(submitit, each) for each in executor.map_array(work, [job] * len(numbers))]


class _RayTask:
    """A task of Ray."""

    def __init__(self, ray: Any, task: Any) -> None:
        self.ray, self.task = ray, task

    def ended(self) -> bool:
        return bool(self.ray.wait([self.task], timeout=0)[0])

    def failure(self) -> str:
        error = self._error()
        return "" if error is None else str(error).strip().splitlines()[-1]

    def killed(self) -> bool:
        from ray.exceptions import OutOfMemoryError, WorkerCrashedError

        return isinstance(self._error(), OutOfMemoryError | WorkerCrashedError)

    def _error(self) -> Exception | None:
        try:
            self.ray.get(self.task)
        except Exception as error:
            return error
        return None

    def stop(self) -> None:
        self.ray.cancel(self.task)


def _ray(job: Job, numbers: Sequence[int], workers: int, options: Mapping[str, str]) -> list[Worker]:
    ray = _extra("ray", "ray")
    if not ray.is_initialized():
        place = {"address": options["address"]} if "address" in options else {"include_dashboard": False}
        ray.init(log_to_driver=False, **place)
    wanted = {name: float(text) for name, text in options.items() if name != "address"}
    task = ray.remote(**{"num_cpus": 1.0, "max_retries": 0, **wanted})(work)
    return [_RayTask(ray, task.remote(job)) for _ in numbers]


def _extra(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise SettingError(f"The launcher '{module}' needs {module}: pip install 'bayeslora[{extra}]'.") from error


#: What starts processes, by name.
LAUNCHERS: dict[str, Launcher] = {"local": _local, "submitit": _submitit, "ray": _ray}
