"""Bring a saved posterior back: base network, adapter, program, then what the backend saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bayeslora import store
from bayeslora.adapters import saved_network
from bayeslora.errors import AdapterError, PosteriorError, SettingError
from bayeslora.identity import TAKEN_OFF, Identity, configuration, describe_as, differences, differing
from bayeslora.inference.base import posterior_class
from bayeslora.models import MODELS
from bayeslora.networks import NetworkSettings, load_base
from bayeslora.observations import Encoder
from bayeslora.observations import build as build_observation
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.record import RECORD, TENSORS, whole_record
from bayeslora.registry import FROM_PLUGIN
from bayeslora.settings import build
from bayeslora.tasks import TaskSpec

__all__ = ["check_same", "load"]

#: Parts of a program's description in which its network is told from others.
NETWORK = ("configuration", "frozen", "computed", "observation", "labels")


def load(
    path: str | Path,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    program: Program | None = None,
) -> Posterior:
    """Load the posterior of a run, or what `Posterior.save` wrote.

    Args:
        path: the run's folder or the posterior's; nothing is written there.
        base: where the base network is now, if not where it was.
        device: where to put it; by default a GPU if there is one.
        program: the program that the posterior is of, for a network of one's own that no name stands for.

    Raises:
        PosteriorError: there is no posterior, it is damaged, or the base network is another one.
        SettingError: there is no such device.
    """
    where = _device(device)
    return store.steady(Path(path), lambda folder: _load(folder, base, where, program))


def _device(device: str | torch.device | None) -> torch.device:
    """The device of a name; by default a GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        raise SettingError(f"device is {device!r}, expected {' or '.join(['cpu', *names])}.") from error


def _load(folder: Path, base: str | Path | None, device: torch.device, program: Program | None) -> Posterior:
    saved = whole_record(folder)
    kind = posterior_class(saved.kind)
    tensors = _tensors(folder)
    if program is None:
        try:
            program = _rebuilt(folder, saved.program, base, tensors["drawn"])
        except (KeyError, TypeError, AttributeError) as error:
            raise PosteriorError(
                f"'{folder}' is damaged: {RECORD} does not describe a program ({type(error).__name__}: {error})."
            ) from error
    _check(folder, _filled(saved.program), describe_as(program, saved.program), (*NETWORK, "lora", "model"))
    _check_weights(folder, "initial values", tensors["centre"], program)
    program = program.around(tensors["centre"])
    program.to(device)
    try:
        state = {name: value.to(program.device) for name, value in tensors["state"].items()}
        posterior = kind.from_state(program, saved.record, state)
        _check_weights(folder, "mean", posterior.mean(), program)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PosteriorError(
            f"'{folder}' is damaged: {TENSORS} does not hold the state of such a posterior "
            f"({type(error).__name__}: {error})."
        ) from error
    return posterior


def _tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by what they are: the posterior's state, the centre of the prior, and frozen weights that were drawn."""
    parts: dict[str, dict[str, torch.Tensor]] = {"state": {}, "centre": {}, "drawn": {}}
    for name, value in load_file(str(folder / TENSORS)).items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise PosteriorError(
                f"'{folder}' is damaged: {TENSORS} holds '{name}'; names begin with {' or '.join(parts)}."
            )
        parts[part][rest] = value
    return parts


def _check_weights(folder: Path, what: str, found: Mapping[str, torch.Tensor], program: Program) -> None:
    """Make sure that each site has a value, in its shape and as floats."""
    expected = {site.name: list(site.initial.shape) for site in program.sites}
    wrong = differing({name: list(value.shape) for name, value in found.items()}, expected)
    wrong += [f"{name}: {value.dtype}" for name, value in found.items() if not value.is_floating_point()]
    if wrong:
        raise PosteriorError(
            f"'{folder}' is damaged: {what} of the weights in {TENSORS} (there and expected): {'; '.join(wrong)}."
        )


