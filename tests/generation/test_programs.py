"""Programs as completions: their tests, and the share of k texts that pass."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from datasets import Dataset

from bayeslora.errors import DataError, SettingError
from bayeslora.generation import Generation
from bayeslora.generation.programs import pass_at_k, pass_rates, run_tests
from bayeslora.generation.sandbox import Outcome
from bayeslora.tasks import Split
from bayeslora.tasks.loading import rows_of
from bayeslora.tasks.spec import find_task

ROWS = [
    {
        "prompt": 'def double(number):\n    """Twice a number."""\n',
        "canonical_solution": "    return 2 * number\n",
        "test": "def check(candidate):\n    assert candidate(4) == 8 and candidate(-1) == -2\n",
        "entry_point": "double",
    },
    {
        "prompt": "from typing import List\n\n\ndef last(words: List[str]) -> str:\n",
        "canonical_solution": "    return max(words)\n",
        "test": "def check(candidate):\n    assert candidate(['b', 'c', 'a']) == 'c'\n",
        "entry_point": "last",
    },
    {
        "prompt": "def once(values):\n",
        "canonical_solution": "    import math\n    return math.prod(values)\n",
        "test": "def check(candidate):\n    assert candidate([2, 3]) == 6, 'product'\n",
        "entry_point": "once",
    },
]


def split(rows: list[dict[str, str]] = ROWS) -> Split:
    spec = find_task("humaneval")
    assert spec is not None
    return rows_of(spec, rows)


def generation(*texts: str) -> Generation:
    return Generation("?", texts, ((1,),) * len(texts), torch.zeros(len(texts), 1), "draw", True)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_against_enumeration(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            tried = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, tried)) / len(tried), abs=1e-15)


def test_pass_at_k_of_many() -> None:
    assert pass_at_k(10_000, 1, 5000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 0, 5000) == 0.0
    for wrong in ((2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0)):
        with pytest.raises(SettingError, match="expected 0 <= c <= n and 1 <= k <= n"):
            pass_at_k(*wrong)


def test_programs_are_tested_and_counted() -> None:
    texts = [generation(row["canonical_solution"], "    return words[-1] if 0 else None\n") for row in ROWS]
    found = run_tests(texts, split(), unsafe_code=True, progress=False)
    assert [[each.status for each in row] for row in found] == [["passed", "failed"]] * 3
    assert found[2][1].error == "AssertionError: product"
    rates = pass_rates([*found, [Outcome("failed")] * 2])
    assert {name: each.value for name, each in rates.items()} == {"pass@1": 0.375, "pass@2": 0.75}
    assert rates["pass@1"].low <= 0.375 <= rates["pass@1"].high
    assert set(pass_rates([[Outcome("failed")] * 9] * 2)) == {"pass@1", "pass@2", "pass@4", "pass@8"}


def test_blanks_at_the_end_of_a_prompt_are_the_text_s() -> None:
    row = ROWS[0] | {"prompt": "def double(number):\n    "}
    ((found,),) = run_tests([generation("    return 2 * number\n")], split([row]), unsafe_code=True, progress=False)
    assert found.passed


def test_what_is_not_tested() -> None:
    with pytest.raises(SettingError, match="unsafe_code=True"):
        run_tests([generation("    pass")] * 3, split())
    with pytest.raises(DataError, match="3 rows and texts for 1"):
        run_tests([generation("    pass")], split(), unsafe_code=True)
    spec = split().spec
    untested = Split(Dataset.from_list([{"prompt": "def f():", "entry_point": "f"}]), spec)
    with pytest.raises(DataError, match="no column 'test'"):
        run_tests([generation("    pass")], untested, unsafe_code=True)
    with pytest.raises(DataError, match="no rows"):
        pass_rates([])
