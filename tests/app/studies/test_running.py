from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from scenarios import write_rows

import bayeslora as bl
from bayeslora.app.studies import Study
from bayeslora.app.studies.results import Results
from bayeslora.app.studies.running import _free_memory
from bayeslora.errors import DataError
from bayeslora.predict.prediction import Prediction

Made = Callable[..., dict[str, Any]]
Lines = Callable[[], list[str]]
FORKED = multiprocessing.get_context("fork")
#: What differs from one time to another.
TIMES = ("predict_seconds", "seconds", "tuning_seconds")


def table(study: Study) -> str:
    return str(study.frame().drop(columns=list(TIMES)).to_csv())


def run(study: dict[str, Any], folder: Path) -> Study:
    return Study(study, folder).run(progress=False)


def test_every_line_has_its_result(study: Made, tmp_path: Path, fits: Lines) -> None:
    found = run(study(), tmp_path / "out")
    frame = found.frame()
    assert list(frame["method"]) == ["quick", "wide", "quick", "wide"] and list(frame["seed"]) == [0, 0, 3, 3]
    assert set(frame["state"]) == {"done"} and set(frame["error"]) == {""} and set(frame["fit_seconds"]) == {1.5}
    assert len(fits()) == 4 and set(frame["device"].str.endswith(" threads")) == {True}
    cell = tmp_path / "out" / "cells" / frame["cell"][1]
    posterior = bl.load(cell)
    assert posterior.record.seed == 0 and posterior.record.settings["learning_rate"] == 0.1
    rows = bl.load_task(tmp_path / "rows.jsonl", train_size=12, heldout_size=20).split("heldout")
    expected = posterior.predict(rows, 2, seed=0, progress=False).metrics(intervals=False)
    assert frame["nll"][1] == pytest.approx(expected["nll"].value)
    assert frame["nll_low"][1] < frame["nll"][1] < frame["nll_high"][1]


