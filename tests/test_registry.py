from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from command_line import FIT, QUICK, call
from scenarios import saved_base, text_program, text_rows

import bayeslora as bl
from bayeslora import registry
from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import BACKENDS, POSTERIORS, PRESETS
from bayeslora.inference.variational.svi import SVI
from bayeslora.models import MODELS, Gaussian
from bayeslora.models.guides import GUIDES, Guide
from bayeslora.observations import OBSERVATIONS
from bayeslora.registry import Registry, load_file
from bayeslora.tasks.spec import TASKS, TaskSpec

OWN = Path(__file__).with_name("own.py")
ALL: list[Registry] = [BACKENDS, POSTERIORS, MODELS, GUIDES, OBSERVATIONS, PRESETS, TASKS]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers is not there for the next one."""
    before = [dict(each._homes) for each in ALL]
    yield
    sys.modules.pop("own", None)
    for each, homes in zip(ALL, before, strict=True):
        each._homes = homes


def test_a_class_is_imported_when_it_is_asked_for_and_a_wrong_name_gets_the_nearest() -> None:
    found: Registry = Registry("sum", {"fraction": "fractions:Fraction"})
    assert list(found) == ["fraction"] and len(found) == 1 and repr(found) == "Registry of each sum: fraction"
    ((name, thing),) = found.items()
    assert name == "fraction" and thing is found["fraction"] and thing.__name__ == "Fraction"
    with pytest.raises(SettingError, match="Unknown sum 'fractoin'. Did you mean 'fraction'"):
        found["fractoin"]


def test_settings_of_backends_are_given_by_name_and_each_class_is_public() -> None:
    for cls in dict(BACKENDS.items()).values():
        assert cls.__name__ in bl.inference.__all__ and getattr(bl.inference, cls.__name__) is cls
        with pytest.raises(TypeError, match="positional argument"):
            cls(1)


def test_a_model_guide_and_observation_of_ones_own_from_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    own = ["--model", "wide", "--set", "model.width=2", "--set", "guide=fixed", "--set", "observation=flat"]
    command = [*FIT, *QUICK, "--backend", "svi", *own, "--output", run]
    assert call(*command) == 2 and "Unknown model 'wide'" in capsys.readouterr().err
    assert call(*command, "--plugin", OWN) == 0
    assert call("list", "models", f"--plugin={OWN}") == 0 and "wide" in capsys.readouterr().out
    assert call("--plugin", OWN, "evaluate", run, "--draws", "2") == 0
    posterior = bl.load(run)
    assert posterior.program.model.width == 2.0 and posterior.program.observation.name == "flat"
    assert "own.py" not in (run / "config.yaml").read_text()


def test_a_preset_of_ones_own_from_the_shell_and_settings_of_its_guide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plugin = tmp_path / "run", ["--plugin", OWN]
    command = [*FIT[:5], "--train-size", "48", *QUICK, "--output", run, *plugin]
    assert call(*command, "--preset", "published", "--set", "guide.spread=-3", "--set", "model.width=4") == 0
    posterior = bl.load(run)
    settings, model = posterior.record.settings, posterior.program.model
    assert settings["guide"] == "fixed" and settings["guide_settings"] == {"spread": -3.0}
    assert settings["epochs"] == 1.0  # what is said goes over what is published
    assert (model.name, model.width, model.head_scale) == ("wide", 4.0, 0.5)
    spread = posterior.guide.parts[0].spread.detach()
    assert float(spread) == pytest.approx(-3, abs=0.1) and spread != -3  # three steps of a hundredth
    assert call("fit", "--resume", "--output", run, *plugin) == 0, capsys.readouterr().err
    assert call("list", "presets", "-v", *plugin) == 0
    shown = capsys.readouterr().out
    assert all(each in shown for each in ("published", "Nobody, 1900", "guide_settings", "Elsewhere the width"))
    assert call("list", "guides", "-v", *plugin) == 0 and "logarithm of the spread" in capsys.readouterr().out


def test_a_preset_of_ones_own_in_python() -> None:
    load_file(OWN)
    found = bl.preset("published")
    assert found.build_backend() == SVI(guide="fixed", guide_settings={"spread": -4.0}, epochs=2.0)
    assert found.build_backend(guide_settings={"spread": -2}, epochs=3).guide_settings == {"spread": -2.0}
    assert found.build_backend(guide="structured") == SVI(epochs=2.0)  # settings of one guide are none of another
    assert found.build_model(width=1).width == 1.0 and found.build_model().head_scale == 0.5
    with pytest.raises(SettingError, match="Unknown preset 'publishd'. Did you mean 'published'"):
        bl.preset("publishd")


def test_a_guide_of_ones_own_has_the_sites_of_the_model(tmp_path: Path) -> None:
    load_file(OWN)
    program = text_program(saved_base(tmp_path / "base"))
    with pytest.raises(SettingError, match=r"guide='fixed' and model 'monteclora' do not .* 'linear_.*\.mixture' is a"):
        bl.fit(program, text_rows(), guide="fixed", epochs=1, progress=False)


def test_a_backend_and_posterior_of_ones_own(tmp_path: Path) -> None:
    load_file(OWN)
    program = text_program(saved_base(tmp_path / "base"))
    fitted = bl.fit(program, text_rows(), "from-prior", number=4, progress=False)
    assert type(fitted).kind == "stored" and fitted.record.settings == {"number": 4}
    assert fitted.record.finished and fitted.cost["parameters"] > 0 and 0 < fitted.cost["seconds"] < 60
    assert call(*FIT[:5], "--backend", "from-prior", "--train-size", "48", "--output", tmp_path / "run") == 0
    loaded = bl.load(tmp_path / "run")
    assert type(loaded) is type(fitted)


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [
        {"sentence": "good", "verdict": "yes"}, {"sentence": "bad", "verdict": "no"},
    ]))  # fmt: skip
    load_file(OWN)
    assert bl.load_task("mine", tmp_path).spec.labels == ("no", "yes")


@pytest.mark.parametrize(
    ("part", "own"), [("model", {"name": "wide", "settings": {}}), ("observation", {"name": "flat"})]
)
def test_a_posterior_that_needs_a_plug_in_says_so(run_of_text: Path, part: str, own: dict) -> None:
    record = run_of_text / "posterior.json"
    described = json.loads(record.read_text())
    described["program"][part] = own
    record.write_text(json.dumps(described))
    with pytest.raises(PosteriorError, match="needs it: import its module before, or give --plugin FILE"):
        bl.load(run_of_text)


@pytest.fixture
def run_of_text(tmp_path: Path) -> Path:
    program = text_program(saved_base(tmp_path / "base"))
    bl.fit(program, text_rows(), "map", epochs=1, cpu=True, progress=False).save(tmp_path / "run")
    return tmp_path / "run"


def test_a_kind_that_needs_a_plug_in_says_so(run_of_text: Path) -> None:
    record = run_of_text / "posterior.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"kind": "os:system"}))
    with pytest.raises(PosteriorError, match="Unknown kind of posterior 'os:system'.*--plugin FILE"):
        bl.load(run_of_text)


def test_names_of_the_library_stay_its_own_and_a_cell_may_run_twice() -> None:
    svi = type("SVI", (), {"name": "svi", "paper": "", "fit": lambda self: None})
    with pytest.raises(SettingError, match="There is a backend 'svi' already, of the library's own"):
        bl.register(svi)
    one, other = (type("Mine", (Gaussian,), {"name": "mine"}) for _ in range(2))
    bl.register(one)
    bl.register(other)
    assert MODELS["mine"] is other
    with pytest.raises(SettingError, match="Nothing of its sort can be registered"):
        bl.register(3)
    with pytest.raises(SettingError, match="has no name"):
        bl.register(type("Nameless", (bl.models.WeightModel,), {}))


def test_presets_and_tasks_of_the_library_stay_what_they_are() -> None:
    bl.register(PRESETS["blob"])  # the same
    with pytest.raises(SettingError, match="There is a preset 'blob' already, of the library's own"):
        bl.register(replace(PRESETS["blob"], settings={}))
    for name in ("glue/mrpc", "MRPC", "demo"):
        with pytest.raises(SettingError, match=f"There is a task '{name}' already, of the library's own"):
            bl.register(TaskSpec(name, text=("mine",)))
    for spread in (1.0, 2.0):  # a cell that is run again
        bl.register(replace(PRESETS["blob"], name="mine", model_settings={"scale": spread}))
    assert bl.preset("mine").model_settings == {"scale": 2.0}


@pytest.mark.parametrize("name", ["structured", "delta", "mean-field", "AutoNormal", "inducing"])
def test_a_guide_of_ones_own_stands_for_no_other(name: str) -> None:
    with pytest.raises(SettingError, match=f"There is a guide '{name}' already, of the library's own"):
        bl.register(type("Mine", (Guide,), {"name": name}))


def test_plug_ins_of_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_module", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken, EntryPoint("own", "own", registry.GROUP)])
    registry._load_installed.cache_clear()
    with pytest.warns(UserWarning, match="The plug-in broken .* cannot be imported"):
        assert "wide" in MODELS


def test_a_plug_in_that_is_not_there_or_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", "models", "--plugin", tmp_path / "no.py") == 2
    assert "There is no plug-in" in capsys.readouterr().err
    (tmp_path / "bad.py").write_text("1 / 0\n")
    assert call("list", "models", "--plugin", tmp_path / "bad.py") == 2
    assert "cannot be imported: ZeroDivisionError" in capsys.readouterr().err


def test_a_backend_may_come_with_its_settings(tmp_path: Path) -> None:
    program = text_program(saved_base(tmp_path))
    posterior = bl.fit(program, text_rows(), SVI(epochs=1, cpu=True), progress=False)
    assert posterior.record.settings["epochs"] == 1
    with pytest.raises(SettingError, match="has its settings already: give epochs to it"):
        bl.fit(program, text_rows(), SVI(), epochs=1)


def test_a_posterior_shows_itself_in_one_line(tmp_path: Path) -> None:
    posterior = bl.fit(text_program(saved_base(tmp_path)), text_rows(), "map", epochs=1, cpu=True, progress=False)
    assert repr(posterior) == f"VariationalPosterior(map, monteclora, {len(text_rows())} rows, predicts by 'sample')"
