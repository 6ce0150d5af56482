"""Base networks: loading one with the head that a task needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bayeslora.demo import MODEL_PATH
from bayeslora.errors import AdapterError, SettingError
from bayeslora.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bayeslora.observations import Observation
    from bayeslora.tasks import TaskSpec

__all__ = [
    "Base",
    "NetworkSettings",
    "is_causal",
    "lacking",
    "load_base",
]


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """Which base network, and how it is loaded: kept with every posterior.

    Attributes:
        name: folder or hub name; "demo" is the encoder that the package ships.
        dtype: of the frozen weights, by torch's name; LoRA weights are float32 in any case.
        quantisation: "4bit" or "8bit", by bitsandbytes.
        attention: kernel of attention, such as "sdpa", "eager" or "flash_attention_2"; transformers' choice by default.
        device_map: over several devices, such as "auto", by accelerate.
    """

    name: str = ""
    dtype: str = "float32"
    quantisation: Literal["4bit", "8bit"] | None = None
    attention: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", _portable(self.name))
        dtype = getattr(torch, str(self.dtype), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise SettingError(f"dtype is '{self.dtype}', expected one of torch's, such as float32 or bfloat16.")

    @classmethod
    def of(cls, network: nn.Module) -> NetworkSettings:
        """Settings of a network that is there already, as far as it tells them."""
        name = getattr(getattr(network, "config", None), "name_or_path", "")
        return cls(name or "", str(next(network.parameters()).dtype).removeprefix("torch."))

    @property
    def path(self) -> str:
        """What transformers loads."""
        return str(MODEL_PATH) if self.name == "demo" else self.name

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained``."""
        found: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.quantisation is not None:
            from transformers import BitsAndBytesConfig

            found["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=self.quantisation == "4bit",
                load_in_8bit=self.quantisation == "8bit",
                bnb_4bit_compute_dtype=found["dtype"],
            )
        if self.attention is not None:
            found["attn_implementation"] = self.attention
        if self.device_map is not None:
            found["device_map"] = self.device_map
        return found


def is_causal(settings: NetworkSettings) -> bool:
    """Whether a base network is a causal language model with its own head, as its configuration says."""
    from transformers import PreTrainedConfig

    try:
        found, _ = PreTrainedConfig.get_config_dict(settings.path)
    except (OSError, ValueError):  # whoever loads it says what is wrong
        return False
    return _names_causal(found.get("architectures") or ())


def _names_causal(architectures: Sequence[str]) -> bool:
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


class Base(NamedTuple):
    """A base network as it was loaded.

    Attributes:
        network: with the head that a task needs.
        tokenizer: of the network.
        drawn: those of its weights that its files lack.
        resized: names of those among them that the files have for another number of classes.
        labels: names of the task's classes, in the order of the network's outputs.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drawn: dict[str, nn.Parameter]
    resized: tuple[str, ...]
    labels: tuple[str, ...]


def load_base(
    settings: NetworkSettings,
    observation: Observation,
    spec: TaskSpec,
    *,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    drawn: Mapping[str, Tensor] | None = None,
) -> Base:
    """The base network with the head that the task needs, drawn afresh if it has none.

    A base network with a trained head knows the order of the classes, and so does an adapter with a ``config.json`` in
    its folder. The network's configuration gives their names, too.

    Args:
        settings: which network, and how.
        observation: says the kind of head.
        spec: of the task.
        adapter: folder of the adapter that is to be put onto it, if that is there already.
        tokenizer: folder of the tokenizer, if not the network's own.
        drawn: values of weights that the network's files lack, in place of random ones.

    Raises:
        AdapterError: there is no such network, transformers has no head of that kind for it, ``drawn`` does not fit, or
            the adapter has other classes than the task.
    """
    base = _loaded(settings, observation, spec, tokenizer, drawn)
    return base._replace(labels=_named_classes(base, observation, spec, adapter))


def _loaded(
    settings: NetworkSettings,
    observation: Observation,
    spec: TaskSpec,
    tokenizer: str | Path | None = None,
    drawn: Mapping[str, Tensor] | None = None,
) -> Base:
    """A base network with the names of the classes of its own head; none if it has none, or does not name them."""
    import transformers

    kind: Any = getattr(transformers, observation.network)
    try:
        with quietly():
            read = transformers.AutoTokenizer.from_pretrained(settings.path if tokenizer is None else tokenizer)
            labels = _label_names(transformers.PreTrainedConfig.get_config_dict(settings.path)[0].get("id2label"))
            config = transformers.AutoConfig.from_pretrained(settings.path, **observation.head(spec))
            _check_kind(settings.name, config, kind, observation)
            # A head for another number of classes is replaced by one that is drawn, as is a head that is not there.
            arguments = settings.arguments() | {"output_loading_info": True, "ignore_mismatched_sizes": True}
            base, found = kind.from_pretrained(settings.path, config=config, **arguments)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise AdapterError(f"The base network '{settings.name}' cannot be loaded: {error}") from error
    if read.pad_token is None:
        read.pad_token = read.eos_token
    base.config.pad_token_id = read.pad_token_id
    resized = tuple(sorted(key for key, *_ in found["mismatched_keys"]))
    heads = tuple(f"{module}." for module in observation.trained_in_full(base))
    others = [name for name in resized if not name.startswith(heads)]
    if others:
        raise AdapterError(
            f"The files of '{settings.name}' do not fit its configuration: '{others[0]}' has another shape there."
        )
    missing = {*found["missing_keys"], *resized}
    random = {name: value for name, value in base.named_parameters() if name in missing}
    for name, value in (drawn or {}).items():
        if name not in random or random[name].shape != value.shape:
            raise AdapterError(f"'{settings.name}' has '{name}' already, or in another shape: it is another network.")
        random[name].data.copy_(value)
    return Base(base, read, random, resized, () if any(name.startswith(heads) for name in random) else labels)


def lacking(settings: NetworkSettings, observation: Observation, spec: TaskSpec) -> frozenset[str]:
    """Names of the weights that a network's files lack; none if it cannot be loaded, so that nobody draws them anew."""
    try:
        with torch.random.fork_rng():
            return frozenset(_loaded(settings, observation, spec).drawn)
    except AdapterError:
        return frozenset()


