"""What is fitted, saved or loaded changes nothing that another fit or posterior sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import lora_regression, tiny_method, tiny_program, tiny_rows

from bayeslora.errors import AdapterError
from bayeslora.inference import BACKENDS, fit, load
from bayeslora.inference.base import Run
from bayeslora.models import Gaussian
from bayeslora.posterior import Posterior
from bayeslora.program import Program

ROWS = tiny_rows(8)
SETTINGS: dict[str, dict[str, Any]] = {
    "laplace": {"mode": "given", "tune": "none"},
    "nuts": {"draws": 4, "warmup": 1, "max_tree_depth": 1},
    "swag": {"epochs": 2, "snapshots": 2, "rank": 2, "collect_from": 0.0},
    **dict.fromkeys(("sgld", "sghmc"), {"draws": 2, "warmup": 0, "thin": 1}),
    "checkpoint-ensemble": {"epochs": 2, "checkpoints": 2},
    "ensemble": {"members": 2, "of_settings": {"epochs": 1}},
    "temperature": {"of_settings": {"epochs": 1}, "heldout": tiny_rows(4, seed=1)},
}


def fitted(program: Program, backend: str, **settings: Any) -> Posterior:
    return fit(program, ROWS, backend, progress=False, **(SETTINGS.get(backend, {"epochs": 1}) | settings))


def outputs(posterior: Posterior) -> torch.Tensor:
    return posterior.predict(ROWS, draws=2, progress=False).outputs


def program() -> Program:
    return tiny_program(Gaussian(deviation=0.1), targets=["query"])


def test_no_backend_sees_what_another_did(tmp_path: Path) -> None:
    backends = [backend for backend in BACKENDS if backend != "adalora"]  # which has an adapter of its own
    alone = {backend: outputs(fitted(program(), backend)) for backend in backends}
    here = program()
    network = {name: value.clone() for name, value in here.network.state_dict().items()}
    posteriors = {}
    for backend in backends:
        posteriors[backend] = fitted(here, backend)
        assert torch.equal(outputs(posteriors[backend]), alone[backend]), backend
        posteriors[backend].save(tmp_path / backend)
    for backend, posterior in posteriors.items():
        assert torch.equal(outputs(load(tmp_path / backend, program=here)), alone[backend]), backend
        assert torch.equal(outputs(posterior), alone[backend]), backend
    assert all(torch.equal(value, network[name]) for name, value in here.network.state_dict().items())


def test_saving_puts_the_network_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = program()
    network = {name: value.clone() for name, value in here.network.state_dict().items()}
    posterior = fitted(here, "mle")

    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(here.network), "save_pretrained", failing)
    with pytest.raises(OSError, match="no space"):
        posterior.save(tmp_path / "posterior")
    assert all(torch.equal(value, network[name]) for name, value in here.network.state_dict().items())


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_backend_starts_where_it_is_told(backend: str) -> None:
    here = tiny_method("adalora") if backend == "adalora" else program()
    start = fitted(here, "mle", learning_rate=1e-2, epochs=4)
    rates = {name: 1e-9 for name in BACKENDS[backend].__dataclass_fields__ if name.endswith("learning_rate")}
    still = {} if backend == "laplace" else rates  # which learns nothing there
    still = {"step_size": 1e-12} if backend.startswith("sg") else still
    if "of_settings" in BACKENDS[backend].__dataclass_fields__:
        still = {"of_settings": {"epochs": 1, "learning_rate": 1e-9}}
    if backend == "nuts":
        still = {"max_tree_depth": 1, "target_accept": 0.99}
    found, without = (fitted(here, backend, start=given, **still).mean() for given in (start, None))
    far, near = (
        float((mean["head.classifier.weight"] - start.mean()["head.classifier.weight"]).norm())
        for mean in (without, found)
    )
    assert near < far if backend == "nuts" else near < 1e-4 < far


def test_weights_to_start_from_are_where_the_program_is() -> None:
    # The posterior that they are the mean of may be on another device.
    here = program()
    run = Run(start={site.name: site.initial.clone() for site in here.sites})
    here.to("meta")
    assert {site.start.device.type for site in run.sites(here)} == {"meta"}


def test_a_start_of_another_network_is_refused() -> None:
    other = lora_regression().program
    start = fit(other, lora_regression().rows, "mle", epochs=1, progress=False)
    with pytest.raises(AdapterError, match="weights do not fit the network"):
        fitted(program(), "mle", start=start)


class Told(Exception):
    """Where a program was to go."""


@pytest.mark.parametrize("backend", ["laplace", "sgld"])
@pytest.mark.parametrize(("cpu", "gpu", "where"), [(True, True, "cpu"), (False, True, "cuda"), (False, False, "cpu")])
def test_a_fit_stays_on_the_cpu_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, backend: str, cpu: bool, gpu: bool, where: str
) -> None:
    def told(_: Program, device: str) -> None:
        raise Told(device)

    here = program()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(Program, "to", told)
    with pytest.raises(Told, match=where):
        fitted(here, backend, cpu=cpu)
