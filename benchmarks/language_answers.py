"""GSM8K by a causal language model: how likely the true answers are, how many are right, and what is unsure of them.

    python benchmarks/language_answers.py run --base FOLDER --threads 1
    python benchmarks/language_answers.py report

LoRA of rank 8 on queries and values, 300 training rows, one epoch in batches of 4, seed 0. Perplexity is that of a
token of the first 60 test rows' answers. The first 10 are answered at the posterior mean, token by token the
likeliest; an answer is right if its number behind "####" is (strict match) or its last number (flexible). Every arm has
the learning rate, of those that are tried, at which it predicts 30 held-back training rows best. `laplace` is laid
around plain LoRA with nothing set. What is finished is not repeated.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import MODEL, SETTINGS, Run, command_line, environment, markdown, read_runs, work

import bayeslora as bl
from bayeslora.files import write_json
from bayeslora.generation.answers import exact_match
from bayeslora.networks import NetworkSettings
from bayeslora.tasks.completion import completion_of

#: Learning rates that are tried; of `svi` those of B, which it learns first.
RATES = {"mle": (1e-3, 3e-3), "svi": (5e-3, 1e-2)}
ARMS = {
    "zero-shot": "before training",
    "mle": "plain LoRA (`mle`)",
    "svi": "`svi`, 4 draws",
    "laplace": "`laplace`, 4 draws",
}
#: Variant of the runs that choose a rate: they see the held-back rows alone.
RATE = "rate"
TRAINED, HELDOUT, REPORTED, ANSWERED, DRAWS = 300, 30, 60, 10, 4
TOKENS, SAMPLES = 128, 4
#: Of a text that shows how unsure the posterior is.
PROMPT = "Question: Tom has 3 boxes with 4 apples each. He eats 2 apples. How many apples are left?\nAnswer:"


def run_of(backend: str, rate: float = 0.0, variant: str = "") -> Run:
    """One fit of one backend."""
    return Run(
        "gsm8k", backend, 0, TRAINED, heldout_size=HELDOUT, epochs=1, batch_size=4, learning_rate=rate, samples=DRAWS,
        split="test", variant=variant,
    )  # fmt: skip


def chosen(backend: str, output: Path) -> float:
    """The learning rate at which held-back rows are predicted best."""
    losses = {}
    for rate in RATES[backend]:
        record = json.loads((output / f"{run_of(backend, rate, RATE).name}.json").read_text(encoding="utf-8"))
        losses[rate] = record["arms"][backend]["nll"]["value"]
    return min(losses, key=lambda rate: losses[rate])


def plan(output: Path) -> Iterator[Run]:
    """All runs; later ones take the rates that earlier ones have chosen."""
    yield run_of("zero-shot")
    for backend, rates in RATES.items():
        for rate in rates:
            yield run_of(backend, rate, RATE)
        yield run_of(backend, chosen(backend, output))
    yield run_of("laplace", chosen("mle", output))


def measured(run: Run, base: str, data_dir: str | None, output: Path) -> dict[str, Any]:
    """Fit one backend, evaluate it, and let it answer; or see how well a learning rate does on held-back rows."""
    task = bl.load_task(run.task, data_dir, train_size=run.train_size, heldout_size=run.heldout_size, seed=run.seed)
    posterior = fit(run, base, task, output)
    common: dict[str, Any] = {"seed": run.seed, "progress": False}
    reported = task.heldout if run.variant == RATE else first(task.split(run.split), REPORTED)
    found = posterior.predict(reported, draws=run.samples, batch_size=4, **common)
    record = {
        "run": asdict(run),
        "arms": {run.backend: found.metrics().to_dict()},
        "seconds": {"fit": posterior.cost["seconds"]},
        "environment": environment(torch.device("cpu")),
    }
    if run.variant == RATE:
        return record
    rows = first(task.split(run.split), ANSWERED)
    answers = posterior.generate(rows, 1, "mean", max_new_tokens=TOKENS, temperature=0, batch_size=10, **common)
    truths = [completion_of(rows.spec, row) or "" for row in rows.dataset]
    record["arms"][run.backend] |= {name: asdict(each) for name, each in exact_match(answers, truths).items()}
    (example,) = posterior.generate(PROMPT, SAMPLES, draws=run.samples, max_new_tokens=TOKENS, **common)
    return record | {"answers": [each.to_dict() for each in answers], "example": example.to_dict()}


def fit(run: Run, base: str, task: bl.Task, output: Path) -> bl.Posterior:
    """The fit of a run: trained and saved, or what was saved before."""
    from peft import LoraConfig

    folder = output / run_of(run.backend, run.learning_rate).name / "posterior"
    if folder.exists():
        return bl.load(folder, base=base)
    common: dict[str, Any] = {"seed": run.seed, "progress": False, "batch_size": run.batch_size}
    if run.backend == "laplace":
        around = fit(run_of("mle", run.learning_rate), base, task, output)
        fitted = bl.fit(around.program, task.train, "laplace", start=around, **common)
    else:
        lora = LoraConfig(r=run.rank, lora_alpha=run.lora_alpha, target_modules=["q_proj", "v_proj"])
        # On short rows, with one thread, fused attention takes longer than its parts.
        network = NetworkSettings(base, attention="eager")
        program = bl.Program.from_pretrained(network, task, lora=lora, model=bl.models.build(**MODEL), seed=run.seed)
        rate = "point_learning_rate" if run.backend == "svi" else "learning_rate"
        if run.backend == "zero-shot":  # a rate at which nothing is learned, for B stays zero
            common |= {"epochs": run.batch_size / run.train_size, rate: 1e-30}
        else:
            common |= {"learning_rate": 2e-3, "epochs": run.epochs, rate: run.learning_rate} | SETTINGS.get(
                run.backend, {}
            )
        fitted = bl.fit(program, task.train, "svi" if run.backend == "svi" else "mle", **common)
    fitted.save(folder)
    return fitted


def first(rows: bl.Split, number: int) -> bl.Split:
    """The first rows, so many at most."""
    return rows.select(list(range(min(len(rows), number))))


def report(options: Namespace) -> None:
    """Print the table and an example, and write what is kept."""
    records = {record["run"]["backend"]: record for record in read_runs(options.output) if not record["run"]["variant"]}
    columns = {"perplexity": "perplexity of a token", "strict": "strict match, %", "flexible": "flexible match, %"}
    rows = []
    for arm, title in ARMS.items():
        if arm in records:
            found = {name: records[arm]["arms"][arm][name] for name in columns}
            shown = [f"{found['perplexity']['value']:.2f}"]
            shown += [f"{100 * found[name]['value']:.0f}" for name in ("strict", "flexible")]
            rows.append([title, *shown])
    print(markdown(["", *columns.values()], rows))
    for arm, record in records.items():
        example = record["example"]
        print(f"\n{arm} at rate {record['run']['learning_rate']:g}: entropy {example['entropy']:.1f} nats, ", end="")
        print(f"mutual information {example['mutual_information']:.2f} nats; the likeliest text:")
        print(max(example["texts"], key=lambda each: each["log_probability"])["text"].strip())
    kept = ("run", "arms", "seconds", "example", "environment")
    write_json(options.results, [{key: record[key] for key in kept} for record in records.values()])
    print(f"\nWrote {options.results}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run or report."""
    parser, running = command_line("GSM8K by a causal language model.", "language_answers", report)
    running.set_defaults(do=lambda options: work(plan(options.output), options, measured))
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
