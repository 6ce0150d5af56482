"""Adapters of PEFT: putting fresh LoRA layers, or saved ones, onto a base network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from bayeslora.errors import AdapterError
from bayeslora.networks import quietly
from bayeslora.observations.decoder import evaluated, hidden_states
from bayeslora.observations.soft_prompts import PROMPTS, virtual_tokens
from bayeslora.positions import positions
from bayeslora.recipes import LoraSettings
from bayeslora.sites import short

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from bayeslora.observations import Observation

__all__ = ["adapt", "by_base_name", "check_prompt", "load_adapter", "saved_network"]


def adapt(
    base: PreTrainedModel, observation: Observation, lora: PeftConfig | LoraSettings
) -> PreTrainedModel | PeftModel:
    """Add LoRA layers, or what else ``lora`` says, to ``base`` and let PEFT train its head in full.

    Raises:
        AdapterError: a target module of ``lora`` does not exist in the network, or a learned prompt has no place before
            texts, or leaves none for them.
    """
    from copy import deepcopy

    from peft import get_peft_model

    config = lora.to_peft() if isinstance(lora, LoraSettings) else deepcopy(lora)
    if config is None:
        return base
    config.task_type = observation.peft_task
    if config.is_prompt_learning and config.task_type is None:
        raise AdapterError(
            f"PEFT puts no {config.peft_type.value} before the texts of a {type(base).__name__}: expected classes, a "
            "value or a causal language model. Take another way to fine-tune."
        )
    if getattr(config, "modules_to_save", ()) is None:
        config.modules_to_save = observation.trained_in_full(base)
    try:
        with quietly():
            network: PeftModel = get_peft_model(base, config)
    except ValueError as error:
        raise AdapterError(
            f"PEFT cannot add {config.peft_type.value} to {type(base).__name__} at "
            f"target_modules={getattr(config, 'target_modules', None)}: {error}"
        ) from error
    _check_room(network)
    return network


def _check_room(network: Any) -> None:
    """Make sure that a learned prompt, if there is one, leaves a text positions for two tokens: one after another.

    Raises:
        AdapterError: it does not.
    """
    count, room = virtual_tokens(network), positions(network)
    if count and room is not None and room < 2:
        raise AdapterError(
            f"A prompt of {count} tokens leaves texts no room in a {network.config.model_type} network, which has "
            f"positions for {room + count}: learn fewer (in a shell --set lora.tokens=...)."
        )


def check_prompt(network: Any, observation: Observation) -> None:
    """Make sure that a network reads texts behind a prompt that is learned, if it has one, and is read at their places.

    Raises:
        AdapterError: it does not, or is not.
    """
    count = virtual_tokens(network)
    if not count:
        return
    _check_room(network)
    kind, base = str(network.active_peft_config.peft_type.value), network.get_base_model()
    if observation.causal and kind not in PROMPTS:
        raise AdapterError(
            f"{kind} puts a learned prompt before the texts of a {type(base).__name__}, and known there are "
            f"{', '.join(PROMPTS)}: take one of these, or another way to fine-tune."
        )
    # A decoder with a head finds the last token of a text by the token ids, which a prompt of vectors is without.
    if not observation.causal and kind != "PREFIX_TUNING" and hasattr(base, "score"):
        raise AdapterError(
            f"{kind} puts {count} places before each text, by which a {type(base).__name__} would be read at a wrong "
            "place: ask the decoder by a prompt (observation='prompted'), learn a prefix (PREFIX_TUNING), or take "
            "another way to fine-tune."
        )
    if observation.causal:
        _check_reading(network, kind)


@torch.no_grad()
def _check_reading(network: Any, kind: str) -> None:
    """Make sure that a causal language model can read a learned prompt, and does: it is asked to, once."""
    base = network.get_base_model()
    ids = torch.arange(2, device=base.get_input_embeddings().weight.device).unsqueeze(0)
    try:
        with evaluated(network):
            without, behind = (hidden_states(each, {"input_ids": ids}) for each in (base, network))
        wrong = "it makes the same of a text without" if torch.equal(without, behind) else None
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        # Each architecture has an error of its own for keys or embeddings that do not fit it.
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise AdapterError(
            f"A {base.config.model_type} network does not read the prompt that PEFT makes for it by {kind} ({wrong}): "
            "set its shape in PEFT's configuration (token_dim, num_layers, num_attention_heads), or take another way "
            "to fine-tune."
        )


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put a saved LoRA adapter onto ``base``.

    Raises:
        AdapterError: there is none, or it is one of another network.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    name = base.config.name_or_path
    with warnings.catch_warnings():
        # PEFT merely warns of weights that the adapter lacks, and they would be drawn at random.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            config = PeftConfig.from_pretrained(str(folder))
            if config.is_prompt_learning:
                raise AdapterError(
                    f"The adapter '{folder}' is a learned prompt ({config.peft_type.value}), which PEFT loads to "
                    "predict by and not to train: load the posterior of its run, or train a prompt anew "
                    "(lora='prompt-tuning')."
                )
            network: PeftModel = PeftModel.from_pretrained(base, folder, is_trainable=True)
        except KeyError as error:
            raise AdapterError(f"The adapter '{folder}' does not fit '{name}': it lacks {error}.") from error
        except (OSError, ValueError, RuntimeError, SafetensorError, UserWarning) as error:
            raise AdapterError(f"The adapter '{folder}' does not fit '{name}': {error}") from error
    weights = load_peft_weights(str(folder), device="cpu")
    wrong = [f"'{key}' of {value.dtype}" for key, value in weights.items() if not value.is_floating_point()]
    if wrong:
        raise AdapterError(f"The adapter '{folder}' holds {wrong[0]} ({len(wrong)} such weights): expected floats.")
    left = sorted(set(weights) - set(get_peft_model_state_dict(network)))
    if left:
        raise AdapterError(
            f"The adapter '{folder}' does not fit '{name}': it holds '{left[0]}' ({len(left)} such weights), for which "
            "there is no place."
        )
    return network


def saved_network(
    base: PreTrainedModel, folder: str | Path, layers: Mapping[str, Sequence[str]]
) -> PreTrainedModel | PeftModel:
    """``base`` as it was trained for the posterior in a folder, which holds the values of all that was.

    Args:
        base: network.
        folder: of the posterior.
        layers: of each site; of a network without PEFT, whose other parameters are frozen, the names of parameters.

    Raises:
        AdapterError: what is in the folder does not fit.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not (Path(folder) / "adapter_config.json").is_file():  # without PEFT
        trained = {name for names in layers.values() for name in names}
        for name, value in base.named_parameters():
            value.requires_grad_(name in trained)
        return base
    config = PeftConfig.from_pretrained(str(folder))
    if not config.is_prompt_learning:
        return load_adapter(base, folder)
    # PEFT loads prompts for inference alone, and of an encoder of prompts nothing but what it gives.
    config.inference_mode = False
    try:
        network: PeftModel = get_peft_model(base, config)
        set_peft_model_state_dict(network, load_peft_weights(str(folder), device="cpu"))
    except (KeyError, RuntimeError, ValueError) as error:
        raise AdapterError(f"The adapter '{folder}' does not fit '{base.config.name_or_path}': {error}") from error
    return network


def by_base_name(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a network by the names that they have without PEFT."""
    return {short(name).replace(".base_layer.", "."): value for name, value in network.named_parameters()}
