"""Time and memory of a training step: PEFT LoRA, PEFT MonteCLoRA and bayeslora's families, alternating in one process.

    python benchmarks/speed.py                                  # BERT of MiniLM's shape: some minutes on 2 CPU cores
    python benchmarks/speed.py --families --no-memory           # of all our families
    python benchmarks/speed.py --shape llama-small --batches 8x64 --threads 1 --arms lora svi --no-memory
    python benchmarks/speed.py --device cuda --shape llama-1b   # in bfloat16
    python benchmarks/speed.py --device cuda --shape llama-7b --gradient-checkpointing

A step is the forward pass, the backward pass and the step of AdamW, on the same batch, with LoRA of the same rank on
the same layers and the same dropout. PEFT MonteCLoRA runs as its documentation says: `MontecloraConfig()` and its
variational loss added to that of the task. SVI looks at the parts of its bound as often as in training. Networks have
random weights, which time does not depend on; `--base` takes one that exists. Times are medians of alternating steps,
so that a slower spell of the machine hits all arms; the ratio is the median of the ratios within a round, and what an
arm takes beyond PEFT LoRA in milliseconds is that of the differences: where steps are short, that is what users feel.
A median leaves out the noise that PEFT MonteCLoRA draws ahead every 150 steps. Peak memory is that of a process that
does nothing else, the median of five: on a GPU of all tensors, on a CPU (Linux) of what it adds to the base network.
Writes benchmarks/results/speed.json.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from common import RESULTS, environment, markdown
from speed_arms import ARMS, CLASSES, FAMILIES, LOG_EVERY, make_work
from torch import Tensor

from bayeslora.files import write_json
from bayeslora.inference.training.process import peak, reset_peak

#: Processes that measure the memory of an arm.
PROCESSES = 5
#: Largest ratio of time to PEFT LoRA, of each arm that has one: at this many tokens a batch or more, and below.
MANY_TOKENS, SLOWEST = 2048, {"svi": (1.05, 1.10), "inducing": (1.10, 1.15)}
#: Largest ratio of peak memory.
LARGEST = {"svi": 1.05}
BERT = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
LLAMA = {
    "llama-tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    | {"num_key_value_heads": 1, "vocab_size": 200},
    "llama-small": {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 352}
    | {"num_key_value_heads": 2, "vocab_size": 2000},
    "llama-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "llama-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    | {"num_key_value_heads": 32, "vocab_size": 32000},
}
Step = Callable[[], float]


def network(options: Namespace) -> Any:
    """The base network with a head for two classes; always the same for the same options."""
    from transformers import (
        AutoModelForSequenceClassification,
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    torch.manual_seed(0)
    if options.base:
        found = AutoModelForSequenceClassification.from_pretrained(
            options.base, num_labels=CLASSES, dtype=torch.float32
        ).to(options.device)
    else:
        with torch.device(options.device):
            if options.shape in BERT:
                found = BertForSequenceClassification(BertConfig(num_labels=CLASSES, **BERT[options.shape]))
            else:
                config = LlamaConfig(num_labels=CLASSES, pad_token_id=0, use_cache=False, **LLAMA[options.shape])
                # Of a small one the kernels are measured, which reduced precision on a CPU would hide.
                dtype = torch.float32 if options.shape == "llama-small" else torch.bfloat16
                found = LlamaForSequenceClassification._from_config(config, dtype=dtype)
    if options.gradient_checkpointing:
        found.gradient_checkpointing_enable({"use_reentrant": False})
    return found


def batch_of(rows: int, tokens: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """A batch without padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (rows, tokens), generator=generator)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def make_step(arm: str, base: Any, options: Namespace, batch: dict[str, Tensor]) -> Step:
    """One step of an arm; calling it returns the seconds that it took."""
    work = make_work(arm, base, options, batch)

    def step() -> float:
        _wait(options.device)
        start = time.perf_counter()
        work()
        _wait(options.device)
        return time.perf_counter() - start

    return step


def measure_time(options: Namespace, rows: int, tokens: int) -> dict[str, Any]:
    """Median seconds a step of each arm, and ratios to PEFT LoRA."""
    networks = {arm: network(options) for arm in options.arms}
    batch = batch_of(rows, tokens, networks["lora"].config.vocab_size, options.device)
    steps = {arm: make_step(arm, networks[arm], options, batch) for arm in options.arms}
    for _ in range(options.warm_up):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {arm: [] for arm in options.arms}
    gc.disable()  # else one arm pays for the others' rubbish
    for number in range(options.rounds):
        # The arm that begins changes, so that none always follows the same other one.
        turn = number % len(options.arms)
        for arm in options.arms[turn:] + options.arms[:turn]:
            seconds[arm].append(steps[arm]())
        gc.collect()
    gc.enable()
    rounds = {arm: list(zip(found, seconds["lora"], strict=True)) for arm, found in seconds.items()}
    return {
        "seconds": {arm: median(found) for arm, found in seconds.items()},
        "time_ratio": {arm: median(one / other for one, other in pairs) for arm, pairs in rounds.items()},
        "milliseconds_beyond": {
            arm: 1000 * median(one - other for one, other in pairs) for arm, pairs in rounds.items()
        },
    }


