from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bayeslora.app.config import LoraSettings, RunConfig, assign, read_config
from bayeslora.errors import SettingError


def test_a_way_to_fine_tune_is_a_word(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: demo\ntask: demo\nlora: dora\n")
    assert read_config(path, {}, ["lora.r=4"]).lora == LoraSettings(method="dora", r=4)
    assert assign({}, ["lora.r=4", "lora=dora"]) == {"lora": {"r": "4", "method": "dora"}}
    assert RunConfig.from_dict({"base": "demo", "task": "demo", "lora": "full"}).lora.to_peft() is None


def test_file_then_flags_then_assignments(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: demo\ntask: demo\nseed: 3\nlora: {r: 4}\nsettings: {epochs: 2, batch_size: 8}\n")
    flags = {"seed": 5, "backend": "map", "task": None}
    assignments = ["epochs=7", "lora.alpha=32", "model.components=2", "task.label=answer"]
    config = read_config(path, flags, assignments)
    assert config == RunConfig(
        base="demo",
        task="demo",
        backend="map",
        seed=5,
        lora=LoraSettings(r=4, alpha=32),
        settings={"epochs": "7", "batch_size": 8},
        model_settings={"components": "2"},
        task_settings={"label": "answer"},
    )


def test_values_may_hold_equals_signs_and_dots() -> None:
    assert assign({}, ["a=b=c.d"]) == {"settings": {"a": "b=c.d"}}
    nested = assign({}, ["of=ensemble", "of.of=svi", "of.of.guide.flow=true", "of.members=3", "model.of.a=1"])
    inner = {"of": "svi", "of_settings": {"guide_settings": {"flow": "true"}}, "members": "3"}
    assert nested == {"settings": {"of": "ensemble", "of_settings": inner}, "model_settings": {"of.a": "1"}}


def test_yaml_and_json_give_the_same_configuration_back(tmp_path: Path) -> None:
    lora = LoraSettings(target_modules=("query", "value"))
    config = RunConfig("demo", "demo", lora=lora, settings={"learning_rate": 1e-5, "epochs": 1.0}, output="é")
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml") == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert yaml.safe_load(config.to_yaml())["lora"]["target_modules"] == ["query", "value"]


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Cannot read the configuration .*missing.yaml: No such file"):
        read_config(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(SettingError, match="broken.yaml is no YAML file"):
        read_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(SettingError, match="holds a list, expected key: value"):
        read_config(tmp_path / "list.yaml")
    with pytest.raises(SettingError, match="a run needs a value for base, task"):
        read_config()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", "all-linear"),
        ("query", {"query"}),
        (("query", "value"), {"query", "value"}),
        (r".*\.(query|value)", r".*\.(query|value)"),
    ],
)
def test_lora_settings_become_those_of_peft(targets: str | tuple[str, ...], expected: object) -> None:
    found = LoraSettings(r=4, alpha=2, dropout=0.1, target_modules=targets).to_peft()
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 2, 0.1)
    assert found.target_modules == expected
