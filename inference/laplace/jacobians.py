"""Jacobians of the logits with respect to LoRA matrices, example by example, and never as one matrix.

A LoRA matrix meets every token of an example, so its gradient is a sum of outer products: what enters the layer times
what comes back. A `Tape` listens to both while the network runs; nothing is stored that is as large as the examples
times all parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayeslora.errors import AdapterError
from bayeslora.inference.laplace.products import Places, Products
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program
from bayeslora.sites import Site, Slot

__all__ = ["Layer", "Products", "Tape", "as_matrices", "as_value", "jacobians", "matrices_of"]

#: A site and the place in its stack: one weight matrix of the network.
Layer = tuple[str, int]
#: Bytes of activations that a backward pass of a prediction keeps at most, about, but for one row.
BYTES = 2_000_000_000


def as_matrices(site: Site, value: Tensor) -> Tensor:
    """A site's value as (layers, columns, rank); of the head, columns are inputs and the rank stands for outputs."""
    if site.role != "head":
        return value
    return value.mT.unsqueeze(0) if value.dim() == 2 else value.reshape(1, 1, -1)


def as_value(site: Site, matrices: Tensor) -> Tensor:
    """The inverse of `as_matrices`."""
    if site.role != "head":
        return matrices
    return matrices.squeeze(0).mT if site.initial.dim() == 2 else matrices.reshape(site.initial.shape)


