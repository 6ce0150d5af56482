"""What a fit takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
from scenarios import tiny_rows, untrained_program

from bayeslora.inference import fit, fitting
from bayeslora.inference.base import Run
from bayeslora.inference.variational.point import MLE
from bayeslora.posterior import Posterior


@dataclass(frozen=True)
class Said(MLE):
    """Says itself what it takes."""

    name: ClassVar[str] = "said"
    took: ClassVar[dict[str, float]] = {}

    def fit(self, program: Any, data: Any, run: Run) -> Posterior:
        """Plain LoRA."""
        found = super().fit(program, data, run)
        found.record = replace(found.record, cost=dict(self.took))
        return found


def test_what_a_backend_says_itself_is_kept_but_for_what_was_more(monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows = untrained_program(), tiny_rows(8)
    weights = sum(site.initial.numel() for site in program.sites)
    own = fit(program, rows, Said(epochs=1), progress=False).cost
    assert own["seconds"] > 0 and own["peak_memory_bytes"] > 2**26
    assert own["parameters"] == weights and own["extra_parameters"] == 0
    more = {"seconds": 1e4, "peak_memory_bytes": 1.0, "parameters": 3.0, "extra_parameters": -2.0, "flops": 1e9}
    monkeypatch.setattr(Said, "took", more)
    found = fit(program, rows, Said(epochs=1), progress=False).cost
    assert found.pop("peak_memory_bytes") > 2**26
    assert found == {name: value for name, value in more.items() if name != "peak_memory_bytes"}


def test_the_peak_is_forgotten_before_each_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(fitting, "reset_peak", lambda: happened.append("forgotten"))
    again = MLE.fit
    monkeypatch.setattr(MLE, "fit", lambda *given: happened.append("fitted") or again(*given))
    fit(untrained_program(), tiny_rows(8), "mle", chains=2, epochs=1, progress=False)
    assert happened == ["forgotten", "fitted"] * 2
