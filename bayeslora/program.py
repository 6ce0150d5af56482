"""The probabilistic program: a prior over the weights, a network, and an observation of its output.

Every inference algorithm works on this one declaration: `Program.forward` is the whole Pyro model, `Program.prior` the
part of it that samples weights, `Program.outputs` the network at given weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor, nn

from bayeslora.adapters import adapt, by_base_name, check_prompt, load_adapter
from bayeslora.errors import AdapterError, SettingError, TaskError
from bayeslora.joined import Apart
from bayeslora.models import build as build_model
from bayeslora.models.base import WeightModel
from bayeslora.models.monteclora import MonteCLoRA
from bayeslora.networks import Base, NetworkSettings, is_causal, lacking, load_base
from bayeslora.observations import Encoder, Observation, Padding, build, of_task
from bayeslora.observations.soft_prompts import virtual_tokens
from bayeslora.positions import counts_padding, numbered_from_mask, positions
from bayeslora.recipes import LoraSettings, recipe
from bayeslora.record import RECORD, read_record
from bayeslora.sites import Site, Value
from bayeslora.store import adapter_at
from bayeslora.tasks import Task
from bayeslora.weights import Weights

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["Estimator", "Program", "one_draw"]

#: What is put into the network for weights by site and a batch: a tensor for each site, or functions for its layers.
Estimator = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Value]]


class Program(nn.Module):
    """LoRA fine-tuning as a Pyro model: weights ~ prior, labels ~ observation(network(weights)).

    The joint density is p(weights) prod_i p(y_i | x_i, weights) over all N examples of the data set: the plate scales a
    batch up to N, so that a Kullback-Leibler weight of 1 is Bayes' rule whatever the batch size.

    Args:
        network: a PEFT model, trained or not, or a network of transformers that is to be trained in full. The program
            freezes its parameters and puts sampled values in their place, without changing them.
        observation: what is read of the network's output, and how labels follow from it.
        model: Pyro model of the LoRA weights, or its name, such as ``"gaussian"``; `bayeslora.models.MonteCLoRA` by
            default.
        encoder: turns the rows of a task into token ids; not needed for data that are tokenised already.
        base: which base network it is, and how it was loaded.
        drawn: weights that the base network's files lack, by their names there, of which the frozen ones are saved with
            a posterior; by default the files are asked.
        new: whether the adapter was just made, and not trained; None: not known.

    Raises:
        AdapterError: nothing of the network is trained, or something that cannot be made stochastic.
        SettingError: ``model`` is the name of none.
    """

    def __init__(
        self,
        network: PeftModel,
        observation: Observation,
        model: WeightModel | str | None = None,
        *,
        encoder: Encoder | None = None,
        base: NetworkSettings | None = None,
        drawn: Mapping[str, nn.Parameter] | None = None,
        new: bool | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        check_prompt(network, observation)
        self.observation = observation.for_network(network)
        self.model = _model(model)
        self.encoder = encoder
        self.weights = Weights(network, new, drawn or ())
        self.base = base or NetworkSettings.of(network)
        self._drawn = drawn
        config = getattr(network, "config", None)
        if config is not None and getattr(config, "pad_token_id", 0) is None:
            # A decoder looks for padding to find the last token of a text.
            config.pad_token_id = self.padding.values["input_ids"]

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | NetworkSettings,
        task: Task,
        *,
        lora: PeftConfig | LoraSettings | Mapping[str, Any] | str | None = None,
        adapter: str | Path | None = None,
        model: WeightModel | str | None = None,
        observation: str | None = None,
        observation_settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_length: int | None = None,
    ) -> Program:
        """Load a base network, add LoRA layers and a head for ``task``, and declare the program.

        Args:
            base: folder or hub name of the base network, or more of how it is to be loaded; ``"demo"`` is the encoder
                that the package ships.
            task: says the kind of network, the number of logits and how rows become text.
            lora: PEFT's configuration, or the name of a way to fine-tune (`bayeslora.recipes.RECIPES`), such as
                ``"dora"`` or ``"full"``, or a name with settings, such as ``{"method": "dora", "r": 4}``; LoRA of
                rank 8, alpha 16 on all linear layers by default.
            adapter: folder of a PEFT LoRA adapter, trained or not, or of a run, to load in place of a fresh one.
            model: Pyro model of the LoRA weights, or its name.
            observation: name of what is read of the network's output; by default what the task's labels and the network
                call for: a causal language model is asked by a prompt.
            observation_settings: fields of that observation, which go over what the task and its training rows say.
            seed: of the initial LoRA matrices and head; the global generators are left as they were.
            max_length: longest sequence in tokens; longer texts are cut. By default 256, for completions as many as
                the task's longest row needs, and never more than the network has positions for.

        Raises:
            AdapterError: a target of ``lora`` does not exist or cannot be made stochastic, or ``adapter`` does not fit
                the base network.
            SettingError: ``lora`` or ``model`` is none, or nothing goes by its name, or a setting is wrong.
            TaskError: ``task`` is none.
        """
        # What is spelled wrong is told before a network is loaded.
        if not isinstance(task, Task):
            raise TaskError(f"task is {task!r:.60}, expected a Task, such as bl.load_task('demo') gives.")
        lora, model = recipe(lora), _model(model)
        settings = base if isinstance(base, NetworkSettings) else NetworkSettings(str(base))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            read = of_task(task.spec, observation, is_causal(settings), observation_settings)
            folder = None if adapter is None else adapter_at(adapter)
            loaded = load_base(settings, read, task.spec, adapter=folder)
            told = read = read.for_tokenizer(loaded.tokenizer, task.spec)
            read = read.for_training(task.train, partial(_head, loaded, read, folder))
            read = replace(read, **{name: getattr(told, name) for name in observation_settings or {}})
            network = adapt(loaded.network, read, lora) if folder is None else load_adapter(loaded.network, folder)
        length = read.length(loaded.tokenizer, task) if max_length is None else max_length
        encoder = Encoder(loaded.tokenizer, task.spec, length, positions(network), loaded.labels)
        new = adapter is None
        program = cls(network, read, model, encoder=encoder, base=settings, drawn=loaded.drawn, new=new)
        if adapter is not None:
            _refuse_random(program, adapter)
        return program

    def around(self, values: Mapping[str, Tensor]) -> Program:
        """The same program over the same network with other initial weights, around which its prior may be.

        Args:
            values: by site.

        Raises:
            AdapterError: they are not of this network's sites.
        """
        return self._with(self.weights.around(values))

    def redrawn(self, seed: int) -> Program:
        """The same program with initial weights by another seed: see `Weights.redrawn`."""
        return self._with(self.weights.redrawn(seed))

    def _with(self, weights: Weights) -> Program:
        if all(torch.equal(one.initial, two.initial) for one, two in zip(weights.sites, self.sites, strict=True)):
            return self
        other = copy(self)
        other.weights = weights
        return other

    @property
    def sites(self) -> tuple[Site, ...]:
        """The weights: LoRA matrices by group and role, and the head's tensors."""
        return self.weights.sites

    @property
    def drawn(self) -> dict[str, Tensor]:
        """Frozen weights that were drawn at random, since the base network's files lack them."""
        if self._drawn is None:
            names = lacking(self.base, self.observation, self.encoder.spec) if self.encoder is not None else ()
            self._drawn = {name: value for name, value in by_base_name(self.network).items() if name in names}
        own = {id(value) for name, value in self.network.named_parameters() if ".original_module." not in name}
        frozen = own - self.weights.parameter_ids
        return {name: value.detach() for name, value in self._drawn.items() if id(value) in frozen}

    @property
    def padding(self) -> Padding:
        """How rows are padded into batches: by the token that the network itself takes for padding."""
        padding = Padding() if self.encoder is None else self.encoder.padding
        config = getattr(self.network, "config", None)
        token = getattr(config, "pad_token_id", None)
        values = padding.values if token is None else {**padding.values, "input_ids": token}
        network, side = self.weights.base, padding.side
        numbered = side == "left" and numbered_from_mask(network)
        if self.observation.causal and (counts_padding(network) or virtual_tokens(self.network)):
            side = "right"  # where it moves no token of a text that is read from the left, nor parts it from a prompt
        return replace(padding, values=values, side=side, positions=numbered)

    def save_settings(self, folder: Path) -> None:
        """Write configuration and tokenizer into a folder, as transformers reads them."""
        config = getattr(self.weights.base, "config", None)
        if config is not None:
            config.save_pretrained(folder)
        if self.encoder is not None:
            tokenizer = self.encoder.tokenizer
            # What was not said when a tokenizer was made would not be written either.
            tokenizer.init_kwargs |= {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side")}
            tokenizer.save_pretrained(folder, save_jinja_files=False)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        # All parameters of a network that is trained in full may have values in their place.
        first = next(self.network.parameters(), self.sites[0].initial)
        return first.device

    def _apply(self, *args: Any, **kwargs: Any) -> Program:
        self.weights.restore()  # PEFT's own parameters move with the network
        devices = set(getattr(self.weights.base, "hf_device_map", {}).values())
        if len(devices) < 2:  # else its layers stay where they are
            super()._apply(*args, **kwargs)
        self.weights.to(self.device)
        return self

    def prior(self, sites: Sequence[Site] | None = None) -> dict[str, Tensor]:
        """Pyro model of the weights alone: sample every latent site, return the weights by site.

        Args:
            sites: the program's own, with other centres; as they are, if left out.
        """
        return self.model.sample(self.sites if sites is None else sites)

    def weights_at(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight of each site that values of all latent sites determine."""
        with torch.no_grad():
            found: dict[str, Tensor] = poutine.condition(self.prior, data=dict(latents))()
        return found

    def outputs(self, weights: Mapping[str, Value], batch: Mapping[str, Tensor]) -> Tensor:
        """Outputs (examples, outputs) in float32 at ``weights``, which stay in place until the next call."""
        self.weights.install(weights)
        return self.observation.run(self.network, batch)

    def joint_outputs(self, draws: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Tensor]) -> Tensor:
        """Outputs (draws, examples, outputs) in float32 at several sets of weights, by one pass if the layers allow."""
        tokens = batch["input_ids"].shape[-1]
        rows = batch["input_ids"].numel() // tokens
        # Layers that are given tokens before rows (XLNet's) are told from others by how many there are.
        whole = not self.weights.on_head or self.observation.scored(batch) is None
        if len(draws) > 1 and len(draws) * rows != tokens and self.weights.joinable and whole:
            self.weights.install(self.weights.joined(draws, rows))
            repeated = {name: value.repeat(len(draws), *[1] * (value.dim() - 1)) for name, value in batch.items()}
            with suppress(Apart):
                return self.observation.run(self.network, repeated).unflatten(0, (len(draws), -1))
        return torch.stack([self.outputs(each, batch) for each in draws])

    def forward(
        self,
        batch: Mapping[str, Tensor],
        size: int,
        estimator: Estimator | None = None,
        sites: Sequence[Site] | None = None,
    ) -> Tensor:
        """The whole Pyro model of a batch out of ``size`` examples; returns the outputs (examples, outputs).

        Args:
            batch: with labels.
            size: number of examples.
            estimator: what stands for the weights in the network; they themselves, if left out.
            sites: as for `prior`.
        """
        weights = self.prior(sites)
        outputs = self.outputs(weights if estimator is None else estimator(weights, batch), batch)
        self.observation.observe(outputs, batch, size)
        return outputs

    def __repr__(self) -> str:
        layers = len({layer for site in self.sites for layer in site.layers if site.stacked})
        return f"Program({self.base.name}, {layers} LoRA layers, {self.model.name}, {self.observation.name})"

    def summary(self) -> str:
        """Table of the latent sites: shape, entries, stochastic or point estimate; then the parameter counts."""
        with torch.random.fork_rng():
            trace = poutine.trace(self.prior).get_trace()
        random = self.model.stochastic(self.sites)
        rows = [("site", "shape", "entries", "posterior")]
        for name, node in trace.nodes.items():
            # A deterministic site is the weighted sum of draws that have their own row.
            if node["type"] == "sample" and not node["is_observed"]:
                value = node["value"]
                kind = "distribution" if name in random else "point"
                rows.append((name, "x".join(map(str, value.shape)) or "scalar", f"{value.numel():,}", kind))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        plain = sum(site.initial.numel() for site in self.sites)
        learned = sum(value.numel() for value in self.model.guide(self.sites).parameters() if value.requires_grad)
        table.append(f"LoRA and head: {plain:,} parameters; structured guide: {learned - plain:,} more.")
        return "\n".join(table)


def one_draw(model: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One draw of every latent site of a Pyro model, and the weights that it returns."""
    trace = poutine.trace(model).get_trace()
    latents = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    return latents | trace.nodes["_RETURN"]["value"]


def _model(model: WeightModel | str | None) -> WeightModel:
    """The model of a name; by default MonteCLoRA."""
    if model is None:
        return MonteCLoRA()
    if isinstance(model, str):
        return build_model(model)
    if not isinstance(model, WeightModel):
        raise SettingError(f"model is {model!r}, expected a name such as 'gaussian', or a model such as Gaussian().")
    return model


def _head(loaded: Base, read: Observation, folder: str | Path | None) -> Observation | None:
    """The observation under which the head of a network was trained, as far as it is known; None for one just drawn."""
    if folder is None:
        heads = tuple(f"{module}." for module in read.trained_in_full(loaded.network))
        return None if any(name.startswith(heads) for name in loaded.drawn) else read
    if (Path(folder) / RECORD).is_file():
        described = read_record(Path(folder)).program["observation"]
        return build(described) if described["name"] == read.name else read
    return read


def _refuse_random(program: Program, adapter: str | Path) -> None:
    """Make sure that an adapter holds what its base network lacks.

    Raises:
        AdapterError: it does not, and its predictions depended on weights that were drawn when it was trained.
    """
    left = sorted(program.drawn)
    if left:
        raise AdapterError(
            f"The adapter '{adapter}' does not fit '{program.base.name}': neither has '{left[0]}' ({len(left)} such "
            "weights), which would be drawn at random. Save it with the adapter (modules_to_save)."
        )
