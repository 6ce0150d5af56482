"""A tiny encoder and a text task with known class probabilities, shipped with the package.

The task is to tell from a one-sentence review of a restaurant whether the guest will come back. Sentences and answers are
generated (`bayeslora.demo.text`), so that predictions can be compared with the truth and not only with drawn labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayeslora.tasks import Task

__all__ = ["MODEL_PATH", "load_demo_task"]

#: Folder of the encoder, for `AutoModelForSequenceClassification.from_pretrained`.
MODEL_PATH = Path(__file__).with_name("encoder")

#: Split: (domain, rows, seed of the generator). The seeds differ from those of the pretraining text.
_SPLITS = {
    "train": ("restaurant", 4_000, 1),
    "validation": ("restaurant", 1_000, 2),
    "test": ("restaurant", 2_000, 3),
    "test_ood": ("hotel", 1_000, 4),
}


def load_demo_task(train_size: int | None = None, heldout_size: int = 0, seed: int = 0) -> Task:
    """The demo task, generated on the fly: columns text, label and probabilities (the true ones of the three classes).

    Args:
        train_size: number of training rows, of 4,000; all that are not held out by default.
        heldout_size: number of rows to cut off the training split.
        seed: of the choice of rows; the rows themselves are always the same.

    Raises:
        DataError: more rows are asked for than there are.
    """
    from bayeslora.demo import text
    from bayeslora.tasks import TaskSpec, build_task

    spec = TaskSpec(name="demo", labels=text.LABELS)
    data = {name: text.rows(size, row_seed, domain) for name, (domain, size, row_seed) in _SPLITS.items()}
    arguments = {"name": "demo", "train_size": train_size, "heldout_size": heldout_size, "seed": seed}
    return build_task(
        spec, data, train_size=train_size, heldout_size=heldout_size, seed=seed, arguments=arguments
    )
