"""Base networks: loading one with the head that a task needs, and putting LoRA layers onto it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bayeslora.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bayeslora.observations import Observation
    from bayeslora.tasks import TaskSpec

__all__ = ["Base", "adapt", "load_adapter", "load_base"]


class Base(NamedTuple):
    """A base network, its tokenizer, and the names of weights that are drawn at random, since its files lack them."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    random: frozenset[str]


def load_base(name: str | Path, observation: Observation, spec: TaskSpec, dtype: torch.dtype = torch.float32) -> Base:
    """The base network with the head that the task needs, drawn afresh if it has none."""
    import transformers

    path = _demo() if str(name) == "demo" else str(name)
    with _quietly():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        kind: Any = getattr(transformers, observation.network)
        base, found = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **observation.head(spec))
    base.config.pad_token_id = tokenizer.pad_token_id
    return Base(base, tokenizer, frozenset(found["missing_keys"]))


@contextmanager
def _quietly() -> Iterator[None]:
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


def _demo() -> str:
    from bayeslora.demo import MODEL_PATH

    return str(MODEL_PATH)


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put a saved LoRA adapter onto ``base``.

    Raises:
        AdapterError: there is none, or it is one of another network.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    name = base.config.name_or_path
    with warnings.catch_warnings():
        # PEFT merely warns of weights that the adapter lacks, and they would be drawn at random.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            network: PeftModel = PeftModel.from_pretrained(base, folder)
        except KeyError as error:
            raise AdapterError(f"The adapter '{folder}' does not fit '{name}': it lacks {error}.") from error
        except (OSError, ValueError, RuntimeError, UserWarning) as error:
            raise AdapterError(f"The adapter '{folder}' does not fit '{name}': {error}") from error
    left = sorted(set(load_peft_weights(str(folder), device="cpu")) - set(get_peft_model_state_dict(network)))
    if left:
        raise AdapterError(
            f"The adapter '{folder}' does not fit '{name}': it holds '{left[0]}' ({len(left)} such weights), for which "
            "there is no place."
        )
    return network


def adapt(base: PreTrainedModel, observation: Observation, lora: LoraConfig | None = None) -> PeftModel:
    """Add LoRA layers to ``base`` and let PEFT train its head in full.

    Raises:
        AdapterError: a target module of ``lora`` does not exist in the network.
    """
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    config = deepcopy(lora) if lora else LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    config.task_type = observation.peft_task
    if config.modules_to_save is None:
        config.modules_to_save = observation.trained_in_full(base)
    try:
        with _quietly():
            network: PeftModel = get_peft_model(base, config)
    except ValueError as error:
        raise AdapterError(
            f"PEFT cannot add LoRA layers to {type(base).__name__} at target_modules={config.target_modules}: {error}"
        ) from error
    return network