def check_same(folder: Path, begun: Mapping[str, Any], program: Program) -> None:
    """Make sure that the fit that is to be resumed is the one that was begun in a run's folder.

    Args:
        folder: of the run.
        begun: entries of the fit's record that must be what they were.
        program: of the fit. The place of the base network may change.

    Raises:
        SettingError: something differs; the message says what.
        PosteriorError: what is there is damaged.
    """
    if not (folder / store.POSTERIOR / RECORD).is_file():  # stopped before its first posterior was written
        return
    saved = whole_record(folder / store.POSTERIOR)
    changed = differing({name: getattr(saved.record, name) for name in begun}, json.loads(json.dumps(begun)))
    now = describe_as(program, saved.program)
    changed += differences(_filled(saved.program), now, ("lora", "model", "spec", "max_length", *NETWORK))
    if not changed:
        centre = _tensors(folder / store.POSTERIOR)["centre"]
        _check_weights(folder, "initial values", centre, program)
        changed = [
            f"initial value of {site.name}"
            for site in program.sites
            if not torch.allclose(centre[site.name], site.initial.cpu())
        ]
    if changed:
        raise SettingError(
            f"'{folder}' holds another fit (there and now): {'; '.join(changed)}. Resume with what it was begun with, "
            "or choose another folder (output_dir, in a shell --output)."
        )


def _check(folder: Path, saved: Identity, now: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Make sure that weights mean the same in a program as in the saved one, as far as entries of these names tell."""
    if changed := differences(saved, now, names):
        raise PosteriorError(
            f"'{folder}' is of another program, on '{saved['base']['name']}' and now '{now['base']['name']}' (there "
            f"and now): {'; '.join(changed)}. Give the network that it was fitted on as base.{_rounded(saved)}"
        )


def _rounded(saved: Identity) -> str:
    """What to do where bits were compared of frozen weights that PEFT computes, and the last ones are the machine's."""
    how = str(saved["lora"].get("init_lora_weights"))
    if "computed" in saved or not how.startswith(TAKEN_OFF):
        return ""
    return (
        f" If it is that one: what '{how}' takes off the weights is rounded otherwise by another number of threads. "
        "Have as many as in the fit (torch.set_num_threads, OMP_NUM_THREADS)."
    )


def _filled(described: Identity) -> Identity:
    """A saved description, in which a setting that there was not yet when it was saved has its default."""
    found = described.copy()
    with suppress(SettingError, TypeError, KeyError):  # what cannot be built will differ as it is
        found["observation"] = build_observation(described["observation"]).to_dict()
        model = MODELS.build(described["model"]["name"], described["model"]["settings"])
        found["model"] = {"name": model.name, "settings": asdict(model)}
    plain: Identity = json.loads(json.dumps(found, default=str))
    return plain


def _rebuilt(folder: Path, described: Identity, base: str | Path | None, drawn: dict[str, torch.Tensor]) -> Program:
    if described["spec"] is None or described["max_length"] is None:
        raise PosteriorError(
            f"'{folder}' was fitted without an encoder: no name stands for its network. Make the program as it was, "
            "and give load(path, program=...)."
        )
    spec = TaskSpec.from_dict(described["spec"])
    try:
        observation = build_observation(described["observation"])
        model = MODELS.build(described["model"]["name"], described["model"]["settings"])
    except SettingError as error:
        raise PosteriorError(f"'{folder}' cannot be rebuilt: {error} {FROM_PLUGIN}") from error
    try:
        settings = build(NetworkSettings, described["base"])
    except SettingError as error:
        raise PosteriorError(f"'{folder}' is damaged: {error}") from error
    settings = settings if base is None else replace(settings, name=str(base))
    with torch.random.fork_rng():
        try:
            loaded = load_base(settings, observation, spec, adapter=folder, tokenizer=folder, drawn=drawn)
            now = {"base": {"name": settings.name}, "configuration": configuration(loaded.network)}
            _check(folder, described, json.loads(json.dumps(now, default=str)), ("configuration",))
            adapted = saved_network(loaded.network, folder, described["lora"]["layers"])
        except AdapterError as error:
            raise PosteriorError(
                f"'{folder}' does not fit '{settings.name}', or that is not there; give base=...: {error}"
            ) from error
    encoder = Encoder(loaded.tokenizer, spec, described["max_length"], labels=loaded.labels)
    return Program(adapted, observation, model, encoder=encoder, base=settings, drawn=loaded.drawn)
