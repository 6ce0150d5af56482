"""Texts that were generated after a prompt, and how sure the posterior is of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Generation", "Vote"]


class Vote(NamedTuple):
    """An answer that texts were asked for.

    Attributes:
        answer: that most texts give; None if none gives one.
        share: of the texts that give it.
    """

    answer: str | None
    share: float


@dataclass(frozen=True, eq=False)
class Generation:
    """The texts after one prompt.

    Attributes:
        prompt: as the network read it.
        texts: one a sample, without what ends it.
        tokens: their token ids, what ends them included.
        log_probs: of each text under each draw of the weights (samples, draws), in nats, in double precision.
        method: how they were made.
        sampled: whether they are samples of the posterior predictive: by draws of the weights or their mixture, at
            temperature 1 and among all tokens.
    """

    prompt: str
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    log_probs: Tensor
    method: str
    sampled: bool

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __repr__(self) -> str:
        return f"Generation({self.prompt[-40:]!r}, {len(self)} texts by '{self.method}', {self.draws} draws)"

    @property
    def draws(self) -> int:
        """Number of weight draws that say how probable a text is."""
        return self.log_probs.shape[1]

    @property
    def log_probability(self) -> Tensor:
        """Log of the probability of each text averaged over draws (samples,), in nats."""
        return self.log_probs.logsumexp(1) - math.log(self.draws)

    @property
    def information(self) -> Tensor:
        """What each text says of the weights (samples,), in nats.

        The Kullback-Leibler divergence of the draws' weights given the text from equal weights: 0 where all draws
        find it equally probable, log(draws) where only one could have written it.
        """
        weights = self.log_probs.log_softmax(1)
        return (weights.exp() * weights).nan_to_num(0).sum(1) + math.log(self.draws)

    @property
    def most_information(self) -> float:
        """What a text could say of the weights at most, in nats: which of the draws wrote it."""
        return math.log(self.draws)

    @property
    def entropy(self) -> float:
        """Minus the log-probability of a text on average, in nats.

        Of samples (`sampled`) an unbiased estimate of the entropy of the mixture of these draws, one of which wrote
        each text: less than that of the posterior predictive, which has no end of draws. Of other texts it is no
        entropy: it says how improbable the posterior finds what was chosen otherwise, at the mean of the weights, at
        another temperature, or among the most probable tokens alone.
        """
        return -float(self.log_probability.mean())

    @property
    def mutual_information(self) -> float:
        """What a text says of the weights on average, in nats.

        Of samples (`sampled`) an unbiased estimate of the mutual information of a text and of which of these draws
        wrote it. That of a text and the posterior's weights is more: this one cannot exceed `most_information`, which
        long texts come near to. Compare it at the same number of draws. Of other texts, as with `entropy`, it is of the
        texts at hand alone.
        """
        return float(self.information.mean())

    def vote(self, extract: Callable[[str], str | None] = str.strip) -> Vote:
        """The answer of most texts.

        Args:
            extract: an answer from a text, or None where there is none; by default the text without blanks around it.
        """
        answers = Counter(answer for answer in map(extract, self.texts) if answer is not None)
        if not answers:
            return Vote(None, 0.0)
        answer, count = answers.most_common(1)[0]
        return Vote(answer, count / len(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        per_text = zip(self.texts, self.log_probability.tolist(), self.information.tolist(), strict=True)
        vote = self.vote()
        return {
            "prompt": self.prompt,
            "method": self.method,
            "sampled": self.sampled,
            "texts": [
                {"text": text, "log_probability": density, "information": known} for text, density, known in per_text
            ],
            "entropy": self.entropy,
            "mutual_information": self.mutual_information,
            "agreement": vote.share,
        }
