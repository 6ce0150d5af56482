"""Programs as completions, as in HumanEval: whether they pass the tests of their row, and how many of k do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from bayeslora.errors import DataError, SettingError
from bayeslora.generation.sandbox import LIMITS, Limits, Outcome, check_consent, run_program
from bayeslora.generation.texts import Generation
from bayeslora.progress import track

if TYPE_CHECKING:
    from bayeslora.predict.resampling import Interval
    from bayeslora.tasks import Split

__all__ = ["STOPS", "check_tests", "pass_at_k", "pass_rates", "run_tests"]

#: Where the function that was asked for has ended, as the evaluation harness has it.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
#: Columns of a row: a program that defines ``check(function)``, and the name of the function.
TEST, FUNCTION = "test", "entry_point"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that of k texts one passes, ``1 - C(n - c, k) / C(n, k)``.

    Args:
        n: number of texts.
        c: number of those that pass.
        k: number of texts that one may try.

    Raises:
        SettingError: not 0 <= c <= n, or not 1 <= k <= n.

    References:
        Chen et al., *Evaluating large language models trained on code*, 2021.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise SettingError(f"pass@{k} of {n} texts of which {c} pass: expected 0 <= c <= n and 1 <= k <= n.")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def check_tests(rows: Split) -> None:
    """Make sure that rows have tests.

    Raises:
        DataError: otherwise.
    """
    if lacking := {TEST, FUNCTION} - {*rows.dataset.column_names}:
        raise DataError(
            f"Split '{rows.name}' of task '{rows.spec.name}' has no column '{min(lacking)}': programs are tested by "
            f"rows as HumanEval's, with '{TEST}' and '{FUNCTION}'."
        )


def run_tests(
    generations: Sequence[Generation],
    rows: Split,
    limits: Limits = LIMITS,
    *,
    unsafe_code: bool = False,
    progress: bool = True,
) -> list[list[Outcome]]:
    """Run each text behind its prompt, and the row's tests behind it, as `run_program` does.

    Blanks at the end of a prompt count with the text, which brings its own.

    Args:
        generations: of each row.
        rows: with tests.
        limits: what a program may use.
        unsafe_code: run programs that a network wrote, though they may be harmful.
        progress: show it.

    Returns:
        How each text of each row ended.

    Raises:
        SettingError: ``unsafe_code`` is not given, or the system cannot put a program under limits.
        DataError: the rows have no tests, or are not as many.
    """
    check_consent(unsafe_code)
    check_tests(rows)
    if len(generations) != len(rows):
        raise DataError(f"Expected texts for each row, found {len(rows)} rows and texts for {len(generations)}.")
    programs = [
        f"{rows.spec.texts(row)[0][0].rstrip(' ')}{text}\n{row[TEST]}\ncheck({row[FUNCTION]})\n"
        for row, found in zip(rows.dataset, generations, strict=True)
        for text in found
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = pool.map(lambda program: run_program(program, limits, unsafe_code=unsafe_code), programs)
        outcomes = iter(list(track(ended, "tests", total=len(programs), show=progress)))
    return [[next(outcomes) for _ in found] for found in generations]


def pass_rates(outcomes: Sequence[Sequence[Outcome]], intervals: bool = True, seed: int = 0) -> dict[str, Interval]:
    """pass@k for k = 1, 2, 4, ... up to the number of texts, averaged over rows.

    Args:
        outcomes: of the texts of each row.
        intervals: make 95 % bootstrap intervals over rows as well.
        seed: of the resamples.

    Raises:
        DataError: there are no rows, or they have not as many texts.
    """
    from bayeslora.predict.resampling import Share, bootstrap

    sizes = {len(row) for row in outcomes}
    if len(sizes) != 1:
        raise DataError(f"All rows need as many texts, found {sorted(sizes) or 'no rows'}.")
    (n,) = sizes
    passed = [sum(each.passed for each in row) for row in outcomes]
    powers = takewhile(lambda k: k <= n, (2**power for power in range(n.bit_length())))
    table = {f"pass@{k}": (Share(np.array([pass_at_k(n, c, k) for c in passed])), 0.0, 1.0) for k in powers}
    return bootstrap(table, len(outcomes), seed, intervals)
