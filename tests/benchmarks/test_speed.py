"""Benchmarks of speed and memory, beside other packages too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("shape", ["minilm", "llama-1b"])
def test_speed_times_all_steps(
    benchmarks: SimpleNamespace, shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "speed.json"
    extra = ["--gradient-checkpointing"] if shape == "llama-1b" else []
    benchmarks.speed.main(["--quick", "--no-memory", "--shape", shape, "--results", str(results), *extra])
    (measured,) = json.loads(results.read_text(encoding="utf-8")).values()
    found = measured["results"]["4x8"]
    assert set(found["seconds"]) == set(found["milliseconds_beyond"]) == {"lora", "monteclora", "svi"}
    assert found["milliseconds_beyond"]["lora"] == 0
    assert len(measured["verdicts"]) == 1
    assert "bayeslora svi" in capsys.readouterr().out


def test_speed_times_every_family_as_it_is_fitted(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    results = tmp_path / "speed.json"
    families = list(benchmarks.speed_arms.FAMILIES)
    benchmarks.speed.main(["--quick", "--no-memory", "--results", str(results), "--arms", "lora", "--families"])
    (name,) = measured = json.loads(results.read_text(encoding="utf-8"))
    assert name == "cpu tiny families" and set(measured[name]["results"]["4x8"]["seconds"]) == {"lora", *families}


def test_a_step_of_a_family_is_that_of_its_backend(benchmarks: SimpleNamespace) -> None:
    """Its objective and optimiser; the noise of `svi` has full width, as it has after its warm-up."""
    arms, speed = benchmarks.speed_arms, benchmarks.speed
    options = speed.parse(["--quick"])
    composed = {}
    for name in ("svi", "ivon-lora"):
        wrapped = arms.adapted(speed.network(options), name, options)
        composed[name] = arms._composed(arms.OURS[name], wrapped)
    assert type(composed["ivon-lora"].optimiser).__name__ == "OnlineNewton"
    assert composed["svi"].objective.estimator.share == 1 and composed["svi"].objective.size == 1000
    # Means, what shapes the noise, and points: 0.24 over the 320 steps of ten epochs.
    assert [group["lr"] for group in composed["svi"].optimiser.param_groups] == [5e-4, 1e-2, 7.5e-4]


@pytest.mark.slow
def test_speed_measures_memory_in_processes_of_their_own(tmp_path: Path) -> None:
    results = tmp_path / "speed.json"
    command = [sys.executable, str(FOLDER / "speed.py"), "--quick", "--results", str(results)]
    subprocess.run(command, check=True, capture_output=True)
    (measured,) = json.loads(results.read_text(encoding="utf-8")).values()
    assert all(size > 0 for size in measured["results"]["4x8"]["bytes"].values())


def test_peers_measures_ours_and_says_which_peers_failed(
    benchmarks: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("laplace", "bayesian_lora"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, module, None)
    results = tmp_path / "peers.json"
    benchmarks.peers.main(["--quick", "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    ours = {"map", "fit", "plain", "predict", "predict-small"}
    assert {name for name, found in kept["results"].items() if "error" not in found} == ours
    assert all(found["seconds"] > 0 and found["bytes"] > 0 for name, found in kept["results"].items() if name in ours)
    assert [verdict["met"] for verdict in kept["verdicts"]].count(None) == 6 + 7
    printed = capsys.readouterr().out
    assert "failed: ModuleNotFoundError" in printed and "- not judged: GGN" in printed


def test_peers_agree(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("laplace")
    results = tmp_path / "peers.json"
    names = [*benchmarks.peers.AGREEMENTS]
    benchmarks.peers.main(["--quick", "--results", str(results), "--parts", *names])
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert [verdict["met"] for verdict in kept["verdicts"]][:6] == [True] * 6


def test_peers_are_measured(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("laplace")
    pytest.importorskip("bayesian_lora")
    results = tmp_path / "peers.json"
    benchmarks.peers.main(["--quick", "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert not [name for name, found in kept["results"].items() if "error" in found]
    assert None not in [verdict["met"] for verdict in kept["verdicts"]]


def test_peers_stops_a_part_that_takes_too_long(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    results = tmp_path / "peers.json"
    command = ["--base", "none", "--parts", "plain", "--time-limit", "0.01", "--results", str(results)]
    benchmarks.peers.main(command)
    kept = json.loads(results.read_text(encoding="utf-8"))["results"]["plain"]
    assert kept["error"] == "stopped after 0.01 s"
    assert len(kept["runs"]) == 1


@pytest.mark.slow
def test_peers_measures_in_processes_of_their_own(
    benchmarks: SimpleNamespace, base: Path, data: Path, tmp_path: Path
) -> None:
    results = tmp_path / "peers.json"
    command = ["--base", str(base), "--task", "sst2", "--data-dir", str(data), "--results", str(results)]
    command += ["--rows", "16", "--test-rows", "8", "--rank", "2", "--batch-size", "8", "--repeats", "2"]
    benchmarks.peers.main([*command, "--parts", "map", "fit"])
    kept = json.loads(results.read_text(encoding="utf-8"))["results"]
    assert [len(kept[name]["runs"]) for name in ("map", "fit")] == [2, 2]
    assert kept["fit"]["seconds_per_row"] == pytest.approx(kept["fit"]["seconds"] / 16)
    # A process that fails says why.
    benchmarks.peers.main([*command[2:], "--base", str(tmp_path / "none"), "--parts", "map"])
    assert "none" in json.loads(results.read_text(encoding="utf-8"))["results"]["map"]["error"]


def test_peers_verdicts(benchmarks: SimpleNamespace) -> None:
    def figures(seconds: float, size: float) -> dict[str, float]:
        return {"seconds_per_row": seconds, "bytes": size}

    found = {
        "map": figures(1.0, 100.0),
        "fit": figures(1.1, 110.0),
        "laplace-torch-fit-asdl": figures(1.0, 1100.0),
        "bayesian-lora-fit": {"error": "MemoryError"},
    }
    judged = {verdict["target"]: verdict["met"] for verdict in benchmarks.peers.verdicts(found)}
    assert judged["time of a fit at most 1.15 of an epoch's"] is True
    assert judged["memory of a fit at most 1.05 of an epoch's"] is False
    assert judged["10 times faster or smaller than laplace-torch: fit, asdl"] is True
    assert judged["10 times faster or smaller than bayesian-lora: fit"] is None


def test_overhead_is_measured(benchmarks: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "overhead.json"
    benchmarks.overhead.main(["--quick", "--share", "0.01", "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert kept["train_rows"] == 37 and kept["validation_rows"] == 4 and kept["bytes"] > 0
    assert kept["ratio"] == pytest.approx(kept["seconds"]["to_inference_data"] / kept["seconds"]["epoch"])
    assert "file, MiB" in capsys.readouterr().out
