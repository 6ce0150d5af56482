"""Texts on the terminal as they grow, and texts for a file of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora import files
from bayeslora.app.terminal import intervals_table, show
from bayeslora.errors import DataError, SettingError, unknown

if TYPE_CHECKING:
    from bayeslora.generation import Generation
    from bayeslora.posterior import Posterior
    from bayeslora.tasks import Split

__all__ = ["check_score", "generate_file", "generate_here", "generate_split"]

COLUMN = "prompt"
#: Prompts that are read, answered and written at a time.
CHUNK = 100
#: The score of programs, by the tests of their rows.
PROGRAMS = "humaneval"


def generate_here(posterior: Posterior, prompts: Sequence[str], output: Path | None, **settings: Any) -> None:
    """Show each text while it is written, then what the draws say of it."""
    found: list[Generation] = []
    try:
        for number, prompt in enumerate(prompts):
            stream = _Stream()
            found += posterior.generate(prompt, first=number, batch_size=1, progress=False, said=stream, **settings)
            stream.end()
            show(summary(found[-1]))
    finally:  # what was written before an error or Ctrl-C is not lost
        if output is not None and found:
            _write(output, [each.to_dict() for each in found])


def generate_file(posterior: Posterior, source: Path, target: Path, **settings: Any) -> int:
    """Answer the prompts of a file, and write a line of JSON for each, in their order.

    A column "prompt" that is none of the task's is read as it is; other rows are read as the task's template says. What
    was written before an error or Ctrl-C is not lost.

    Returns:
        The number of prompts.

    Raises:
        DataError: the file cannot be read, lacks the column, or has no rows.
    """
    from bayeslora.tasks.sources import tables

    count = 0
    with _growing(target) as write:
        encoder = posterior.program.encoder
        there = any(COLUMN in rows.column_names for rows in islice(tables(source, (), (COLUMN,), size=1), 1))
        raw = there and (encoder is None or COLUMN not in encoder.spec.columns)
        columns = (COLUMN,) if raw or encoder is None else encoder.spec.columns
        for rows in tables(source, columns, size=CHUNK):
            asked = rows[COLUMN][:] if raw else list(rows)
            write(each.to_dict() for each in posterior.generate(asked, first=count, **settings))
            count += len(rows)
        if not count:
            raise DataError(f"'{source}' has no rows.")
    return count


def generate_split(posterior: Posterior, rows: Split, target: Path, score: str | None, **settings: Any) -> Any:
    """Answer the rows of a task, and write a line of JSON for each, with the true text where there is one.

    Programs end where the function that was asked for does, unless it is said where. They are run, so make sure first
    that this is wanted (`check_score`); a text then says whether it passed.

    Args:
        posterior: of a causal language model.
        rows: of the task.
        target: file to write.
        score: whose way to read answers is taken, one of `bayeslora.generation.ANSWERS`, or `PROGRAMS`; None for no
            scores.
        **settings: of `Posterior.generate`.

    Returns:
        What to show: a table of scores, or how many rows were answered.
    """
    from bayeslora.generation import ANSWERS, exact_match, programs
    from bayeslora.generation.answers import check_truths
    from bayeslora.tasks.completion import completion_of

    written = rows.spec.kind == "completion"  # other answers are no texts
    truths = [completion_of(rows.spec, row) if written else None for row in rows.dataset]
    if score == PROGRAMS:
        programs.check_tests(rows)
        settings["stop"] = settings.get("stop") or programs.STOPS
    elif score is not None:  # what cannot be scored is said before the work
        check_truths([truth or "" for truth in truths], ANSWERS[score])
    found: list[Generation] = []
    lines: list[dict[str, Any]] = []
    with _growing(target) as write:
        for start in range(0, len(rows), CHUNK):
            some = rows.select(range(start, min(start + CHUNK, len(rows))))
            found += posterior.generate(some, first=start, **settings)
            lines += [
                each.to_dict() | ({} if truth is None else {"truth": truth})
                for each, truth in zip(found[start:], truths[start:], strict=False)
            ]
            write(lines[start:])
    if score is None:
        return f"{len(found):,} rows answered by {posterior.record.backend}. Written into {target}"
    if score == PROGRAMS:
        outcomes = programs.run_tests(found, rows, unsafe_code=True)
        for line, row in zip(lines, outcomes, strict=True):
            for text, outcome in zip(line["texts"], row, strict=True):
                text |= {"passed": outcome.passed, **outcome._asdict()}
        _write(target, lines)
        scores = programs.pass_rates(outcomes)
    else:
        scores = exact_match(found, [truth or "" for truth in truths], ANSWERS[score])
    return intervals_table(
        scores, f"{posterior.record.backend} on {len(found):,} rows of {rows.spec.name}, {rows.name}"
    )


def check_score(score: str | None, split: str | None, run_programs: bool) -> None:
    """Make sure that answers can be scored.

    Raises:
        SettingError: there is no such way to read them, there are no true ones, or programs are not to be run.
    """
    from bayeslora.generation import ANSWERS
    from bayeslora.generation.sandbox import check_consent

    scores = (*ANSWERS, PROGRAMS)
    if score is not None and score not in scores:
        raise SettingError(unknown("score", score, scores))
    if score is not None and split is None:
        raise SettingError("A score needs rows with a true answer: give --split, such as --split test.")
    if score == PROGRAMS:
        check_consent(run_programs)
    elif run_programs:
        raise SettingError(f"--run-programs goes with --score {PROGRAMS}, which alone runs what is written.")


def summary(found: Generation) -> str:
    """What the draws say of the texts after a prompt, on one line."""
    vote = found.vote()
    parts = [
        f"log-probability {found.log_probability.mean():.2f}",
        f"mutual information {found.mutual_information:.3f} nats of at most {found.most_information:.3f}",
    ]
    if not found.sampled:
        parts.append("both of these texts alone, which are no samples of the posterior predictive")
    if len(found) > 1:
        parts.append(f"{vote.share:.0%} of {len(found)} texts agree")
    return f"[{found.draws} draws: {', '.join(parts)}]"


@contextmanager
def _growing(target: Path) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
    """Give what adds lines to a file, which takes the place of an older one at the end of the block, if it has any.

    It does so after an error or Ctrl-C as well. Until then the lines are in a hidden file beside it, where they stay if
    the process is killed.

    Raises:
        SettingError: another process is writing there, or there can be no such place.
    """
    files.make(target.parent)
    part = files.hidden(target, "part")
    with files.locked(files.hidden(target, "lock")), part.open("w", encoding="utf-8") as file:

        def write(lines: Iterable[Mapping[str, Any]]) -> None:
            file.write("".join(map(_line, lines)))
            file.flush()

        try:
            yield write
        finally:
            if file.tell():
                files.move(part, target)
            else:
                part.unlink()


def _write(target: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    files.write_text(target, "".join(map(_line, lines)))


def _line(found: Mapping[str, Any]) -> str:
    return json.dumps(found, ensure_ascii=False) + "\n"


class _Stream:
    """Writes what is new of the text that grows; each text begins on a line of its own."""

    def __init__(self) -> None:
        self._place, self._text = (0, 0), ""

    def __call__(self, prompt: int, sample: int, text: str) -> None:
        if (prompt, sample) != self._place:
            self.end()
            self._place, self._text = (prompt, sample), ""
        sys.stdout.write(text[len(self._text) :])
        sys.stdout.flush()
        self._text = text

    def end(self) -> None:
        """End the line."""
        sys.stdout.write("\n")
