"""What a pass over data is made of: rows as tasks, users and tokenizers give them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from scenarios import SPEC, saved_base, text_program, text_rows, tiny_choices, tiny_program, tiny_rows

from bayeslora.errors import DataError, TaskError
from bayeslora.inference import fit
from bayeslora.observations import Encoder
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

TEXTS = ["w3 w9 w5", "w30", "w4 w4"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return text_program(saved_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def posterior(program: Program) -> Posterior:
    return fit(program, text_rows(), "mle", epochs=1, batch_size=6, progress=False, cpu=True)


NEW: dict[str, Any] = {
    "texts": TEXTS,
    "mappings": [{"text": text, "note": 1} for text in TEXTS],
    "a DataFrame": pd.DataFrame({"text": TEXTS, "date": ["x", None, "y"]}),
    "a data set": Dataset.from_dict({"text": TEXTS}),
    "a split": Split(Dataset.from_dict({"text": TEXTS}), SPEC),
}


@pytest.mark.parametrize("kind", NEW)
def test_new_rows_are_predicted_as_they_come(posterior: Posterior, kind: str) -> None:
    labelled = Split(Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2]}), SPEC)
    found = posterior.predict(NEW[kind], progress=False)
    assert found.labels is None
    assert torch.equal(found.outputs, posterior.predict(labelled, progress=False).outputs)
    assert found.to_pandas()["class"].isin(SPEC.labels).all()


def test_one_text_is_one_row(posterior: Posterior) -> None:
    alone, first = posterior.predict("w3 w9 w5", progress=False), posterior.predict(TEXTS[:1], progress=False)
    assert torch.equal(alone.outputs, first.outputs)


def test_rows_of_other_classes_are_refused(posterior: Posterior) -> None:
    other = replace(text_rows(), spec=replace(SPEC, labels=("more", "one", "none")))
    with pytest.raises(TaskError, match=r"into \(more, one, none\), but the posterior was fitted to"):
        posterior.predict(other, progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no rows"),
        (pd.DataFrame({"title": ["a"]}), "'text'"),
        ([3], "Row 0"),
        (7, "found a int"),
        ([{"text": None}], "Row 0"),
    ],
)
def test_what_cannot_be_read_is_said(program: Program, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Rows.of(program, data)


def test_a_whole_task_is_no_rows(program: Program) -> None:
    with pytest.raises(DataError, match="task.train"):
        Rows.of(program, Task(SPEC, text_rows()))


def test_text_needs_an_encoder() -> None:
    with pytest.raises(DataError, match="expected a column 'input_ids', or an encoder"):
        Rows.of(tiny_program(), TEXTS)
    assert len(Rows.of(tiny_program(), tiny_rows(5))) == 5


def test_rows_may_have_another_number_of_choices(program: Program) -> None:
    def quiz(labels: tuple[str, ...]) -> TaskSpec:
        return TaskSpec("quiz", "multiple-choice", ("q",), "right", labels, choices=("choices",))

    choosing = tiny_choices()
    choosing.encoder = Encoder(program.encoder.tokenizer, quiz(("A", "B")), 16)
    rows = Dataset.from_list([{"q": "w3", "choices": ["w4", "w5", "w6", "w7"], "right": 3}])
    found = Rows.of(choosing, Split(rows, quiz(("A", "B", "C", "D"))))
    assert (found.observation.classes, found.names) == (4, ("A", "B", "C", "D"))
    # Read once, they are those of their own task ever after, in batches of any size.
    again = Rows.of(choosing, found, batch_size=3, progress=True)
    assert again.dataset is found.dataset and again.names == found.names
    assert (again.batch_size, again.progress, found.batch_size, found.progress) == (3, True, 64, False)


def test_the_loss_of_an_average_over_draws_is_infinite_where_the_network_overflows(program: Program) -> None:
    rows = Rows.of(program, text_rows(2))
    outputs = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    right = torch.stack([outputs.softmax(-1)[:, row, label] for row, label in enumerate(rows.labels.tolist())])
    assert rows.nll(outputs) == pytest.approx(-float(right.mean(1).log().mean()))
    for value in (math.nan, math.inf):
        outputs[1, 0, 0] = value
        assert rows.nll(outputs) == math.inf
