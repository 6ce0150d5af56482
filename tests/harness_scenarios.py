"""Posteriors of small causal language models, and tasks of the evaluation harness on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from causal_scenarios import causal_base
from datasets import Dataset
from peft import LoraConfig

from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import Gaussian
from bayeslora.models.guides.auto import make_guide
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.tasks import Split, Task, TaskSpec

#: Questions with three choices, the last of which have one token each; one question ends with a blank.
QUIZ: list[dict[str, Any]] = [
    {"question": "What is the moon made of, and is it not a stone?", "choices": ["a stone", "the sun", "water"]},
    {"question": "Is this not a good film? ", "choices": ["yes, the film is great", "no", "one or none"]},
    {"question": "Which of A B C is the one?", "choices": ["A", "B", "C"]},
]
#: More than the networks have positions for.
LONG = {"question": "What is the moon made of, and is it not a stone? " * 8, "choices": ["a stone", "no", "the sun"]}
TEXTS = ["The moon is made of stone.", "What is this, and which is it? " * 12, "good"]


def posterior_of(network: str = "llama", tokenizer: str = "bytes-bos", *also: str) -> Posterior:
    """A posterior whose draws differ much; its LoRA is on further layers, if some are named."""
    torch.manual_seed(0)
    spec = TaskSpec("quiz", "multiple-choice", ("question",), "label", ("A", "B", "C"), choices=("choices",))
    task = Task(spec, Split(Dataset.from_list([row | {"label": 0} for row in QUIZ]), spec))
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[network]
    base, lora = str(causal_base(network, tokenizer)), LoraConfig(r=2, target_modules=[*targets, *also])
    program = Program.from_pretrained(base, task, model=Gaussian(), lora=lora)
    guide = make_guide("structured", program.model, program.sites, 0.1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return VariationalPosterior(program, Record("svi", {"guide": "structured"}, n_data=len(QUIZ), finished=True), guide)


def write_tasks(folder: Path) -> dict[str, Path]:
    """Files of tasks by name: multiple choice, perplexity, and generation."""
    rows = {
        "quiz": [row | {"label": number % 3} for number, row in enumerate([*QUIZ, LONG])],
        "texts": [{"text": text} for text in TEXTS],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), "utf-8")
    asked = "Question: {{question}}\nAnswer:"
    kinds: dict[str, dict[str, Any]] = {
        "quiz": {
            "output_type": "multiple_choice",
            "doc_to_text": asked,
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
        "says": {
            "output_type": "generate_until",
            "doc_to_text": asked,
            "doc_to_target": "{{choices[label]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    kinds["texts"]["metric_list"] = [{"metric": "word_perplexity"}]
    found = {}
    for name, settings in kinds.items():
        data = str(folder / ("texts.jsonl" if name == "texts" else "quiz.jsonl"))
        read = {"data_files": {"validation": data}, "cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": read, "validation_split": "validation"}
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump(task | settings), "utf-8")
    return found
