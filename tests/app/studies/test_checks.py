from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bayeslora.app.studies import Study
from bayeslora.app.studies.expansion import expand
from bayeslora.app.studies.file import StudyFile
from bayeslora.errors import SettingError

Made = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"backend": "ensemble", "lora": {"r": 4}}, r"'around' starts from 'quick', .* lora.*r=4"),
        ({"backend": "ensemble", "chains": 2}, "chains: 2 and 1"),
        ({"backend": "ensemble", "heldout_size": 5}, "heldout_size: 5 and 20"),
        ({"backend": "temperature", "settings": {"of": "map"}}, "of: map and quick"),
        ({"backend": "temperature", "settings": {"of": "quick", "of_settings": {"epochs": 7}}}, "epochs: 7.0 and 1.0"),
        # Its prior would be tuned on rows that the start was trained on.
        ({"backend": "laplace", "train_size": 8}, "train_size: 8 and 12"),
        ({"backend": "laplace", "heldout_size": 24}, "heldout_size: 24 and 20"),
    ],
)
def test_a_method_says_nothing_that_its_start_overrules(own: dict[str, Any], said: str, study: Made) -> None:
    with pytest.raises(SettingError, match=said):
        expand(StudyFile.from_dict(study(methods={"quick": {}, "around": {"start": "quick", **own}})))


@pytest.mark.parametrize(
    "several",
    [
        {"backend": "ensemble", "settings": {"of": "quick", "members": 3}},
        {"backend": "quick", "chains": 3},
        {"backend": "temperature", "settings": {"of": "ensemble", "of_settings": {"of": "quick", "members": 3}}},
    ],
)
def test_weights_to_start_from_are_those_of_one_fit(several: dict[str, Any], study: Made) -> None:
    methods = {"several": several, "around": {"backend": "laplace", "start": "several"}}
    with pytest.raises(SettingError, match="'around' starts from 'several', which is 3 independent fits"):
        expand(StudyFile.from_dict(study(methods=methods, seeds=[0])))
    # What is over the whole posterior may be over several fits.
    over = methods | {"around": {"backend": "temperature", "start": "several", "chains": several.get("chains", 1)}}
    assert len(Study(study(methods=over, seeds=[0])).cells) == 2


def test_what_a_method_says_as_its_start_does_is_no_contradiction(study: Made) -> None:
    same = {"lora": {"r": 4}, "heldout_size": 10}
    settings = {"of": "quick", "of_settings": {"epochs": 2}}
    methods = {
        "quick": {**same, "settings": {"epochs": 2}},
        "around": {"start": "quick", "backend": "ensemble", "settings": settings, **same},
        "laplace": {"start": "quick", **same},
    }
    assert len(Study(study(methods=methods, seeds=[0])).cells) == 3


def test_chains_of_two_runs_have_no_seed_in_common(study: Made) -> None:
    common = study()["common"]
    assert len(Study(study(common=common | {"chains": 3}, seeds=[3, 0])).cells) == 4
    with pytest.raises(SettingError, match=r"4 chains of 'quick' .* seeds are 3, 0: .* such as \[0, 4\]"):
        expand(StudyFile.from_dict(study(common=common | {"chains": 4}, seeds=[3, 0])))


def test_tuning_needs_rows_that_are_held_out(study: Made) -> None:
    tuning = {"values": {"learning_rate": [0.1, 0.2]}}
    with pytest.raises(SettingError, match="task 'demo' has none: give it a heldout_size"):
        expand(StudyFile.from_dict(study(tuning=tuning, common={})))


def test_rows_that_choose_are_not_those_that_are_reported(study: Made) -> None:
    tuning = {"values": {"learning_rate": [0.1, 0.2]}}
    with pytest.raises(
        SettingError, match="those of task 'demo' are to be predicted as well: .* Predict another split"
    ):
        expand(StudyFile.from_dict(study(tuning=tuning, evaluation={"split": "heldout"})))


def test_names_that_are_no_settings_are_not_offered(study: Made) -> None:
    common = study()["common"] | {"settings": {"papers": 1}}
    with pytest.raises(SettingError) as raised:
        expand(StudyFile.from_dict(study(common=common)))
    assert "learning_rate" in str(raised.value) and "paper," not in str(raised.value)


def test_a_shared_setting_is_one_of_some_method(study: Made) -> None:
    with pytest.raises(
        SettingError, match="setting of any method of the study 'max_grad'. Did you mean 'max_grad_norm"
    ):
        expand(StudyFile.from_dict(study(methods={"quick": {}, "map": {}}, common={"settings": {"max_grad": 1.0}})))


@pytest.mark.parametrize(
    ("own", "key", "values"),
    [
        ({"settings": {"learning_rate": 0.1}}, "learning_rate", [0.1, 0.2]),
        ({"backend": "ensemble", "settings": {"of": "quick", "of_settings": {"epochs": 2}}}, "epochs", [2, 3]),
        ({"lora": {"r": 4}}, "lora.r", [4, 8]),
        ({"lora": "dora"}, "lora", ["lora", "dora"]),
        ({"max_length": 8}, "max_length", [8, 16]),
    ],
)
def test_a_grid_varies_nothing_that_a_method_says_itself(
    own: dict[str, Any], key: str, values: list[Any], study: Made
) -> None:
    made = study(methods={"quick": {}, "own": {"backend": "quick", **own}}, grid={key: values})
    with pytest.raises(
        SettingError, match=f"^Method 'own' of the study: {key} is its own, and the grid varies it: give only"
    ):
        expand(StudyFile.from_dict(made))


def test_candidates_replace_what_a_method_says_itself(study: Made) -> None:
    methods = {"quick": {"settings": {"learning_rate": 0.5}, "lora": {"r": 4}}}
    tuning = {"values": {"learning_rate": [0.1, 0.2]}}
    same, chosen = expand(StudyFile.from_dict(study(methods=methods, seeds=[0], tuning=tuning)))
    rates = [each.entry.cell.config.settings["learning_rate"] for each in (*same.candidates, *chosen.candidates)]
    assert rates == [0.5, 0.1, 0.2]
    expand(StudyFile.from_dict(study(methods=methods, seeds=[0], grid={"epochs": [1, 2], "lora.alpha": [8, 16]})))


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"backend": "ensemble", "settings": {"of": "laplace", "stacked": True}}, "stacked=True trains members of"),
        ({"backend": "quick", "settings": {"epoch": 1}}, "Unknown setting of quick 'epoch'"),
        ({"backend": "quick", "lora": "dorra"}, "Unknown way to fine-tune 'dorra'"),
    ],
)
def test_an_error_names_the_method_that_it_is_of(own: dict[str, Any], said: str, study: Made) -> None:
    with pytest.raises(SettingError, match=f"^Method 'ens' of the study: .*{said}"):
        expand(StudyFile.from_dict(study(methods={"quick": {}, "ens": own})))
