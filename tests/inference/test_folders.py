from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scenarios import tiny_program, tiny_rows

from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit
from bayeslora.models import MonteCLoRA

QUICK = {"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, "log_every": 1, "progress": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    fit(tiny_program(), tiny_rows(5), output_dir=folder, **{**QUICK, "epochs": 1})
    return folder


def test_a_fit_is_not_overwritten(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(SettingError, match="holds a fit already: give resume=True"):
        fit(tiny_program(), tiny_rows(5), output_dir=finished, **{**QUICK, "epochs": 1})
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_plain_adapter_is_not_overwritten(tmp_path: Path) -> None:
    tiny_program().network.save_pretrained(tmp_path)
    with pytest.raises(PosteriorError, match="holds a PEFT adapter, which would be replaced"):
        fit(tiny_program(), tiny_rows(5), output_dir=tmp_path, **{**QUICK, "epochs": 1})
    posterior = fit(tiny_program(), tiny_rows(5), **{**QUICK, "epochs": 1})
    with pytest.raises(PosteriorError, match="holds a PEFT adapter, which would be replaced"):
        posterior.save(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"guide": "mean-field"}, "settings.guide: structured and mean-field"),
        ({"epochs": 2}, r"settings.epochs: 1.0 and 2.0"),
        ({"backend": "map"}, "backend: svi and map"),
        ({"seed": 7}, "seed: 0 and 7"),
        ({"data": tiny_rows(6)}, "n_data: 5 and 6"),
        ({"data": tiny_rows(5, seed=3)}, "data: "),
        ({"program": tiny_program(targets="all-linear", rank=3)}, "program.lora.r: 2 and 3"),
        ({"program": tiny_program(targets=["query"])}, "program.lora.layers"),
        ({"program": tiny_program(alpha=400)}, "program.lora.lora_alpha: 4 and 400"),
        ({"program": tiny_program(seed=1)}, "initial value of linear"),
        ({"program": tiny_program(MonteCLoRA(components=3, scale=0.5))}, r"program.model.settings.scale: 1.5 and 0.5"),
    ],
)
def test_another_fit_is_not_resumed(finished: Path, changed: dict[str, Any], message: str) -> None:
    arguments = {"program": tiny_program(), "data": tiny_rows(5), **QUICK, "epochs": 1, **changed}
    with pytest.raises(SettingError, match=message):
        fit(output_dir=finished, resume=True, **arguments)


def test_seconds_of_a_fit_that_was_resumed_add_up(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "posterior.json").read_text())
    described["record"] |= {"cost": described["record"]["cost"] | {"seconds": 1000.0}, "finished": False}
    (tmp_path / "run" / "posterior.json").write_text(json.dumps(described))
    resumed = fit(tiny_program(), tiny_rows(5), output_dir=tmp_path / "run", resume=True, **{**QUICK, "epochs": 1})
    assert 1000 < resumed.cost["seconds"] < 1060
