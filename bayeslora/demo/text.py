"""A generator of short reviews whose class probabilities are known.

Each review is one sentence of clauses such as "the soup was not very fresh". A clause has a value: that of its adjective
(which depends on the subject), times a factor for its adverb or negation. The values add up to the review's score, with
weights that depend on how the clauses are joined: after "but" counts more than before it, and what others said counts
little. The probabilities of the answers to "will the guest come back?" are a softmax of the score, so that the best
possible classifier, its accuracy and its log-likelihood are known exactly.

Only `random.Random.random`, whose sequence Python keeps from version to version, is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from random import Random
from typing import Any, TypeVar

from bayeslora.demo import lexicon
from bayeslora.demo.lexicon import Aspect

__all__ = ["LABELS", "Review", "corpus", "probabilities", "review", "rows"]

LABELS = ("no", "unsure", "yes")
SHARPNESS = 1.8
UNSURE = 1.0
MAIN, ASIDE, HEARD = 1.5, 0.4, 0.2

T = TypeVar("T")


@dataclass(frozen=True)
class Clause:
    """A statement about one subject and its contribution to the score."""

    text: str
    value: float


@dataclass(frozen=True)
class Review:
    """A sentence and its hidden score."""

    text: str
    score: float

    @property
    def probabilities(self) -> tuple[float, ...]:
        """The true probabilities of `LABELS` given the text."""
        return probabilities(self.score)


def probabilities(score: float) -> tuple[float, ...]:
    """Softmax of (-SHARPNESS score, UNSURE, SHARPNESS score): "unsure" is the likeliest where the score is near zero."""
    logits = (-SHARPNESS * score, UNSURE, SHARPNESS * score)
    weights = [exp(logit - max(logits)) for logit in logits]
    return tuple(weight / sum(weights) for weight in weights)


def _pick(random: Random, options: Sequence[T]) -> T:
    return options[int(random.random() * len(options))]


def _pick_weighted(random: Random, weights: Sequence[float]) -> int:
    threshold = random.random() * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return len(weights) - 1


def _clause(random: Random, aspects: Sequence[Aspect], sign: int = 0) -> Clause:
    """A clause about a subject of one of the aspects, with a value of the given sign (0: either)."""
    aspect = _pick(random, aspects)
    subject = _pick(random, aspect.subjects)
    verb = "were" if subject in lexicon.PLURAL else "was"
    while True:
        adjective, value = _pick(random, aspect.qualities)
        if random.random() < 0.25:
            adverb, factor = _pick(random, lexicon.NEGATIONS)
        else:
            adverb, factor = _pick(random, lexicon.EXTREME_ADVERBS if lexicon.is_extreme(value) else lexicon.ADVERBS)
        if adverb == "too" and value > 0:
            continue
        if value * factor * sign >= 0:
            return Clause(" ".join(word for word in (subject, verb, adverb, adjective) if word), value * factor)


def _sign(clause: Clause) -> int:
    return 1 if clause.value > 0 else -1


def _pair(random: Random, aspects: Sequence[Aspect], relation: int) -> tuple[Clause, Clause]:
    """Two clauses that agree (relation 1) or disagree (-1)."""
    first = _clause(random, aspects)
    return first, _clause(random, aspects, relation * _sign(first))


def _alone(random: Random, aspects: Sequence[Aspect]) -> Clause:
    clause = _clause(random, aspects)
    return Clause(f"{_pick(random, lexicon.COMPANIONS)} and {clause.text}", MAIN * clause.value)


def _and(random: Random, aspects: Sequence[Aspect]) -> Clause:
    first, second = _pair(random, aspects, 1)
    return Clause(f"{first.text} and {second.text}", first.value + second.value)


def _but(random: Random, aspects: Sequence[Aspect]) -> Clause:
    first, second = _pair(random, aspects, -1)
    return Clause(f"{first.text}, but {second.text}", ASIDE * first.value + MAIN * second.value)


def _although(random: Random, aspects: Sequence[Aspect]) -> Clause:
    first, second = _pair(random, aspects, -1)
    return Clause(f"although {first.text}, {second.text}", ASIDE * first.value + MAIN * second.value)


def _even_though(random: Random, aspects: Sequence[Aspect]) -> Clause:
    first, second = _pair(random, aspects, -1)
    return Clause(f"{first.text}, even though {second.text}", MAIN * first.value + ASIDE * second.value)


def _hearsay(random: Random, aspects: Sequence[Aspect]) -> Clause:
    first, second = _pair(random, aspects, -1)
    said = _pick(random, lexicon.HEARSAY)
    return Clause(f"{said} {first.text}, but {second.text}", HEARD * first.value + MAIN * second.value)


_PATTERNS: tuple[tuple[Callable[[Random, Sequence[Aspect]], Clause], float], ...] = (
    (_alone, 0.2),
    (_and, 0.25),
    (_but, 0.2),
    (_although, 0.12),
    (_even_though, 0.08),
    (_hearsay, 0.15),
)


def review(random: Random, domain: str = "restaurant") -> Review:
    """One review of about 8 to 20 words: a pattern of one or two clauses, perhaps an opening or a closing phrase."""
    pattern, _ = _PATTERNS[_pick_weighted(random, [weight for _, weight in _PATTERNS])]
    body = pattern(random, lexicon.DOMAINS[domain])
    place = random.random()
    opener = f"{_pick(random, lexicon.OPENERS)}, " if place < 0.5 else ""
    closer = f" {_pick(random, lexicon.CLOSERS)}" if place > 0.75 else ""
    return Review(_sentence(f"{opener}{body.text}{closer}"), body.value)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def rows(size: int, seed: int, domain: str = "restaurant") -> list[dict[str, Any]]:
    """Rows of text, label (drawn from the true probabilities) and probabilities; a longer list begins like a shorter."""
    random = Random(seed)
    table = []
    for _ in range(size):
        written = review(random, domain)
        label = _pick_weighted(random, written.probabilities)
        table.append({"text": written.text, "label": label, "probabilities": list(written.probabilities)})
    return table


def corpus(size: int, seed: int) -> Iterator[tuple[str, int]]:
    """Unlabelled text for pretraining, broader than the task: reviews of four domains, each followed by a verdict.

    A verdict is a sentence such as "we may give it another try" that suits the score, give or take a half. It is how the
    encoder can learn, as from real reviews, what clauses amount to. The task's labels and seeds are not used.

    Yields:
        A review, every second one of a single plain clause, and the index of its verdict in `lexicon.VERDICTS`.
    """
    random = Random(seed)
    domains = tuple(lexicon.DOMAINS)
    for _ in range(size):
        domain = _pick(random, domains)
        if random.random() < 0.5:
            clause = _clause(random, lexicon.DOMAINS[domain])
            written = Review(_sentence(clause.text), clause.value)
        else:
            written = review(random, domain)
        weights = [exp(-2.0 * (written.score - value) ** 2) + 1e-9 for _, value in lexicon.VERDICTS]
        yield written.text, _pick_weighted(random, weights)
