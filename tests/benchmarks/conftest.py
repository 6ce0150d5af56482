"""The scripts of benchmarks/ as modules, a base of 16 dimensions, and data in the columns of GLUE."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import BertConfig, BertModel, BertTokenizer

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORDS = ["good", "bad", "film", "the", "a", "was", "story", "dull"]


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The scripts, imported as they import each other: from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import common
        import curvature
        import draws
        import ensembles
        import estimators
        import language_models
        import nearest
        import overhead
        import peers
        import robustness
        import set_aside
        import speed
        import speed_arms

        modules = (
            common,
            curvature,
            draws,
            ensembles,
            estimators,
            language_models,
        )
        modules += nearest, overhead, peers, robustness, set_aside, speed, speed_arms
        scripts = {each.__name__: each for each in modules}
        yield SimpleNamespace(**scripts)
        for name in (*scripts, "nearest_figure", "peer_parts"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of 16 dimensions and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the columns of SST-2, MRPC and CoLA."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("sst2", "mrpc", "cola"):
        (folder / task).mkdir()
        for split, size in (("train", 60), ("validation", 20), ("validation_ood", 12)):
            rows = [_row(task, number) for number in range(size)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def _row(task: str, number: int) -> dict[str, object]:
    text = f"the {WORDS[3 + number % 5]} film was {WORDS[number % 2]}"
    texts = (
        {"sentence": text} if task in ("sst2", "cola") else {"sentence1": text, "sentence2": f"a {WORDS[number % 3]}"}
    )
    return texts | {"label": number % 2, "idx": number}
