"""A configuration that is known to be right: names that exist, values in the type of their setting, absolute paths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from bayeslora.app.config import RunConfig, plain
from bayeslora.errors import SettingError, unknown
from bayeslora.identity import differing
from bayeslora.registry import check_names
from bayeslora.settings import build, coerce

if TYPE_CHECKING:
    from bayeslora.inference import Backend

__all__ = ["canonical", "differences", "folder", "located_task", "named", "resolve", "task_settings"]


def resolve(config: RunConfig) -> RunConfig:
    """The same configuration with values in the type of their setting and absolute paths, once it is known to be right.

    Two runs with equal resolved configurations are the same run.

    Raises:
        SettingError: an unknown backend, preset, Pyro model or setting, a value of another type, or a folder that is
            not there.
    """
    from bayeslora.inference import BACKENDS
    from bayeslora.models import MODELS

    config = _with_preset(config)
    assert config.backend is not None
    # What is spelled wrong is told at once: no class is imported for it.
    BACKENDS.check(config.backend, config.settings)
    if config.model is not None:
        MODELS.check(config.model, config.model_settings)
    check_names("network", "bayeslora.networks:NetworkSettings", config.network)
    of_task = task_settings(config.task_settings)
    from bayeslora.networks import NetworkSettings

    if "name" in config.network:
        raise SettingError("The name of the network is that of the base: give base= (in a shell --base).")
    algorithm = BACKENDS.build(config.backend, config.settings)
    model, model_settings = _model(config, algorithm)
    return replace(
        config,
        model=model,
        base=_located(config.base),
        task=located_task(config.task, config.data_dir),
        adapter=None if config.adapter is None else folder(config.adapter, "adapter"),
        data_dir=None if config.data_dir is None else folder(config.data_dir, "data"),
        settings=_typed(algorithm, config.settings),
        model_settings=_typed(MODELS.build(model, model_settings), model_settings),
        network=_typed(build(NetworkSettings, config.network), config.network),
        task_settings=of_task,
    )


def _with_preset(config: RunConfig) -> RunConfig:
    """The same configuration with its preset's backend and model, and their settings, where it does not say others."""
    if config.preset is None:
        return replace(config, backend=config.backend or "svi")
    from bayeslora.inference.presets import PRESETS, over

    found = PRESETS[config.preset]
    if config.backend in (None, found.backend):
        config = replace(config, backend=found.backend, settings=over(found.settings, config.settings))
    if config.model in (None, found.model):
        config = replace(config, model=found.model, model_settings=over(found.model_settings, config.model_settings))
    return config


def _model(config: RunConfig, algorithm: Backend) -> tuple[str, dict[str, Any]]:
    """Name and settings of the Pyro model of a run."""
    from bayeslora.inference.base import default_model_of

    name, settings = default_model_of(algorithm)
    if config.model in (None, name):
        return name, settings | config.model_settings
    return config.model, config.model_settings


def canonical(config: RunConfig) -> RunConfig:
    """The resolved configuration with every setting in it, those that have their defaults as well, and no preset.

    Two runs with equal canonical configurations are the same run, whatever the defaults will be.

    Raises:
        SettingError: as in `resolve`.
    """
    from bayeslora.inference import BACKENDS
    from bayeslora.models import MODELS
    from bayeslora.networks import NetworkSettings

    config = resolve(config)
    assert config.backend is not None and config.model is not None
    network = asdict(build(NetworkSettings, config.network))
    return replace(
        config,
        preset=None,
        settings=plain(asdict(BACKENDS.build(config.backend, config.settings))),
        model_settings=plain(asdict(MODELS.build(config.model, config.model_settings))),
        network={name: value for name, value in network.items() if name != "name"},
        output=None,
    )


def named(name: str) -> dict[str, str]:
    """The field of a run that a method's name stands for: its backend, or else its preset.

    Raises:
        SettingError: there is neither.
    """
    from bayeslora.inference import BACKENDS
    from bayeslora.inference.presets import PRESETS

    if name in BACKENDS or name not in PRESETS:
        BACKENDS.check(name, ())
        return {"backend": name}
    return {"preset": name}


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Fields in which two configurations differ, each as "name: value and value"; the output does not count."""
    first, second = (config.to_dict() | {"output": None} for config in (one, other))
    return differing(first, second)


def _typed(built: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in the types that they have in what was built from them."""
    return {name: plain(getattr(built, name)) for name in values}


def task_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Further arguments of `bayeslora.load_task` in their types.

    Raises:
        SettingError: an argument is unknown, or one that a run has a field for.
    """
    from bayeslora.tasks import load_task

    # What the configuration has fields for is no further argument.
    known = set(inspect.signature(load_task).parameters) - {"source", *RunConfig.__dataclass_fields__}
    hints = get_type_hints(load_task)
    typed = {}
    for name, value in values.items():
        if name not in known:
            raise SettingError(unknown("setting of a task", name, known))
        is_template = isinstance(value, str) and "{" in value  # its commas are part of the text
        typed[name] = value if is_template else plain(coerce(value, hints[name], f"task: {name}"))
    return typed


def _located(base: str) -> str:
    """A hub name as it is, a folder by its absolute path."""
    path = Path(base).expanduser()
    if base != "demo" and path.exists():
        return str(path.resolve())
    if path.is_absolute() or base.startswith((".", "~")):
        raise SettingError(f"There is no base network '{base}': expected a folder, a name on the hub, or 'demo'.")
    return base


def located_task(name: str, data_dir: str | None) -> str:
    """A known task, or a name on the hub or within ``data_dir``, as it is; a file or folder by its absolute path."""
    from bayeslora.tasks.sources import SUFFIXES
    from bayeslora.tasks.spec import find_task

    path = Path(name).expanduser()
    if data_dir is not None or not name.strip() or not path.exists():
        return name
    return str(path.resolve()) if path.suffix.lower() in SUFFIXES or find_task(name) is None else name


def folder(name: str, what: str) -> str:
    """Absolute path of a folder.

    Raises:
        SettingError: it is not there.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise SettingError(f"There is no {what} folder '{name}'.")
    return str(path.resolve())
