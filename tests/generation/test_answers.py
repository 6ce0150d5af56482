"""Answers as the evaluation harness reads them off texts of GSM8K."""

from __future__ import annotations

import pytest
import torch

from bayeslora.errors import DataError
from bayeslora.generation import Generation
from bayeslora.generation.answers import exact_match, flexible, strict


@pytest.mark.parametrize(
    ("text", "by_mark", "last"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18", "18"),
        ("#### -1,234.50 and #### 7", "-1234.50", "7"),
        ("so it is $1,000.", None, "1000"),
        ("#### 5. Then 6", "5", "6"),
        ("no number", None, None),
        ("####18", None, "18"),
    ],
)
def test_answers(text: str, by_mark: str | None, last: str | None) -> None:
    assert (strict(text), flexible(text)) == (by_mark, last)


def generation(*texts: str) -> Generation:
    return Generation("?", texts, ((1,),) * len(texts), torch.zeros(len(texts), 1), "draw", True)


def test_shares_and_majorities() -> None:
    rows = [generation("#### 4", "#### 4", "it is 5"), generation("it is 7", "#### 8", "8 or 7")]
    found = exact_match(rows, ["#### 4", "1 + 6\n#### 7"])
    assert {name: each.value for name, each in found.items()} == pytest.approx(
        {"strict": 1 / 3, "strict_maj@3": 0.5, "flexible": 2 / 3, "flexible_maj@3": 1.0}
    )
    assert found["strict"].low <= 1 / 3 <= found["strict"].high
    assert set(exact_match([generation("4")], ["#### 4"])) == {"strict", "flexible"}


def test_what_cannot_be_scored() -> None:
    with pytest.raises(DataError, match="1 rows and 2 texts"):
        exact_match([generation("4")], ["#### 4", "#### 5"])
    with pytest.raises(DataError, match="true text of row 0 has no answer by the way 'strict'"):
        exact_match([generation("4")], ["4"])
    with pytest.raises(DataError, match="as many texts"):
        exact_match([generation("4"), generation("4", "5")], ["#### 4", "#### 4"])
