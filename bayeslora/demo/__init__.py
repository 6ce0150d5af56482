"""A tiny encoder and a text task with known class probabilities, shipped with the package.

The task: from a one-sentence review of a restaurant, tell whether the guest will come back. Sentences and
answers are generated (`bayeslora.demo.text`), so that predictions can be compared with the true
probabilities and not with drawn labels alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayeslora.tasks import Task

__all__ = ["MODEL_PATH", "load_demo_task"]

#: Folder of the encoder, for `AutoModelForSequenceClassification.from_pretrained`.
MODEL_PATH = Path(__file__).with_name("encoder")

# Split: domain, rows, seed of the generator. The seeds are not those of the pretraining text.
_SPLITS = {
    "train": ("restaurant", 4_000, 1),
    "validation": ("restaurant", 1_000, 2),
    "test": ("restaurant", 2_000, 3),
    "test_ood": ("hotel", 1_000, 4),
}


def load_demo_task(train_size: int | None = None, heldout_size: int = 0, seed: int = 0) -> Task:
    """The demo task, generated on the fly, with columns text, label and probabilities.

    The column probabilities holds the true ones of the classes "no", "unsure" and "yes". Besides train (of
    4,000 rows), validation and test there is the split "test_ood": reviews of hotels.

    Args:
        train_size: number of training rows; all that are not held out by default.
        heldout_size: number of rows to cut off the training split.
        seed: of the choice of rows; the rows themselves are always the same.

    Raises:
        DataError: more rows are asked for than there are.
    """
    from bayeslora.demo.text import LABELS, rows
    from bayeslora.tasks import TaskSpec, build_task

    data = {name: rows(size, number, domain) for name, (domain, size, number) in _SPLITS.items()}
    return build_task(
        TaskSpec(name="demo", labels=LABELS),
        data,
        train_size=train_size,
        heldout_size=heldout_size,
        seed=seed,
        arguments={"source": "demo", "train_size": train_size, "heldout_size": heldout_size, "seed": seed},
    )
