from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bayeslora.app.config import LoraSettings, RunConfig, read_config
from bayeslora.app.resolving import differences, resolve
from bayeslora.errors import SettingError
from bayeslora.inference import PRESETS, Preset


def test_resolving_gives_every_value_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network").mkdir()
    (tmp_path / "data").mkdir()
    flags = {"base": "network", "task": "mrpc", "data_dir": "data"}
    typed = ["epochs=2", "learning_rate=1e-3", "model.components=2", "model.nu=none"]
    config = resolve(read_config(None, flags, [*typed, "task.labels=no,yes", "task.text={a}, {b}"]))
    assert config.base == str(tmp_path / "network") and config.data_dir == str(tmp_path / "data")
    assert config.settings == {"epochs": 2.0, "learning_rate": 1e-3}
    assert config.model_settings == {"components": 2, "nu": None}
    assert config.task_settings == {"labels": ["no", "yes"], "text": "{a}, {b}"}
    assert resolve(config) == config


def test_a_backend_may_have_a_model_of_its_own_by_default() -> None:
    around_zero = {"sites": "both", "centre": "zero", "deviation": 0.1}

    def found(**fields: Any) -> tuple[str | None, dict[str, Any]]:
        config = resolve(RunConfig(base="demo", task="demo", **fields))
        return config.model, config.model_settings

    assert found(backend="svi") == ("monteclora", {})
    assert found(backend="laplace") == ("gaussian", around_zero)
    assert found(backend="laplace", model="gaussian", model_settings={"deviation": 1.0}) == (
        "gaussian",
        around_zero | {"deviation": 1.0},
    )
    assert found(backend="laplace", model="monteclora") == ("monteclora", {})


def test_a_preset_is_of_the_backend_and_model_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Preset(name="a", paper="", settings={"epochs": 2.0}, model_settings={"deviation": 0.1, "sites": "both"})
    monkeypatch.setattr(PRESETS, "_homes", {"a": whole})

    def found(**fields: Any) -> tuple[Any, ...]:
        config = resolve(RunConfig(base="demo", task="demo", preset="a", **fields))
        assert resolve(config) == config
        return config.backend, config.settings, config.model, config.model_settings

    of_model = {"deviation": 0.1, "sites": "both"}
    assert found() == ("svi", {"epochs": 2.0}, "gaussian", of_model)
    assert found(settings={"batch_size": "8"}) == ("svi", {"epochs": 2.0, "batch_size": 8}, "gaussian", of_model)
    assert found(backend="map") == ("map", {}, "gaussian", of_model)
    assert found(model="monteclora") == ("svi", {"epochs": 2.0}, "monteclora", {})
    assert found(model_settings={"sites": "A"}) == ("svi", {"epochs": 2.0}, "gaussian", of_model | {"sites": "A"})


@pytest.mark.parametrize(
    ("flags", "assignments", "message"),
    [
        ({"modle": "x"}, [], "Unknown setting of a run 'modle'. Did you mean 'model'"),
        ({}, ["epochs"], "Cannot read the setting 'epochs': expected key=value"),
        ({}, ["modle.nu=3"], "Unknown prefix of a setting 'modle'. Did you mean 'model'"),
        ({}, ["lora.rank=3"], "Unknown setting of lora 'rank'"),
        ({}, ["guide.spread=3"], "guide='structured' has no settings, found spread"),
        ({"backend": "map"}, ["guide.spread=3"], "Unknown setting of map 'guide_settings'"),
        ({"backend": "temperature"}, ["of=svi", "of.epocs=3"], "Unknown setting of svi 'epocs'"),
        ({"backend": "temperature"}, ["of=swi"], "Unknown backend 'swi'"),
        ({}, ["lora=dorra"], "Unknown way to fine-tune 'dorra'. Did you mean 'dora'?"),
        ({}, ["lora=ia3", "lora.r=4"], "'ia3' has no r, found lora.r=4"),
        ({"preset": "a"}, [], "Unknown preset 'a'"),
        ({}, ["lora.r=0"], "lora: r should be greater than or equal to 1, found '0'"),
        ({}, ["lora.dropout=1"], "lora: dropout should be less than 1"),
        ({"seed": "x"}, [], "a run: seed should be a valid integer"),
        ({}, ["epcohs=1"], "Unknown setting of svi 'epcohs'. Did you mean 'epochs'"),
        ({}, ["epochs=many"], "svi: epochs should be a valid number"),
        ({}, ["model.component=1"], "Unknown setting of monteclora 'component'. Did you mean 'components'"),
        ({}, ["task.lable=y"], "Unknown setting of a task 'lable'. Did you mean 'label'"),
        ({}, ["task.seed=1"], "Unknown setting of a task 'seed'"),
        ({"backend": "sv1"}, [], "Unknown backend 'sv1'. Did you mean 'svi'"),
        ({"model": "montecarlo"}, [], "Unknown model 'montecarlo'. Did you mean 'monteclora'"),
        ({"base": "./missing"}, [], "There is no base network './missing'"),
        ({}, ["network.name=other"], "The name of the network is that of the base"),
        ({}, ["network.quantisation=2bit"], "quantisation"),
        ({"data_dir": "missing"}, [], "There is no data folder 'missing'"),
    ],
)
def test_mistakes_are_named(flags: dict[str, str], assignments: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve(read_config(None, {"base": "demo", "task": "demo"} | flags, assignments))


def test_differences_name_the_fields() -> None:
    one = RunConfig("demo", "demo", settings={"epochs": 1.0}, output="a")
    assert differences(one, RunConfig("demo", "demo", settings={"epochs": 1.0}, output="b")) == []
    other = RunConfig("demo", "demo", settings={"batch_size": 8}, lora=LoraSettings(r=4))
    assert differences(one, other) == [
        "lora.r: 8 and 4",
        "settings.epochs: 1.0 and default",
        "settings.batch_size: default and 8",
    ]
