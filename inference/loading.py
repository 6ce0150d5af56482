"""Bring a saved posterior back: base network, adapter, program, then what the backend saved."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bayeslora import files
from bayeslora.errors import PosteriorError, unknown
from bayeslora.networks import load_adapter, load_base
from bayeslora.observations import Encoder
from bayeslora.observations import build as build_observation
from bayeslora.posterior import FORMAT, RECORD, TENSORS, Posterior, Record, describe, read_record
from bayeslora.program import Program
from bayeslora.settings import differing

__all__ = ["load", "posterior_class"]

#: Where the class of each kind of posterior is.
POSTERIORS: dict[str, str] = {
    "empirical": "bayeslora.inference.mcmc.posterior:EmpiricalPosterior",
    "variational": "bayeslora.inference.variational.posterior:VariationalPosterior",
    "laplace": "bayeslora.inference.laplace.posterior:LaplacePosterior",
    "mixture": "bayeslora.inference.mixture:MixturePosterior",
}


def load(
    path: str | Path,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    program: Program | None = None,
) -> Posterior:
    """Load what `Posterior.save` wrote.

    Args:
        path: the posterior's folder.
        base: where the base network is now, if not where it was.
        device: where to put it; by default a GPU if there is one.
        program: the program that the posterior is of, for a network of one's own that no name stands for.

    Raises:
        PosteriorError: there is no posterior, it is damaged, or the base network is another one.
    """
    folder = Path(path)
    described = _read(folder)
    if program is None:
        program = _rebuilt(folder, described["program"], base)
    else:
        _check(program, folder, described["program"])
    tensors = files.read_tensors(folder / TENSORS)
    parts: dict[str, dict[str, torch.Tensor]] = {"state": {}, "centre": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    program.weights.centre(parts["centre"])
    program.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return posterior_class(described["kind"]).from_state(program, Record(**described["record"]), parts["state"])


def posterior_class(kind: str) -> type[Posterior]:
    """The class of a kind of posterior.

    Raises:
        PosteriorError: there is no such kind.
    """
    if kind not in POSTERIORS:
        raise PosteriorError(unknown("kind of posterior", kind, POSTERIORS))
    module, _, attribute = POSTERIORS[kind].partition(":")
    found: type[Posterior] = getattr(import_module(module), attribute)
    return found


def _read(folder: Path) -> dict[str, Any]:
    """The description of a saved posterior, once it is known to be whole."""
    described = read_record(folder)
    if not described:
        raise PosteriorError(f"There is no posterior in '{folder}': expected a file {RECORD}.")
    if described.get("format") != FORMAT:
        raise PosteriorError(
            f"'{folder}' has format {described.get('format')}; this version of bayeslora reads format {FORMAT}."
        )
    found = files.digests(folder)
    damaged = [name for name, digest in described["files"].items() if found.get(name) != digest]
    if damaged:
        raise PosteriorError(f"'{folder}' is damaged: {', '.join(damaged)} is not what was written.")
    return described


def _check(program: Program, folder: Path, saved: dict[str, Any]) -> None:
    """Make sure that weights mean the same in a program as in the saved one."""
    names = ("base_config", "lora", "model", "observation")
    now = json.loads(json.dumps({name: describe(program)[name] for name in names}))
    changed = differing({name: saved.get(name) for name in names}, now)
    if changed:
        raise PosteriorError(f"'{folder}' is of another program (there and now): {'; '.join(changed)}.")


def _rebuilt(folder: Path, described: dict[str, Any], base: str | Path | None) -> Program:
    from bayeslora.models import build as build_model
    from bayeslora.tasks import TaskSpec

    name = str(base or described["base"])
    if described["spec"] is None:
        raise PosteriorError(
            f"'{folder}' was fitted without an encoder: no name stands for its network. Make the program as it was, "
            "and give load(path, program=...)."
        )
    spec = TaskSpec.from_dict(described["spec"])
    observation = build_observation(described["observation"])
    with torch.random.fork_rng():
        try:
            network, tokenizer, _ = load_base(name, observation, spec, getattr(torch, described["dtype"]))
        except (OSError, ValueError) as error:
            raise PosteriorError(
                f"The base network '{name}' of '{folder}' cannot be loaded; give base=...: {error}"
            ) from error
        found = files.fingerprint(network.config.to_dict())
        if found != described["base_config"]:
            raise PosteriorError(
                f"'{folder}' was fitted on '{described['base']}' (configuration {described['base_config']}), and does "
                f"not fit '{name}' (configuration {found}). Give the folder of the right network as base."
            )
        adapted = load_adapter(network, folder)
    model = build_model(described["model"]["name"], **described["model"]["settings"])
    encoder = Encoder(tokenizer, spec, max_length=described["max_length"])
    return Program(adapted, observation, model, encoder=encoder)
