"""A tiny encoder, and the rows of a text task with known class probabilities, shipped with the package.

The task: from a one-sentence review of a restaurant, tell whether the guest will come back. Sentences and answers were
generated (``scripts/demo``), so that predictions can be compared with the true probabilities and not with drawn labels
alone.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_PATH", "ROWS_PATH"]

#: Folder of the encoder, for `AutoModelForSequenceClassification.from_pretrained`.
MODEL_PATH = Path(__file__).with_name("encoder")
#: Folder of the rows, a Parquet file for each split: text, label, and the true probabilities of the classes.
ROWS_PATH = Path(__file__).with_name("rows")
