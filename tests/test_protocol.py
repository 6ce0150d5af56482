"""What every backend, posterior, observation, model and guide has to do: each is tested by being registered."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from causal_scenarios import causal_base
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from scenarios import saved_base

import bayeslora as bl
from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import BACKENDS, POSTERIORS, PRESETS
from bayeslora.models import MODELS
from bayeslora.models.guides import GUIDES
from bayeslora.models.guides.auto import ALIASES
from bayeslora.observations import OBSERVATIONS
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.registry import Registry, load_file
from bayeslora.settings import build
from bayeslora.tasks import Split, Task, TaskSpec

REGISTRIES: list[Registry[Any]] = [BACKENDS, POSTERIORS, MODELS, OBSERVATIONS]


def plugged() -> list[tuple[Registry[Any], str, Any]]:
    """What the plug-ins register."""
    before = [set(registry) for registry in REGISTRIES]
    for path in sorted((Path(__file__).parent / "plugins").glob("*.py")):
        load_file(path)
        sys.modules.pop(path.stem)
    return [
        (registry, name, registry[name])
        for registry, known in zip(REGISTRIES, before, strict=True)
        for name in registry
        if name not in known
    ]


PLUGGED = plugged()
NAMES = {registry.sort: list(registry) for registry in REGISTRIES}
OBSERVED = [(name, kind) for name in OBSERVATIONS for kind in OBSERVATIONS[name].kinds]
CLASSES = [registry[name] for registry in (BACKENDS, MODELS) for name in registry]
for registry, name, _ in PLUGGED:
    del registry._homes[name]


@pytest.fixture(autouse=True)
def plugins() -> Iterator[None]:
    """The plug-ins' names are there for these tests alone."""
    for registry, name, thing in PLUGGED:
        registry.add(name, thing)
    yield
    for registry, name, _ in PLUGGED:
        del registry._homes[name]