def measure_memory(options: Namespace, rows: int, tokens: int) -> dict[str, Any]:
    """Median peak bytes of each arm, in processes of its own, and ratios to PEFT LoRA."""
    found = {}
    for arm in options.arms:
        command = [sys.executable, __file__, *options.arguments]
        command += ["--memory-of", arm, "--batches", f"{rows}x{tokens}"]
        sizes = []
        for _ in range(1 if options.quick else PROCESSES):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"Measuring the memory of {arm} failed:\n{done.stderr}")
            sizes.append(int(done.stdout.split()[-1]))
        found[arm] = int(median(sizes))
    return {"bytes": found, "memory_ratio": {arm: size / found["lora"] for arm, size in found.items()}}


def peak_memory(arm: str, options: Namespace, rows: int, tokens: int) -> int:
    """Peak bytes of an arm: of the GPU's tensors, or of this process over what it held with the base network alone."""
    base = network(options)
    batch = batch_of(rows, tokens, base.config.vocab_size, options.device)
    gc.collect()
    device = torch.device(options.device)
    before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    reset_peak()
    step = make_step(arm, base, options, batch)
    for _ in range(LOG_EVERY):
        step()
    return peak(device) - before


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def verdicts(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target against PEFT LoRA, what was found, and whether it is met."""
    found = []
    for name, result in results.items():
        rows, tokens = _shape(name)
        limits = {("time", arm): each[rows * tokens < MANY_TOKENS] for arm, each in SLOWEST.items()}
        limits |= {("memory", arm): each for arm, each in LARGEST.items()}
        for (what, arm), limit in limits.items():
            ratio = result.get(f"{what}_ratio", {}).get(arm)
            if ratio is not None:
                target = f"{what} of a step of {arm} at {name} tokens at most {limit} of PEFT LoRA's"
                found.append({"target": target, "found": ratio, "met": ratio <= limit})
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Times and memory of all arms and batches."""
    rows = []
    for name, result in results.items():
        for arm, seconds in result["seconds"].items():
            row = [name, ARMS[arm], f"{1000 * seconds:.0f}", f"{result['milliseconds_beyond'][arm]:.1f}"]
            row += [f"{result['time_ratio'][arm]:.2f}"]
            if "bytes" in result:
                row += [f"{result['bytes'][arm] / 2**20:,.0f}", f"{result['memory_ratio'][arm]:.2f}"]
            rows.append(row + [""] * (7 - len(row)))
    return markdown(["rows x tokens", "step", "ms", "ms beyond LoRA", "ratio", "peak MiB", "ratio"], rows)


def _shape(name: str) -> tuple[int, int]:
    rows, _, tokens = name.partition("x")
    return int(rows), int(tokens)


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Options of the command line."""
    parser = ArgumentParser(description="Time and memory of a training step against PEFT.")
    parser.add_argument("--shape", choices=[*BERT, *LLAMA], default="minilm", help="of a network with random weights")
    parser.add_argument("--base", help="folder or hub name of a network to take in its place")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", nargs="+", metavar="ROWSxTOKENS", help="32x64 and 32x16 by default")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["lora", "monteclora", "svi"], help="PEFT LoRA is one"
    )
    parser.add_argument("--families", action="store_true", help="our other families as well")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21, help="steps of each arm that are timed")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each arm before that")
    parser.add_argument("--threads", type=int, help="threads of this process")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--results", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few steps: to see that it works")
    parser.add_argument("--memory-of", choices=ARMS, help="print the peak bytes of one arm, and no more")
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if options.families:
        options.arms = list(dict.fromkeys([*options.arms, *FAMILIES]))
    if "lora" not in options.arms:
        parser.error("--arms needs lora, which the others are compared with.")
    if options.quick:
        options.rounds, options.warm_up = 3, 1
        options.shape = "llama-tiny" if options.shape in LLAMA else "tiny"
    options.batches = options.batches or (["4x8"] if options.quick else ["32x64", "32x16"])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(options.memory_of, options, *_shape(options.batches[0])))
        return
    results = {}
    for name in options.batches:
        results[name] = measure_time(options, *_shape(name))
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if not options.no_memory:
            results[name] |= measure_memory(options, *_shape(name))
    judged = verdicts(results)
    print(table(results), end="\n\n")
    for verdict in judged:
        print(f"- {'met' if verdict['met'] else 'NOT met'}: {verdict['target']}. Found: {verdict['found']:.3f}.")
    settings = ("shape", "device", "rank", "rounds", "warm_up", "gradient_checkpointing")
    measured = {
        "settings": {name: getattr(options, name) for name in settings}
        | ({"model": Path(options.base).name} if options.base else {}),
        "environment": environment(torch.device(options.device)),
        "results": results,
        "verdicts": judged,
    }
    _keep(options.results, measured)
    print(f"\nWrote {options.results}.")


def _keep(path: Path, measured: dict[str, Any]) -> None:
    """Add to the measurements of other devices and shapes in the file; replace those of the same."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = measured["settings"]
    name = " ".join(
        [settings["device"], settings.get("model", settings["shape"])]
        + ["gradient-checkpointing"] * settings["gradient_checkpointing"]
        + ["families"] * any(arm in FAMILIES for result in measured["results"].values() for arm in result["seconds"])
    )
    write_json(path, kept | {name: measured})


if __name__ == "__main__":
    main()
