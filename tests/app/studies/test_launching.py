from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import environment

from bayeslora import files
from bayeslora.app.studies import Study, launching
from bayeslora.app.studies.work import Job, work
from bayeslora.errors import SettingError

Made = Callable[..., dict[str, Any]]
Lines = Callable[[], list[str]]


class Forked:
    """A process that begins with all that this one has imported."""

    def __init__(self, job: Job) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=work, args=(job,))
        self.process.start()

    def ended(self) -> bool:
        return not self.process.is_alive()

    def failure(self) -> str:
        return "ended badly" if (self.process.exitcode or 0) > 0 else ""

    def killed(self) -> bool:
        return (self.process.exitcode or 0) < 0

    def stop(self) -> None:
        self.process.terminate()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Numbers of the processes that were started by the launcher "forked", and among how many each is."""
    found: list[tuple[int, int]] = []

    def start(job: Job, numbers: Sequence[int], workers: int, options: Mapping[str, str]) -> list[launching.Worker]:
        found.extend((number, workers) for number in numbers)
        return [Forked(job) for _ in numbers]

    monkeypatch.setitem(launching.LAUNCHERS, "forked", start)
    return found


def test_a_process_that_is_killed_costs_its_cell_alone(
    study: Made, tmp_path: Path, fits: Lines, started: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["quick", "deadly", "hungry"]
    found = Study(study(methods=methods), tmp_path / "out").run(workers=2, launcher="forked")
    frame = found.frame()
    assert list(frame["state"]) == ["done", "failed", "failed"] * 2 and sorted(fits()) == [
        "quick 0 0.001 False", "quick 3 0.001 False"
    ]  # fmt: skip
    assert set(frame["error"][frame["method"] == "deadly"]) == {
        "The process was killed: there may have been no memory left."
    }
    # One for each that was killed, in its place: with the device and as many cores as that had.
    assert started[:2] == [(0, 2), (1, 2)] and len(started) == 2 + 2 and set(started[2:]) <= {(0, 2), (1, 2)}
    told = capsys.readouterr().err
    assert told.count("failed") == 4 and "[6/6]" in told


def test_what_was_left_some_other_time_is_tried_again(
    study: Made, tmp_path: Path, started: list[tuple[int, int]]
) -> None:
    found = Study(study(methods=["deadly", "quick"], seeds=[0]), tmp_path / "out")
    locks = [files.hidden(found.results.at(cell), "lock") for cell in found.cells]
    locks[0].parent.mkdir(parents=True)
    for lock in locks:
        lock.write_text("process 1 on another machine, long ago")
    found.run(workers=1, launcher="forked", progress=False)
    assert list(found.frame()["state"]) == ["failed", "done"] and len(started) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "options"), [("submitit", {"cluster": "local", "timeout_min": "9"}), ("ray", {})])
def test_a_job_that_is_killed_costs_its_cell_alone(
    launcher: str, options: dict[str, str], study: Made, tmp_path: Path, fits: Lines, plugin: Path
) -> None:
    pytest.importorskip(launcher)
    made = study(methods=["deadly", "quick"])
    (tmp_path / "study.yaml").write_text(json.dumps(made))
    words = [f"{name}={value}" for name, value in options.items()]
    how = ["--workers", "1", "--launcher", launcher, *(word for each in words for word in ("--option", each))]
    command_line = command(tmp_path / "study.yaml", tmp_path / "out", plugin, *how)
    found = subprocess.run(command_line, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert found.returncode == 1 and "2 of 4 lines failed" in found.stderr, found.stderr
    frame = Study(made, tmp_path / "out").frame()
    assert list(frame["state"]) == ["failed", "done"] * 2 and len(fits()) == 2
    assert set(frame["error"].dropna()) - {""} == {"The process was killed: there may have been no memory left."}


def test_processes_that_end_too_early_are_told(study: Made, tmp_path: Path, started: list[tuple[int, int]]) -> None:
    def start(job: Job, numbers: Sequence[int], workers: int, options: Mapping[str, str]) -> list[launching.Worker]:
        return [Forked(Job({}, job.folder, job.place)) for _ in numbers]

    launching.LAUNCHERS["forked"] = start
    left = r"4 of 4 lines are left, and no process is at them \(ended badly\): the same command goes on"
    with pytest.raises(SettingError, match=left):
        Study(study(), tmp_path / "out").run(workers=2, launcher="forked", progress=False)
    with pytest.raises(SettingError, match="Unknown launcher 'locl'. Did you mean 'local'"):
        Study(study(), tmp_path / "out").run(launcher="locl", progress=False)


def test_parts_are_the_whole(study: Made, tmp_path: Path, fits: Lines) -> None:
    methods = {"quick": {}, "around": {"backend": "quick", "start": "quick", "settings": {"epochs": 2}}}
    found = Study(study(methods=methods, seeds=[0, 1, 2]), tmp_path / "out")
    parts = [found.part((number, 3)) for number in (1, 2, 3)]
    assert sorted(each.title for part in parts for each in part) == sorted(each.title for each in found.targets)
    assert [len(part) for part in parts] == [2, 2, 2]
    part = next(part for part in parts if any(each.method == "around" for each in part))
    found.run(shard=(parts.index(part) + 1, 3), progress=False)
    assert [found.results.settled(each) for each in part] == ["done", "done"]  # with what they start from
    assert all(found.results.settled(each) == "open" for each in found.targets if each not in part and (
        each.method == "around" or each.seed not in {other.seed for other in part}
    ))  # fmt: skip
    with pytest.raises(SettingError, match="one from 1/3 to 3/3, found 4/3"):
        found.part((4, 3))


def test_devices_and_cores_are_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    class Seen:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append((env["CUDA_VISIBLE_DEVICES"], int(env["OMP_NUM_THREADS"])))
            assert Job.from_json(command[-1]) == job

    monkeypatch.setattr(launching.subprocess, "Popen", Seen)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = Job({"a": 1}, str(tmp_path), ".", ("x.py",), (1, 2))
    launching.LAUNCHERS["local"](job, range(3), 3, {})
    assert seen == [("4", 2), ("6", 2), ("4", 2)]
    launching.LAUNCHERS["local"](job, [1], 3, {})  # in the place of one that was killed
    assert seen[3:] == [("6", 2)]
    for said, threads in (("1", 1), ("", 2)):  # what is said goes
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        launching.LAUNCHERS["local"](job, [1], 3, {})
        assert seen[-1] == ("6", threads)
    with pytest.raises(SettingError, match="'local' has no options, found a"):
        launching.LAUNCHERS["local"](job, [0], 1, {"a": "1"})


def test_a_process_of_its_own_does_the_work(
    study: Made, tmp_path: Path, fits: Lines, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    found = Study(study(methods=["quick"], seeds=[3], tasks={"demo": "rows.jsonl"}), "out")
    found.run(workers=1, plugins=[plugin], progress=False)
    assert fits() == ["quick 3 0.001 False"] and list(found.frame()["state"]) == ["done"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_says_nothing(number: int, study: Made, tmp_path: Path, plugin: Path) -> None:
    made = study(methods=["quick"], seeds=[0])
    made["common"]["settings"]["seconds"] = 60
    found = Study(made, tmp_path / "out")
    job = Job(made, str(found.results.folder), str(tmp_path), (str(plugin),))
    words = [sys.executable, "-c", launching.PROGRAM, job.to_json()]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
    lock = files.hidden(found.results.at(found.cells[0]), "lock")
    while not lock.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=50)
    assert process.returncode == 128 + number and told == ""
    assert list(found.frame()["state"]) == ["open"]


def test_a_process_that_is_stopped_while_it_imports_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bayeslora").mkdir()  # what a process imports first, and is long about
    (tmp_path / "bayeslora" / "__init__.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    process = launching._Process(Job({}, ".", "."), {}).process
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=50) == -signal.SIGINT and capfd.readouterr().err == ""


def command(file: Path, folder: Path, plugin: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "bayeslora.app.cli", "compare", str(file), "--output", str(folder)]
    return [*words, "--plugin", str(plugin), *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["--workers", "2"],
        ["--workers", "2", "--launcher", "submitit", "--option", "cluster=local", "--option", "timeout_min=9"],
        ["--workers", "2", "--launcher", "ray"],
    ],
)
def test_launchers_give_the_table_of_one_process(
    how: list[str], study: Made, tmp_path: Path, fits: Lines, plugin: Path
) -> None:
    if "submitit" in how or "ray" in how:
        pytest.importorskip(how[3])
    made = study(methods=["quick", "hungry"], tuning={"values": {"learning_rate": [0.1, 0.2]}})
    (tmp_path / "study.yaml").write_text(json.dumps(made))
    alone = Study(made, tmp_path / "alone").run(progress=False)
    expected = sorted(fits())
    (tmp_path / "fits").unlink()
    words = command(tmp_path / "study.yaml", tmp_path / "out", plugin, *how)
    found = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert found.returncode == 1 and "4 of 8 lines failed" in found.stderr, found.stderr  # those of "hungry"
    # Times differ from run to run, and launchers share cores out in ways of their own, which "device" tells.
    differing = ["predict_seconds", "seconds", "tuning_seconds", "device"]
    here, there = (each.frame().drop(columns=differing) for each in (alone, Study(made, tmp_path / "out")))
    assert here.to_csv() == there.to_csv() and sorted(fits()) == expected


@pytest.mark.parametrize(
    ("code", "said"), [(0, ""), (143, ""), (130, ""), (1, "ended with 1, see above"), (200, "200"), (255, "255")]
)
def test_a_process_that_was_stopped_has_said_nothing_to_see(code: int, said: str) -> None:
    found = launching._failure(code)
    assert said in found and bool(found) == bool(said)
