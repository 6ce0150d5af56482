"""A posterior of a causal language model as a model of the evaluation harness."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from bayeslora.errors import DataError, PosteriorError, SettingError, unknown
from bayeslora.harness.scoring import Pair, Scores, scored
from bayeslora.observations.prompts import tokens
from bayeslora.observations.soft_prompts import virtual_tokens
from bayeslora.passes import undisturbed
from bayeslora.settings import Count, Seed, coerce

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from bayeslora.posterior import Posterior

__all__ = ["AVERAGES", "PosteriorLM"]

#: What is averaged over draws: the probability of a text; the softmax over a document's choices; or nothing, since the
#: one pass is at the posterior mean (of several fits one for each, averaged as sequences).
AVERAGES = ("sequence", "choices", "mean")


class PosteriorLM(TemplateLM):
    """What the harness asks of a language model, answered by a posterior over one.

    Probabilities are averaged over draws of the weights, never log-likelihoods. ``"sequence"`` averages the probability
    of each continuation: right where it is the likelihood. ``"choices"`` averages the softmax over the choices of each
    document, the likelihood of multiple choice, and answers with its logarithm, so that the harness's own softmax finds
    it again; what the harness divides by a length, such as acc_norm, then means nothing. A request that is the only one
    of its document, and a perplexity, are averaged as sequences in any case. ``"mean"`` is the posterior mean: the same
    as the harness's own model of the saved adapter; of several fits, whose adapter is the first one's, the average of
    sequences over the mean of each.

    All requests see the same draws, and only averages are answers: nothing of a single draw is kept by the harness.

    Args:
        posterior: of a causal language model.
        average: one of `AVERAGES`.
        draws: number of weight draws; a point estimate has one.
        method: how texts are generated, as of `bayeslora.Posterior.generate`; by default "mixture", and "mean" where
            that is the average. By "draw" the repetitions of a request are by one draw each.
        seed: of the draws and of generated tokens.
        batch_size: texts a pass; it does not change the result.
        progress: show bars.

    Raises:
        PosteriorError: the network is no causal language model, or there is no tokenizer.
        SettingError: there is no such average.
    """

    def __init__(
        self,
        posterior: Posterior,
        average: str = "sequence",
        *,
        draws: int = 10,
        method: str | None = None,
        seed: int = 0,
        batch_size: int = 8,
        progress: bool = True,
    ) -> None:
        super().__init__()
        program = posterior.program
        if not program.observation.causal or program.encoder is None:
            raise PosteriorError(
                f"The harness asks a causal language model with its tokenizer, and '{program.base.name}' is none: its "
                f"program is of {program.observation.name}."
            )
        if average not in AVERAGES:
            raise SettingError(unknown("average over draws", average, AVERAGES))
        self.posterior, self.average = posterior, average
        self.seed, self.batch_size = coerce(seed, Seed, "seed"), coerce(batch_size, Count, "batch_size")
        self.method = method or ("mean" if average == "mean" else "mixture")
        self.tokenizer = program.encoder.tokenizer
        self._device = program.device
        self._progress = progress
        posterior.check_weights()
        draws = posterior.differing(coerce(draws, Count, "draws"))
        with torch.no_grad():
            self._draws = posterior.means() if average == "mean" else list(posterior.draws(draws, self.seed))

    def __repr__(self) -> str:
        return f"PosteriorLM({self.posterior!r}, {self.average!r}, draws={len(self._draws)}, method={self.method!r})"

    @property
    def described(self) -> dict[str, Any]:
        """What answers, as plain data."""
        record = self.posterior.record
        return {
            "backend": record.backend,
            "base": self.posterior.program.base.name,
            "finished": record.finished,
            "average": self.average,
            "draws": len(self._draws),
            "method": self.method,
            "seed": self.seed,
        }

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, averaged, and whether it is what the mixture of draws says greedily.

        Raises:
            DataError: a continuation has no tokens, or more than the network has positions.
        """
        found = super().loglikelihood(requests, disable_tqdm=True)
        log_probs = torch.stack([each for each, _ in found])
        if self.average == "choices":
            log_probs = _among_choices(log_probs, requests)
        return list(zip(_average(log_probs), (greedy for _, greedy in found), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text: summed over the windows that it is read in under each draw, then averaged."""
        windows: list[Pair] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            read = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(read, self.prefix_token_id, self.max_length, context_len=1)
            windows += map(make_disjoint_window, parts)
            owner += [number] * (len(windows) - len(owner))
        log_probs = self._scores(windows).log_probs
        sums = log_probs.new_zeros(len(requests), log_probs.shape[1])
        return _average(sums.index_add(0, torch.tensor(owner, dtype=torch.long), log_probs))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context; repetitions of a request are further samples of it.

        Raises:
            SettingError: a task asks for a way to decode that there is not.
        """
        texts = [""] * len(requests)
        for numbers in _alike(requests):
            settings = _decoding(requests[numbers[0][0]].args[1])
            room = self.max_length - settings["max_new_tokens"]
            found = self.posterior.generate(
                [self._end(requests[first].args[0], room) for first, *_ in numbers],
                len(numbers[0]),
                self.method,
                draws=len(self._draws),
                seed=self.seed,
                batch_size=self.batch_size,
                progress=self._progress,
                **settings,
            )
            for places, generation in zip(numbers, found, strict=True):
                for place, text in zip(places, generation, strict=True):
                    texts[place] = text
        return texts

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """What the harness calls when it is to keep answers in a file.

        Raises:
            SettingError: answers depend on more than the request by which they are kept.
        """
        if self.average == "choices":
            raise SettingError(
                "The harness keeps answers by context and continuation, and by average='choices' they depend on all "
                "choices of a document: leave out use_cache, or take average='sequence'."
            )
        super().set_cache_hook(cache_hook)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int | None:
        """The token before a text that nothing precedes."""
        found: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else found

    @property
    def max_length(self) -> int:
        """How many tokens the network reads behind a learned prompt, as the harness finds it."""
        program = self.posterior.program
        return int(resolve_max_length(program.weights.base.config, self.tokenizer)) - virtual_tokens(program.network)

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells requests with one chat template from those with another."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with the one that begins a text unless it is there already or not wanted."""
        if add_special_tokens is False:
            found: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
            return found
        return tokens(self.tokenizer, string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the tokenizer's template writes it, up to the assistant's turn or within it."""
        found: Any = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(found)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[Tensor, bool]]:
        """Log-likelihoods (draws,) of each request, and whether it is what is said greedily."""
        pairs = []
        for (_, said), before, after in requests:
            if not 0 < len(after) <= self.max_length:
                raise DataError(
                    f"The continuation {said[-40:]!r} has {len(after)} tokens of its own: expected at least one, and "
                    f"no more than the {self.max_length} that '{self.posterior.program.base.name}' reads."
                )
            pairs.append((before[max(0, len(before) + len(after) - self.max_length - 1) :], after))
        log_probs, greedy = self._scores(pairs)
        return list(zip(log_probs, greedy.tolist(), strict=True))

    def _scores(self, pairs: Sequence[Pair]) -> Scores:
        program = self.posterior.program
        with undisturbed(program):
            return scored(program, self._draws, pairs, self.batch_size, self._progress)

    def _end(self, text: str, room: int) -> str:
        """What of a context leaves room for the text after it: its end, where the question is."""
        while 0 < room < (count := len(tokens(self.tokenizer, text))):
            kept = self.tok_encode(text, add_special_tokens=False)[count - room :]
            text = str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))
        return text


def _average(log_probs: Tensor) -> list[float]:
    """Logarithms of means over draws of what has these logarithms (requests, draws)."""
    found: list[float] = (log_probs.logsumexp(1) - math.log(log_probs.shape[1])).tolist()
    return found


def _among_choices(log_probs: Tensor, requests: Sequence[Instance]) -> Tensor:
    """Log-probabilities (requests, draws) of the choices among those of their document.

    What a task asks without the question, for the mutual information, is another choice among as many.
    """
    groups = defaultdict(list)
    seen: Counter[int] = Counter()
    for number, request in enumerate(requests):
        groups[request.task_name, request.doc_id, request.args[0] == "", seen[id(request)]].append(number)
        seen[id(request)] += 1
    found = log_probs.clone()
    for numbers in groups.values():
        if len(numbers) > 1:
            found[numbers] = log_probs[numbers].log_softmax(0)
    return found


def _alike(requests: Sequence[Instance]) -> list[list[list[int]]]:
    """Requests by how their texts are decoded: of each the places at which it stands."""
    places = defaultdict(list)
    for number, request in enumerate(requests):
        places[id(request)].append(number)
    groups = defaultdict(list)
    for numbers in places.values():
        groups[repr(requests[numbers[0]].args[1]), len(numbers)].append(numbers)
    return list(groups.values())


def _decoding(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `bayeslora.generation.Decoding` by those that a task of the harness has."""
    given = dict(normalize_gen_kwargs(dict(asked)))
    sampled = given.pop("do_sample")
    return {
        "max_new_tokens": given.pop("max_gen_toks"),
        "stop": tuple(text for text in given.pop("until") if text),
        "temperature": given.pop("temperature", 1.0 if sampled else 0.0),
    } | given
