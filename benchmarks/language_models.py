"""Time of what bayeslora does with causal language models against the plain way, alternating in one process.

    python benchmarks/language_models.py --threads 1                 # a Llama of 8 layers and 256 dimensions
    python benchmarks/language_models.py --base FOLDER --threads 1   # a network that exists

- `choices`: questions of 60 tokens with four choices of 5 tokens, scored with the question run once, against a sequence
  for each choice; `choices-gradient`: the same with the gradient by LoRA on all queries and values. Both compute logits
  at the tokens of choices alone.
- `labels`: logits of four labels behind 8 prompts of 64 tokens, against those of all tokens over the whole vocabulary;
  `labels-gradient`: the same with the gradient.
- `draws`: a prompt of 64 tokens at 8 draws of the weights at once, against one draw after another; `draws-token`: one
  more token of a text behind it, as a mixture of 8 draws reads it.

Weights are random, which time does not depend on. Times are medians of alternating passes, so that a slower spell of
the machine hits both; the ratio is the median of the ratios within a round. Writes
benchmarks/results/language_models.json.
"""

from __future__ import annotations

import gc
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, environment, markdown
from torch import Tensor

from bayeslora.files import write_json
from bayeslora.generation.decoding import Reader
from bayeslora.models import Gaussian
from bayeslora.observations import Observation, Padding, Prompted, TextChoices
from bayeslora.observations.completions import log_likelihoods
from bayeslora.observations.decoder import hidden_states
from bayeslora.program import Program

SHAPES = {
    "tiny": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "vocab_size": 8192},
}
EXAMPLES, CHOICES, QUESTION, CHOICE, PROMPT, DRAWS = 8, 4, 60, 5, 64, 8
LETTERS = tuple("ABCD")


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same tensor.

    Attributes:
        plain: the way that all know.
        ours: of which is measured how many times it is faster.
        target: how many times that should be at least.
    """

    plain: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    target: float


def program(options: Namespace, observation: Observation) -> Program:
    """A causal language model with LoRA on its queries and values."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    if options.base:
        network = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        network = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[options.shape], **heads))
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return Program(get_peft_model(network.to(options.device), lora).eval(), observation, Gaussian())


def choices(options: Namespace, gradient: bool = False) -> Comparison:
    """Scores of text choices, or the gradient of their sum by the LoRA matrices."""
    ours = program(options, TextChoices(CHOICES))
    weights = {site.name: site.initial.clone().requires_grad_(gradient) for site in ours.sites}
    size = ours.network.config.vocab_size
    ids = torch.randint(size, (EXAMPLES, QUESTION + CHOICES * CHOICE), generator=torch.Generator().manual_seed(1))
    segments = [0] * QUESTION + [number for number in range(1, CHOICES + 1) for _ in range(CHOICE)]
    rows = [{"input_ids": row, "segments": segments, "sizes": [1] * CHOICES} for row in ids.tolist()]
    packed = {name: value.to(options.device) for name, value in ours.observation.collator(Padding())(rows).items()}
    question, behind = ids.to(options.device).split([QUESTION, CHOICES * CHOICE], dim=1)
    question = question.unsqueeze(1).expand(-1, CHOICES, -1)
    alone = torch.cat([question, behind.unflatten(1, (CHOICES, CHOICE))], dim=2).flatten(0, 1)

    def plainly() -> Tensor:
        ours.weights.install(weights)
        inputs = {"input_ids": alone, "attention_mask": torch.ones_like(alone)}
        hidden = hidden_states(ours.network, inputs)[:, QUESTION - 1 : -1]
        found = log_likelihoods(ours.network, hidden.flatten(0, 1), alone[:, QUESTION:].flatten())
        return found.reshape(EXAMPLES, CHOICES, CHOICE).sum(-1)

    ways = (plainly, lambda: ours.outputs(weights, packed))
    return Comparison(*(gradient_of(way, weights) if gradient else torch.no_grad()(way) for way in ways), 1.8)


def labels(options: Namespace, gradient: bool = False) -> Comparison:
    """Logits of a few tokens behind a prompt, or the gradient of their sum by the LoRA matrices."""
    ours = program(options, Prompted(CHOICES, LETTERS, tuple(range(1, CHOICES + 1))))
    weights = {site.name: site.initial.clone().requires_grad_(gradient) for site in ours.sites}
    batch = prompts(ours, options, EXAMPLES)

    def plainly() -> Tensor:
        ours.weights.install(weights)
        found: Tensor = ours.network(**batch).logits
        return found.float()[:, -1, 1 : CHOICES + 1]

    ways = (plainly, lambda: ours.outputs(weights, batch))
    return Comparison(*(gradient_of(way, weights) if gradient else torch.no_grad()(way) for way in ways), 1.0)


