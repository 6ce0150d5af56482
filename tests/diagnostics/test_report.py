from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scenarios import lora_regression, saved_base, text_program, text_rows

from bayeslora.diagnostics import diagnose, read
from bayeslora.errors import PosteriorError
from bayeslora.inference import fit
from bayeslora.models import Gaussian

SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"epochs": 2, "batch_size": 4},
    "svi": {"epochs": 8, "batch_size": 4, "log_every": 1},
    "laplace": {"epochs": 2, "batch_size": 4},
    "sgld": {"draws": 30, "warmup": 1, "thin": 1},
}


@pytest.mark.parametrize("backend", SETTINGS)
def test_a_diagnosis_of_every_posterior(backend: str, tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"), Gaussian(deviation=0.1))
    rows = text_rows(12)
    posterior = fit(program, rows, backend, progress=False, **SETTINGS[backend])
    found = diagnose(posterior, text_rows(9), rows, text_rows(7), draws=30, progress=False)
    found.save(tmp_path / "out", "of a test")
    text = (tmp_path / "out" / "diagnosis.md").read_text()
    figures = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert text.startswith("# of a test\n") and "What are the probabilities worth?" in text
    assert {"accuracy", "nll", "ece_15", "aurc", "auroc_entropy", "prior_confidence"} <= set(figures)
    random, dense = backend != "map", backend in ("svi", "laplace")
    assert ("khat" in figures) == dense and ("elpd_loo" in figures) == random
    assert ("rhat_largest" in figures) == (backend == "sgld")
    assert ("has come to rest" in text or "still falls" in text) == (backend == "svi")
    assert ("which leave no row out" in text) == (backend in ("svi", "laplace"))
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == set(found.pictures) and all(f"![{name}]({name}.png)" in text for name in pictures)
    assert {"reliability", "classes", "risk", "uncertainty", "shift", "prior_predictive"} <= pictures
    assert read(tmp_path / "out" / "posterior.nc").attrs["backend"] == backend


def test_without_the_training_rows(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"))
    posterior = fit(program, text_rows(12), "svi", progress=False, epochs=1)
    found = diagnose(posterior, text_rows(9), draws=30, progress=False)
    sentences = [sentence for sentences in found.verdicts.values() for sentence in sentences]
    assert "k-hat is left out: the training rows are not there." in sentences
    assert any("Leave-one-out is left out" in sentence for sentence in sentences)


def test_blocks_when_asked_for(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path / "base"))
    rows = text_rows(12)
    posterior = fit(program, rows, "svi", progress=False, epochs=1)
    found = diagnose(posterior, rows, rows, draws=30, block_draws=30, progress=False)
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} <= set(found.figures["khat_by_block"])


def test_real_labels_are_refused() -> None:
    known = lora_regression()
    posterior = fit(known.program, known.rows, "svi", progress=False, epochs=1)
    with pytest.raises(PosteriorError, match="A diagnosis is of class probabilities"):
        diagnose(posterior, known.rows, progress=False)
