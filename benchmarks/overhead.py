"""What the data of arviz cost: the default `to_inference_data` against an epoch of training, and its size on disk.

    python benchmarks/overhead.py

A network of RoBERTa-base's shape with random weights, LoRA of rank 8 on all linear layers, rows of 64 random tokens:
as many validation rows for each training row as MRPC has (408 to 3,668), both reduced by `--share` for time. The file
is written from 408 validation rows of two tokens, since its size does not depend on their length. Prints a table and
writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from common import RESULTS, environment, markdown
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

import bayeslora as bl
from bayeslora.files import write_json
from bayeslora.observations import Classes

TRAIN, VALIDATION, TOKENS = 3668, 408, 64
#: The targets: mebibytes, and time as a part of an epoch's.
LARGEST, SLOWEST = 50, 1.0


def rows(number: int, vocabulary: int, tokens: int = TOKENS) -> Dataset:
    """Rows of random tokens and labels."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, vocabulary, (number, tokens), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [row % 2 for row in range(number)]})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = ArgumentParser(description="What the data of arviz cost.")
    parser.add_argument("--share", type=float, default=0.05, help="part of MRPC's rows")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that it works")
    parser.add_argument("--results", type=Path, default=RESULTS / "overhead.json")
    options = parser.parse_args(arguments)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, **(shape if options.quick else {}))
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    network = get_peft_model(RobertaForSequenceClassification(config), lora)
    program = bl.Program(network, Classes(2), bl.models.MonteCLoRA())
    train, validation = (rows(max(1, round(options.share * size)), config.vocab_size) for size in (TRAIN, VALIDATION))
    posterior = bl.fit(program, train, "svi", epochs=1, progress=False)
    begun = time.perf_counter()
    posterior.to_inference_data(validation, progress=False)
    converted = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.nc"
        few = 4 if options.quick else VALIDATION
        data = posterior.to_inference_data(rows(few, config.vocab_size, tokens=2), progress=False)
        bl.diagnostics.write(data, path)
        size = path.stat().st_size
    ratio = converted / posterior.cost["seconds"]
    table = [
        ["time, part of an epoch", f"{ratio:.2f}", f"below {SLOWEST}", "met" if ratio < SLOWEST else "NOT met"],
        ["file, MiB", f"{size / 2**20:.1f}", f"below {LARGEST}", "met" if size < LARGEST * 2**20 else "NOT met"],
    ]
    print(markdown(["", "found", "target", ""], table))
    kept = {
        "train_rows": len(train), "validation_rows": len(validation), "tokens": TOKENS, "ratio": ratio, "bytes": size,
        "seconds": {"epoch": posterior.cost["seconds"], "to_inference_data": converted},
        "environment": environment(program.device),
    }  # fmt: skip
    write_json(options.results, kept)


if __name__ == "__main__":
    main()