def draws(options: Namespace) -> Comparison:
    """Logits of a few tokens behind one prompt, at several draws of the weights."""
    ours = program(options, Prompted(CHOICES, LETTERS, tuple(range(1, CHOICES + 1))))
    several, batch = drawn(ours), prompts(ours, options, 1)
    return Comparison(
        torch.no_grad()(lambda: torch.stack([ours.outputs(each, batch) for each in several])),
        torch.no_grad()(lambda: ours.joint_outputs(several, batch)),
        1.0,
    )


def token(options: Namespace) -> Comparison:
    """What comes after one more token of a text, at several draws of the weights that have read the prompt."""
    ours = program(options, Prompted(CHOICES, LETTERS, tuple(range(1, CHOICES + 1))))
    several, batch = drawn(ours), prompts(ours, options, 1)
    together, single = [Reader(ours, several)], [Reader(ours, [each]) for each in several]
    with torch.no_grad():
        for reader in (*together, *single):
            reader(batch)

    def after(readers: Sequence[Reader]) -> Callable[[], Tensor]:
        lengths = count(PROMPT + 1)  # each call reads one token more

        def read() -> Tensor:
            mask = torch.ones(1, next(lengths), dtype=torch.long, device=options.device)
            longer = {"input_ids": batch["input_ids"][:, :1], "attention_mask": mask}
            return torch.cat([reader(longer) for reader in readers], dim=1)

        return torch.no_grad()(read)

    return Comparison(after(single), after(together), 1.0)


def prompts(ours: Program, options: Namespace, rows: int) -> dict[str, Tensor]:
    """Prompts without padding."""
    size = ours.network.config.vocab_size
    ids = torch.randint(size, (rows, PROMPT), generator=torch.Generator().manual_seed(1)).to(options.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def drawn(ours: Program) -> list[dict[str, Tensor]]:
    """Several sets of weights."""
    return [
        {site.name: site.initial + 0.01 * torch.randn_like(site.initial) for site in ours.sites} for _ in range(DRAWS)
    ]


def gradient_of(way: Callable[[], Tensor], weights: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The gradient of the sum of what a way gives."""

    def found() -> Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(way().sum(), list(weights.values()))])

    return found


#: What is compared, by name.
COMPARISONS: dict[str, Callable[[Namespace], Comparison]] = {
    "choices": choices,
    "choices-gradient": lambda options: choices(options, gradient=True),
    "labels": labels,
    "labels-gradient": lambda options: labels(options, gradient=True),
    "draws": draws,
    "draws-token": token,
}


def measure(comparison: Comparison, options: Namespace) -> dict[str, Any]:
    """Median seconds of both ways, how many times ours is faster, and how far apart what they give is."""
    ways = {"plain": comparison.plain, "ours": comparison.ours}
    one, other = (way() for way in ways.values())
    for _ in range(options.warm_up):
        for way in ways.values():
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gc.disable()  # else one way pays for the other's rubbish
    for number in range(options.rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            seconds[name].append(_seconds(ways[name], options.device))
        gc.collect()
    gc.enable()
    faster = median(plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True))
    return {
        "seconds": {name: median(found) for name, found in seconds.items()},
        "faster": faster,
        "target": comparison.target,
        "difference": float((one - other).norm() / one.norm()),
    }


def _seconds(way: Callable[[], Tensor], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All comparisons."""
    rows = [
        [name, *(f"{1000 * found['seconds'][way]:.0f}" for way in ("plain", "ours")), f"{found['faster']:.2f}"]
        + [f"at least {found['target']}", "met" if found["faster"] >= found["target"] else "NOT met"]
        for name, found in results.items()
    ]
    return markdown(["", "plain, ms", "ours, ms", "times faster", "target", ""], rows)


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Options of the command line."""
    parser = ArgumentParser(description="Time of causal language models in bayeslora against the plain way.")
    parser.add_argument("--parts", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="what is compared")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of a network with random weights")
    parser.add_argument("--base", help="folder or hub name of a network to take in its place")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="passes of each way that are timed")
    parser.add_argument("--warm-up", type=int, default=2, help="passes of each way before that")
    parser.add_argument("--threads", type=int, help="threads of this process")
    parser.add_argument("--results", type=Path, default=RESULTS / "language_models.json")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few passes: to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.rounds, options.warm_up = "tiny", 2, 0
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write, beside what was measured of other networks and devices."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {name: measure(COMPARISONS[name](options), options) for name in options.parts}
    print(table(results))
    name = " ".join([options.device, Path(options.base).name if options.base else options.shape])
    kept = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    before = kept.get(name, {}).get("results", {})
    made = {"environment": environment(torch.device(options.device)), "results": before | results}
    write_json(options.results, kept | {name: made})
    print(f"\nWrote {options.results}.")


if __name__ == "__main__":
    main()
