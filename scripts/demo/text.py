"""A generator of short reviews whose class probabilities are known.

A review is one sentence of clauses such as "the soup was not very fresh". A clause has a value: that of its
adjective (which depends on the subject) times a factor for its adverb or negation. The review's score is a
weighted sum of its clauses' values, with weights that depend on how they are joined: what comes after "but"
counts more than what comes before, and what others said counts little. The probabilities of the answers to
"will the guest come back?" are a softmax of the score. So the best possible predictions are known, and with
them the best possible accuracy and log-likelihood.

Only `random.Random.random` is drawn from, whose sequence Python keeps from version to version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from random import Random
from typing import Any, TypeVar

import lexicon
from lexicon import Aspect

__all__ = ["LABELS", "Review", "corpus", "probabilities", "review", "rows"]

LABELS = ("no", "unsure", "yes")
SHARPNESS = 1.8
UNSURE = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Pattern:
    """A way of joining clauses.

    Attributes:
        template: of the sentence.
        first: weight of the first clause.
        second: weight of the second clause.
        relation: 1 if the two clauses agree, -1 if they contradict each other.
        share: of the reviews that follow the pattern.
    """

    template: str
    first: float
    second: float
    relation: int
    share: float


PATTERNS = (
    Pattern("{company} and {first}", 1.5, 0.0, 1, 0.20),
    Pattern("{first} and {second}", 1.0, 1.0, 1, 0.25),
    Pattern("{first}, but {second}", 0.4, 1.5, -1, 0.20),
    Pattern("although {first}, {second}", 0.4, 1.5, -1, 0.12),
    Pattern("{first}, even though {second}", 1.5, 0.4, -1, 0.08),
    Pattern("{hearsay} {first}, but {second}", 0.2, 1.5, -1, 0.15),
)


@dataclass(frozen=True)
class Review:
    """A sentence, or a part of one, and its contribution to the score."""

    text: str
    score: float


def probabilities(score: float) -> list[float]:
    """Probabilities of `LABELS`: the softmax of (-SHARPNESS score, UNSURE, SHARPNESS score)."""
    return _softmax((-SHARPNESS * score, UNSURE, SHARPNESS * score))


def review(random: Random, domain: str = "restaurant") -> Review:
    """A review of 8 to 20 words, a few more at times; an opening or a closing phrase may be part of it."""
    pattern = PATTERNS[_draw(random, [pattern.share for pattern in PATTERNS])]
    aspects = lexicon.DOMAINS[domain]
    first = _clause(random, aspects)
    second = _clause(random, aspects, sign=pattern.relation if first.score > 0 else -pattern.relation)
    body = pattern.template.format(
        first=first.text,
        second=second.text,
        company=_pick(random, lexicon.COMPANIONS),
        hearsay=_pick(random, lexicon.HEARSAY),
    )
    place = random.random()
    opener = f"{_pick(random, lexicon.OPENERS)}, " if place < 0.5 else ""
    closer = f" {_pick(random, lexicon.CLOSERS)}" if place > 0.75 else ""
    score = pattern.first * first.score + pattern.second * second.score
    return Review(_sentence(f"{opener}{body}{closer}"), score)


def rows(size: int, seed: int, domain: str = "restaurant") -> list[dict[str, Any]]:
    """Rows with a text, a label drawn from the true probabilities, and these probabilities.

    A longer table begins like a shorter one of the same seed.
    """
    random = Random(seed)
    table = []
    for _ in range(size):
        written = review(random, domain)
        true = probabilities(written.score)
        table.append({"text": written.text, "label": _draw(random, true), "probabilities": true})
    return table


def corpus(size: int, seed: int) -> Iterator[tuple[str, int]]:
    """Text for pretraining, broader than the task: reviews of four domains, each followed by a verdict.

    A verdict is a sentence such as "we may give it another try" that suits the score, give or take a half.
    By it an encoder learns, as from real reviews, what clauses amount to.

    Yields:
        A review, half of them of a single clause, and the index of its verdict in `lexicon.VERDICTS`.
    """
    random = Random(seed)
    domains = tuple(lexicon.DOMAINS)
    for _ in range(size):
        domain = _pick(random, domains)
        if random.random() < 0.5:
            clause = _clause(random, lexicon.DOMAINS[domain])
            written = Review(_sentence(clause.text), clause.score)
        else:
            written = review(random, domain)
        suitable = _softmax([-2.0 * (written.score - score) ** 2 for _, score in lexicon.VERDICTS])
        yield written.text, _draw(random, suitable)


def _clause(random: Random, aspects: Sequence[Aspect], sign: int = 0) -> Review:
    """A statement about one subject, with a value of the given sign (0: either)."""
    aspect = _pick(random, aspects)
    subject = _pick(random, aspect.subjects)
    verb = "were" if subject in lexicon.PLURAL else "was"
    while True:
        adjective, value = _pick(random, aspect.qualities)
        adverbs = lexicon.EXTREME_ADVERBS if lexicon.is_extreme(value) else lexicon.ADVERBS
        adverb, factor = _pick(random, lexicon.NEGATIONS if random.random() < 0.25 else adverbs)
        sensible = adverb != "too" or value < 0
        if sensible and value * factor * sign >= 0:
            words = (subject, verb, adverb, adjective)
            return Review(" ".join(word for word in words if word), value * factor)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _softmax(logits: Sequence[float]) -> list[float]:
    weights = [exp(logit - max(logits)) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _pick(random: Random, options: Sequence[T]) -> T:
    return options[int(random.random() * len(options))]


def _draw(random: Random, weights: Sequence[float]) -> int:
    """An index, with probability proportional to its weight."""
    threshold = random.random() * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return len(weights) - 1