def _check_kind(name: str, config: Any, kind: Any, observation: Observation) -> None:
    if type(config) not in kind._model_mapping:
        raise AdapterError(
            f"transformers has no {observation.network.removeprefix('AutoModelFor')} for '{name}' "
            f"({config.model_type}), which the observation '{observation.name}' needs: choose another base, or "
            "a task of another kind."
        )
    # transformers makes one of an encoder, too, which was never trained to go on with a text.
    if observation.causal and config.architectures and not _names_causal(config.architectures):
        raise AdapterError(
            f"'{name}' is a {config.architectures[0]}, and the observation '{observation.name}' needs a causal "
            "language model: choose another base, or another observation."
        )


def _label_names(id2label: Mapping[Any, str] | None) -> tuple[str, ...]:
    """Names of the classes that a configuration gives; none if transformers made them up."""
    names = tuple(str(name) for _, name in sorted((id2label or {}).items(), key=lambda item: int(item[0])))
    return () if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _named_classes(base: Base, observation: Observation, spec: TaskSpec, adapter: str | Path | None) -> tuple[str, ...]:
    """Names of a task's classes in the order of the network's outputs; its configuration gives them, too."""
    if "id2label" not in observation.head(spec):  # outputs that are no classes
        return spec.labels
    name, own = base.network.config.name_or_path, () if adapter is None else _labels_at(Path(adapter))
    known = own or base.labels
    labels = known if sorted(known) == sorted(spec.labels) else spec.labels
    numbers = tuple(str(number) for number in range(len(spec.labels)))  # which are names that say nothing
    if own and own != labels and spec.labels != numbers:
        raise AdapterError(
            f"The adapter '{adapter}' is for the classes ({', '.join(own)}), and task '{spec.name}' has "
            f"({', '.join(spec.labels)}). Name the task's classes as the adapter does: labels={list(own)} (in a shell "
            f"--set task.labels={','.join(own)})."
        )
    if adapter is None and base.resized:
        _say(
            f"'{name}' has a head of another size ({', '.join(base.resized)}): it is replaced by one that is drawn at "
            "random and trained."
        )
    elif known and known != labels and spec.labels != numbers:
        _say(f"The head of '{name}' is for ({', '.join(known)}): it is taken as it is for ({', '.join(spec.labels)}).")
    base.network.config.id2label = dict(enumerate(labels))
    base.network.config.label2id = {label: number for number, label in enumerate(labels)}
    return labels


def _labels_at(folder: Path) -> tuple[str, ...]:
    from transformers import PreTrainedConfig

    if not (folder / "config.json").is_file():
        return ()
    try:
        return _label_names(PreTrainedConfig.get_config_dict(folder)[0].get("id2label"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"The configuration in '{folder}' cannot be read: {error}") from error


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=5)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' report of a head that is drawn afresh, as was asked for, and of its own deprecations."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _portable(name: str) -> str:
    """Name of a base network that holds in other folders; the packaged one has the same name everywhere."""
    path = Path(name)
    if name in ("", "demo") or not path.is_dir():
        return name
    return "demo" if path.resolve() == MODEL_PATH.resolve() else str(path.resolve())