#: What makes a fit short, of the settings that a backend has.
QUICK = {"epochs": 1, "batch_size": 6, "draws": 6, "warmup": 4, "thin": 1, "max_tree_depth": 3, "cpu": True}
#: A prior that is tuned on so few rows may have no width.
QUICK |= {"tune": "none"}
#: There are two steps.
QUICK |= {"snapshots": 2, "rank": 2, "collect_from": 0.0}
QUICK |= {"members": 2, "checkpoints": 2, "of_settings": {"epochs": 1, "batch_size": 6, "cpu": True, "warmup": 0.0}}
#: A search over widths looks at one batch.
QUICK |= {"search_rows": 3}
#: Adapters of backends that have one of their own.
ADAPTERS = {"adalora": AdaLoraConfig(init_r=3, target_r=3, lora_alpha=2, target_modules=["query"], total_step=1)}
#: Of a text of one word, attention is what it is whatever the query, and the bridge of no variance is not defined.
TEXTS = ["w3 w9 w5", "w30 w1", "w4 w4 w6", "w12 w2", "w20 w7", "w9 w8 w2 w1", "w8 w3", "w1 w2 w3", "w5 w11"]
TASKS = {
    "classification": (TaskSpec("counting", labels=("none", "one", "more")), {"text": TEXTS, "label": [0, 1, 2] * 3}),
    "regression": (TaskSpec("rating", "regression"), {"text": TEXTS, "label": [0.5, -1.0, 2.0] * 3}),
    "multiple-choice": (
        TaskSpec("quiz", "multiple-choice", ("text",), "label", ("A", "B", "C"), choices=("choices",)),
        {"text": TEXTS, "label": [0, 1, 1] * 3, "choices": [["w1", "w2 w3"], ["w4", "w5", "w6 w7"], ["w8", "w9"]] * 3},
    ),
    "completion": (
        TaskSpec("pairs", "completion", ("prompt",), completion=" {completion}"),
        {"prompt": TEXTS, "completion": ["w1", "w2 w3", "w4 w5 w6"] * 3},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"), dropout=0.1)


def rows(kind: str) -> Split:
    spec, columns = TASKS[kind]
    return Split(Dataset.from_dict(columns), spec)


def program(
    base: Path,
    kind: str = "classification",
    model: str = "gaussian",
    observation: str | None = None,
    model_settings: Mapping[str, Any] = MappingProxyType({}),
    lora: PeftConfig | None = None,
) -> Program:
    causal = observation is not None and OBSERVATIONS[observation].causal
    lora = lora or LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj" if causal else "query"])
    task = Task(TASKS[kind][0], train=rows(kind))
    settings = {"lora": lora, "model": bl.models.build(model, **model_settings), "observation": observation}
    return Program.from_pretrained(causal_base() if causal else base, task, max_length=64 if causal else 16, **settings)


def quick(backend: str) -> dict[str, Any]:
    known = {field.name for field in fields(BACKENDS[backend])}
    found = {name: value for name, value in QUICK.items() if name in known}
    found |= {"epochs": 2} if "checkpoints" in known else {}
    return found | ({"warmup": 0.0} if "schedule" in known else {})


def fitted(base: Path, backend: str = "map", kind: str = "classification", **settings: Any) -> Posterior:
    of_program = {name: settings.pop(name) for name in ("model", "observation") if name in settings}
    of_program["lora"] = ADAPTERS.get(backend)
    return bl.fit(program(base, kind, **of_program), rows(kind), backend, progress=False, **quick(backend) | settings)


def outputs(posterior: Posterior, kind: str = "classification", **settings: Any) -> torch.Tensor:
    return posterior.predict(rows(kind), 3, progress=False, **settings).outputs


def keeps_the_protocol(posterior: Posterior, folder: Path, kind: str = "classification") -> None:
    """Predict, save, load, and be diagnosed."""
    found = outputs(posterior, kind)
    assert torch.equal(found, outputs(posterior, kind))
    for name, predictor in posterior.predictors.items():
        try:
            each = outputs(posterior, kind, method=name)
        except PosteriorError as error:
            assert name in str(error)
            continue
        if predictor.by_draws or posterior.chains[0].kind != "noisy-passes":  # whose noise is a row's own
            # Sums in another order: single precision, which a softmax and an average leave as it is.
            torch.testing.assert_close(outputs(posterior, kind, method=name, batch_size=2), each, rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    posterior.save(folder)
    loaded = bl.load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.record == posterior.record and type(loaded) is type(posterior)
    assert torch.equal(outputs(loaded, kind), found)
    assert torch.equal(outputs(posterior, kind), found)  # saving touches nothing
    by_draws = any(each.by_draws for each in posterior.predictors.values())
    try:
        draw, again = (next(iter(each.draws(1, seed=4))) for each in (posterior, loaded))
    except PosteriorError as error:
        assert not by_draws and "not a distribution over weights" in str(error)
        draw = again = posterior.mean()
    assert all(torch.equal(draw[name], again[name]) for name in draw)
    if posterior.dense:
        assert torch.equal(posterior.log_prob(draw), loaded.log_prob(draw))
    else:
        with pytest.raises((PosteriorError, TypeError)):
            posterior.log_prob(draw)
    data = posterior.to_inference_data(rows(kind), draws=3, prior_draws=2, progress=False)
    assert ("posterior" in data) == by_draws and "log_likelihood" in data
    assert len(repr(posterior).splitlines()) == 1


@pytest.mark.parametrize("backend", NAMES["backend"])
def test_backends(base: Path, tmp_path: Path, backend: str) -> None:
    posterior = fitted(base, backend)
    assert posterior.record.backend == backend and posterior.record.finished and POSTERIORS[posterior.kind]
    keeps_the_protocol(posterior, tmp_path / "saved")
    assert torch.equal(outputs(fitted(base, backend)), outputs(posterior))  # by the seed
    other = fitted(base, backend, seed=1) if "seed" not in quick(backend) else posterior
    assert not torch.equal(outputs(other), outputs(posterior))


@pytest.mark.parametrize("backend", NAMES["backend"])
def test_mixtures(base: Path, tmp_path: Path, backend: str) -> None:
    keeps_the_protocol(fitted(base, backend, chains=2), tmp_path / "saved")


@pytest.mark.parametrize(("name", "kind"), OBSERVED)
def test_observations(base: Path, tmp_path: Path, name: str, kind: str) -> None:
    posterior = fitted(base, "svi", kind, observation=name)
    keeps_the_protocol(posterior, tmp_path / "saved", kind)
    found = posterior.predict(rows(kind), 3, progress=False)
    assert found.metrics(intervals=False)["nll"].value == pytest.approx(-float(found.log_predictive_density.mean()))
    assert len(found.to_pandas()) == len(TEXTS)
    observation = posterior.program.observation
    assert bl.observations.build(observation.to_dict()) == observation
    with pytest.raises(bl.errors.DataError, match="Row 1"):
        observation.check([1, "no label"])


@pytest.mark.parametrize("name", NAMES["model"])
def test_models(base: Path, tmp_path: Path, name: str) -> None:
    posterior = fitted(base, "svi", model=name)
    keeps_the_protocol(posterior, tmp_path / "saved")
    model, sites = posterior.program.model, posterior.program.sites
    assert set(model.initial(sites)) >= model.stochastic(sites)
    assert set(model.weights(model.initial(sites))) == {site.name for site in sites}
    assert set(posterior.prior_draw()) >= {site.name for site in sites}


@pytest.mark.parametrize("guide", ["structured", "delta", *ALIASES, *GUIDES])
def test_guides(base: Path, tmp_path: Path, guide: str) -> None:
    keeps_the_protocol(fitted(base, "svi", guide=guide), tmp_path / "saved")


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets(base: Path, tmp_path: Path, name: str) -> None:
    found = bl.preset(name)
    assert found.name == name and found.paper and found.note
    program_of_preset = program(base, model=found.model, model_settings=found.model_settings)
    backend = found.build_backend(**quick(found.backend))
    data, run = rows("classification"), tmp_path / "run"  # a folder, so that checkpoints are written
    posterior = bl.fit(program_of_preset, data, backend, output_dir=run, progress=False)
    keeps_the_protocol(posterior, tmp_path / "saved")


@pytest.mark.parametrize("cls", CLASSES)
def test_wrong_settings(cls: type) -> None:
    with pytest.raises(SettingError, match="Unknown"):
        build(cls, {"no_such_setting": 1})
    numbers = [field.name for field in fields(cls) if field.type in ("float", "int")]
    for name in numbers:
        with pytest.raises(SettingError):
            build(cls, {name: "no number"})
