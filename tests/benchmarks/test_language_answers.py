"""The study of GSM8K: every arm answers, at the rate that held-back rows like best, and nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from causal_scenarios import causal_base


@pytest.mark.slow
def test_all_arms_answer(
    benchmarks: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, output, results = benchmarks.language_answers, tmp_path / "runs", tmp_path / "answers.json"
    monkeypatch.setattr(study, "TOKENS", 4)
    monkeypatch.setattr(study, "PROMPT", "Which is good?")
    (tmp_path / "gsm8k").mkdir()
    for split, size in (("train", 60), ("test", 6)):
        rows = [{"question": "Which is good?", "answer": f"the sun #### {number % 3}"} for number in range(size)]
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    command = ["run", "--base", str(causal_base()), "--data-dir", str(tmp_path), "--output", str(output), "--quick"]
    study.main(command)
    assert "finished before" not in capsys.readouterr().out
    study.main(command)
    tried = sum(len(rates) for rates in study.RATES.values())
    assert capsys.readouterr().out.count("finished before") == tried + len(study.ARMS)
    study.main(["report", "--output", str(output), "--results", str(results)])
    kept = json.loads(results.read_text(encoding="utf-8"))
    assert {record["run"]["backend"] for record in kept} == set(study.ARMS)
    for record in kept:
        found = record["arms"][record["run"]["backend"]]
        assert found["perplexity"]["value"] > 1 and 0 <= found["strict"]["value"] <= 1
        assert len(record["example"]["texts"]) == study.SAMPLES
    # The rate is that at which held-back rows are predicted best.
    tried_at = {
        rate: json.loads((output / f"{study.run_of('svi', rate, study.RATE).name}.json").read_text(encoding="utf-8"))
        for rate in study.RATES["svi"]
    }
    best = min(tried_at, key=lambda rate: tried_at[rate]["arms"]["svi"]["nll"]["value"])
    assert next(each["run"]["learning_rate"] for each in kept if each["run"]["backend"] == "svi") == best
