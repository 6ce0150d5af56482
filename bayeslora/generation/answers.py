"""Answers that are read off texts, and how often they are right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from bayeslora.errors import DataError
from bayeslora.generation.texts import Generation

if TYPE_CHECKING:
    from bayeslora.predict.resampling import Interval

__all__ = ["ANSWERS", "Extract", "check_truths", "exact_match", "flexible", "strict"]

#: Reads an answer off a text; None where there is none.
Extract = Callable[[str], str | None]

MARKED = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def strict(text: str) -> str | None:
    """The number behind the first "####", as GSM8K ends its answers."""
    found = MARKED.search(text)
    return None if found is None else _number(found[1])


def flexible(text: str) -> str | None:
    """The last number in a text."""
    found = NUMBER.findall(text)
    return _number("".join(found[-1])) if found else None


def _number(text: str) -> str:
    return re.sub(r"[,$]", "", text).removesuffix(".")


#: Ways to read an answer, by the data set that they are for and by name, as the evaluation harness has them.
ANSWERS: Mapping[str, Mapping[str, Extract]] = MappingProxyType(
    {"gsm8k": MappingProxyType({"strict": strict, "flexible": flexible})}
)


def check_truths(truths: Sequence[str], ways: Mapping[str, Extract]) -> None:
    """Make sure that true texts have an answer by each way to read it.

    Raises:
        DataError: one has none.
    """
    for name, extract in ways.items():
        for row, truth in enumerate(truths):
            if extract(truth) is None:
                raise DataError(f"The true text of row {row} has no answer by the way '{name}': {truth[-60:]!r}.")


def exact_match(
    generations: Sequence[Generation],
    truths: Sequence[str],
    ways: Mapping[str, Extract] = ANSWERS["gsm8k"],
    intervals: bool = True,
    seed: int = 0,
) -> dict[str, Interval]:
    """How often an answer is that of the true text, by each way to read it.

    Args:
        generations: of each row.
        truths: a text with the right answer for each row.
        ways: to read an answer, by name.
        intervals: make 95 % bootstrap intervals over rows as well.
        seed: of the resamples.

    Returns:
        ``NAME``, the share of texts that are right, and with several texts a row ``NAME_maj@k``, that of rows whose
        answer of most of the k texts is.

    Raises:
        DataError: there are no rows, not as many truths, or a truth without an answer.
    """
    from bayeslora.predict.resampling import Share, bootstrap

    if not generations or len(generations) != len(truths):
        raise DataError(f"Expected a true text for each row, found {len(generations)} rows and {len(truths)} texts.")
    if len(numbers := {len(each) for each in generations}) > 1:
        raise DataError(f"All rows need as many texts, found from {min(numbers)} to {max(numbers)}.")
    check_truths(truths, ways)
    scores: dict[str, list[float]] = {}
    for name, extract in ways.items():
        for found, truth in zip(generations, truths, strict=True):
            right = extract(truth)
            share = sum(extract(text) == right for text in found) / len(found)
            scores.setdefault(name, []).append(share)
            if len(found) > 1:
                majority = float(found.vote(extract).answer == right)
                scores.setdefault(f"{name}_maj@{len(found)}", []).append(majority)
    table = {name: (Share(np.array(each)), 0.0, 1.0) for name, each in scores.items()}
    return bootstrap(table, len(generations), seed, intervals)