def test_a_single_process_shows_bars(study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("bayeslora.app.studies.running.settle", lambda *_, bars: seen.append(bars))
    for progress in (True, False):
        Study(study(), tmp_path / "out").run(progress=progress)
    assert seen == [True, False]


def test_what_was_taken_for_what_is_said_once(
    study: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study(methods=["quick"], seeds=[0, 1])
    monkeypatch.setattr(
        "bayeslora.app.runs._chosen", lambda *_: ["Rows have up to 16 tokens.", "The observation is x."]
    )
    run(made, tmp_path / "quiet")
    assert "tokens" not in capsys.readouterr().err
    Study(made, tmp_path / "out").run()
    told = capsys.readouterr().err
    assert told.count("Rows have up to 16 tokens.") == told.count("The observation is x.") == 1


def test_some_rows_are_the_same_for_all(study: Made, tmp_path: Path) -> None:
    """And whoever asks for all has the predictions that there are."""
    whole = run(study(), tmp_path / "out")
    some = run(study(evaluation={"split": "heldout", "draws": 2, "rows": 7}), tmp_path / "out")
    loaded = {}
    for target in some.targets:
        entry = target.candidates[0].entry
        loaded[target.method, target.seed] = Prediction.load(some.results.prediction(entry.cell, entry.evaluations[""]))
    assert {len(each) for each in loaded.values()} == {7}
    for seed in (0, 3):  # rows that are held out differ with the seed
        assert torch.equal(loaded["quick", seed].labels, loaded["wide", seed].labels)
    task = study()["tasks"]["demo"]
    few = study(tasks={"demo": {"task": task, "rows": "7"}}, evaluation={"split": "heldout", "draws": 2})
    assert [each.candidates[0].entry for each in Study(few).targets] == [
        each.candidates[0].entry for each in some.targets
    ]
    more = run(study(tasks={"demo": {"task": task, "rows": 50}}), tmp_path / "out")
    assert list(more.frame()["nll"]) == list(whole.frame()["nll"]) != list(some.frame()["nll"])


def test_what_is_done_is_not_done_again(study: Made, tmp_path: Path, fits: Lines) -> None:
    before = table(run(study(), tmp_path / "out"))
    cells = tmp_path / "out" / "cells"
    times = {path: path.stat().st_mtime_ns for path in cells.rglob("*") if path.is_file()}
    assert table(run(study(), tmp_path / "out")) == before
    more = run(study(methods=["quick"], seeds=[0, 4], evaluation={"split": "train", "draws": 3}), tmp_path / "out")
    assert len(fits()) == 5  # the new seed alone
    assert set(more.frame()["state"]) == {"done"}
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_fit_starts_from_the_run_that_another_method_has(study: Made, tmp_path: Path, fits: Lines) -> None:
    methods = {"quick": {}, "around": {"backend": "quick", "start": "quick", "settings": {"learning_rate": 0.0}}}
    found = run(study(methods=methods, seeds=[0]), tmp_path / "out")
    assert fits() == ["quick 0 0.001 False", "quick 0 0.0 True"]
    first, around = (bl.load(found.results.at(cell)) for cell in found.cells)
    for name, value in around.mean().items():
        torch.testing.assert_close(value, first.mean()[name])
    assert list(found.frame()["fit_seconds"]) == [1.5, 3.0]  # as if it were alone


@pytest.mark.parametrize(("backend", "said"), [("hungry", "MemoryError: no room"), ("diverging", "TrainingError: The")])
def test_a_failing_cell_is_recorded_and_does_not_stop_the_rest(
    backend: str, said: str, study: Made, tmp_path: Path, fits: Lines
) -> None:
    methods = {backend: {}, "around": {"backend": "quick", "start": backend}, "quick": {}}
    found = run(study(methods=methods), tmp_path / "out")
    frame = found.frame()
    assert list(frame["state"]) == ["failed", "failed", "done"] * 2
    assert all(frame["error"][frame["method"] != "quick"].str.startswith(said)) and len(fits()) == 2
    error = json.loads((found.results.at(found.cells[0]) / "error.json").read_text())
    assert "backends.py" in error["traceback"] and "raise" in error["traceback"]


def test_a_task_that_cannot_be_loaded_fails_alone_or_ends_the_study_before_its_fits(
    study: Made, tmp_path: Path, fits: Lines
) -> None:
    """What is wrong with all lines is nothing to record: once it is put right, the same command does them."""
    tasks = study()["tasks"] | {"lost": str(tmp_path / "lost.jsonl")}
    frame = run(study(tasks=tasks, methods=["quick"], seeds=[0]), tmp_path / "some").frame()
    assert list(frame["state"]) == ["done", "failed"] and len(fits()) == 1
    with pytest.raises(DataError, match=r"There is no file .*lost\.jsonl"):
        run(study(tasks={"lost": tasks["lost"]}), tmp_path / "none")
    assert not (tmp_path / "none").exists() and len(fits()) == 1
    write_rows(tmp_path / "split" / "train.jsonl", [{"text": f"soup {n}", "label": n % 2} for n in range(40)])
    write_rows(tmp_path / "split" / "test.jsonl", [{"text": "soup"}])
    own = {"task": str(tmp_path / "split"), "task_settings": {"text": "text", "label": "label"}, "split": "test"}
    with pytest.raises(DataError, match="Split 'test' of task 'split' has no labels"):
        run(study(tasks={"own": own}), tmp_path / "none")
    assert not (tmp_path / "none").exists() and len(fits()) == 1
    methods = {"many": {"backend": "quick", "train_size": 99}, "quick": {}}
    frame = run(study(methods=methods, seeds=[0]), tmp_path / "sizes").frame()
    assert list(frame["state"]) == ["failed", "done"]


def test_what_failed_is_tried_again_on_demand_alone(
    study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: Lines
) -> None:
    from bayeslora.inference import BACKENDS

    made = study(methods=["hungry"], seeds=[0])
    run(made, tmp_path / "out")
    monkeypatch.setattr(BACKENDS["hungry"], "fit", BACKENDS["quick"].fit)
    assert list(run(made, tmp_path / "out").frame()["state"]) == ["failed"]
    found = Study(made, tmp_path / "out").run(retry=True, progress=False)
    assert list(found.frame()["state"]) == ["done"] and len(fits()) == 1


def test_a_prediction_that_fails_leaves_the_fit_and_other_predictions(study: Made, tmp_path: Path) -> None:
    methods = {"quick": {}, "linked": {"backend": "quick", "predict": "probit"}}
    found = run(study(methods=methods, seeds=[0]), tmp_path / "out").frame()
    assert list(found["state"]) == ["done", "failed"]
    assert "probit" in found["error"][1]


def test_settings_are_chosen_by_rows_that_are_held_out(study: Made, tmp_path: Path, fits: Lines) -> None:
    tuning = {"values": {"learning_rate": [30.0, 0.001, 3.0]}}
    made = study(methods=["quick", "diverging"], tuning=tuning, evaluation={"split": "train", "draws": 2})
    found = run(made, tmp_path / "out")
    frame = found.frame()
    chosen = frame[(frame["protocol"] == "chosen") & (frame["method"] == "quick")]
    judged = {}
    for candidate in next(each for each in found.targets if each.protocol == "chosen").candidates:
        assert candidate.trial is not None
        record = found.results.evaluated(candidate.trial.cell, candidate.trial.evaluations[""])
        assert record is not None
        judged[candidate.point["learning_rate"]] = record["metrics"]["nll"]["value"]
    best = min(judged, key=lambda rate: judged[rate])
    assert len(set(judged.values())) == 3 and set(chosen["chosen_learning_rate"]) == {best}
    # As given, one of them a trial; trials; and the best with the other seed.
    assert len(chosen) == 2 and len(fits()) == 2 + 2 + (best != 0.001)
    assert list(chosen["tuning_seconds"] > 3 * 1.5) == [True, True] and set(chosen["fit_seconds"]) == {1.5}
    assert set(frame["state"][frame["method"] == "diverging"]) == {"failed"}


def test_a_trial_that_failed_has_cost_its_time(study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayeslora.inference import BACKENDS

    worked = BACKENDS["quick"].fit

    def fit(self: Any, program: Any, data: Any, run: Any) -> Any:
        if self.learning_rate > 1:
            time.sleep(1.0)
            raise MemoryError
        return worked(self, program, data, run)

    monkeypatch.setattr(BACKENDS["quick"], "fit", fit)
    made = study(methods=["quick"], seeds=[0], tuning={"values": {"learning_rate": [30.0, 0.001]}})
    frame = run(made, tmp_path / "out").frame()
    chosen = frame[frame["protocol"] == "chosen"].iloc[0]
    assert chosen["chosen_learning_rate"] == 0.001
    assert chosen["tuning_seconds"] - chosen["fit_seconds"] - chosen["predict_seconds"] >= 1.0


def test_a_killed_study_goes_on_to_the_same_table(study: Made, tmp_path: Path, fits: Lines) -> None:
    made = study(methods=["quick"], seeds=[0, 1, 2, 3])
    expected = table(run(made, tmp_path / "whole"))
    (tmp_path / "fits").unlink()
    process = FORKED.Process(target=run, args=(made, tmp_path / "out"))
    process.start()
    while len(list((tmp_path / "out").glob("cells/*/evaluations/*.json"))) < 2:
        assert process.is_alive()
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    killed = Study(made, tmp_path / "out")
    left = sum(killed.results.settled(target) == "open" for target in killed.targets)
    done = len(list((tmp_path / "out").glob("cells/*/cell.json")))
    before = len(fits())
    assert 0 < left < 3
    assert table(run(made, tmp_path / "out")) == expected
    assert len(fits()) - before == 4 - done  # a fit that had ended was not done again


def test_two_launchers_share_the_cells(study: Made, tmp_path: Path, fits: Lines) -> None:
    tuning = {"values": {"learning_rate": [30.0, 0.01]}}
    made = study(methods=["quick"], tuning=tuning)
    made["common"]["settings"]["seconds"] = 0.1
    expected = table(run(made, tmp_path / "one"))
    alone = sorted(fits())
    (tmp_path / "fits").unlink()
    processes = [FORKED.Process(target=run, args=(made, tmp_path / "two")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert table(Study(made, tmp_path / "two")) == expected
    assert sorted(fits()) == alone


def test_a_held_cell_is_left_to_its_holder(study: Made, tmp_path: Path) -> None:
    found = Study(study(seeds=[0]), tmp_path / "out")
    results = Results(tmp_path / "out")
    entry = found.targets[0].candidates[0].entry
    from bayeslora.app.studies.running import Performer

    connection, other = FORKED.Pipe()

    def hold() -> None:
        with results.claimed(entry.cell) as held:
            other.send(held)
            other.recv()

    process = FORKED.Process(target=hold)
    process.start()
    assert connection.recv()
    assert not Performer(results).perform(entry) and results.state(entry) == "open"
    with results.left(entry.cell) as held:
        assert not held
    process.kill()
    process.join()
    with results.left(entry.cell) as held:
        assert held
    with results.left(entry.cell) as held:  # it was given back
        assert not held
    assert Performer(results).perform(entry) and results.state(entry) == "done"


def test_a_run_is_a_part_of_those_that_are_over_it(study: Made, tmp_path: Path, fits: Lines) -> None:
    methods = {
        "quick": {},
        "around": {"backend": "quick", "start": "quick", "settings": {"learning_rate": 0.01}},
        "ensemble": {"start": "quick", "settings": {"members": 2}},
        "tempered": {"backend": "temperature", "start": "around"},
        "both": {"backend": "temperature", "start": "ensemble"},
    }
    found = run(study(methods=methods, seeds=[0]), tmp_path / "out")
    frame = found.frame().set_index("method")
    assert list(frame["state"]) == ["done"] * 5, list(frame["error"])
    # The run itself, the one around it, and the second member of the ensemble.
    assert sorted(line.split()[2] for line in fits()) == ["0.001", "0.001", "0.01"]
    # Each as if it were alone; to find a temperature takes some time, too.
    assert list(frame["fit_seconds"])[:3] == [1.5, 3.0, 3.0] and frame["fit_seconds"][3:].between(3.0, 4.4).all()
    assert frame["accuracy"]["tempered"] == frame["accuracy"]["around"]
    assert frame["nll"]["tempered"] <= frame["nll"]["around"] + 1e-4  # fitted on the rows that are evaluated here


def test_a_device_that_no_longer_works_fails_one_cell_alone(
    study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    made = study(methods=["hungry", "quick"], seeds=[0])
    with pytest.raises(RuntimeError, match="device-side"):
        run(made, tmp_path / "out")
    assert list(Study(made, tmp_path / "out").frame()["state"]) == ["failed", "open"]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="`malloc_trim` is glibc's: other systems' allocators offer no such call, and nothing is called there",
)
def test_the_memory_of_a_cell_is_not_counted_in_the_next_one() -> None:
    process = psutil.Process()
    blocks = [torch.ones(2**14) for _ in range(4096)]  # 256 MiB of blocks that the allocator keeps
    last = torch.ones(2**14)
    del blocks
    before = process.memory_info().rss
    _free_memory()
    assert before - process.memory_info().rss > 128 * 2**20 and last.sum() == 2**14