def matrices_of(sites: Sequence[Site], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of ``sites`` as stacks of matrices."""
    return {site.name: as_matrices(site, values[site.name]) for site in sites}


@dataclass
class _Call:
    """One pass through a layer: what entered, what left, and the factor between the latter and the LoRA product."""

    entered: Tensor
    left: Tensor
    factor: float = 1.0


class Tape:
    """Listens to the layers of some sites while the network runs.

    Use as a context; within it, run the network once with gradients enabled, then ask for `products`.

    Args:
        program: whose network it is.
        sites: whose matrices the Jacobian is with respect to.

    Raises:
        AdapterError: a part of the head is no linear layer (the message names it).
    """

    def __init__(self, program: Program, sites: Sequence[Site]) -> None:
        self._calls: dict[Layer, list[_Call]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._patched: list[Any] = []
        self._sites = {site.name: site for site in sites}
        self._places = [
            (site, place, slot) for site in sites for place, slot in enumerate(program.weights.slots(site.name))
        ]
        self._network = program.network
        self._attended, self._scored = program.observation.attended, program.observation.scored
        for site, place, slot in self._places:
            if site.stacked and not site.scaling:
                raise AdapterError(
                    f"Layer '{site.layers[place]}' is a DoRA layer: its Jacobian is not that of a product B A. Choose "
                    "svi or a sampler, or make the adapter without DoRA."
                )
            if site.role == "head" and not isinstance(slot.module, nn.Linear):
                raise AdapterError(
                    f"The head's part '{site.layers[place]}' is a {type(slot.module).__name__}: a Jacobian needs "
                    "linear layers. Leave the head out, head=False."
                )

    def __enter__(self) -> Tape:
        for site, place, slot in self._places:
            self._listen(site, (site.name, place), slot)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._patched:
            layer.__dict__.pop("_embed", None)
        self._handles.clear()
        self._patched.clear()
        self._calls.clear()

    def _listen(self, site: Site, key: Layer, slot: Slot) -> None:
        calls = self._calls[key]
        if isinstance(slot.module, nn.Linear):

            def heard(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if torch.is_grad_enabled():  # else it is no part of what is differentiated
                    calls.append(_Call(inputs[0].detach(), _awake(output)))

            self._handles.append(slot.module.register_forward_hook(heard))
            return
        layer: Any = self._network.get_submodule(site.layers[key[1]])
        if site.role == "A":
            self._listen_to_lookup(layer, lambda ids, found: calls.append(_Call(ids, _awake(found))))
            return
        entered: list[Tensor] = []
        self._listen_to_lookup(layer, lambda ids, found: entered.append(found.detach()))
        scale = layer._get_embed_scale()
        factor = float(layer.scaling[slot.name]) * (1.0 if scale is None else float(scale))

        def left(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append(_Call(entered.pop(), _awake(output), factor))

        self._handles.append(layer.register_forward_hook(left))

    def _listen_to_lookup(self, layer: Any, heard: Any) -> None:
        # PEFT keeps the matrices of an embedding as bare parameters: only its own lookup sees what they give.
        inner = layer._embed

        def lookup(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = inner(ids, *args, **kwargs)
            heard(ids, found)
            return found

        layer.__dict__["_embed"] = lookup
        self._patched.append(layer)

    def products(
        self, logits: Tensor, directions: Tensor, batch: Mapping[str, Tensor]
    ) -> Iterator[dict[Layer, Products]]:
        """For each direction, the gradients of direction . logits with respect to every matrix.

        Args:
            logits: of the pass that was listened to, (examples, outputs).
            directions: (directions, examples, outputs).
            batch: of the pass, whose masks say which tokens are padding.

        Raises:
            AdapterError: a layer sees something other than the rows, so that its gradient cannot be split between them.
        """
        calls = [(key, call) for key, heard in self._calls.items() for call in heard]
        outputs = [call.left for _, call in calls]
        # A sequence that begins with padding may leave attention there without a key, and what follows is not finite.
        attended, scored = self._attended(batch), self._scored(batch)
        places = None if scored is None else Places(scored, len(logits))
        picked = {key for key, heard in self._calls.items() if places is not None and _at_places(heard, places)}
        self._refuse_mixed(attended.flatten(0, 1), picked)
        finite = bool(attended[..., 0].all())
        # What entered a layer is the same for every direction.
        inputs = {
            key: _entered_at(heard, places)
            if places is not None and key in picked
            else self._entered(key, heard, attended, finite)
            for key, heard in self._calls.items()
        }
        for number, direction in enumerate(directions):
            more = number + 1 < len(directions)
            gradients = torch.autograd.grad(logits, outputs, direction, retain_graph=more, allow_unused=True)
            came: dict[Layer, list[Tensor]] = {key: [] for key in self._calls}
            for (key, call), gradient in zip(calls, gradients, strict=True):
                back = (torch.zeros_like(call.left) if gradient is None else gradient).float()
                back = back if call.factor == 1 else back * call.factor
                came[key].append(back if key in picked else back.reshape(len(logits), -1, back.shape[-1]))
            if places is not None:
                came |= {key: [places.spread(came[key])] for key in picked}
            yield {key: self._product(key, *inputs[key], came[key]) for key in came}

    def _refuse_mixed(self, mask: Tensor, picked: Collection[Layer]) -> None:
        """Name all layers that see something other than the rows, such as relative positions."""
        whole = {key: heard for key, heard in self._calls.items() if key not in picked}
        mixed = {key for key, heard in whole.items() if not all(_sees_rows(call, mask) for call in heard)}
        if not mixed:
            return
        lora = {(site.name, place): site.layers[place] for site, place, _ in self._places if site.stacked}
        names = sorted({lora.get(key, "head") for key in mixed})
        kinds, others = ({name.rpartition(".")[2] for name in some} for some in (names, lora.values()))
        left = sorted(others - kinds)
        way_out = (
            f"Give LoraConfig(target_modules={left}) (in a shell --set lora.target_modules={','.join(left)})."
            if left
            else "No layer is left: choose another backend, such as svi."
        )
        span = " to ".join(f"'{name}'" for name in dict.fromkeys((names[0], names[-1])))
        raise AdapterError(
            f"{len(names)} layers see something other than the rows, such as relative positions, so that their "
            f"gradients cannot be split between examples: {span}. {way_out}"
        )

    def _entered(self, key: Layer, calls: list[_Call], attended: Tensor, finite: bool) -> tuple[Tensor, Tensor]:
        """What entered a layer (examples, tokens, ...), and which tokens count."""
        examples = len(attended)
        if not calls:  # a layer that the network leaves out
            nothing = self._sites[key[0]].initial.new_zeros(examples, 0)
            return nothing.unsqueeze(-1), nothing.bool()
        entered, counted = [], []
        for call in calls:
            rows, tokens = len(call.entered), call.left.shape[1:-1]
            each = _counted(attended, rows, tokens).reshape(examples, -1)
            if call.entered.is_floating_point():
                value = call.entered.float().reshape(examples, -1, call.entered.shape[-1])
                value = value if finite else torch.where(each.unsqueeze(-1), value, 0.0)
            else:
                value = call.entered.reshape(examples, -1)
            entered.append(value)
            counted.append(each)
        return _joined(entered), _joined(counted)

    def _product(self, key: Layer, entered: Tensor, counted: Tensor, came: list[Tensor]) -> Products:
        site = self._sites[key[0]]
        columns, rank = as_matrices(site, site.initial).shape[1:]
        if not came:
            narrow, wide = entered.expand(-1, -1, rank), entered.expand(-1, -1, columns)
            return Products(wide, narrow, counted, columns, site.role != "B")
        back = _joined(came)
        if site.role == "B":
            return Products(back, entered * counted.unsqueeze(-1), counted, columns, False)
        back = back * counted.unsqueeze(-1)
        if site.role == "head":
            # A head may score every token, of which one is looked at.
            counted = counted & back.ne(0).any(-1)
            if site.initial.dim() == 1:  # a bias sees one
                entered = counted.unsqueeze(-1).to(back)
        return Products(entered, back, counted, columns, True)


def jacobians(
    program: Program, sites: Sequence[Site], weights: Mapping[str, Tensor], rows: Rows
) -> Iterator[tuple[Tensor, Tensor, dict[Layer, Tensor]]]:
    """Logits at ``weights`` and their gradients, one batch at a time.

    What is held is what enters and comes back to the layers, and the gradients, of as many tokens at once as take about
    `BYTES` (or of one row): a batch with more is split.

    Yields:
        Which rows they are, logits (examples, outputs), and gradients (examples, outputs, columns, rank) by layer.
    """
    tape, most = Tape(program, sites), _tokens(program)
    with undisturbed(program):
        pieces = (_pieces(batch, index, most) for batch, index in rows.batches(program.device))
        for batch, index in chain.from_iterable(pieces):
            with torch.enable_grad(), tape:
                logits = program.outputs(weights, batch)
                directions = torch.eye(logits.shape[1]).to(logits).unsqueeze(1).expand(-1, *logits.shape)
                each = [
                    {key: product.matrices() for key, product in products.items()}
                    for products in tape.products(logits, directions, batch)
                ]
            # Key by key, so that no gradient is held twice.
            gradients = {key: torch.stack([found.pop(key) for found in each], dim=1) for key in list(each[0])}
            yield index, logits.detach(), gradients


def _tokens(program: Program) -> int:
    """Tokens whose activations take `BYTES`: a number in four bytes for each that enters or leaves a matrix.

    About 4,200 of MiniLM and 750 of SmolLM2-135M, with LoRA on all linear layers.
    """
    program.weights.restore()  # what has a value in its place is no parameter
    return BYTES // (4 * sum(sum(value.shape) for value in program.network.parameters() if value.dim() == 2))


def _pieces(batch: Mapping[str, Tensor], index: Tensor, most: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """A batch in parts of so many tokens at most, padding and all choices counted."""
    step = max(1, most // batch["input_ids"][0].numel())
    for start in range(0, len(index), step):
        rows = slice(start, start + step)
        yield {name: value[rows] for name, value in batch.items()}, index[rows]


def _joined(parts: list[Tensor]) -> Tensor:
    """All tokens; the one part itself, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _awake(output: Tensor) -> Tensor:
    """The output itself, with a gradient even where no weight before it has one."""
    return output if output.requires_grad else output.requires_grad_()


def _at_places(calls: Sequence[_Call], places: Places) -> bool:
    """Whether a layer was given the scored positions of all examples, in one row of parts."""
    one_row = all(len(call.entered) == 1 and call.left.dim() == 3 for call in calls)
    return one_row and sum(call.left.shape[1] for call in calls) == len(places)


def _entered_at(calls: Sequence[_Call], places: Places) -> tuple[Tensor, Tensor]:
    """What entered a layer at the scored positions (examples, tokens, ...), and which count."""
    entered = [call.entered.float() for call in calls]
    counted = places.spread([torch.ones_like(each[..., :1]) for each in entered])
    return places.spread(entered), counted.squeeze(-1).bool()


def _sees_rows(call: _Call, mask: Tensor) -> bool:
    """Whether what entered a layer has a row, or a token, for each of those of the batch."""
    rows = len(call.entered)
    return rows == len(mask) or (call.left.dim() == 2 and rows == mask.numel())


def _counted(attended: Tensor, rows: int, tokens: torch.Size) -> Tensor:
    """Whether each token of each row of a layer is one of the text, (rows, tokens); a pooled row is one token."""
    examples, mask = len(attended), attended.flatten(0, 1)
    if len(tokens) == 1 and mask.shape == (rows, tokens[0]):
        return mask
    if not tokens and rows == mask.numel():
        return mask.reshape(examples, -1)
    return mask.any(-1, keepdim=True).expand(rows, max(tokens.numel(), 1))
