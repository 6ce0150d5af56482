from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from scenarios import METHODS, saved_base, text_program, text_rows, tiny_program, tiny_rows
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from bayeslora import files
from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit, load
from bayeslora.models import Gaussian, MonteCLoRA, WeightModel
from bayeslora.observations import Classes
from bayeslora.posterior import Posterior
from bayeslora.program import Program

QUICK = {"epochs": 1, "batch_size": 6, "progress": False}
CASES: dict[str, tuple[WeightModel, str, dict[str, Any]]] = {
    "structured": (MonteCLoRA(components=3), "svi", {}),
    "precision": (MonteCLoRA(components=3, wishart_on="precision"), "svi", {}),
    "expanded": (MonteCLoRA(components=3, collapse=False), "svi", {}),
    "B": (MonteCLoRA(components=2, sites="B", learn_eps=True), "svi", {"temperature": 0.5}),
    "both": (MonteCLoRA(components=2, sites="both", prior="paper", cooperation=0.1), "svi", {"elbo": "trace"}),
    "gaussian": (Gaussian(noise="entry", centre="zero"), "svi", {}),
    "mean-field": (MonteCLoRA(components=3), "svi", {"guide": "mean-field", "init_scale": 0.05}),
    "expanded mean-field": (MonteCLoRA(components=3, collapse=False), "svi", {"guide": "mean-field"}),
    "low-rank": (MonteCLoRA(components=3), "svi", {"guide": "low-rank"}),
    "full": (Gaussian(), "svi", {"guide": "full"}),
    "delta": (MonteCLoRA(components=3), "svi", {"guide": "delta"}),
    "map": (MonteCLoRA(components=3), "map", {}),
    "mle": (MonteCLoRA(components=3), "mle", {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    fit(text_program(base), text_rows(), **QUICK).save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "posterior.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_posterior_is_the_saved_one(base: Path, tmp_path: Path, case: str) -> None:
    model, backend, settings = CASES[case]
    task = {"name": "counting"}
    posterior = fit(
        text_program(base, model), replace(text_rows(), arguments=task), backend, seed=5, **QUICK, **settings
    )
    posterior.save(tmp_path)
    state = torch.get_rng_state()
    loaded = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.record == posterior.record
    assert loaded.record.task == task
    assert loaded.program.model == model
    assert loaded.program.observation == posterior.program.observation
    assert_same_predictions(posterior, loaded)
    for one, two in zip(posterior.program.sites, loaded.program.sites, strict=True):
        assert (one.name, one.layers) == (two.name, two.layers)
        assert torch.equal(one.initial, two.initial)  # the prior's centre, though the adapter holds the mean
    draws, again = posterior.sample(2), loaded.sample(2)
    assert all(torch.equal(draws[name], again[name]) for name in draws)
    if backend == "svi" and settings.get("guide") != "delta":
        one_draw = {name: value[0] for name, value in draws.items()}
        assert torch.equal(posterior.log_prob(one_draw), loaded.log_prob(one_draw))


def test_a_setting_that_there_was_not_yet_has_its_default(copy: Path) -> None:
    before = load(copy)
    model: dict[str, Any] = json.loads((copy / "posterior.json").read_text())["program"]["model"]["settings"]
    usual = [name for name, value in asdict(MonteCLoRA()).items() if model[name] == value]
    assert usual
    rewrite(copy, lambda described: [described["program"]["model"]["settings"].pop(name) for name in usual])
    for program in (None, before.program):
        assert load(copy, program=program).program.model == before.program.model


@pytest.mark.parametrize("method", [*METHODS, "partly"])
def test_whatever_trained_the_network_comes_back_by_its_name(base: Path, tmp_path: Path, method: str) -> None:
    encoder = text_program(base).encoder
    network, config = AutoModelForSequenceClassification.from_pretrained(base), METHODS.get(method)
    network = network if config is None else get_peft_model(network, deepcopy(config))
    if method == "partly":
        network.bert.embeddings.requires_grad_(False)
    program = Program(network, Classes(3), Gaussian(), encoder=encoder)
    posterior = fit(program, text_rows(), "map", learning_rate=0.1, cpu=True, **QUICK)
    posterior.save(tmp_path)
    assert_same_predictions(posterior, load(tmp_path))


def assert_same_predictions(one: Posterior, two: Posterior) -> None:
    for settings in ({"draws": 2}, {"method": "mean"}):
        first, second = (each.predict(text_rows(), progress=False, **settings) for each in (one, two))
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.labels, second.labels)
        assert first.label_names == second.label_names == ("none", "one", "more")


def test_saving_what_was_loaded_changes_nothing(saved: Path, tmp_path: Path) -> None:
    load(saved).save(tmp_path)
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        assert files.digests(tmp_path)[name] == files.digests(saved)[name]


def test_a_low_precision_base_comes_back_in_its_precision(base: Path, tmp_path: Path) -> None:
    posterior = fit(text_program(base, dtype="bfloat16"), text_rows(), **QUICK)
    posterior.save(tmp_path)
    loaded = load(tmp_path)
    assert next(loaded.program.network.parameters()).dtype == torch.bfloat16
    assert_same_predictions(posterior, loaded)


def test_a_base_that_has_moved_is_found_where_it_is_now(saved: Path, base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base, tmp_path / "moved")
    assert_same_predictions(load(saved), load(saved, base=moved))


def test_another_base_is_refused_by_both_names(saved: Path, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    config = BertConfig.from_pretrained(base, num_hidden_layers=1)
    BertForSequenceClassification(config).save_pretrained(other)
    with pytest.raises(PosteriorError, match=f"of another program, on '{base}' and now '{other}'"):
        load(saved, base=other)


def test_a_missing_posterior_is_named(tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match=rf"no posterior in '{tmp_path}'.*posterior.json"):
        load(tmp_path)


def test_an_unknown_format_and_an_unknown_kind_are_refused(copy: Path) -> None:
    rewrite(copy, lambda described: described.update(kind="laplac"))
    with pytest.raises(PosteriorError, match="Unknown kind of posterior 'laplac'. Did you mean 'laplace'"):
        load(copy)
    rewrite(copy, lambda described: described.update(format=99))
    with pytest.raises(PosteriorError, match="has format 99; this version of bayeslora reads format 2"):
        load(copy)


def test_parameters_of_another_guide_are_refused(saved: Path) -> None:
    posterior = load(saved)
    record = replace(posterior.record, settings={"guide": "mean-field"})
    with pytest.raises(PosteriorError, match="do not fit the guide 'mean-field'"):
        type(posterior).from_state(posterior.program, record, posterior.state())


@pytest.mark.parametrize("name", ["posterior.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    path = copy / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-8] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PosteriorError, match=f"is damaged: {name}"):
        load(copy)


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors, and their digest with them."""
    path = folder / "posterior.safetensors"
    tensors = load_file(path)
    change(tensors)
    files.write_tensors(path, tensors)
    rewrite(folder, lambda described: described["files"].update({path.name: files.digests(folder)[path.name]}))


A = "centre/linear_16x16.A"
TENSOR_DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no prefix": (lambda found: found.update(words=found.pop(A)), "holds 'words'; names begin with state or centre"),
    "another prefix": (lambda found: found.update({"c/x": found.pop(A)}), "holds 'c/x'; names begin with"),
    "no centre": (lambda found: found.pop(A), "initial values of the weights .*linear_16x16.A"),
    "an integer centre": (lambda found: found.update({A: found[A].int()}), "linear_16x16.A: torch.int32"),
    "a permuted centre": (lambda found: found.update({A: found[A].mT}), "initial values .*linear_16x16.A"),
    "no state": (lambda found: [found.pop(name) for name in list(found) if "state/" in name], "do not fit the guide"),
    "an integer state": (
        lambda found: found.update({name: value.int() for name, value in found.items() if "state/" in name}),
        "do not fit the guide 'structured': .* is of torch.int32",
    ),
    "a state of other shapes": (
        lambda found: found.update({name: value[None] for name, value in found.items() if "state/" in name}),
        "do not fit the guide 'structured'",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES)
def test_tensors_that_are_not_those_of_the_program_are_refused(copy: Path, damage: str) -> None:
    change, message = TENSOR_DAMAGES[damage]
    rewrite_tensors(copy, change)
    with pytest.raises(PosteriorError, match=message):
        load(copy)


@pytest.mark.parametrize("backend", ["laplace", "sgld"])
@pytest.mark.parametrize("damage", ["integers", "permuted", "fewer"])
def test_states_that_are_not_those_of_their_kind_are_refused(tmp_path: Path, backend: str, damage: str) -> None:
    settings = {"laplace": QUICK, "sgld": {"draws": 3, "warmup": 1, "progress": False}}[backend]
    fit(tiny_program(Gaussian()), tiny_rows(6), backend, **settings).save(tmp_path / "run")
    name = {"laplace": "state/mode/linear_16x16.A", "sgld": "state/linear_16x16.A"}[backend]
    changes = {"integers": torch.Tensor.int, "permuted": lambda value: value.mT, "fewer": lambda value: value[:1]}
    rewrite_tensors(tmp_path / "run", lambda found: found.update({name: changes[damage](found[name])}))
    with pytest.raises(PosteriorError, match=r"is damaged: .*posterior.safetensors|not as many floats"):
        load(tmp_path / "run", program=tiny_program(Gaussian()))


PROGRAM_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown dtype": (lambda program: program["base"].update(dtype="float33"), "dtype is 'float33'"),
    "a dtype that is none": (lambda program: program["base"].update(dtype="nn"), "dtype is 'nn'"),
    "no model": (lambda program: program.pop("model"), "is damaged: program.model: Field required"),
    "permuted labels": (lambda program: program["labels"].reverse(), r"labels: \[.*\] and \["),
    "a list as model": (lambda program: program.update(model=[]), "is damaged: program.model: "),
    "a model without a name": (lambda program: program["model"].pop("name"), "does not describe a program .*'name'"),
}


@pytest.mark.parametrize("damage", PROGRAM_DAMAGES)
def test_a_damaged_program_is_refused(copy: Path, damage: str) -> None:
    change, message = PROGRAM_DAMAGES[damage]
    rewrite(copy, lambda described: change(described["program"]))
    with pytest.raises(PosteriorError, match=message):
        load(copy)


def test_a_run_is_read_without_being_written(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished, *finished.rglob("*"))}
    for path in (finished, finished / "posterior"):
        load(path, program=tiny_program())
    assert before == {path: path.stat().st_mtime_ns for path in (finished, *finished.rglob("*"))}


def test_a_posterior_without_text_says_that_it_cannot_be_rebuilt(tmp_path: Path) -> None:
    fit(tiny_program(), tiny_rows(6), **QUICK).save(tmp_path)
    with pytest.raises(PosteriorError, match="without an encoder"):
        load(tmp_path)


def test_a_posterior_without_text_loads_into_its_own_program(tmp_path: Path) -> None:
    posterior = fit(tiny_program(), tiny_rows(6), **QUICK)
    posterior.save(tmp_path)
    loaded = load(tmp_path, program=tiny_program())
    one, two = (each.predict(tiny_rows(4), draws=2, progress=False).logits for each in (posterior, loaded))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    with pytest.raises(PosteriorError, match="is of another program.*lora.r: 2 and 3"):
        load(tmp_path, program=tiny_program(rank=3))


def test_a_flow_is_saved_and_loaded(tmp_path: Path) -> None:
    fit(tiny_program(), tiny_rows(6), **QUICK, guide="AutoIAFNormal", output_dir=tmp_path)
    loaded = load(tmp_path, program=tiny_program())
    assert torch.isfinite(loaded.predict(tiny_rows(4), draws=2, progress=False).logits).all()


def test_two_loaded_posteriors_live_side_by_side(saved: Path) -> None:
    one, two = load(saved), load(saved)
    with torch.no_grad():
        for parameter in two.guide.parameters():
            parameter.add_(0.3)
    before = one.predict(text_rows(), draws=2, progress=False).logits
    two.predict(text_rows(), draws=2, progress=False)
    assert torch.equal(one.predict(text_rows(), draws=2, progress=False).logits, before)


FITTED = {"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, "log_every": 1, "progress": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    fit(tiny_program(), tiny_rows(5), output_dir=folder, **{**FITTED, "epochs": 1})
    return folder


def test_a_fit_is_not_overwritten(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(
        SettingError, match=r"give resume=True .* or choose another folder \(output_dir, in a shell --output"
    ):
        fit(tiny_program(), tiny_rows(5), output_dir=finished, **{**FITTED, "epochs": 1})
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"guide": "mean-field"}, "settings.guide: structured and mean-field"),
        ({"epochs": 2}, r"settings.epochs: 1.0 and 2.0"),
        ({"backend": "map"}, "backend: svi and map"),
        ({"seed": 7}, "seed: 0 and 7"),
        ({"data": tiny_rows(6)}, "n_data: 5 and 6"),
        ({"data": tiny_rows(5, seed=3)}, "data: "),
        ({"program": tiny_program(targets="all-linear", rank=3)}, "lora.r: 2 and 3"),
        ({"program": tiny_program(targets=["query"])}, "lora.layers"),
        ({"program": tiny_program(alpha=400)}, "lora.lora_alpha: 4 and 400"),
        ({"program": tiny_program(seed=1)}, "frozen: "),
        ({"program": tiny_program(MonteCLoRA(components=3, scale=0.5))}, r"model.settings.scale: 2.5 and 0.5"),
    ],
)
def test_another_fit_is_not_resumed(finished: Path, changed: dict[str, Any], message: str) -> None:
    arguments = {"program": tiny_program(), "data": tiny_rows(5), **FITTED, "epochs": 1, **changed}
    with pytest.raises(SettingError, match=message):
        fit(output_dir=finished, resume=True, **arguments)


def test_a_fit_that_was_tuned_on_other_rows_is_not_resumed(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"backend": "laplace", "epochs": 1, "tune": "heldout", "cpu": True, "progress": False}
    program, rows = tiny_program(Gaussian(sites="both")), tiny_rows(5)
    fit(program, rows, heldout=tiny_rows(6), output_dir=tmp_path, **arguments)
    assert fit(program, rows, heldout=tiny_rows(6), output_dir=tmp_path, resume=True, **arguments).record.tuned_on
    for other in (tiny_rows(6, seed=3), None):
        arguments |= {} if other else {"tune": "none"}
        with pytest.raises(SettingError, match="tuned_on: "):
            fit(program, rows, heldout=other, output_dir=tmp_path, resume=True, **arguments)


def test_seconds_of_a_fit_that_was_resumed_add_up(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "posterior" / "posterior.json").read_text())
    described["record"] |= {"cost": described["record"]["cost"] | {"seconds": 1000.0}, "finished": False}
    (tmp_path / "run" / "posterior" / "posterior.json").write_text(json.dumps(described))
    resumed = fit(tiny_program(), tiny_rows(5), output_dir=tmp_path / "run", resume=True, **{**FITTED, "epochs": 1})
    assert 1000 < resumed.cost["seconds"] < 1060


@pytest.mark.parametrize("device", ["foo", "cuda:99", 3.5])
def test_a_device_that_there_is_not_is_named_with_those_that_there_are(tmp_path: Path, device: Any) -> None:
    with pytest.raises(SettingError, match=f"device is {device!r}, expected cpu"):
        load(tmp_path, device=device)
