"""The configuration of a run, from a YAML file, flags and ``key=value`` assignments, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bayeslora.errors import SettingError, unknown
from bayeslora.recipes import LoraSettings
from bayeslora.settings import Count, Seed, Settings, build

__all__ = ["OF_ROWS", "PREFIXES", "LoraSettings", "RunConfig", "assign", "plain", "read_config", "read_yaml"]

#: Where an assignment with a prefix goes; one without goes to the settings of the backend.
PREFIXES = {
    "guide": ("settings", "guide_settings"),
    "of": ("settings", "of_settings"),
    "model": ("model_settings",),
    "network": ("network",),
    "lora": ("lora",),
    "task": ("task_settings",),
    "observation": ("observation_settings",),
}
#: Fields of a run that say which rows there are, but for the seed by which some of them are chosen.
OF_ROWS = ("task", "data_dir", "train_size", "heldout_size", "task_settings")


@dataclass(frozen=True)
class RunConfig(Settings):
    """All that a run depends on.

    Attributes:
        base: folder or hub name of the base network; "demo" is the encoder that the package ships.
        adapter: PEFT LoRA adapter to start from, in place of a fresh one; ``lora`` is then not looked at.
        task: name of a known task, or path or hub name of your own data (with ``task_settings``).
        data_dir: folder with the task's files; without it they come from the hub.
        preset: published settings, over which those that are given here go.
        backend: inference algorithm; by default "svi".
        train_size: number of training rows; all by default.
        heldout_size: number of training rows to set aside.
        seed: of the choice of rows, the initial weights and the fit.
        chains: number of independent fits, whose seeds follow one another; the posterior is their mixture.
        max_length: longest sequence in tokens; by default 256, for completions as many as the longest row needs.
        model: Pyro model of the LoRA weights; by default "monteclora", but "gaussian" for `ivon`, and for `laplace`,
            isotropic around zero over both matrices, as in Laplace-LoRA.
        model_settings: settings of that model.
        network: how the base network is loaded: fields of `bayeslora.networks.NetworkSettings`.
        observation: what is read of the network's output; by default what task and base call for.
        observation_settings: fields of that observation.
        lora: what is trained of the network: LoRA layers, or what its ``method`` says; a word is that method.
        task_settings: further arguments of `bayeslora.load_task`.
        settings: settings of the backend.
        output: folder of the run.
    """

    name: ClassVar[str] = "a run"

    base: str
    task: str
    adapter: str | None = None
    data_dir: str | None = None
    preset: str | None = None
    backend: str | None = None
    train_size: int | None = None
    heldout_size: int = 0
    seed: Seed = 0
    chains: Count = 1
    max_length: int | None = None
    model: str | None = None
    model_settings: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    observation: str | None = None
    observation_settings: dict[str, Any] = field(default_factory=dict)
    lora: LoraSettings = field(default_factory=LoraSettings)
    task_settings: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    output: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` or a YAML file gives.

        Raises:
            SettingError: an unknown key, or a value of another type.
        """
        if values.get("model") == "demo":
            raise SettingError("'model' is the Pyro model of the weights: the base network, such as 'demo', is 'base'.")
        return build(cls, _spelled_out(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def to_yaml(self) -> str:
        """The configuration as a YAML file that `read_config` takes."""
        import yaml

        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def read_config(
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
) -> RunConfig:
    """Configuration from a file, over which flags go, over which assignments go.

    Args:
        path: YAML file with the fields of `RunConfig`.
        flags: fields by name; those that are None were not given.
        assignments: ``key=value`` each; see `assign`.

    Raises:
        SettingError: the file cannot be read, a key is unknown, or a value has another type.
    """
    values = {} if path is None else read_yaml(Path(path))
    values |= {name: value for name, value in (flags or {}).items() if value is not None}
    return RunConfig.from_dict(assign(values, assignments))


def assign(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Fields of a `RunConfig` with assignments put in.

    ``epochs=3`` is a setting of the backend; ``guide.flow=true`` is one of its guide, ``of.epochs=3`` one of the
    backend that it is over, and ``of.guide.flow=true`` of that one's guide; ``model.components=4``,
    ``network.dtype=bfloat16``, ``lora.r=16`` and ``task.label=answer`` are settings of the Pyro model, the base
    network, the LoRA layers and the task; ``max_length=128`` is a field of `RunConfig` itself.
    Values stay text: the setting knows its type.

    Raises:
        SettingError: an assignment without equals sign, or with an unknown prefix.
    """
    merged = _spelled_out(values)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise SettingError(f"Cannot read the setting '{assignment}': expected key=value.")
        prefix, dot, name = key.strip().partition(".")
        if dot and prefix not in PREFIXES:
            raise SettingError(unknown("prefix of a setting", prefix, PREFIXES))
        if prefix == "lora":
            name = name or "method"  # lora=dora
        if name:
            path = (*PREFIXES[prefix], *_within(prefix, name))
        elif prefix in RunConfig.__dataclass_fields__ and not dot:
            path = (prefix,)
        else:
            path = ("settings", prefix)
        merged = _put(merged, path, value)
    return merged


def _within(prefix: str, name: str) -> tuple[str, ...]:
    """Where a setting is: of a backend that another one is over, that of its guide or own backend is a step further."""
    inner, dot, rest = name.partition(".")
    if prefix == "of" and dot and inner in ("of", "guide"):
        return (f"{inner}_settings", *_within(inner, rest))
    return (name,)


def _put(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Nested mappings with a value put in."""
    name, *rest = path
    return {**values, name: _put(values.get(name) or {}, rest, value) if rest else value}


def _spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with the mapping that the name of a way to fine-tune is short for."""
    lora = values.get("lora")
    return {**values, "lora": {"method": lora}} if isinstance(lora, str) else dict(values)


def read_yaml(path: Path, what: str = "configuration") -> dict[str, Any]:
    """What a YAML file of keys and values holds.

    Raises:
        SettingError: it cannot be read, or holds something else.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"Cannot read the {what} {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"The {what} {path} is no YAML file: {error}") from error
    if not isinstance(values, dict):
        raise SettingError(f"The {what} {path} holds a {type(values).__name__}, expected key: value lines.")
    return {str(key): value for key, value in values.items()}


def plain(value: Any) -> Any:
    """Values that YAML and JSON give back as they were: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
